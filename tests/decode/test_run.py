"""Loops under `generate`: the plain one gives what `generate` gives, processors, padding and stops included."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, MaxTimeCriteria, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.run import Loop, Run
from tokenloom.draw import RandomDraw

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_generates_greedy(seed: int) -> None:
    model = tiny_llama(seed=seed)
    given = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 12}
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    theirs = model.generate(IDS, logits_processor=processors, **given)
    ours = model.generate(IDS, logits_processor=processors, custom_generate=decode.loop("plain"), **given)
    assert torch.equal(ours, theirs)


def test_sampling_follows_the_processed_law() -> None:
    model = tiny_llama()

    class Spy(Loop):
        def rows(self, run: Run) -> list[list[int]]:
            with run.session() as session:
                self.laws = run.laws([0, 1, 2], [[], [], []], session.start())
            return [[4], [5], [6]]

    spy = Spy()
    ids = model.generate(IDS, attention_mask=MASK, do_sample=True, temperature=0.5, top_k=3, custom_generate=spy,
                         max_new_tokens=4)  # fmt: skip
    assert ids[:, 5].tolist() == [4, 5, 6]
    with torch.no_grad():
        scores = model(input_ids=IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    scores = TemperatureLogitsWarper(0.5)(IDS, scores)
    kept = scores.topk(3).indices
    expected = torch.zeros_like(scores).scatter(1, kept, scores.gather(1, kept).softmax(-1))
    torch.testing.assert_close(spy.laws, expected, rtol=1e-4, atol=1e-5)


def test_processors_that_read_no_ids_see_all_rows_at_once() -> None:
    """Rows of different lengths get together what each gets by itself; processors that read ids see those."""
    calls: list[tuple[int, ...]] = []

    class Counted(RepetitionPenaltyLogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            calls.append(tuple(ids.shape))
            return super().__call__(ids, scores)

    class Spy(Loop):
        def rows(self, run: Run) -> list[list[int]]:
            with run.session() as session:
                scores = session.start()
            prefixes: list[list[int]] = [[1], [3, 3, 1], []]
            before = scores.clone()
            whole = run.shaped([0, 1, 2], prefixes, scores)
            assert torch.equal(scores, before)
            for i, prefix in enumerate(prefixes):
                assert torch.equal(whole[i], run.shaped([i], [prefix], scores[[i]])[0])
            return [[4], [5], [6]]

    model = tiny_llama()
    given = {"attention_mask": MASK, "do_sample": True, "temperature": 0.5, "top_k": 3, "max_new_tokens": 4}
    model.generate(IDS, custom_generate=Spy(), **given)
    assert calls == []
    model.generate(IDS, custom_generate=Spy(), logits_processor=LogitsProcessorList([Counted(1.3)]), **given)
    assert sorted(calls[:3]) == [(1, 5), (1, 6), (1, 8)]


def test_stopping_and_streaming() -> None:
    model = tiny_llama()
    shown: list[int] = []

    class Streamer:
        def put(self, ids: torch.Tensor) -> None:
            shown.extend(ids.flatten().tolist())

        def end(self) -> None:
            shown.append(-1)

    loop = decode.loop("plain")
    loop.streamer = Streamer()
    one = IDS[2:]
    ids = model.generate(one, do_sample=False, max_new_tokens=4, custom_generate=loop,
                         stopping_criteria=[MaxTimeCriteria(1e-9)])  # fmt: skip
    assert ids.shape == (1, 6)
    assert shown == [int(ids[0, -1]), -1]
    with pytest.raises(ValueError, match="streamer"):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=2, custom_generate=loop)
    loop.streamer = None
    out = model.generate(one, max_new_tokens=2, custom_generate=loop, return_dict_in_generate=True)
    assert out.sequences.shape == (1, 7)


def test_a_draw_of_its_own_makes_it_repeatable() -> None:
    model = tiny_llama()
    results = []
    for _ in range(2):
        loop = decode.loop("plain")
        loop.draw = RandomDraw(torch.Generator().manual_seed(3))
        results.append(model.generate(IDS, attention_mask=MASK, do_sample=True, max_new_tokens=8, custom_generate=loop))
    assert torch.equal(*results)


def test_unknown_names_and_parameters_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        decode.loop("plan")
    with pytest.raises(ValueError, match="unknown parameter 'width'"):
        decode.loop("plain", width=3)
    with pytest.raises(ValueError, match="it is a loop"):
        decode.shaper("plain")
