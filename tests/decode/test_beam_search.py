"""Beam search: greedy with one beam, exact with enough, and transformers' own results in between."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from tests.decode.table_runs import table_run
from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.beam_search import BeamSearch
from tokenloom.decode.table import TableLM

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3"])
def test_one_beam_is_greedy(name: str) -> None:
    model = TINY[name]()
    given = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 10}
    ours = model.generate(IDS, custom_generate=decode.loop("beam-search", beams=1), **given)
    assert torch.equal(ours, model.generate(IDS, **given))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [1, 3])
def test_enough_beams_find_the_most_probable_string(seed: int, length: int) -> None:
    table = TableLM.random(3, seed=seed)
    for eos in ((), (1,)):
        law = table.string_law([0], length, eos=eos[0] if eos else None)
        loop = BeamSearch(beams=3**length, length_penalty=0.0)
        best = max(law, key=lambda y: law[y])
        assert tuple(loop.rows(table_run(table, limit=length, eos=eos, sample=False))[0]) == best
        assert loop.scores[0] == pytest.approx(math.log(law[best]), abs=1e-9)
        assert law[best] >= max(law.values())


def theirs_and_ours(model: Any, returned: int = 1, eos: Any = 1, **settings: Any) -> tuple[Any, Any, list[float]]:
    beams = settings.pop("beams")
    given = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 12,
             "eos_token_id": eos, "logits_processor": settings.pop("processors", [])}  # fmt: skip
    theirs = model.generate(IDS, num_beams=beams, num_return_sequences=returned, return_dict_in_generate=True,
                            output_scores=True, **settings, **given)  # fmt: skip
    loop = decode.loop("beam-search", beams=beams, returned=returned, **settings)
    return theirs, model.generate(IDS, custom_generate=loop, **given), loop.scores


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("seed", range(2))
def test_sequences_and_scores_are_those_of_transformers(seed: int, length_penalty: float, early_stopping: Any) -> None:
    model = tiny_llama(vocab=16, seed=seed)
    settings = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    for beams, returned, eos in ((3, 1, 1), (4, 3, [1, 7, 9])):
        theirs, ours, scores = theirs_and_ours(model, returned, eos, beams=beams, **settings)
        torch.testing.assert_close(torch.tensor(scores), theirs.sequences_scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours, theirs.sequences)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mistral"])
def test_other_models_and_processors_too(name: str) -> None:
    processors = [RepetitionPenaltyLogitsProcessor(1.2), NoRepeatNGramLogitsProcessor(2)]
    theirs, ours, scores = theirs_and_ours(TINY[name](vocab=32), 2, beams=4, processors=processors)
    torch.testing.assert_close(torch.tensor(scores), theirs.sequences_scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours, theirs.sequences)


def test_a_score_is_the_log_prob_of_the_beam() -> None:
    model = tiny_llama()
    loop = decode.loop("beam-search", beams=4, length_penalty=0.0)
    ids = model.generate(IDS, attention_mask=MASK, max_new_tokens=6, eos_token_id=None, custom_generate=loop)
    for row in range(3):
        prompt = IDS[row][MASK[row].bool()]
        whole = torch.cat((prompt, ids[row, 5:]))[None]
        with torch.no_grad():
            laws = model(input_ids=whole).logits[0].log_softmax(-1)
        taken = laws[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None])
        assert loop.scores[row] == pytest.approx(float(taken.sum()), abs=1e-4)


def test_equal_scores_go_to_the_lowest_id() -> None:
    table = TableLM(4, lambda prefix: [0.25] * 4)
    run = table_run(table, limit=2, sample=False)
    assert BeamSearch(beams=3).rows(run) == [[0, 0]]


def test_refusals() -> None:
    model = tiny_llama()
    for settings in ({"beams": 0}, {"beams": 2, "returned": 3}):
        with pytest.raises(ValueError, match="1 <= returned <= beams"):
            decode.loop("beam-search", **settings)
    with pytest.raises(ValueError, match="early_stopping"):
        decode.loop("beam-search", early_stopping="always")
    loop = decode.loop("beam-search", beams=2)
    for given, match in (
        ({"do_sample": True}, "do_sample=False"),
        ({"num_beams": 2}, "not num_beams"),
    ):
        with pytest.raises(ValueError, match=match):
            model.generate(IDS, attention_mask=MASK, max_new_tokens=2, custom_generate=loop, **given)
    table = TableLM(2, lambda prefix: [1.0, 0.0])
    wide = BeamSearch(beams=2, returned=2)
    with pytest.raises(ValueError, match="fewer than 2 strings"):
        wide.rows(table_run(table, [(0,), (0,)], limit=1, sample=False))
