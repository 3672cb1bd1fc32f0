"""Prompt look-up: the draft is what followed the same tokens earlier in the text (Saxena 2023).

The last n tokens of the text, n from `longest` down to `shortest`, are looked for earlier in it; the tokens behind the
latest such place are the draft. Nothing is drawn, so the draft has no law: a token is drawn from the target's law
P, and a drafted token is accepted when it is that token. That is accepting a draft x with probability P(x) and else
drawing from P without x: the same law of token and acceptance together, also for several children of a node, and
the tokens are those that plain sampling would have drawn from the same random numbers.

Source: https://github.com/apoorvumang/prompt-lookup-decoding. Deviations: the latest match, where the code takes the
first one (the latest is nearer to what is being written); a draft that reaches the end of the text goes on with its
own tokens, so that loops are followed at full length. Fidelity: code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenloom.catalog import part
from tokenloom.draw import Draw
from tokenloom.methods.decoding.draft_tree import DraftTree, Laws, Verdict, walk

PAPER = "https://github.com/apoorvumang/prompt-lookup-decoding"


@part("prompt-lookup", stage="draft", scope="row", paper=PAPER)
def prompt_lookup(ids: Sequence[int], *, longest: int = 3, shortest: int = 1, drafts: int = 10) -> list[int]:
    """At most `drafts` tokens that may follow `ids`; none without a match.

    Raises:
        ValueError: for lengths out of order.
    """
    if not 1 <= shortest <= longest or drafts < 1:
        raise ValueError(f"needs 1 <= shortest <= longest and drafts >= 1; got {shortest}, {longest}, {drafts}")
    text = list(ids)
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        wanted = text[-n:]
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == wanted:
                return continued(text, start + n, drafts)
    return []


def continued(text: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens of `text` from `start` on, and behind its end the tokens so given, over and over."""
    draft = list(text[start : start + count])
    while len(draft) < count:
        draft.append(draft[len(draft) - (len(text) - start)])
    return draft


@part("prompt-lookup/verify", stage="verify", scope="row", paper=PAPER)
def verify(tree: DraftTree, laws: Laws, draw: Draw) -> Verdict:
    """Draw each token from the target's law and go down the tree as long as it was drafted; `q` is not looked at."""
    return walk(tree, laws, draw, _pick)


def _pick(p: Tensor, q: Tensor | None, tokens: list[int], draw: Draw) -> tuple[int | None, int]:
    token = draw.categorical(p)
    return (tokens.index(token) if token in tokens else None), token
