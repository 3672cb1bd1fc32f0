"""`Context`: masking on entry, rewards by row and by token, and calling parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenloom import Algorithm, Schedule, bind, part
from tokenloom.context import Context
from tokenloom.testing import random_batch

NAN = float("nan")
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


def scored(rewards: list[float]) -> Context:
    ctx = Context({}, MASK)
    ctx.put_rewards(torch.tensor(rewards))
    return ctx


def test_what_lies_off_the_mask_is_zeroed_on_entry() -> None:
    hostile = torch.full((3, 3), NAN)
    hostile[MASK] = 2.0
    ctx = Context({"logprobs": hostile, "extra": hostile[..., None].expand(3, 3, 2), "tokens": MASK.long() + 1}, MASK)
    assert torch.equal(ctx.get("logprobs"), 2.0 * MASK)
    assert torch.equal(ctx.get("extra"), 2.0 * MASK[..., None].expand(3, 3, 2))
    assert ctx.get("tokens").min() == 1  # ids are not values
    assert torch.equal(hostile[MASK], torch.full((3,), 2.0))
    assert hostile[~MASK].isnan().all()  # the caller's tensor is untouched


def test_none_is_absent() -> None:
    ctx = Context({"values": None}, MASK)
    assert ctx.get("values") is None
    assert "values" not in ctx.values


def test_an_outcome_sits_on_the_last_sampled_token() -> None:
    ctx = scored([1.0, 2.0, 3.0])
    assert ctx.get("token_rewards").tolist() == [[0, 1, 0], [2, 0, 0], [0, 0, 0]]
    assert ctx.get("rewards").tolist() == [1, 2, 3]


def test_row_rewards_after_token_rewards_keep_both_consistent() -> None:
    ctx = scored([1.0, 2.0, 3.0])
    ctx.put_rewards(torch.tensor([[0.5, 1.0, NAN], [2.0, NAN, NAN], [NAN, NAN, NAN]]))
    # An empty row holds no token reward, so its outcome stays what it was.
    assert ctx.get("rewards").tolist() == [1.5, 2, 3]
    ctx.put_rewards(torch.tensor([1.0, 5.0, 0.0]))
    # Row 0: 1.0 - 1.5 is added on the last token; what the first token earned stays.
    assert ctx.get("token_rewards").tolist() == [[0.5, 0.5, 0], [5, 0, 0], [0, 0, 0]]
    assert ctx.get("rewards").tolist() == [1, 5, 0]
    assert torch.equal(ctx.get("token_rewards").sum(-1)[:2], ctx.get("rewards")[:2])


def test_unscorable_rows_stay_so_until_a_part_scores_them() -> None:
    ctx = scored([NAN, 1.0, 0.0])
    assert ctx.get("token_rewards")[0, 1].isnan()
    ctx.put_rewards(ctx.get("rewards") + 1)
    assert ctx.get("rewards")[0].isnan()
    assert ctx.get("token_rewards")[0, 1].isnan()
    ctx.put_rewards(ctx.get("rewards").nan_to_num(0.25))
    assert ctx.get("rewards").tolist() == [0.25, 2, 1]
    assert ctx.get("token_rewards").tolist() == [[0, 0.25, 0], [2, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("value", [torch.zeros(3, 1), torch.zeros(2), torch.zeros(()), torch.zeros(3, 3, 1), 1.0])
def test_rewards_of_another_shape_are_refused(value: Tensor) -> None:
    with pytest.raises(ValueError, match=r"rewards must be \[B\] or \[B, T\] = \(3, 3\), got"):
        scored([1.0, 2.0, 3.0]).put_rewards(value)


def test_the_ratio_follows_from_the_log_ratio() -> None:
    ctx = Context({"log_ratio": torch.full((3, 3), 100.0)}, MASK)
    ratio = ctx.get("ratio")
    assert ratio[~MASK].eq(1).all()
    torch.testing.assert_close(ratio[MASK], torch.full((3,), 20.0).exp())
    assert Context({}, MASK).get("ratio") is None


def test_calls_inject_by_name_and_resolve_schedules() -> None:
    @part("test/call", stage="weight", scope="token", paper="none")
    def call(
        mask: Tensor, entropies: Tensor | None = None, step: int = -1, total_steps: int | None = -1, *, rho: float = 1.0
    ) -> tuple[bool, int, int | None, float]:
        return entropies is None, step, total_steps, rho

    bound = bind("test/call", rho=Schedule("linear", 1.0, 0.0, steps=4))
    assert Context({"step": 1}, MASK).call(bound) == (True, 1, None, 0.75)
    assert Context({"step": 2, "total_steps": 9, "entropies": MASK * 1.0}, MASK).call(bound) == (False, 2, 9, 0.5)
    assert Context({}, MASK).call(bind("test/call")) == (True, -1, None, 1.0)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"part 'entropy-bonus' needs 'entropies', which is not there; present: mask"):
        Context({}, MASK).call(bind("entropy-bonus"))


def test_a_multiplier_takes_the_parameters_of_its_part() -> None:
    def multiplier(ratio: Tensor, *, factor: float = 99.0) -> Tensor:
        return factor * ratio

    @part("test/factor", stage="surrogate", scope="token", paper="none", multiplier=multiplier)
    def factored(log_ratio: Tensor, *, factor: float = 2.0) -> Tensor:
        return factor * log_ratio.exp()

    ctx = Context({"log_ratio": torch.zeros(3, 3)}, MASK)
    # The default is declared at the part; what the multiplier declares must not win.
    assert ctx.multiplier(bind("test/factor")).tolist() == [[2] * 3] * 3  # type: ignore[union-attr]  # it has one
    assert ctx.multiplier(bind("test/factor", factor=5.0)).tolist() == [[5] * 3] * 3  # type: ignore[union-attr]
    assert ctx.multiplier(bind("grpo")) is None


def test_a_term_that_reads_the_ratio_gets_its_gradient() -> None:
    # The loss measures the ratio without gradient before its terms run.
    @part("test-ratio", stage="term", scope="token", paper="none")
    def just_the_ratio(ratio: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, ratio, 0.0)

    rollouts, signals = random_batch(0)
    algorithm = Algorithm.compose(advantage="grpo", surrogate="importance").override(terms=["test-ratio"])
    got = algorithm.coefficients(rollouts, signals)["logprobs"]
    plain = algorithm.override(terms=[]).coefficients(rollouts, signals)["logprobs"]
    ratio = (signals.named()["logprobs"] - signals.named()["old_logprobs"]).exp()
    expected = plain - torch.where(rollouts.mask, ratio, 0.0) / rollouts.mask.sum()
    torch.testing.assert_close(got, expected)
