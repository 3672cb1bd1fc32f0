"""THR: the matrix form is the double sum; the sheet's identities, thresholds and limits; NTHR."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methods.policy_optimization.batch import (
    NAN,
    close,
    coefficients_of,
    defaults,
    make,
    ones,
    preset_defaults,
    row,
    synthetic_batch,
    vector,
)
from tokenloom.methods.policy_optimization import thr
from tokenloom.methods.policy_optimization.thr import (
    hidden_influence,
    negative_hidden_reward,
    token_hidden_reward,
)

WIDTH, SIZE, VOCABULARY = 5, 4, 11


def group(rows: int = 4, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(VOCABULARY, SIZE, generator=g, dtype=torch.float64)
    mask = torch.arange(WIDTH) < torch.tensor([5, 2, 4, 1, 3, 5])[:rows, None]
    mask[0, 2] = False
    return {
        "hidden": torch.randn(rows, WIDTH, SIZE, generator=g, dtype=torch.float64),
        "logits": lambda h: h @ head.T,
        "tokens": torch.randint(0, VOCABULARY, (rows, WIDTH), generator=g),
        "mask": mask,
        "outcomes": torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])[:rows],
    }


def double_sum(values: dict[str, Any], *, mean: bool) -> Tensor:
    """s [R, T], token by token."""
    hidden, tokens, mask = values["hidden"], values["tokens"], values["mask"]
    here = sorted({int(tokens[i, t]) for i, t in mask.nonzero().tolist()})

    def error(i: int, t: int) -> Tensor:
        law = values["logits"](hidden[i, t][None]).softmax(-1)[0]
        return torch.stack([float(int(tokens[i, t]) == v) - law[v] for v in here])

    out = torch.zeros(mask.shape, dtype=hidden.dtype)
    for j, t in mask.nonzero().tolist():
        for i in (values["outcomes"] > 0.5).nonzero()[:, 0].tolist():
            own = [error(i, k) @ error(j, t) * (hidden[i, k] @ hidden[j, t]) for k in mask[i].nonzero()[:, 0].tolist()]
            out[j, t] += sum(own, torch.zeros(())) / (len(own) if mean else 1)
    return out


def test_defaults() -> None:
    assert defaults("thr") == {"p": 0.1, "beta": 1.0, "threshold": "influence"}
    assert defaults("thr/negative") == {"beta": 1.0}
    assert preset_defaults("thr") == {"p": 0.1, "variant": "thr"}
    algorithm = make("thr")
    assert algorithm.terms[0].coef == 1e-4
    assert algorithm.refill
    assert make("thr", variant="negative").credit[0].part.name == "thr/negative"


def test_what_it_needs() -> None:
    for variant in ("thr", "negative"):
        algorithm = make("thr", variant=variant)
        assert algorithm.loss_needs == {"logprobs"}
        assert algorithm.needs == {"hidden_influence", "ref_logprobs"}


@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_the_matrix_form_is_the_double_sum(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thr, "CHUNK", chunk)
    values = group()
    calls: list[int] = []
    logits = values["logits"]
    values["logits"] = lambda h: calls.append(len(h)) or logits(h)
    found = hidden_influence(**values)
    assert max(calls) <= chunk
    values["logits"] = logits
    close(found[..., 0], double_sum(values, mean=True))
    close(found[..., 1], double_sum(values, mean=False))
    assert bool((found[~values["mask"]] == 0).all())


def test_padding_and_hostile_states_change_nothing() -> None:
    values = group()
    wide = values | {
        "hidden": torch.cat([values["hidden"], torch.full((4, 2, SIZE), NAN).double()], 1),
        "tokens": torch.nn.functional.pad(values["tokens"], (0, 2), value=-5),
        "mask": torch.nn.functional.pad(values["mask"], (0, 2)),
    }
    close(hidden_influence(**wide)[:, :WIDTH], hidden_influence(**values))


def test_a_group_without_tokens_reads_no_logits() -> None:
    values = group() | {"mask": torch.zeros(4, WIDTH, dtype=torch.bool), "logits": None}
    assert torch.equal(hidden_influence(**values), torch.zeros(4, WIDTH, 2).double())


def test_one_right_token_worked_by_hand() -> None:
    # The right row's only token and a wrong row's token share state and prediction.
    head = torch.randn(6, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = torch.randn(SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = {
        "hidden": state.expand(2, 1, SIZE),
        "logits": lambda h: h @ head.T,
        "tokens": torch.tensor([[3], [3]]),
        "mask": ones(2),
        "outcomes": vector(1, 0),
    }
    s = hidden_influence(**values)
    error = 1 - (head @ state).softmax(-1)[3]
    close(s[:, 0, 0], error**2 * (state @ state))
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    ids = torch.zeros(2, dtype=torch.int64)
    found = token_hidden_reward(advantages, s, vector(1, 0), ids, ones(2), p=0.25, threshold="none")
    # THR is +|g|^2 |h|^2 on the right token, which gains, and minus that on the wrong one, which is spared.
    close(found[:, 0], vector(1.25, -0.75))
    # tau is that same number, and nothing exceeds it.
    close(token_hidden_reward(advantages, s, vector(1, 0), ids, ones(2)), 0.0)


def test_threshold_sign_and_strength_worked_by_hand() -> None:
    s = torch.tensor([[0.4, 0.2], [0.9, -0.1], [0.7, -0.5]], dtype=torch.float64)
    influence = torch.stack([s, torch.zeros_like(s)], -1)
    outcomes, ids = vector(1, 1, 0), torch.zeros(3, dtype=torch.int64)
    advantages = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-2.0, -2.0]], dtype=torch.float64)

    def of(**settings: Any) -> Tensor:
        return token_hidden_reward(advantages, influence, outcomes, ids, ones(3, 2), **settings)

    # Means of the right rows are 0.3 and 0.4, so tau = 0.3; the wrong row's THR is -0.7, 0.5.
    close(of(p=0.5), torch.tensor([[1.5, 0.0], [1.5, 0.0], [-1.0, -3.0]]))
    close(of(p=-0.5), torch.tensor([[0.5, 0.0], [0.5, 0.0], [-3.0, -1.0]]))
    close(of(p=0.0), torch.tensor([[1.0, 0.0], [1.0, 0.0], [-2.0, -2.0]]))
    close(of(p=0.0, beta=2.0), torch.tensor([[0.0, 0.0], [1.0, 0.0], [-2.0, 0.0]]))
    close(of(p=0.0, beta=0.0), torch.tensor([[1.0, 1.0], [1.0, 1.0], [-2.0, -2.0]]))
    close(of(p=0.0, threshold="none"), advantages)


def test_a_negative_threshold_counts_as_none() -> None:
    influence = torch.tensor([[-0.4, 0.2], [0.0, 0.1]], dtype=torch.float64)[..., None].expand(2, 2, 2)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    found = token_hidden_reward(
        advantages, influence, vector(1, 0), torch.zeros(2, dtype=torch.int64), ones(2, 2), p=0.5
    )
    # tau = mean(-0.4, 0.2) < 0: only a token without any influence is left out.
    close(found, torch.tensor([[0.5, 1.5], [0.0, -0.5]]))


def test_scaling_the_states_leaves_the_selection() -> None:
    values = group(6)
    scaled = values | {"hidden": 3 * values["hidden"], "logits": lambda h: values["logits"](h / 3)}
    one, other = hidden_influence(**values), hidden_influence(**scaled)
    close(other, 9 * one)
    ids, advantages = torch.zeros(6, dtype=torch.int64), torch.ones(6, WIDTH).double()
    rest = (values["outcomes"].double(), ids, values["mask"])
    close(token_hidden_reward(advantages, other, *rest), token_hidden_reward(advantages, one, *rest))
    assert 0 < int(token_hidden_reward(advantages, one, *rest).count_nonzero()) < int(values["mask"].sum())


@pytest.mark.parametrize("outcomes", [(1, 1, 1), (0, 0, 0), (1, 1, NAN), (NAN, NAN, NAN)])
def test_one_sided_groups_are_left_alone(outcomes: tuple[float, ...]) -> None:
    influence = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    ids = torch.zeros(3, dtype=torch.int64)
    for rule in (token_hidden_reward, negative_hidden_reward):
        close(rule(advantages, influence, vector(*outcomes), ids, ones(3, 2)), advantages)


def test_a_right_row_without_tokens_sets_no_threshold() -> None:
    influence = torch.full((3, 1, 2), 0.5, dtype=torch.float64)
    mask = torch.tensor([[True], [False], [True]])
    advantages = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64)
    found = token_hidden_reward(
        advantages, influence, vector(1, 1, 0), torch.zeros(3, dtype=torch.int64), mask, beta=0.5, p=0.0
    )
    close(found, advantages)


@pytest.mark.parametrize(("right", "size", "eta"), [(2, 4, 0.0), (1, 4, 0.5), (1, 10, 0.8), (3, 4, 0.5)])
def test_nthr_scales_by_how_one_sided_the_group_is(right: int, size: int, eta: float) -> None:
    outcomes = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
    influence = torch.zeros(size, 2, 2, dtype=torch.float64)
    influence[..., 1] = vector(0.2, 0.4)
    influence[-1, :, 1] = vector(0.29, 0.31)
    advantages = torch.where(outcomes[:, None] > 0, 1.0, -1.0).double().expand(size, 2)
    found = negative_hidden_reward(advantages, influence, outcomes, torch.zeros(size, dtype=torch.int64), ones(size, 2))
    # tau = 0.3: of the last row only the second token exceeds it, and right rows are never touched.
    close(found[-1], row(-1.0, -eta)[0])
    close(found[0], row(1.0, 1.0)[0])


def test_without_strength_and_threshold_it_is_grpo() -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("thr", p=0.0).override(credit={"thr": {"threshold": "none"}})
    close(
        coefficients_of(algorithm, rollouts, signals),
        coefficients_of(algorithm.override(credit=None), rollouts, signals),
    )


@pytest.mark.parametrize("settings", [{}, {"p": -0.1}, {"p": 0.0}, {"variant": "negative"}])
def test_the_mechanism_shows_on_the_batch(settings: dict[str, Any]) -> None:
    rollouts, signals = synthetic_batch()
    algorithm = make("thr", **settings)
    found, plain = (coefficients_of(a, rollouts, signals) for a in (algorithm, algorithm.override(credit=None)))
    assert not torch.allclose(found, plain, rtol=1e-6, atol=1e-9)
