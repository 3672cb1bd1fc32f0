"""Masks as a processor have the law of locally constrained decoding, and dead ends are told from ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper

from tests.decode.even_ids import IDS, OPTIONS, Even
from tests.decode.table_runs import close, loop_law
from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.constraints import Masks, standing
from tokenloom.decode.locally_constrained import LocallyConstrained
from tokenloom.decode.plain import Plain
from tokenloom.decode.respond import Decoding, respond
from tokenloom.decode.table import TableLM
from tokenloom.policy import Policy


class Trap:
    """Two zeros, behind which nothing may come."""

    def accept(self, prefix: Sequence[int], token: int) -> bool:
        return len(prefix) < 2 and token == 0


def test_the_law_is_that_of_the_loop() -> None:
    class Alternating:
        def accept(self, prefix: Sequence[int], token: int) -> bool:
            return (prefix[-1:] == [1]) if token == 2 else not prefix or prefix[-1] != token

    table = TableLM.random(3, seed=4)
    loop = loop_law(lambda: LocallyConstrained(Alternating()), table, limit=4, eos=[2])
    masks = [Masks(Alternating(), 1, [2])]
    close(loop_law(Plain, table, limit=4, eos=[2], processors=masks), loop)
    assert len(loop) > 3
    # Behind the masks, top-k counts what is allowed only: of two possible tokens the likelier.
    sure = loop_law(Plain, table, limit=4, eos=[2], processors=[*masks, TopKLogitsWarper(1)])
    assert len(sure) == 1
    assert set(sure) <= set(loop)


@pytest.mark.parametrize("name", sorted(TINY)[:4])
@pytest.mark.parametrize("sample", [False, True])
def test_rows_with_padding_go_through_any_generate(name: str, sample: bool) -> None:
    model = TINY[name]()
    given = {"do_sample": sample, "logits_processor": [Masks(Even(), 5, [1])], **OPTIONS}
    outs = [model.generate(IDS, **given), model.generate(IDS, custom_generate=decode.loop("plain"), **given)]
    outs.append(model.generate(IDS, custom_generate=decode.loop("token-recycling"), **given))
    for out in outs:
        for row in out[:, 5:].tolist():
            stand, ids = standing(Even(), row[: row.index(1) + 1], [1], limit=8)
            assert stand == "fulfilled"
            assert len(ids) == 4
    if not sample:
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


def test_a_dead_end_ends_and_is_no_end() -> None:
    table = TableLM.random(3, seed=4)
    law = loop_law(Plain, table, limit=6, eos=[2], processors=[Masks(Trap(), 1, [2])])
    assert law == {(0, 0, 2): pytest.approx(1.0)}
    assert standing(Trap(), [0, 0, 2], [2], limit=6) == ("failed", [0, 0])
    with pytest.raises(ValueError, match="Trap allows no first token"):
        loop_law(Plain, TableLM(3, lambda _: [0.0, 0.5, 0.5]), eos=[2], processors=[Masks(Trap(), 1, [2])])


def test_a_search_prefers_an_allowed_end_to_a_dead_one() -> None:
    class Fork:
        """0 goes on to nowhere, 1 to an end."""

        def accept(self, prefix: Sequence[int], token: int) -> bool:
            return token != 2 if not prefix else list(prefix) == [1] and token == 2

    table = TableLM(3, lambda prefix: [0.9, 0.05, 0.05])
    found = loop_law(
        lambda: decode.loop("beam-search", beams=2), table, limit=4, eos=[2], sample=False,
        processors=[Masks(Fork(), 1, [2])],
    )  # fmt: skip
    assert set(found) == {(1, 2)}


def test_standing() -> None:
    assert standing(Even(), [2, 4, 4, 1], [1], limit=9) == ("fulfilled", [2, 4, 4, 1])
    assert standing(Even(), [2, 4, 4], [1], limit=3) == ("fulfilled", [2, 4, 4])
    assert standing(Even(), [2, 4], [1], limit=2) == ("unfinished", [2, 4])
    assert standing(Even(), [2, 4], [1], limit=9) == ("failed", [2, 4])
    assert standing(Even(), [2, 3, 4, 1], [1], limit=9) == ("failed", [2])
    assert standing(Even(), [2, 1], [1], limit=9) == ("failed", [2])
    assert standing(Even(), [], [1], limit=9) == ("failed", [])
    with pytest.raises(ValueError, match="end token"):
        standing(Even(), [2], [], limit=9)


@pytest.mark.parametrize("slug", ["plain", "awrs", "smc", "locally-constrained"])
def test_respond_judges(slug: str) -> None:
    policy = Policy(tiny_llama())

    def found(constraint: Any, limit: int) -> Any:
        own = {} if slug == "plain" else {"constraint": constraint}
        decoding = Decoding(loop=decode.loop(slug, **own), max_tokens=limit, constraint=constraint)
        return respond(policy, [[5, 9, 4], [3, 8]], decoding, copies=2, seed=1)

    fit = found(Even(), 6)
    assert [a.standing for a in fit.answers] == ["fulfilled"] * 4
    assert all(len(a.ids) == 4 and not a.truncated for a in fit.answers)
    dead = found(Trap(), 6)
    assert [(a.standing, a.ids) for a in dead.answers] == [("failed", [0, 0])] * 4
    if slug in ("plain", "locally-constrained"):
        assert [(a.standing, len(a.ids)) for a in found(Even(), 2).answers] == [("unfinished", 2)] * 4
    else:
        # These condition on an end within the limit, which there is none of.
        assert {a.standing for a in found(Even(), 2).answers} == {"failed"}
    assert ("kept" in fit.counts) == (slug == "plain")
