"""FIM-SE with a tokenizer and a model: markers become tokens, completions are cut and checked."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from decode.tokenizers_at_hand import byte_level
from tests.tiny_models import tiny_llama
from tokenloom.decode.fim_se import add_markers, infill, training_ids
from tokenloom.draw import RandomDraw
from tokenloom.methods.decoding.fim_se import Markers


class Answers:
    """A model that writes a given text."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text

    def generate(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.prompt = self.tokenizer.decode(ids[0])
        self.options = options
        new = self.tokenizer.encode(self.text, add_special_tokens=False)
        return torch.cat((ids, torch.tensor([new])), 1)


def test_infilling() -> None:
    tokenizer = deepcopy(byte_level())
    model = tiny_llama(vocab=len(tokenizer))
    with pytest.raises(ValueError, match="add_markers"):
        infill(model, tokenizer, "a", "b")
    markers = add_markers(model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    answers = Answers(tokenizer, "    return x\n" + markers.stop + "rubbish")
    text = infill(answers, tokenizer, "def f():\n    retu", " x\nprint()\n", max_new_tokens=9)
    assert text == "def f():\n    return x\nprint()\n"
    assert answers.prompt == "<fim_prefix>def f():\n<fim_suffix>print()\n<fim_start>    retu<fim_end> x\n<fim_middle>"
    assert answers.options["max_new_tokens"] == 9
    assert infill(Answers(tokenizer, "something else" + markers.stop), tokenizer, "retu", "x") is None
    assert infill(Answers(tokenizer, "returnx"), tokenizer, "retu", "x") is None, "no end in sight"
    out = infill(model, tokenizer, "ab", "c", max_new_tokens=4, do_sample=False)
    assert out is None or (out.startswith("ab") and out.endswith("c"))


def test_training_ids_decode_to_the_format() -> None:
    tokenizer = deepcopy(byte_level())
    markers = add_markers(tiny_llama(vocab=len(tokenizer)), tokenizer)
    texts = ["the answer\nis 12\n"] * 30
    rows = training_ids(tokenizer, texts, RandomDraw(torch.Generator().manual_seed(0)), markers)
    stop = tokenizer.convert_tokens_to_ids(markers.stop)
    cut = [r for r in rows if r[0] == tokenizer.convert_tokens_to_ids(markers.prefix)]
    assert all(r[-1] == stop for r in rows)
    assert 20 <= len(cut) < 30
    with pytest.raises(ValueError, match="no tokens"):
        training_ids(byte_level(), texts, RandomDraw(), Markers())
