"""KTAE: contingency tables of tokens and answers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    advantages_of,
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    signals_of,
    synthetic_batch,
    vector,
)
from tokenloom.batch import Rollouts, Sampling
from tokenloom.methods.policy_optimization.ktae import (
    fisher_pvalue,
    fisher_strength,
    frequency_term,
    information_gain,
    ktae,
)

KEY, OTHER = 7, 3
"""The token of the table, and one that every row has."""


def cells(*counts: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([x]) for x in counts)


def credit(
    tokens: list[list[int]], outcomes: list[float], lengths: list[int] | None = None, **settings: object
) -> Tensor:
    """u of every token [B, T] of one group, without the rule for the token that ends a response."""
    ids = torch.tensor(tokens)
    mask = ones(*ids.shape)
    if lengths is not None:
        mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    group, cut = torch.zeros(len(ids), dtype=torch.int64), torch.zeros(len(ids), dtype=torch.bool)
    settings = {"eos": -1} | settings
    zero = torch.zeros(ids.shape, dtype=torch.float64)
    return ktae(zero, ids, vector(*outcomes), group, cut, mask, **settings)  # type: ignore[arg-type]


def table(a: int, b: int, c: int, d: int) -> tuple[list[list[int]], list[float]]:
    """Rows of two tokens with the key token in a right and b wrong ones, absent from c and d."""
    rows = [[KEY, OTHER]] * a + [[OTHER, OTHER]] * c + [[KEY, OTHER]] * b + [[OTHER, OTHER]] * d
    return rows, [1.0] * (a + c) + [0.0] * (b + d)


def value_of_key(a: int, b: int, c: int, d: int, **settings: object) -> float:
    rows, outcomes = table(a, b, c, d)
    found = credit(rows, outcomes, **{"tf": False} | settings)
    values = found[torch.tensor(rows) == KEY].unique()
    assert len(values) == 1
    return float(values)


def test_defaults() -> None:
    expected = {"alpha": 1.0, "beta": 1.0, "tf": True, "top": 1.0, "threshold": 0.0, "eos": None}
    assert defaults("ktae") == expected
    assert preset_defaults("ktae") == {"base": "grpo", "beta": 1.0, "top": 1.0, "eos": None}
    algorithm = make("ktae", eos=5)
    assert algorithm.credit[0].params["eos"] == 5
    assert (algorithm.aggregate.part.name, algorithm.terms) == ("token-mean", ())
    assert make("ktae", base="dapo").override(credit=None).recipe() == make("dapo").recipe()


@pytest.mark.parametrize(
    ("counts", "p", "strength", "gain", "value"),
    [
        ((2, 0, 0, 2), 1 / 3, 0.513417, 1.0, 0.532994),
        ((2, 2, 0, 0), 1.0, 0.0, 0.0, 0.0),
        ((3, 1, 1, 3), 0.485714, 0.378542, 0.188722, 0.074118),
    ],
)
def test_worked_numbers(counts: tuple[int, ...], p: float, strength: float, gain: float, value: float) -> None:
    close(fisher_pvalue(*cells(*counts)), p, 1e-6)
    close(fisher_strength(*cells(*counts)), strength, 1e-6)
    close(information_gain(*cells(*counts)), gain, 1e-6)
    assert value_of_key(*counts) == pytest.approx(value, abs=1e-6)


def exact_pvalue(a: int, b: int, c: int, d: int) -> Fraction:
    """Tables at most as likely as this one, counted in integers."""
    right, total, holders = a + c, a + b + c + d, a + b

    def ways(k: int) -> int:
        return math.comb(right, k) * math.comb(total - right, holders - k) if 0 <= k <= holders else 0

    less = sum(ways(k) for k in range(right + 1) if ways(k) <= ways(a))
    return Fraction(less, math.comb(total, holders))


@pytest.mark.parametrize("size", [1, 2, 5, 8, 12])
def test_fisher_against_counting(size: int) -> None:
    tables = [t for t in itertools.product(range(size + 1), repeat=4) if sum(t) == size]
    found = fisher_pvalue(*torch.tensor(tables).T)
    close(found, [float(exact_pvalue(*t)) for t in tables])
    # p = 1 exactly where counting says so: those say nothing.
    certain = torch.tensor([exact_pvalue(*t) == 1 for t in tables])
    assert torch.equal(fisher_strength(*torch.tensor(tables).T) == 0, certain)


def test_information_gain_is_mutual_information() -> None:
    tables = [t for t in itertools.product(range(4), repeat=4) if sum(t) > 0]
    for t, found in zip(tables, information_gain(*torch.tensor(tables).T).tolist(), strict=True):
        a, b, c, d = (x / sum(t) for x in t)
        joint = [(a, a + b, a + c), (b, a + b, b + d), (c, c + d, a + c), (d, c + d, b + d)]
        wanted = sum(x * math.log2(x / (row * column)) for x, row, column in joint if x)
        assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("counts", [(2, 0, 0, 2), (3, 1, 1, 3), (4, 0, 1, 3), (1, 0, 2, 3), (2, 3, 1, 0)])
@pytest.mark.parametrize("tf", [False, True])
def test_swapping_right_and_wrong_flips_the_sign(counts: tuple[int, ...], tf: bool) -> None:
    a, b, c, d = counts
    value = value_of_key(a, b, c, d, tf=tf)
    assert value_of_key(b, a, d, c, tf=tf) == pytest.approx(-value, abs=1e-12)
    assert value != 0


@pytest.mark.parametrize("top", [1.0, 0.3])
def test_values_are_bounded_by_top(top: float) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 30, (12, 20), generator=g)
    found = credit(tokens.tolist(), [1.0] * 5 + [0.0] * 7, top=top)
    assert float(found.abs().max()) <= top
    assert float(found.abs().max()) > 0.9 * top


def test_a_one_sided_token_saturates_with_the_frequency_term() -> None:
    assert value_of_key(2, 0, 0, 2, tf=True) == pytest.approx(1.0, abs=1e-9)
    assert value_of_key(0, 3, 3, 0, tf=True) == pytest.approx(-1.0, abs=1e-9)


def test_frequency_term() -> None:
    # Right side: 8 tokens, 4 of them v; wrong side: 4 tokens, 1 of them v.
    found = frequency_term(torch.tensor([[1.0, 3.0], [4.0, 4.0]]).double())[0]
    right, wrong = 3 * 0.5 / (0.5 + 1 + 8 / 6), 3 * 0.25 / (0.25 + 1 + 4 / 6)
    close(found, right / (wrong + 1e-5) - wrong / (right + 1e-5))
    even = frequency_term(torch.tensor([[2.0, 2.0], [2.0, 2.0]]).double())
    close(even, 0.0)


def test_frequency_counts_every_occurrence_and_presence_one_per_row() -> None:
    often = credit([[KEY, KEY], [KEY, OTHER], [OTHER, OTHER], [KEY, OTHER]], [1, 1, 0, 0], tf=False)
    once = credit([[KEY, OTHER], [KEY, OTHER], [OTHER, OTHER], [KEY, OTHER]], [1, 1, 0, 0], tf=False)
    close(often[0, 0], float(once[0, 0]))
    often = credit([[KEY, KEY], [KEY, OTHER], [OTHER, OTHER], [KEY, OTHER]], [1, 1, 0, 0])
    once = credit([[KEY, OTHER], [KEY, OTHER], [OTHER, OTHER], [KEY, OTHER]], [1, 1, 0, 0])
    assert float(often[0, 0]) > float(once[0, 0])


def test_every_occurrence_of_a_token_gets_its_value() -> None:
    tokens = torch.tensor([[KEY, OTHER, KEY], [OTHER, KEY, OTHER], [OTHER, OTHER, OTHER], [5, OTHER, OTHER]])
    found = credit(tokens.tolist(), [1, 1, 0, 0])
    for v in (KEY, OTHER, 5):
        values = found[tokens == v]
        assert bool((values == values[0]).all())


def test_tokens_on_all_rows_alike_say_nothing() -> None:
    rows, outcomes = table(2, 0, 0, 2)
    found = credit(rows, outcomes, tf=False)
    close(found[torch.tensor(rows) == OTHER], 0.0)


@pytest.mark.parametrize("outcomes", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, NAN, NAN], [NAN] * 3])
def test_one_sided_groups_keep_their_advantage(outcomes: list[float]) -> None:
    assert torch.equal(credit([[1, 2], [2, 3], [KEY, 4]], outcomes), torch.zeros(3, 2).double())


def test_a_single_row_gets_nothing() -> None:
    assert bool((credit([[1, 2, 3]], [1.0]) == 0).all())


def test_unscorable_and_empty_rows_are_not_in_the_tables() -> None:
    plain = credit([[KEY, OTHER], [OTHER, OTHER], [OTHER, OTHER], [OTHER, OTHER]], [1, 1, 0, 0])
    more = credit(
        [[KEY, OTHER], [OTHER, OTHER], [OTHER, OTHER], [OTHER, OTHER], [KEY, KEY], [KEY, KEY]],
        [1, 1, 0, 0, NAN, 0],
        lengths=[2, 2, 2, 2, 2, 0],
    )
    close(more[:4], plain)
    close(more[4:], 0.0)
    # A wrong row that says nothing is no wrong row.
    close(credit([[KEY, OTHER], [KEY, KEY]], [1, 0], lengths=[2, 0]), 0.0)


def test_tool_tokens_and_padding_do_not_count() -> None:
    tokens = torch.tensor([[KEY, 9, OTHER, 9], [OTHER, KEY, OTHER, KEY]])
    mask = torch.tensor([[True, False, True, False], [True, False, True, False]])
    zero, group, cut = torch.zeros(2, 4).double(), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    found = ktae(zero, tokens, vector(1.0, 0.0), group, cut, mask, eos=-1)
    close(found[mask].reshape(2, 2), credit([[KEY, OTHER], [OTHER, OTHER]], [1.0, 0.0]))
    assert bool((found[~mask] == 0).all())


def test_groups_have_tables_of_their_own() -> None:
    rows, outcomes = table(2, 0, 0, 2)
    tokens = torch.tensor(rows + rows)
    groups, mask = torch.tensor([4] * 4 + [1] * 4), ones(8, 2)
    both = vector(*outcomes, *(1 - x for x in outcomes))
    found = ktae(torch.zeros(8, 2).double(), tokens, both, groups, torch.zeros(8, dtype=torch.bool), mask, eos=-1)
    close(found[:4], -found[4:])


def test_the_token_that_ends_a_response_is_left_alone() -> None:
    # Row 0 and 1 end by themselves with token 2, row 2 is cut, row 3 ends with another token.
    tokens = torch.tensor([[KEY, 2, 0], [KEY, KEY, 2], [OTHER, OTHER, OTHER], [OTHER, 8, 0]])
    mask = torch.tensor([[True, True, False], [True] * 3, [True] * 3, [True, True, False]])
    cut, group = torch.tensor([False, False, True, False]), torch.zeros(4, dtype=torch.int64)
    outcomes, a = vector(1, 1, 0, 0), torch.full((4, 3), 0.25).double()
    by_place = ktae(a, tokens, outcomes, group, cut, mask) - 0.25 * mask
    assert (by_place != 0).tolist() == [[True, False, False], [True, True, False], [True] * 3, [True, False, False]]
    by_id = ktae(a, tokens, outcomes, group, cut, mask, eos=2) - 0.25 * mask
    assert (by_id != 0).tolist() == [[True, False, False], [True, True, False], [True] * 3, [True, True, False]]


def test_right_means_above_the_threshold() -> None:
    rows, outcomes = table(2, 0, 0, 2)
    signed = [2 * x - 1 for x in outcomes]
    close(credit(rows, signed), credit(rows, outcomes))
    partial = [0.3 * x + 0.1 for x in outcomes]
    assert bool((credit(rows, partial) == 0).all())
    close(credit(rows, partial, threshold=0.2), credit(rows, outcomes))


def test_weights_of_the_statistics() -> None:
    direction = 2 * math.asin(math.sqrt(0.75)) - math.pi / 2
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (1.0, 2.0)):
        x = (alpha * 0.378542 + beta * 0.188722) / (alpha + beta) * direction
        assert value_of_key(3, 1, 1, 3, alpha=alpha, beta=beta) == pytest.approx(math.tanh(x / 2), abs=1e-6)


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"beta": -0.1}, {"alpha": 0.0, "beta": 0.0}])
def test_impossible_weights_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="ktae weighs"):
        credit([[1], [2]], [1.0, 0.0], **wrong)


# -- the composition


def batch_of(tokens: list[list[int]], rewards: list[float]) -> Rollouts:
    ids = torch.tensor(tokens)
    number, width = ids.shape
    return Rollouts(
        prompt_tokens=tuple(torch.arange(2) for _ in range(number)),
        tokens=ids,
        lengths=torch.full((number,), width),
        mask=ones(number, width),
        group_ids=torch.zeros(number, dtype=torch.int64),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        truncated=torch.ones(number, dtype=torch.bool),
        sampling=Sampling(max_tokens=width),
    )


def test_added_after_the_standard_deviation() -> None:
    rows, outcomes = table(3, 1, 1, 3)
    rollouts = batch_of(rows, outcomes)
    base, found = (advantages_of(make(s), rollouts) for s in ("grpo", "ktae"))
    close(found - base, credit(rows, outcomes))
    plain = coefficients_of(make("ktae").override(credit=None), rollouts, signals_of(rollouts))
    close(coefficients_of(make("ktae"), rollouts, signals_of(rollouts)), plain * found / base)


def test_adds_to_dapo_as_well() -> None:
    rollouts, signals = synthetic_batch()
    found, plain = (
        advantages_of(make(s, **k), rollouts, signals) for s, k in (("ktae", {"base": "dapo"}), ("dapo", {}))
    )
    assert not torch.allclose(found, plain)
    assert float((found - plain).abs().max()) <= 1


def test_degenerate_groups_are_grpo() -> None:
    rollouts, signals = synthetic_batch()
    settled = rollouts.replace(rewards=torch.ones(12).double())
    assert bool((advantages_of(make("ktae"), settled, signals) == 0).all())


def test_single_precision_agrees() -> None:
    rollouts, _ = synthetic_batch()
    assert rollouts.rewards is not None
    assert rollouts.truncated is not None
    zero = torch.zeros(rollouts.mask.shape)
    rest = (rollouts.group_ids, rollouts.truncated, rollouts.mask)
    low = ktae(zero, rollouts.tokens, rollouts.rewards.float(), *rest)
    high = ktae(zero.double(), rollouts.tokens, rollouts.rewards, *rest)
    assert low.dtype == torch.float32
    close(low.double(), high, 1e-6)


def test_mechanism_shows_on_the_batch() -> None:
    rollouts, signals = synthetic_batch()
    found, plain = (coefficients_of(a, rollouts, signals) for a in (make("ktae"), make("ktae").override(credit=None)))
    assert not torch.allclose(found, plain)
    without = coefficients_of(make("ktae").override(credit={"ktae": {"tf": False}}), rollouts, signals)
    assert not torch.allclose(found, without)
