"""The speculative loop: every pair of drafter and verifier keeps the target's law; greedy text is `generate`'s."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.run import Run
from tokenloom.decode.speculative import Speculative
from tokenloom.decode.table import TableLM
from tokenloom.draw import Draw, RandomDraw, law_of
from tokenloom.methods.decoding.token_recycling import TEMPLATE

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
Strings = tuple[tuple[int, ...], ...]


def table_run(model: TableLM, prompts: list[list[int]], limit: int, draw: Draw, **rest: Any) -> Run:
    return Run(model, torch.tensor(prompts), prompts, limit, frozenset(rest.pop("eos", ())), 0, True, draw=draw, **rest)


def drafter(name: str, vocab: int, **given: Any) -> Any:
    objects = {"draft": TableLM.random(vocab, 50)} if name == "draft-model" else {}
    return decode.build("drafter", name, objects, **given)


def law(pair: tuple[str, str], prompts: list[list[int]], limit: int, *, vocab: int, nodes: int, **rest: Any) -> Any:
    """The joint law of all rows, a new loop for every branch; tables of n-grams and followers are filled before."""
    target = TableLM.random(vocab, 3)
    options = {"width": 2, "depth": 2} if pair[0] == "draft-model" else {}

    def program(draw: Draw) -> Strings:
        loop = Speculative(drafter(pair[0], vocab, **options), pair[1], nodes=nodes)
        seen = loop.drafter
        for token in range(vocab):
            if pair[0] == "stand":
                seen.table.add([token], (tuple(range(vocab)), tuple((i + 2.0) / 9 for i in range(vocab))))  # type: ignore[attr-defined]
        if pair[0] == "token-recycling":
            seen.adjacency = torch.tensor([[(t + 1) % vocab, t] for t in range(vocab)])  # type: ignore[attr-defined]
        return tuple(tuple(row) for row in loop.rows(table_run(target, prompts, limit, draw, **rest)))

    return target, law_of(program)


PAIRS = [
    ("draft-model", "speculative-sampling"),
    ("draft-model", "recursive-rejection"),
    ("draft-model", "spec-tr"),
    ("draft-model", "two-step-multi-draft"),
    ("draft-model", "prompt-lookup"),
    ("stand", "recursive-rejection"),
    ("stand", "spec-tr"),
    ("token-recycling", "prompt-lookup"),
    ("prompt-lookup", "prompt-lookup"),
    ("group-ngrams", "prompt-lookup"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_strings_have_the_targets_law(pair: tuple[str, str]) -> None:
    nodes = {"speculative-sampling": 2, "spec-tr": 2}.get(pair[1], 3)
    target, found = law(pair, [[1, 0, 1]], 3, vocab=2, nodes=nodes)
    wanted = target.string_law([1, 0, 1], 3)
    assert max(abs(found.get((s,), 0.0) - mass) for s, mass in wanted.items()) < 1e-9


@pytest.mark.parametrize("pair", [PAIRS[1], PAIRS[5], PAIRS[7]], ids=" ".join)
def test_rows_of_a_batch_are_independent_and_end_where_they_end(pair: tuple[str, str]) -> None:
    prompts = [[1, 0], [0, 1]]
    target, found = law(pair, prompts, 2, vocab=2, nodes=2, eos=[0])
    first, second = (target.string_law(p, 2, eos=0) for p in prompts)
    for one, mass in first.items():
        for two, other in second.items():
            assert found.get((one, two), 0.0) == pytest.approx(mass * other, abs=1e-9)


def test_processors_see_every_node_with_its_own_prefix() -> None:
    class Favor(LogitsProcessor):
        """Doubles the odds of the token after the last one."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.scatter_add(1, (input_ids[:, -1:] + 1) % 2, torch.full((len(scores), 1), 2.0).log().double())

    favored = TableLM(2, lambda p: _odds(TableLM.random(2, 3), p))
    wanted = favored.string_law([1, 0, 1], 3)
    for pair in (PAIRS[1], PAIRS[5]):
        _, found = law(pair, [[1, 0, 1]], 3, vocab=2, nodes=3, processors=[Favor()])
        assert max(abs(found.get((s,), 0.0) - mass) for s, mass in wanted.items()) < 1e-9


def _odds(table: TableLM, prefix: tuple[int, ...]) -> list[float]:
    law = table.probs(prefix).clone()
    law[(prefix[-1] + 1) % 2] *= 2
    return [float(x) for x in law / law.sum()]


# -- greedy text ------------------------------------------------------------------------------------


def generated(model: Any, loop: Any, **given: Any) -> torch.Tensor:
    settings = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 14, **given}
    result: torch.Tensor = model.generate(IDS, custom_generate=loop, **settings)
    return result


def loops(model: Any, nodes: int | None) -> list[Any]:
    other = tiny_llama(seed=9)
    return [
        decode.loop("speculative-sampling", draft=other, nodes=nodes),
        decode.loop("recursive-rejection", draft=other, nodes=nodes),
        decode.loop("spec-tr", draft=model, nodes=nodes),
        decode.loop("two-step-multi-draft", draft=other, nodes=nodes),
        decode.loop("prompt-lookup", nodes=nodes),
        decode.loop("token-recycling", nodes=nodes),
        decode.loop("token-recycling", template="paper"),
        decode.loop("stand", nodes=nodes),
        decode.loop("speculative", drafter="group-ngrams", nodes=nodes),
    ]


