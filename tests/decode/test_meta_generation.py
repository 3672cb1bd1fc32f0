"""Meta-generation: combinators on scripted generators, and a ledger that adds up and is never passed."""

from __future__ import annotations

import pytest

from tests.decode.tokenizers_at_hand import byte_level
from tests.tiny_models import tiny_llama
from tokenloom.decode.candidates import Candidate
from tokenloom.decode.meta_generation import (
    Generator,
    Ledger,
    Sampler,
    Session,
    bayes_risk,
    chain,
    parallel,
    refine,
    select,
    steps,
    vote,
)


def made(text: str, answer: str | None = None) -> Candidate:
    return Candidate([1], list(range(len(text))), text, answer)


def scripted(name: str, *texts: str) -> Generator:
    """Says each text, with its last sign as the answer; costs what it reads and writes, a token a sign."""

    def generate(prompt: str, ledger: Ledger) -> list[Candidate]:
        ledger.record(name, len(prompt), sum(map(len, texts)))
        return [made(text, text[-1:]) for text in texts]

    return generate


def texts(candidates: list[Candidate]) -> list[str]:
    return [c.text for c in candidates]


def test_parallel_and_vote() -> None:
    ledger = Ledger()
    many = parallel(scripted("g", "4", "x5", "y5"), scripted("h", "4", "4"))
    assert texts(many("q", ledger)) == ["4", "x5", "y5", "4", "4"]
    assert texts(select(many, vote)("q", ledger)) == ["4"]
    assert texts(select(scripted("g", "4", "x5", "y5"), vote)("q", ledger)) == ["x5"]
    assert select(scripted("g"), vote)("q", ledger) == []


def test_minimum_bayes_risk_with_exact_match_is_the_vote() -> None:
    rule = bayes_risk(lambda a, b: float(a == b))
    for said in (["a", "b", "b"], ["a", "b"], ["c"], ["a", "b", "c", "c", "b"]):
        candidates = [made(s, s) for s in said]
        assert rule(candidates) == vote(candidates)


def test_chain_reads_each_candidate() -> None:
    ledger = Ledger()
    both = chain(scripted("g", "a", "bb"), scripted("h", "1", "2"), join=lambda prompt, text: f"{prompt}+{text}")
    assert texts(both("q", ledger)) == ["1", "2", "1", "2"]
    assert [s.prompt_tokens for s in ledger.sessions] == [1, 3, 4]


def test_refinement_ends_when_accepted_or_after_its_rounds() -> None:
    def longer(prompt: str, ledger: Ledger) -> list[Candidate]:
        return [made(prompt + "!")]

    def revise(prompt: str, last: Candidate) -> str:
        return last.text

    assert texts(refine(longer, revise=revise, rounds=3)("q", Ledger())) == ["q!!!!"]
    assert texts(refine(longer, revise=revise, rounds=0)("q", Ledger())) == ["q!"]
    accepted = refine(longer, revise=revise, rounds=9, accept=lambda c: len(c.text) == 3)
    assert texts(accepted("q", Ledger())) == ["q!!"]


def test_step_level_search_keeps_the_best() -> None:
    seen: list[str] = []

    def step(prompt: str, ledger: Ledger) -> list[Candidate]:
        seen.append(prompt)
        return [made("a"), made("b")]

    def score(prompt: str, text: str) -> float:
        return {"a": 1.0, "b": 0.5}.get(text, text.count("b") + 0.1 * text.count("a"))

    search = steps(step, score=score, width=2, depth=2, done=lambda c: False)
    # "a" is better at first; with width 2 "b" survives and wins.
    assert texts(search("q", Ledger())) == ["bb", "ab"]
    assert seen == ["q", "qa", "qb"]
    assert texts(steps(step, score=score, width=1, depth=2, done=lambda c: False)("q", Ledger())) == ["ab"]
    ended = steps(step, score=lambda p, t: t.count("a"), width=1, depth=5, done=lambda c: c.text == "a")
    assert texts(ended("q", Ledger())) == ["a"]


def test_the_ledger_is_the_sum_of_its_sessions() -> None:
    ledger = Ledger()
    select(parallel(scripted("g", "ab", "c"), chain(scripted("g", "abc"), scripted("h", "d"))), vote)("qq", ledger)
    assert ledger.sessions == [Session("g", 2, 3), Session("g", 2, 3), Session("h", 5, 1)]
    assert ledger.total == sum(s.prompt_tokens + s.generated_tokens for s in ledger.sessions) == 16
    assert ledger.generated == 7
    assert ledger.by_model() == {"g": Session("g", 4, 6), "h": Session("h", 5, 1)}
    assert ledger.cost({"g": (1.0, 2.0), "h": (0.0, 10.0)}) == 4 + 12 + 10
    with pytest.raises(ValueError, match="no price for 'g'"):
        ledger.cost({"h": (1.0, 1.0)})


def test_limits_are_kept() -> None:
    ledger = Ledger(limit=4)
    ledger.record("g", 100, 3)
    assert ledger.left == 1
    with pytest.raises(ValueError, match="1 left of 4"):
        ledger.record("g", 0, 2)
    with pytest.raises(ValueError, match="counts >= 0"):
        ledger.record("g", -1, 0)
    assert ledger.generated == 3


@pytest.mark.parametrize("limit", [1, 5, 13])
def test_samplers_never_pass_the_limit(limit: int) -> None:
    tokenizer = byte_level()
    sampler = Sampler(tiny_llama(vocab=len(tokenizer)), tokenizer, n=3, name="tiny", max_new_tokens=4)
    ledger = Ledger(limit=limit)
    calls = 0
    while sampler("the answer", ledger):
        calls += 1
    assert calls > 0
    assert ledger.left == 0
    prompt = len(tokenizer("the answer")["input_ids"])
    assert ledger.by_model()["tiny"] == Session("tiny", prompt * calls, limit)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="rounds >= 0"):
        refine(scripted("g"), revise=lambda p, c: p, rounds=-1)
    with pytest.raises(ValueError, match="width and depth"):
        steps(scripted("g"), score=lambda p, t: 0.0, width=0, done=lambda c: True)
