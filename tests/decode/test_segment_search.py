"""Segment search: candidates have the model's own scores wherever they branch, wait, stop or return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from tests.decode.table_runs import close, table_run
from tests.tiny_models import TINY, tiny_llama
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import (
    Choice,
    Hypothesis,
    SearchLoop,
    best_first,
    common_prefix,
    draws,
    segment_search,
)
from tokenloom.decode.table import TableLM
from tokenloom.draw import RandomDraw, law_of

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def direct(model: Any, prefix: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probs [T, V] after each token and hidden states [T, D], read at once."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([list(prefix)]), output_hidden_states=True)
    return out.logits[0].log_softmax(-1), out.hidden_states[-1][0]


class Checked(SearchLoop):
    """Three draws per hypothesis, ragged segments, random survivors; returns to parents when it reads ahead."""

    def __init__(self, ahead: bool) -> None:
        self.ahead, self.seen, self.returned = ahead, 0, 0

    def search(self, run: Run) -> list[list[Hypothesis]]:
        draw = RandomDraw(torch.Generator().manual_seed(5))

        def score(candidates: list[Hypothesis]) -> list[float]:
            for h in candidates:
                self.check(run, h)
            return [sum(h.logprobs) for h in candidates]

        def select(candidates: list[Hypothesis]) -> list[Hypothesis]:
            kept = best_first([h for h in candidates if draw.bernoulli(0.5)] or candidates)[:2]
            if self.ahead and kept[0].parent is not None and draw.bernoulli(0.4):
                self.returned += 1
                kept[0] = kept[0].parent
            return kept

        return segment_search(
            run,
            propose=lambda live: draws(run, live, [3] * len(live)),
            boundary=lambda h: h.tokens[-1] % 3 == 0 or len(h.tokens) - h.begin == 3,
            score=score,
            select=select,
            width=2,
            ahead=self.ahead,
            hidden=self.ahead,
        )

    def check(self, run: Run, h: Hypothesis) -> None:
        prompt = run.prompts[h.row]
        laws, states = direct(run.model, [*prompt, *h.tokens])
        taken = laws[len(prompt) - 1 : -1].gather(1, torch.tensor(h.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(h.notes), taken, rtol=1e-4, atol=1e-4)
        assert (h.scores is None) == (not self.ahead)
        if self.ahead:
            assert h.scores is not None
            torch.testing.assert_close(h.scores.log_softmax(-1), laws[-1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(h.hidden, states[-1], rtol=1e-4, atol=1e-4)
        self.seen += 1


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2"])
def test_candidates_have_the_scores_of_the_model(name: str, ahead: bool) -> None:
    loop = Checked(ahead)
    loop.draw = RandomDraw(torch.Generator().manual_seed(1))
    model = TINY[name]()
    out = model.generate(
        IDS, attention_mask=MASK, do_sample=True, top_k=50, max_new_tokens=9, custom_generate=loop, eos_token_id=12
    )
    assert out.shape[1] <= 14
    assert loop.seen > 30
    assert loop.returned > 0 or not ahead


def test_a_prompt_of_one_token_can_be_tried_again() -> None:
    loop = Checked(ahead=True)
    loop.draw = RandomDraw(torch.Generator().manual_seed(3))
    tiny_llama().generate(torch.tensor([[5]]), do_sample=True, max_new_tokens=6, custom_generate=loop)
    assert loop.returned > 0


def test_nothing_is_read_twice() -> None:
    """Of one survivor in blocks of two tokens, each token but the last costs one forward."""
    model = tiny_llama()

    class Blocks(SearchLoop):
        def search(self, run: Run) -> list[list[Hypothesis]]:
            return segment_search(
                run,
                propose=lambda live: draws(run, live, [4] * len(live)),
                boundary=lambda h: len(h.tokens) % 2 == 0,
                score=lambda c: [sum(h.logprobs) for h in c],
                select=lambda c: best_first(c)[:1],
                width=1,
            )

    loop = Blocks()
    model.generate(IDS, attention_mask=MASK, do_sample=True, max_new_tokens=8, eos_token_id=None, custom_generate=loop)
    assert loop.last_run is not None
    assert loop.last_run.counts == {"forwards": 8, "candidates": 3 * 4 * 4}


def test_processors_shape_the_draws_and_the_log_probs() -> None:
    model = tiny_llama()
    seen = []

    class Greedy(SearchLoop):
        def search(self, run: Run) -> list[list[Hypothesis]]:
            def score(candidates: list[Hypothesis]) -> list[float]:
                seen.extend(candidates)
                return [0.0] * len(candidates)

            return segment_search(
                run, propose=lambda live: draws(run, live, [5] * len(live)), boundary=lambda h: len(h.tokens) % 3 == 0,
                score=score, select=lambda c: c[:1], width=1,
            )  # fmt: skip

    given = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 10,
             "logits_processor": [RepetitionPenaltyLogitsProcessor(1.4)]}  # fmt: skip
    assert torch.equal(model.generate(IDS, custom_generate=Greedy(), **given), model.generate(IDS, **given))
    assert all(len(set(h.tokens)) >= 1 and h.logprobs != h.notes for h in seen)


def test_one_draw_per_round_is_plain_sampling_whatever_the_segments() -> None:
    table = TableLM.random(3, seed=2)
    for boundary in (lambda h: True, lambda h: h.tokens[-1] == 1, lambda h: False):
        for ahead in (False, True):

            def program(draw: Any, boundary: Any = boundary, ahead: bool = ahead) -> tuple[Any, ...]:
                run = table_run(table, [(0,), (1, 2)], limit=2, eos=[2], draw=draw)
                pools = segment_search(
                    run, propose=lambda live: draws(run, live, [1] * len(live)), boundary=boundary,
                    score=lambda c: [0.0] * len(c), select=lambda c: c, width=1, ahead=ahead,
                )  # fmt: skip
                return tuple(pool[0].tokens for pool in pools)

            law = law_of(program)
            one, two = table.string_law([0], 2, eos=2), table.string_law([1, 2], 2, eos=2)
            close(law, {(a, b): p * q for a, p in one.items() for b, q in two.items()})  # type: ignore[misc]


def test_what_all_hypotheses_agree_on_is_streamed_once() -> None:
    shown: list[int] = []

    class Streamer:
        def put(self, ids: Tensor) -> None:
            shown.extend(ids.tolist())

        def end(self) -> None:
            shown.append(-1)

    loop = Checked(ahead=False)
    loop.streamer, loop.draw = Streamer(), RandomDraw(torch.Generator().manual_seed(1))
    out = tiny_llama().generate(IDS[2:], do_sample=True, max_new_tokens=12, eos_token_id=None, custom_generate=loop)
    assert shown == [*out[0, 5:].tolist(), -1]
    assert common_prefix([Hypothesis(0, (1, 2, 3)), Hypothesis(0, (1, 2, 4)), Hypothesis(0, (1, 2))]) == (1, 2)


def test_misuse_is_named() -> None:
    run = table_run(TableLM.random(3), limit=4)

    def search(propose: Any, width: int) -> None:
        segment_search(run, propose=propose, boundary=lambda h: True, score=lambda c: [0.0] * len(c),
                       select=lambda c: c, width=width)  # fmt: skip

    with pytest.raises(ValueError, match="width=0"):
        search(lambda live: [], 0)
    with pytest.raises(ValueError, match="more than width=1"):
        search(lambda live: [[Choice(0, 0.0), Choice(1, 0.0)]] * len(live), 1)
    # The first prompt's only candidate ends and is lost while the second's grows; then it is wanted again.
    two = table_run(TableLM.random(3), [(0,), (1,)], limit=4, eos=[2])
    with pytest.raises(ValueError, match="needs ahead=True"):
        segment_search(
            two,
            propose=lambda live: [[Choice(2 * (h.row == 0 and two.counts["forwards"] < 2), 0.0)] for h in live],
            boundary=lambda h: h.row == 1 and len(h.tokens) == 2,
            score=lambda c: [0.0] * len(c),
            select=lambda c: [h.parent if h.row == 0 and h.parent else h for h in c],
            width=1,
        )
    with pytest.raises(ValueError, match="leave no token"):
        search(lambda live: [[]] * len(live), 1)