@pytest.mark.parametrize("name", sorted(TINY))
def test_greedy_is_generates_greedy(name: str) -> None:
    model = TINY[name]()
    theirs = generated(model, None)
    for loop in loops(model, 12):
        assert torch.equal(generated(model, loop), theirs), loop.drafter.slug


@pytest.mark.parametrize("seed", range(3))
def test_any_adjacency_gives_the_same_text(seed: int) -> None:
    model = tiny_llama(seed=seed)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
    for given in ({}, {"logits_processor": processors}):
        theirs = generated(model, None, **given)
        loop = decode.loop("token-recycling", nodes=40)
        shape = (64, 8)
        loop.drafter.adjacency = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(generated(model, loop, **given), theirs)
        counts = loop.last_run.counts
        assert counts["tokens"] <= theirs[:, 5:].numel()
        assert counts["accepted"] <= counts["drafted"]


def test_a_recycled_matrix_makes_the_same_text_cheap() -> None:
    model = tiny_llama(seed=1)
    for name in ("token-recycling", "stand"):
        loop = decode.loop(name, nodes=24)
        first = generated(model, loop)
        before = dict(loop.last_run.counts)
        assert torch.equal(generated(model, loop), first)
        after = loop.last_run.counts
        assert after["forwards"] < before["forwards"]
        assert after["accepted"] > before["accepted"]
        depth = loop.drafter.depth
        assert len(IDS) * (depth + 1) >= after["tokens"] / after["forwards"] >= 1
        # One token of each forward is the model's own.
        assert after["accepted"] + after["forwards"] * len(IDS) >= after["tokens"]


def test_the_papers_template_is_drafted_whole() -> None:
    loop = decode.loop("token-recycling", template="paper")
    loop.drafter.adjacency = torch.arange(8).repeat(64, 1).add(20)
    model = tiny_llama()
    model.generate(IDS[2:], custom_generate=loop, do_sample=False, max_new_tokens=9, eos_token_id=None)
    counts = loop.last_run.counts
    assert counts["drafted"] <= counts["rounds"] * len(TEMPLATE[0])
    assert counts["drafted"] > 80


def test_an_equal_draft_model_is_always_accepted() -> None:
    model = tiny_llama()
    loop = decode.loop("speculative-sampling", draft=model, drafts=3, nodes=3)
    for sample in (False, True):
        generated(model, loop, do_sample=sample, eos_token_id=None, max_new_tokens=13)
        counts = loop.last_run.counts
        # One token from the prompts, then four in each round.
        assert counts["forwards"] == 4
        assert counts["accepted"] == counts["drafted"] == 3 * 9
        # Two sessions of one model leave it as it was.
        assert "forward" not in model.model.layers[0].mlp.__dict__


def test_with_looked_up_drafts_sampling_draws_what_plain_sampling_draws() -> None:
    model = tiny_llama(seed=2)
    one = IDS[2:]
    texts = []
    for loop in (decode.loop("plain"), decode.loop("token-recycling", nodes=20), decode.loop("prompt-lookup", nodes=8)):
        loop.draw = RandomDraw(torch.Generator().manual_seed(5))
        texts.append(model.generate(one, custom_generate=loop, do_sample=True, temperature=0.3, max_new_tokens=25))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def test_the_measured_size_gives_the_same_text() -> None:
    model = tiny_llama(seed=3)
    theirs = generated(model, None, max_new_tokens=30)
    for loop in loops(model, None):
        assert torch.equal(generated(model, loop, max_new_tokens=30), theirs), loop.drafter.slug


def test_without_nodes_it_is_plain_decoding() -> None:
    model = tiny_llama(seed=4)
    loop = decode.loop("token-recycling", nodes=0)
    assert torch.equal(generated(model, loop), generated(model, None))
    assert loop.last_run.counts["drafted"] == 0


# -- what does not fit ------------------------------------------------------------------------------


def test_pairs_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"verifier 'spec-tr' needs the law .* drafter 'token-recycling'"):
        decode.loop("speculative", drafter="token-recycling", verifier="spec-tr")
    with pytest.raises(ValueError, match="unknown drafter 'stend'; did you mean 'stand'"):
        decode.loop("speculative", drafter="stend")
    with pytest.raises(ValueError, match="unknown verifier"):
        decode.loop("speculative", drafter="stand", verifier="greedi")
    with pytest.raises(ValueError, match="takes a drafter and a verifier"):
        decode.loop("speculative", drafter=3)
    with pytest.raises(ValueError, match="nodes"):
        decode.loop("stand", nodes=-1)


def test_other_tokens_are_refused() -> None:
    loop = decode.loop("speculative-sampling", draft=tiny_llama(vocab=32))
    with pytest.raises(ValueError, match="vocabulary of 32 tokens and the model has 64"):
        generated(tiny_llama(), loop)

    class Tokenizer:
        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {w: i for i, w in enumerate(self.words)}

    with pytest.raises(ValueError, match="other tokens than the target's"):
        decode.build(
            "drafter",
            "draft-model",
            {"draft": tiny_llama(), "tokenizer": Tokenizer("a", "b"), "draft_tokenizer": Tokenizer("b", "a")},
        )
