"""FIM-SE with a model: markers for its tokenizer, training ids, and infilling with the check of the hints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenloom.draw import Draw
from tokenloom.methods.decoding.fim_se import RATE, Markers, filled, prompt_text, training_text, whole_lines


def add_markers(model: Any, tokenizer: Any, markers: Markers | None = None) -> Markers:
    """Make the markers control tokens of `tokenizer`, and the model's embeddings large enough; gives the markers."""
    markers = markers or Markers()
    tokenizer.add_tokens(list(markers.all), special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return markers


def training_ids(
    tokenizer: Any, texts: Sequence[str], draw: Draw, markers: Markers, rate: float = RATE
) -> list[list[int]]:
    """Ids of training texts, each cut anew; the loss counts every token.

    Raises:
        ValueError: for markers that the tokenizer does not have as tokens.
    """
    _checked(tokenizer, markers)
    return [list(tokenizer.encode(training_text(t, draw, markers, rate=rate), add_special_tokens=False)) for t in texts]


def infill(
    model: Any, tokenizer: Any, prefix: str, suffix: str, markers: Markers | None = None, **options: Any
) -> str | None:
    """`prefix`, what the model writes between, and `suffix`; None where its lines break the hints.

    `options` go to `generate`.

    Raises:
        ValueError: for markers that the tokenizer does not have as tokens.
    """
    markers = markers or Markers()
    _checked(tokenizer, markers)
    hole = whole_lines(prefix, suffix)
    ids = torch.tensor([tokenizer.encode(prompt_text(hole, markers), add_special_tokens=False)], device=model.device)
    stop = tokenizer.convert_tokens_to_ids(markers.stop)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), **{"eos_token_id": stop, "pad_token_id": stop} | options
    )
    new = out[0, ids.shape[1] :].tolist()
    if stop not in new:
        return None
    return filled(hole, tokenizer.decode(new[: new.index(stop)], clean_up_tokenization_spaces=False))


def _checked(tokenizer: Any, markers: Markers) -> None:
    lost = [m for m in markers.all if len(tokenizer.encode(m, add_special_tokens=False)) != 1]
    if lost:
        raise ValueError(
            f"fim-se: {', '.join(lost)} are no tokens of the tokenizer; add_markers(model, tokenizer) adds them"
        )
