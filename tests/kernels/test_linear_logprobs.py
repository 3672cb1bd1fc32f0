"""The fused log-prob: values and gradients against autograd of the definition, precision, mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.definition import FORMS, ROWS, defined, inputs, mixture
from tokenloom.kernels import linear_logprobs
from tokenloom.kernels.tiles import Grid


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of at most 2 x 4: ragged at both edges of [9, 23] and of what is left of it."""
    monkeypatch.setattr(Grid, "fitting", classmethod(lambda cls, m, v, device, chunk: cls(m, v, chunk or 2, 4)))


def test_worked_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    weight = torch.tensor([[0.0, 0.0], [1.0986123, 0.0], [0.0, 0.6931472]])
    found = linear_logprobs(hidden, torch.tensor([0, 1, 0]), torch.tensor([1, 2, 0]), weight, None, need_entropy=True)
    # Odds 1 : 3 : 1, then 1 : 1 : 4.
    assert found.logprobs.exp().tolist() == pytest.approx([3 / 5, 4 / 6, 1 / 5], abs=1e-6)
    assert found.entropies is not None
    assert found.entropies.tolist() == pytest.approx([0.950271, 0.867563, 0.950271], abs=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [None, ROWS], ids=["identity", "shared"])
@pytest.mark.parametrize(
    "asked", [{}, {"need_entropy": True}, {"top_k": 6}, {"need_entropy": True, "top_k": 3}], ids=str
)
@pytest.mark.usefixtures("small_tiles")
def test_values_and_gradients_are_those_of_the_definition(
    form: dict[str, Any], biased: bool, rows: Tensor | None, asked: dict[str, Any]
) -> None:
    hidden, weight, bias, targets = inputs()
    leaves = [hidden, weight, *([bias] if biased else [])]
    given = (hidden, rows, targets, weight, bias if biased else None)
    ours = linear_logprobs(*given, **form, **asked)
    theirs = defined(*given, **form, top_k=asked.get("top_k", 0))
    if "need_entropy" not in asked:
        theirs = theirs._replace(entropies=None)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-12, atol=1e-12)
    assert (ours.entropies is None) == (theirs.entropies is None)
    if ours.entropies is not None and theirs.entropies is not None:
        torch.testing.assert_close(ours.entropies, theirs.entropies, rtol=1e-12, atol=1e-12)
    assert (ours.top is None) == (theirs.top is None)
    if ours.top is not None and theirs.top is not None:
        torch.testing.assert_close(ours.top.logprobs, theirs.top.logprobs, rtol=1e-12, atol=1e-12)
        assert ours.top.tokens.equal(theirs.top.tokens)
    mine = torch.autograd.grad(mixture(ours), leaves)
    wanted = torch.autograd.grad(mixture(theirs), leaves)
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_chunk_changes_nothing(chunk: int) -> None:
    hidden, weight, bias, targets = inputs()
    ours = linear_logprobs(hidden, ROWS, targets, weight, bias, need_entropy=True, top_k=2, chunk=chunk)
    theirs = defined(hidden, ROWS, targets, weight, bias, top_k=2)
    mine = torch.autograd.grad(mixture(ours), [hidden, weight, bias])
    wanted = torch.autograd.grad(mixture(theirs), [hidden, weight, bias])
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_random_rows_and_repeated_targets(seed: int) -> None:
    """Any number of rows and targets; a row's targets may repeat, as at the end of identical responses."""
    generator = torch.Generator().manual_seed(seed)
    m, n = (int(torch.randint(1, 40, (1,), generator=generator)) for _ in range(2))
    hidden, weight, bias, _ = inputs(m, 4, 17)
    rows, targets = (torch.randint(high, (n,), generator=generator) for high in (m, 3))
    ours = linear_logprobs(hidden, rows, targets, weight, bias, need_entropy=True, top_k=2)
    theirs = defined(hidden, rows, targets, weight, bias, top_k=2)
    mine = torch.autograd.grad(mixture(ours), [hidden, weight, bias])
    wanted = torch.autograd.grad(mixture(theirs), [hidden, weight, bias])
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck(form: dict[str, Any]) -> None:
    hidden, weight, bias, targets = inputs(4, 3, 6, n=5)
    rows = torch.tensor([1, 1, 3, 0, 3])

    def everything(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = linear_logprobs(hidden, rows, targets, weight, bias, need_entropy=True, top_k=2, **form)
        assert found.entropies is not None
        assert found.top is not None
        return found.logprobs, found.entropies, found.top.logprobs

    assert torch.autograd.gradcheck(everything, (hidden, weight, bias))


@pytest.mark.parametrize("form", [{}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
def test_float32_agrees_with_float64(form: dict[str, Any]) -> None:
    exact = inputs(600, 32, 801)
    hidden, weight, bias = (x.detach().float().requires_grad_() for x in exact[:3])
    ours = linear_logprobs(hidden, None, exact[3], weight, bias, need_entropy=True, **form)
    theirs = defined(exact[0], None, exact[3], exact[1], exact[2], **form)
    # A logit sums 32 products (and is at most `largest`, soft-capped or not, before the temperature); its
    # distance from the maximum, at most twice that, is rounded twice on the way to the exponential, of which
    # the norm sums 801.
    eps = torch.finfo(torch.float32).eps
    largest = float((exact[0] @ exact[1].T + exact[2]).detach().abs().max()) / form.get("temperature", 1.0)
    tolerance = eps * (32**0.5 * largest + 4 * largest + 801**0.5)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert a is not None
        assert a.dtype == torch.float32
        assert float((a.double() - b).detach().abs().max()) < tolerance
    # A slope p (a + b log p) has the errors of p, of a and of log p, each at most the tolerance; products with
    # it are bounded by the norms. A bias for every row shows the slopes.
    beside = exact[2].detach().expand(600, -1).clone().requires_grad_()
    logits_grad = torch.autograd.grad(mixture(defined(exact[0], None, exact[3], exact[1], beside, **form)), beside)[0]
    mine = torch.autograd.grad(mixture(ours), [hidden, weight, bias])
    wanted = torch.autograd.grad(mixture(theirs), list(exact[:3]))
    for a, b, factor in zip(mine, wanted, (exact[1], exact[0], torch.ones(600)), strict=True):
        assert float((a.double() - b).norm()) < 3 * tolerance * float(logits_grad.norm() * factor.detach().norm())


def test_16_bit_products_keep_float32_arithmetic() -> None:
    """Rounding enters through the inputs and the logits (bf16), not through the softmax after them."""
    hidden, weight, _, targets = inputs(64, 32, 501, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_logprobs(hidden, None, targets, weight, need_entropy=True)
        assert found.entropies is not None
        (found.logprobs.sum() + found.entropies.sum()).backward()
    assert found.logprobs.dtype == found.entropies.dtype == torch.float32
    rounded = hidden.detach().bfloat16() @ weight.detach().bfloat16().T
    law = torch.log_softmax(rounded.double(), -1)
    wanted = law.gather(-1, targets[:, None])[:, 0]
    assert float((found.logprobs.double() - wanted).detach().abs().max()) < 501 * torch.finfo(torch.float32).eps
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    theirs = defined(exact[0], None, targets, exact[1])
    assert theirs.entropies is not None
    (theirs.logprobs.sum() + theirs.entropies.sum()).backward()
    for ours, reference in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None
        assert reference.grad is not None
        assert ours.grad.dtype == torch.float32
        error = (ours.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert float(error) < 4 * torch.finfo(torch.bfloat16).eps


def test_bfloat16_errors_are_noise_without_a_bias() -> None:
    """Over many tokens the log-probs' errors average out: no systematic shift, as a lost tail would cause."""
    hidden, weight, bias, targets = inputs(4000, 16, 600, dtype=torch.bfloat16)
    logprobs = linear_logprobs(hidden, None, targets, weight, bias).logprobs
    assert logprobs.dtype == torch.float32
    exact = defined(hidden.detach().double(), None, targets, weight.detach().double(), bias.detach().double()).logprobs
    errors = (logprobs.double() - exact).detach()
    # A logit of size 4 rounds by up to half of 4 eps.
    assert float(errors.std()) < 4 * torch.finfo(torch.bfloat16).eps
    # The 4000 errors are independent but for the weights they share: four standard errors.
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / 4000**0.5


@pytest.mark.parametrize("rows", [9, 700], ids=["one block of rows", "two"])
def test_bfloat16_weights_get_bfloat16_gradients_rounded_once(rows: int) -> None:
    hidden, weight, bias, targets = inputs(rows, 8, 33, dtype=torch.bfloat16)
    linear_logprobs(hidden, None, targets, weight, bias).logprobs.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    defined(exact[0], None, targets, exact[1], exact[2]).logprobs.sum().backward()
    for ours, theirs in zip((hidden, weight, bias), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == torch.bfloat16
        # Logits, slopes and the result are rounded, none more than once.
        assert float((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < 4 * torch.finfo(ours.dtype).eps


def test_tokens_that_the_policy_is_sure_of_keep_their_small_gradient() -> None:
    """1 - p by subtraction would be 0 or 6e-8 here, in float32; the definition in float64 knows better."""
    hidden = torch.tensor([[20.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    linear_logprobs(hidden, None, torch.tensor([0]), weight).logprobs.sum().backward()
    assert hidden.grad is not None
    # Only the target's column has a weight; its slope is 1 / (1 + e^20). log p itself is known to 6e-8 of the logit.
    assert float(hidden.grad) == pytest.approx(1 / (1 + torch.tensor(20.0, dtype=torch.float64).exp().item()), abs=2e-6)


def test_no_rows_and_no_targets() -> None:
    hidden, weight, bias, targets = inputs(0)
    found = linear_logprobs(hidden, None, targets, weight, bias, need_entropy=True, top_k=2)
    mixture(found).backward()
    assert found.logprobs.shape == (0,)
    assert found.top is not None
    assert found.top.tokens.shape == (0, 2)
    assert weight.grad is not None
    assert weight.grad.eq(0).all()
    hidden, weight, bias, _ = inputs()
    nothing = torch.zeros(0, dtype=torch.int64)
    linear_logprobs(hidden, nothing, nothing, weight, bias).logprobs.sum().backward()
    for x in (hidden, weight, bias):
        assert x.grad is not None
        assert x.grad.eq(0).all()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    found = linear_logprobs(hidden, None, torch.tensor([0, 0]), weight, need_entropy=True)
    assert found.entropies is not None
    assert found.logprobs.tolist() == [0.0, -2e4]
    assert found.entropies.tolist() == [0.0, 0.0]
    (found.logprobs + found.entropies).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[:, 0].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("form", [f for f in FORMS if "softcap" not in f], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_a_bias_of_minus_infinity_rules_a_token_out(form: dict[str, Any]) -> None:
    """All results and gradients are those over the rest of the vocabulary."""
    hidden, weight, bias, _ = inputs()
    out = torch.tensor([0, 1, 2, 3, 9, 22])  # the first tile is of such tokens only
    kept = torch.tensor([v for v in range(23) if v not in out])
    with torch.no_grad():
        bias[out] = -torch.inf
    targets = torch.arange(9)
    ours = linear_logprobs(hidden, ROWS, kept[targets], weight, bias, need_entropy=True, top_k=3, **form)
    theirs = defined(hidden, ROWS, targets, weight[kept], bias[kept], top_k=3, **form)
    for a, b in ((ours.logprobs, theirs.logprobs), (ours.entropies, theirs.entropies)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad(mixture(ours), [hidden, weight, bias])
    wanted = torch.autograd.grad(mixture(theirs), [hidden, weight, bias])
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, ROWS], ids=["identity", "shared"])
def test_hidden_states_may_lie_in_any_order(dtype: torch.dtype, rows: Tensor | None) -> None:
    hidden, weight, bias, targets = inputs(dtype=dtype)
    other = hidden.detach().t().contiguous().t().requires_grad_()
    assert not other.is_contiguous()
    gradients = []
    for given in (hidden, other):
        found = linear_logprobs(given, rows, targets, weight, bias, need_entropy=True)
        gradients.append(torch.autograd.grad(mixture(found), given)[0])
    assert gradients[0].equal(gradients[1])


def test_repeated_runs_are_equal_to_the_bit() -> None:
    results = []
    for _ in range(2):
        hidden, weight, bias, targets = inputs(700, 16, 900, dtype=torch.float32)
        found = linear_logprobs(hidden, torch.arange(700) // 3, targets, weight, bias, need_entropy=True, top_k=2)
        results.append([*torch.autograd.grad(mixture(found), [hidden, weight, bias]), found.logprobs])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "must be positive"),
        ({"softcap": 0.0}, "write None"),
        ({"hidden": torch.zeros(2, 3, 5)}, r"\[M, D\]"),
        ({"hidden": torch.zeros(9, 4)}, r"\(9, 4\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must be \[9\]"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"targets must be \[3\]"),
        ({"rows": torch.full((9,), 9)}, r"rows must lie in \[0, 9\), got 9"),
        ({"targets": torch.full((9,), -100)}, "got -100: leave ignored tokens out"),
        ({"targets": torch.full((9,), 23)}, r"\[0, 23\), got 23"),
        ({"targets": torch.zeros(9)}, "must be int64"),
        ({"bias": torch.zeros(9)}, r"bias must be \[23\]"),
        ({"top_k": 24}, "the 23 tokens"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    hidden, weight, bias, targets = inputs()
    given = {"hidden": hidden, "rows": None, "targets": targets, "weight": weight, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**given)
