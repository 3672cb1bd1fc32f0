"""The laws themselves: each accepts a sound part and fails for a part broken in just its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom import get_part, part, parts
from tokenloom.laws import laws_for
from tokenloom.masked import group_mean, to_tokens, where_mask
from tokenloom.testing import HOSTILE, TOLERANCE, check, pairs, random_batch, same, vocabulary_values
from tokenloom.vocabulary import known_names

Rule = Callable[..., Any]
BROKEN: dict[str, Callable[[], Rule]] = {}


def breaks(law: str, variant: str = "") -> Callable[[Callable[[], Rule]], Callable[[], Rule]]:
    """Collect a factory that registers a part under `test-broken/...` and returns it."""

    def keep(factory: Callable[[], Rule]) -> Callable[[], Rule]:
        BROKEN[f"{law} {variant}".strip()] = factory
        return factory

    return keep


def broken(stage: str, scope: str, **rest: Any) -> Callable[[Rule], Rule]:
    return part("test-broken/part", stage=stage, scope=scope, paper="none", **rest)  # type: ignore[arg-type]


@breaks("shape-and-dtype", "shape")
def _() -> Rule:
    @broken("advantage", "row")
    def rule(rewards: Tensor, mask: Tensor) -> Tensor:
        return rewards

    return rule


@breaks("shape-and-dtype", "dtype")
def _() -> Rule:
    @broken("advantage", "row")
    def rule(rewards: Tensor, mask: Tensor) -> Tensor:
        return to_tokens(rewards, mask).float()

    return rule


@breaks("branches-are-counts-of-sampled-tokens")
def _() -> Rule:
    @broken("branch", "row")
    def rule(tokens: Tensor) -> Tensor:
        return torch.ones_like(tokens)

    return rule


@breaks("shares-lie-between-zero-and-one")
def _() -> Rule:
    @broken("blend", "row")
    def rule(rewards: Tensor) -> Tensor:
        return 1 + rewards.nan_to_num().abs()

    return rule


@breaks("numbers-by-name-that-padding-and-order-leave-alone")
def _() -> Rule:
    @broken("metric", "batch")
    def rule(advantages: Tensor) -> dict[str, Tensor]:
        return {"mean": advantages.mean()}

    return rule


@breaks("shape-and-dtype", "keep")
def _() -> Rule:
    @broken("select", "row")
    def rule(lengths: Tensor) -> Tensor:
        return (lengths > 2).long()

    return rule


@breaks("finite-and-zero-off-the-mask", "infinite")
def _() -> Rule:
    @broken("advantage", "row")
    def rule(rewards: Tensor, mask: Tensor) -> Tensor:
        return to_tokens(1 / rewards, mask)

    return rule


@breaks("finite-and-zero-off-the-mask", "leaking")
def _() -> Rule:
    @broken("weight", "token")
    def rule(mask: Tensor, entropies: Tensor) -> Tensor:
        return torch.ones_like(entropies)

    return rule


@breaks("hostile-padding-never-leaks", "value")
def _() -> Rule:
    @broken("weight", "token")
    def rule(entropies: Tensor, mask: Tensor) -> Tensor:
        return entropies * mask  # nan * 0

    return rule


@breaks("hostile-padding-never-leaks", "gradient")
def _() -> Rule:
    @broken("term", "token")
    def rule(logprobs: Tensor, mask: Tensor) -> Tensor:
        # The value is clean; the gradient is 0 * exp(inf).
        return where_mask(logprobs.exp(), mask)

    return rule


@breaks("hostile-padding-never-leaks", "gradient-of-a-chunk-signal")
def _() -> Rule:
    @broken("term", "token")
    def rule(full_ref_kl: Tensor, mask: Tensor) -> Tensor:
        return where_mask(full_ref_kl.exp(), mask)

    return rule


@breaks("padding-changes-nothing")
def _() -> Rule:
    @broken("aggregate", "batch")
    def rule(mask: Tensor) -> Tensor:
        return mask.double() / mask.numel()

    return rule


@breaks("row-order-changes-nothing")
def _() -> Rule:
    @broken("advantage", "batch")
    def rule(rewards: Tensor, mask: Tensor) -> Tensor:
        return to_tokens(rewards.cumsum(0), mask)

    return rule


@breaks("group-labels-change-nothing")
def _() -> Rule:
    @broken("advantage", "row")
    def rule(rewards: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
        return to_tokens(rewards * (group_ids > 5), mask)

    return rule


@breaks("batch-equals-loop", "row")
def _() -> Rule:
    @broken("advantage", "row")
    def rule(rewards: Tensor, mask: Tensor) -> Tensor:
        return to_tokens(rewards - rewards.mean(), mask)

    return rule


@breaks("batch-equals-loop", "group")
def _() -> Rule:
    @broken("advantage", "group")
    def rule(rewards: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
        return to_tokens(rewards - group_mean(rewards, torch.zeros_like(group_ids)), mask)

    return rule


@breaks("tokens-do-not-see-each-other")
def _() -> Rule:
    @broken("weight", "token")
    def rule(entropies: Tensor, mask: Tensor) -> Tensor:
        return where_mask(entropies, mask).cumsum(-1) * mask

    return rule


@breaks("inputs-stay-untouched")
def _() -> Rule:
    @broken("credit", "token")
    def rule(advantages: Tensor, mask: Tensor) -> Tensor:
        return advantages.mul_(2).where(mask, torch.zeros_like(advantages))

    return rule


@breaks("same-inputs-same-result")
def _() -> Rule:
    @broken("weight", "token")
    def rule(entropies: Tensor, mask: Tensor) -> Tensor:
        return torch.rand_like(entropies) * mask

    return rule


@breaks("nothing-sampled-gives-nothing", "not-finite")
def _() -> Rule:
    @broken("aggregate", "batch")
    def rule(mask: Tensor) -> Tensor:
        return mask.double() / mask.sum()

    return rule


@breaks("nothing-sampled-gives-nothing", "not-zero")
def _() -> Rule:
    @broken("aggregate", "batch")
    def rule(mask: Tensor, entropies: Tensor) -> Tensor:
        return mask / mask.sum() if mask.any() else torch.ones_like(entropies)

    return rule


@breaks("never-negative")
def _() -> Rule:
    @broken("weight", "token")
    def rule(advantages: Tensor, mask: Tensor) -> Tensor:
        return where_mask(advantages, mask)

    return rule


@breaks("carries-no-gradient")
def _() -> Rule:
    @broken("weight", "token")
    def rule(entropies: Tensor, mask: Tensor) -> Tensor:
        return where_mask(entropies, mask)

    return rule


@breaks("unscorable-rows-get-nothing", "nan")
def _() -> Rule:
    @broken("advantage", "row")
    def rule(rewards: Tensor, mask: Tensor) -> Tensor:
        return to_tokens(rewards, mask)

    return rule


@breaks("unscorable-rows-get-nothing", "credit")
def _() -> Rule:
    @broken("advantage", "row")
    def rule(rewards: Tensor, mask: Tensor) -> Tensor:
        return to_tokens(rewards.nan_to_num(0.0) - 0.5, mask)

    return rule


@breaks("constant-groups-get-exactly-zero")
def _() -> Rule:
    @broken("advantage", "group")
    def rule(rewards: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
        # What a framework without a guard does: rounding of the mean over a tiny std.
        scored = ~rewards.isnan()
        centered = where_mask(rewards - group_mean(rewards, group_ids, scored), scored)
        std = group_mean(centered**2, group_ids, scored).sqrt()
        return to_tokens(centered / (std + 1e-8), mask)

    return rule


@breaks("closed-form-equals-autograd", "wrong")
def _() -> Rule:
    def multiplier(ratio: Tensor, lo: float, hi: float) -> Tensor:
        return ratio.clamp(lo, hi)

    @broken("surrogate", "token", multiplier=multiplier)
    def rule(log_ratio: Tensor, advantages: Tensor, mask: Tensor, lo: float = 0.8, hi: float = 1.2) -> Tensor:
        ratio = where_mask(log_ratio, mask).exp()
        return ratio.clamp(lo, hi) * where_mask(advantages, mask)

    return rule


@breaks("closed-form-equals-autograd", "absent")
def _() -> Rule:
    @broken("surrogate", "token")
    def rule(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return where_mask(log_ratio, mask).clamp(-20, 20).exp() * where_mask(advantages, mask)

    return rule


@breaks("on-policy-gradient-is-the-advantage")
def _() -> Rule:
    @broken("surrogate", "token", multiplier=lambda ratio: 2 * ratio)
    def rule(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return 2 * where_mask(log_ratio, mask).exp() * where_mask(advantages, mask)

    return rule


@breaks("any-split-gives-the-same-gradient")
def _() -> Rule:
    @broken("term", "row")
    def rule(logprobs: Tensor, mask: Tensor) -> Tensor:
        # The classic: normalizing inside the part, by what happens to be in the micro-batch.
        return -where_mask(logprobs, mask) / mask.sum().clamp(min=1)

    return rule


@breaks("gathered-ranks-give-the-same-gradient")
def _() -> Rule:
    @broken("weight", "batch")
    def rule(entropies: Tensor, mask: Tensor) -> Tensor:
        position = torch.arange(len(mask), dtype=entropies.dtype)
        return where_mask(position[:, None].expand(mask.shape), mask)

    return rule


@breaks("every-epoch-visits-every-kept-row-once", "missing")
def _() -> Rule:
    @broken("updates", "batch")
    def rule(keep: Tensor) -> list[Tensor]:
        return [keep.nonzero().reshape(-1)[1:]]

    return rule


@breaks("every-epoch-visits-every-kept-row-once", "dropped")
def _() -> Rule:
    @broken("updates", "batch")
    def rule(keep: Tensor) -> list[Tensor]:
        return [torch.arange(len(keep))]

    return rule


@breaks("every-epoch-visits-every-kept-row-once", "uneven")
def _() -> Rule:
    @broken("updates", "batch")
    def rule(keep: Tensor) -> list[Tensor]:
        rows = keep.nonzero().reshape(-1)
        return [rows, rows[:2]]

    return rule


@breaks("limits-enclose-one", "order")
def _() -> Rule:
    @broken("bounds", "token")
    def rule(*, low: float = -0.2) -> tuple[float, float, float]:
        return 1 - low, 1.3, 3.0

    return rule


@breaks("limits-enclose-one", "cap")
def _() -> Rule:
    @broken("bounds", "token")
    def rule() -> tuple[float, float, float]:
        return 0.8, 4.0, 3.0

    return rule


@breaks("logits-keep-their-shape-and-rows", "rows")
def _() -> Rule:
    @broken("sampling", "row")
    def rule(logits: Tensor) -> Tensor:
        return logits - logits.mean()

    return rule


@breaks("logits-keep-their-shape-and-rows", "shape")
def _() -> Rule:
    @broken("sampling", "row")
    def rule(logits: Tensor) -> Tensor:
        return logits[:, :3]

    return rule


# -- decoding ---------------------------------------------------------------------------------------


@breaks("keeps-at-least-one-token-of-every-row")
def _() -> Rule:
    @broken("truncate", "row")
    def rule(probs: Tensor) -> Tensor:
        return probs > 0.5

    return rule


@breaks("half-precision-rows-are-cut-too")
def _() -> Rule:
    @broken("truncate", "row")
    def rule(probs: Tensor) -> Tensor:
        return (probs > 0) & (probs.dtype != torch.bfloat16)

    return rule


@breaks("rows-do-not-see-each-other", "truncate")
def _() -> Rule:
    @broken("truncate", "row")
    def rule(probs: Tensor) -> Tensor:
        return probs >= probs.amax(-1, keepdim=True).amin(0)

    return rule


@breaks("rows-do-not-see-each-other", "shape")
def _() -> Rule:
    @broken("shape", "row")
    def rule(scores: Tensor) -> Tensor:
        return scores - scores.nan_to_num(neginf=0.0).mean()

    return rule


@breaks("names-of-tokens-do-not-matter")
def _() -> Rule:
    @broken("truncate", "row")
    def rule(probs: Tensor) -> Tensor:
        return torch.arange(probs.shape[-1]).expand_as(probs) < 3

    return rule


@breaks("what-is-given-stays-as-it-was")
def _() -> Rule:
    @broken("shape", "row")
    def rule(scores: Tensor) -> Tensor:
        return scores.mul_(2)

    return rule


@breaks("scores-keep-their-shape-and-format")
def _() -> Rule:
    @broken("shape", "row")
    def rule(scores: Tensor) -> Tensor:
        return scores.float()

    return rule


@pytest.mark.parametrize("name", BROKEN)
def test_a_law_fails_for_what_breaks_it(name: str) -> None:
    rule = BROKEN[name]()
    found = get_part("test-broken/part")
    assert found.family == "user"
    law = next(x for x in laws_for(found) if x.name == name.split()[0])
    with pytest.raises(AssertionError, match=r"test-broken/part: "):
        law.check(found)
    with pytest.raises(AssertionError):
        check(rule)


def test_every_law_is_broken_by_some_part() -> None:
    every = {law.name for _, law in pairs()}
    assert {name.split()[0] for name in BROKEN} == every


def test_broken_parts_are_gone_afterwards() -> None:
    assert not [name for name in parts() if name.startswith("test")]


def test_user_parts_are_no_pairs_of_the_library() -> None:
    before = len(list(pairs()))
    BROKEN["never-negative"]()
    assert len(list(pairs())) == before


# -- what sound parts of one's own look like ---------------------------------------------------------


def test_sound_parts_pass_whatever_they_read() -> None:
    @part("test/difficulty", stage="weight", scope="row", paper="none")
    def difficulty(prompts: tuple[dict[str, Any], ...], answers: tuple[str, ...], mask: Tensor) -> Tensor:
        level = torch.tensor([p["difficulty"] + int(a) for p, a in zip(prompts, answers, strict=True)])
        return to_tokens(level.double(), mask)

    @part("test/dict", stage="advantage", scope="row", paper="none", gives=["returns"])
    def given(rewards: Tensor, mask: Tensor) -> dict[str, Any]:
        # The result is found by name, wherever it stands.
        advantages = to_tokens(rewards.nan_to_num(), mask)
        return {"metrics": {"mean": 1.0}, "returns": torch.full_like(advantages, -1.0), "advantages": advantages}

    @part("test/state", stage="advantage", scope="batch", paper="none")
    def stateful(rewards: Tensor, mask: Tensor, state: float | None) -> tuple[Tensor, float]:
        return to_tokens(rewards.nan_to_num() - (state or 0.0) * ~rewards.isnan(), mask), 1.0

    @part("test/epochs", stage="updates", scope="batch", paper="none")
    def epochs(keep: Tensor, *, times: int = 3) -> list[Tensor]:
        return [keep.nonzero().reshape(-1)] * times

    @part(
        "test/entropic", stage="surrogate", scope="token", paper="none", multiplier=lambda entropies: 0 * entropies + 1
    )
    def entropic(logprobs: Tensor, entropies: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return where_mask(logprobs, mask) * where_mask(advantages, mask)

    for rule in (difficulty, given, stateful, epochs, entropic):
        assert check(rule)


def test_check_takes_names_and_refuses_strangers() -> None:
    assert "constant-groups-get-exactly-zero" in check("grpo")
    with pytest.raises(ValueError, match=r"is not a part: decorate the function with @part"):
        check(to_tokens)


def test_declared_properties_waive_laws() -> None:
    names = {law.name for law in laws_for(get_part("clip-cov"))}
    assert "row-order-changes-nothing" not in names
    assert "any-split-gives-the-same-gradient" in names


# -- the batch that the laws use ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_the_batch_has_everything_in_it(seed: int) -> None:
    rollouts, signals = random_batch(seed)
    sizes = rollouts.group_ids.unique(return_counts=True)[1]
    assert len(set(sizes.tolist())) > 1
    assert 1 in sizes
    assert (rollouts.lengths == 0).any()
    # Tool tokens are drawn; what must be there in every batch is padding.
    assert not rollouts.mask.all()
    assert rollouts.rewards is not None
    assert rollouts.rewards[rollouts.group_ids == 3].unique().numel() == 1
    assert signals.logprobs is not None
    assert signals.old_logprobs is not None
    assert ((signals.logprobs - signals.old_logprobs).abs() <= 1.5 + 1e-9).all()
    boundaries = rollouts.group_ids.diff().ne(0).sum()
    assert boundaries > len(sizes) - 1  # scattered


def test_every_vocabulary_name_has_a_value() -> None:
    values = vocabulary_values(*random_batch())
    absent = {n for n in known_names() if values.get(n) is None}
    # What nobody collected is absent: parts that may read it have something to fall back on.
    assert absent == {"state", "branch_weights", "segment_values", "reward_components"}


def test_same_is_strict() -> None:
    one = torch.ones(2, dtype=torch.float64)
    same(one, one + 1e-10, "near")
    same(torch.tensor([float("inf")]), torch.tensor([float("inf")]), "infinite")
    for other in (one + 1e-6, one.float(), torch.ones(3, dtype=torch.float64), one * float("nan"), one * float("inf")):
        with pytest.raises(AssertionError, match="apart"):
            same(one, other, "apart")
    with pytest.raises(AssertionError, match="apart"):
        same(torch.tensor([True]), torch.tensor([False]), "apart")
    assert TOLERANCE[torch.float64] == 1e-9
    assert len(HOSTILE) == 3
