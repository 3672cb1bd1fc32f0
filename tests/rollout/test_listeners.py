"""Who listens hears every token and every response once, while others still decode."""

from __future__ import annotations

import pytest
import torch

from rollout.stand_in import StandIn
from tiny_models import tiny_llama
from tokenloom.batch import Sampling
from tokenloom.rollout import generate
from tokenloom.rollout.record import Response

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([11])]


@pytest.mark.parametrize("max_rows", [None, 4])
def test_tokens_and_responses_as_they_come(max_rows: int | None) -> None:
    events: list[tuple[str, int]] = []
    tokens: dict[int, list[int]] = {}
    finished: dict[int, Response] = {}

    def on_tokens(row: int, ids: list[int]) -> None:
        assert row not in finished
        tokens.setdefault(row, []).extend(ids)
        events.append(("tokens", row))

    def on_finished(row: int, response: Response) -> None:
        assert row not in finished
        finished[row] = response
        events.append(("finished", row))

    counts: list[tuple[int, int, int]] = []
    out = generate(
        StandIn(tiny_llama(), ends=range(1, 64, 9)),
        PROMPTS,
        Sampling(max_tokens=25, seed=0),
        copies=3,
        max_rows=max_rows,
        progress=lambda *numbers: counts.append(numbers),
        on_tokens=on_tokens,
        on_finished=on_finished,
    )
    for row in range(9):
        assert tokens[row] == out.response(row).tolist() == finished[row].tokens.tolist()
        assert torch.equal(finished[row].logprobs, out.sampler_logprobs[row, : int(out.lengths[row])])
        assert finished[row].truncated == bool(out.truncated[row])
    first = events.index(next(e for e in events if e[0] == "finished"))
    assert any(kind == "tokens" for kind, _ in events[first:]), "told only at the end"
    assert counts[-1] == (9, 9, int(out.lengths.sum()))
    assert counts == sorted(counts)
