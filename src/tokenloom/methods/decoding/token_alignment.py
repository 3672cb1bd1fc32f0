"""Token alignment: take back the prompt's last tokens and write their text again (arXiv 2403.08688).

With r the bytes that are still to be written, a step may choose the tokens that start with r, or that r starts with:
    keep(v) = [bytes(v) starts with r] or [r starts with bytes(v)],   then r loses what the token wrote.
One token taken back is token healing. The law of each step is the model's, masked: the prompt's text is kept, but the
probabilities are not those of `byte-level-probabilities`.
Deviations: none known. Fidelity: reconstructed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.catalog import part

_PAPER = "arXiv:2403.08688"


@part("token-alignment", stage="bytes", scope="row", paper=_PAPER)
def aligned(pieces: Sequence[bytes | None], remaining: bytes) -> Tensor:
    """[V] bool: the tokens that may come while `remaining` bytes of the prompt are to be written; all once none are.

    `pieces[id]`: the bytes of each token, None for control tokens, which must wait.
    """
    if not remaining:
        return torch.ones(len(pieces), dtype=torch.bool)
    return torch.tensor(
        [p is not None and p != b"" and (p.startswith(remaining) or remaining.startswith(p)) for p in pieces]
    )


@part("token-alignment/rest", stage="bytes", scope="row", paper=_PAPER)
def after_token(remaining: bytes, piece: bytes) -> bytes:
    """What is left of `remaining` after a token with bytes `piece`.

    Raises:
        ValueError: for a token that writes something else.
    """
    if not (piece.startswith(remaining) or remaining.startswith(piece)):
        raise ValueError(f"token-alignment: {piece!r} does not write {remaining!r}")
    return remaining[len(piece) :]


@part("token-alignment/backtrack", stage="bytes", scope="row", paper=_PAPER)
def taken_back(prompt: Sequence[int], pieces: Sequence[bytes | None], *, backtrack: int = 1) -> tuple[list[int], bytes]:
    """The prompt without its last `backtrack` tokens, and the bytes of these.

    At least one token stays; a control token, which has no text to write again, and what is before it stay too.
    """
    kept = list(prompt)
    removed: list[bytes] = []
    while len(removed) < backtrack and len(kept) > 1:
        # Models have ids that their tokenizers do not.
        piece = pieces[kept[-1]] if kept[-1] < len(pieces) else None
        if not piece:
            break
        kept.pop()
        removed.append(piece)
    return kept, b"".join(reversed(removed))
