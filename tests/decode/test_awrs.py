"""AWRS with particles: exact weights by enumeration over a table, and strings of the true conditional law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from decode.tokenizers_at_hand import byte_level
from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.awrs import Awrs
from tokenloom.decode.constraints import PredicateConstraint
from tokenloom.decode.run import Run
from tokenloom.decode.table import TableLM
from tokenloom.decode.token_bytes import token_bytes
from tokenloom.draw import RandomDraw, expectation, law_of
from tokenloom.methods.decoding.awrs import awrs_token

A, B, END = 0, 1, 2
VALID = {(A, B), (B, A)}


def toy() -> TableLM:
    """P(a) = .6, P(b | a) = .5, P(a | b) = .1, the end after two tokens."""
    laws = {(): [0.6, 0.4, 0.0], (A,): [0.5, 0.5, 0.0], (B,): [0.1, 0.9, 0.0]}
    return TableLM(3, lambda prefix: laws.get(prefix[1:], [0.0, 0.0, 1.0]))


class OneOf:
    """Strings of a set, then the end."""

    def __init__(self, strings: set[tuple[int, ...]], masked: bool = False) -> None:
        self.strings = strings
        self.calls = 0
        if masked:
            self.mask = lambda prefix: torch.tensor([self._fits((*prefix, t)) for t in range(3)])

    def accept(self, prefix: Sequence[int], token: int) -> bool:
        self.calls += 1
        return self._fits((*prefix, token))

    def _fits(self, string: tuple[int, ...]) -> bool:
        if string[-1] == END:
            return string[:-1] in self.strings
        return any(s[: len(string)] == string for s in self.strings)


def run_on(model: Any, draw: Any, prompts: int = 1, limit: int = 3) -> Run:
    ids = torch.full((prompts, 1), 2)
    return Run(model, ids, [[2]] * prompts, limit, frozenset([END]), END, True, draw=draw)


def _law(loop: Awrs, model: TableLM, limit: int = 3) -> tuple[float, dict[tuple[int, ...], float]]:
    """Mean weight and mean of weight x law of strings over all branches."""
    mean, total = 0.0, {}

    def program(draw: Any) -> tuple[Any, ...]:
        loop.rows(run_on(model, draw, limit=limit))
        posterior = loop.posteriors[0]
        scale = math.exp(posterior.log_normalizer)
        return (scale, *sorted((s, scale * w) for s, w in posterior.law().items()))

    for outcome, mass in law_of(program).items():
        mean += mass * outcome[0]
        for string, weight in outcome[1:]:
            total[string] = total.get(string, 0.0) + mass * weight
    return mean, total


@pytest.mark.parametrize("mode", ["auto", "recursive", "mask"])
@pytest.mark.parametrize(
    ("particles", "ess", "resampling"),
    [(1, 0.5, "systematic"), (2, 1.0, "systematic"), (2, 1.0, "stratified"), (2, 1.0, "multinomial")],
)
def test_weights_are_proper_whatever_the_resampling(mode: Any, particles: int, ess: float, resampling: Any) -> None:
    loop = Awrs(OneOf(VALID), particles=particles, ess=ess, resampling=resampling, mode=mode)
    mean, total = _law(loop, toy())
    assert mean == pytest.approx(0.34, abs=1e-9)
    assert total[A, B, END] == pytest.approx(0.3, abs=1e-9)
    assert total[B, A, END] == pytest.approx(0.04, abs=1e-9)
    assert set(total) == {(A, B, END), (B, A, END)}


def test_a_critic_multiplies_the_law() -> None:
    def critic(tokens: Sequence[int]) -> float:
        return math.log(0.2 + 0.3 * tokens.count(A) if tokens[0] == B else 0.1)

    for ess in (0.0, 1.0):
        loop = Awrs(OneOf(VALID), critic, particles=2, ess=ess, mode="mask")
        mean, total = _law(loop, toy())
        assert total[A, B, END] == pytest.approx(0.3 * 0.1, abs=1e-9)
        assert total[B, A, END] == pytest.approx(0.04 * 0.5, abs=1e-9)
        assert mean == pytest.approx(0.05, abs=1e-9)


def test_the_length_limit_conditions_on_ending() -> None:
    model = TableLM(3, lambda prefix: [0.5, 0.2, 0.3])
    anything = OneOf({(A,) * n for n in range(5)})
    mean, total = _law(Awrs(anything, particles=1, mode="mask"), model, limit=2)
    assert mean == pytest.approx(0.3 + 0.5 * 0.3, abs=1e-9)
    assert set(total) == {(END,), (A, END)}
    mean, total = _law(Awrs(anything, particles=1, mode="mask", at_limit="cut"), model, limit=2)
    assert total[A, A] == pytest.approx(0.25, abs=1e-9)
    assert mean == pytest.approx(0.3 + 0.15 + 0.25, abs=1e-9)


def test_many_particles_give_the_true_conditional_where_masking_alone_does_not() -> None:
    loop = Awrs(OneOf(VALID), particles=1500)
    loop.rows(run_on(toy(), RandomDraw(torch.Generator().manual_seed(0))))
    posterior = loop.posteriors[0]
    assert math.exp(posterior.log_normalizer) == pytest.approx(0.34, abs=0.03)
    assert posterior.law()[A, B, END] == pytest.approx(0.88235, abs=0.03)
    biased = decode.loop("locally-constrained", constraint=OneOf(VALID))
    law = law_of(lambda draw: tuple(biased.rows(run_on(toy(), draw))[0]))
    assert law[A, B, END] == pytest.approx(0.6, abs=1e-9)


def test_rows_of_a_batch_are_independent() -> None:
    loop = Awrs(OneOf(VALID), particles=1, mode="mask")
    law = law_of(lambda draw: tuple(map(tuple, loop.rows(run_on(toy(), draw, prompts=2)))))
    assert law[(A, B, END), (B, A, END)] == pytest.approx(0.6 * 0.4, abs=1e-9)
    assert len(loop.posteriors) == 2


def test_all_particles_dead_is_reported_not_divided_by() -> None:
    trap = OneOf({(A, A, A, A)})
    loop = Awrs(trap, particles=4)
    rows = loop.rows(run_on(toy(), RandomDraw(torch.Generator().manual_seed(0))))
    assert loop.posteriors[0].log_normalizer == -math.inf
    assert loop.posteriors[0].law() == {}
    assert END not in rows[0]
    assert all(t == A for t in rows[0])


def test_under_generate_with_padding() -> None:
    class Even:
        def accept(self, prefix: Sequence[int], token: int) -> bool:
            return len(prefix) == 4 if token == 1 else len(prefix) < 4 and token % 2 == 0

    ids = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    loop = decode.loop("awrs", constraint=Even(), particles=4)
    out = tiny_llama().generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=9, eos_token_id=1,
                                pad_token_id=0, custom_generate=loop)  # fmt: skip
    for row in out[:, 5:].tolist():
        new = row[: row.index(1)]
        assert len(new) == 4
        assert all(t % 2 == 0 for t in new)
    assert loop.last_run.counts["constraint_calls"] > 0
    with pytest.raises(ValueError, match="do_sample=True"):
        tiny_llama().generate(ids, do_sample=False, max_new_tokens=3, custom_generate=loop)
    for name, wrong in (("particles", 0), ("ess", -0.1)):
        with pytest.raises(ValueError, match=f"awrs: {name} .*got {wrong}"):
            decode.loop("awrs", constraint=Even(), **{name: wrong})


def test_particles_with_one_prefix_do_not_ask_twice() -> None:
    class Asked(OneOf):
        asked: ClassVar[list[tuple[int, ...]]] = []

        def accept(self, prefix: Sequence[int], token: int) -> bool:
            self.asked.append((*prefix, token))
            return super().accept(prefix, token)

    constraint = Asked(VALID)
    loop = Awrs(constraint, particles=20, ess=0.0)
    run = run_on(toy(), RandomDraw(torch.Generator().manual_seed(0)))
    loop.rows(run)
    assert len(constraint.asked) == len(set(constraint.asked)) == run.counts["constraint_calls"]
    assert run.counts["tokens"] > 40


def test_a_refusal_that_takes_others_along_leaves_the_weights_proper() -> None:
    class Explained(OneOf):
        """Of two beginnings, all of one go together."""

        def refused_with(self, prefix: Sequence[int], token: int) -> torch.Tensor:
            return torch.tensor([t for t in range(4) if not self._fits((*prefix, t))])

    laws = {(): [0.5, 0.4, 0.1], (A,): [0.5, 0.3, 0.2], (B,): [0.1, 0.3, 0.6]}
    model = TableLM(3, lambda prefix: laws.get(prefix[1:], [0.0, 0.0, 1.0]))
    for mode in ("auto", "recursive", "improper"):
        constraint = Explained({(B,)})
        mean, total = _law(Awrs(constraint, particles=2, mode=mode), model)
        if mode != "improper":
            assert mean == total[B, END] == pytest.approx(0.4 * 0.6, abs=1e-9)
        assert set(total) == {(B, END)}


def test_a_predicate_over_half_characters_and_tokens_that_begin_alike() -> None:
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer)
    wanted = ("a\u20ac", "an", "a")
    constraint = PredicateConstraint(tokenizer, wanted.__contains__, lambda t: any(w.startswith(t) for w in wanted))
    a, first, second, last, both = (pieces.index(p) for p in (b"a", b"\xe2", b"\x82", b"\xac", b"an"))
    masses = torch.zeros(len(pieces), dtype=torch.float64)
    masses[[a, first, second, last, both, tokenizer.eos_token_id]] = torch.tensor(
        [0.2, 0.1, 0.3, 0.15, 0.05, 0.2]
    ).double()
    for prefix in ([], [a], [a, first], [a, first, second], [a, first, second, last], [both]):
        total = expectation(partial(_weighed, constraint, prefix, masses))
        expected = {t: float(masses[t]) for t in masses.nonzero()[:, 0].tolist() if constraint.accept(prefix, t)}
        assert expected
        assert {t: w for t, w in total.items() if w > 0} == pytest.approx(expected, abs=1e-9)


def _weighed(constraint: Any, prefix: list[int], masses: torch.Tensor, draw: Any) -> tuple[int, float]:
    def accept(token: int) -> bool:
        return bool(constraint.accept(prefix, token))

    def refused_with(token: int) -> torch.Tensor:
        return torch.as_tensor(constraint.refused_with(prefix, token))

    token, log_weight = awrs_token(masses.log(), accept, draw, refused_with=refused_with, tail=0.0)
    return token, math.exp(log_weight)


def test_a_mask_rescues_rare_valid_tokens() -> None:
    model = TableLM(3, lambda prefix: [1 - 1e-7, 1e-7, 0.0] if len(prefix) == 1 else [0.0, 0.0, 1.0])
    loop = Awrs(OneOf({(B,)}, masked=True), particles=2)
    assert loop.rows(run_on(model, RandomDraw())) == [[B, END]]
    assert loop.posteriors[0].log_normalizer == pytest.approx(math.log(1e-7), abs=1e-6)
