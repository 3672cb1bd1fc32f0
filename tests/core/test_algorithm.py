"""Numbers and gradients of `Algorithm`: worked by hand, by finite differences, under splits, ranks and selection."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom import Algorithm, Plan, Rollouts, Signals, part, presets
from tokenloom.testing import random_batch, same

NAN = float("nan")
PRESETS = sorted(slug for slug, p in presets().items() if p.family != "user")


def batch(rewards: list[float], lengths: list[int], groups: list[int] | None = None, **rest: Any) -> Rollouts:
    return Rollouts.build(
        [[1]] * len(lengths),
        [list(range(2, 2 + n)) for n in lengths],
        groups or [0] * len(lengths),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        **rest,
    )


def zeros(rollouts: Rollouts) -> Signals:
    nothing = torch.zeros(rollouts.mask.shape, dtype=torch.float64)
    return Signals(logprobs=nothing, old_logprobs=nothing, ref_logprobs=nothing, entropies=nothing, values=nothing,
                   old_values=nothing)  # fmt: skip


def loss_of(algorithm: Algorithm, signals: Signals, plan: Plan) -> Tensor:
    found = [algorithm.loss(signals.rows(u.rows), u)[0] for u in plan.updates]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64)


def gradient(algorithm: Algorithm, signals: Signals, pieces: list[Any]) -> Tensor:
    """d loss / d signal summed over pieces, the signals of `loss_needs` one after the other."""
    leaves = {n: signals.named()[n].clone().requires_grad_() for n in sorted(algorithm.loss_needs)}
    for piece in pieces:
        loss, _ = algorithm.loss(signals.replace(**leaves).rows(piece.rows), piece)
        if loss.requires_grad:
            loss.backward()
    return torch.cat([(torch.zeros_like(v) if v.grad is None else v.grad).reshape(-1) for v in leaves.values()])


# -- numbers ----------------------------------------------------------------------------------------


def test_grpo_worked_by_hand() -> None:
    rollouts = batch([1.0, 0.0], [3, 2])
    logprobs = torch.full((2, 3), -1.0, dtype=torch.float64)
    ratio = torch.tensor([[1.0, 1.5, 0.5], [1.1, 0.5, 1.0]], dtype=torch.float64)
    # e^(ref - logprob): 2 at the first token of row 0, 1/2 at that of row 1, else 1.
    drift = torch.tensor([[2.0, 1.0, 1.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
    signals = Signals(logprobs=logprobs, old_logprobs=logprobs - ratio.log(), ref_logprobs=logprobs + drift.log())
    algorithm = Algorithm.from_recipe({"preset": "grpo", "advantage": {"eps": 0.0}, "kl_coef": 0.04})

    plan = algorithm.plan(rollouts, signals)
    # mean 1/2, std with Bessel sqrt((1/4 + 1/4) / 1) = 1/sqrt2, so A = +-(1/2) / (1/sqrt2) = +-1/sqrt2
    a = 1 / math.sqrt(2)
    same(plan.values["advantages"], torch.tensor([[a, a, a], [-a, -a, 0]], dtype=torch.float64), "advantages")
    # two rows, of 3 and 2 tokens: 1/(2*3) and 1/(2*2)
    same(plan.values["scale"], torch.tensor([[1 / 6] * 3, [1 / 4, 1 / 4, 0]], dtype=torch.float64), "scale")

    # Policy, scale * ratio * A where the clip [0.8, 1.2] lets it through:
    #   row 0: 1.0 through; 1.5 > 1.2 with A > 0 is blocked; 0.5 with A > 0 goes through
    #   row 1: 1.1 with A < 0 goes through; 0.5 < 0.8 with A < 0 is blocked; the third token is padding
    policy = [[a / 6, 0, 0.5 * a / 6], [-1.1 * a / 4, 0, 0]]
    # KL, k3 = e^x - x - 1 with x = ref - logprob: -d k3 / d logprob = e^x - 1, times 0.04 * scale
    kl = [[0.04 / 6 * (2 - 1), 0, 0], [0.04 / 4 * (0.5 - 1), 0, 0]]
    expected = torch.tensor(policy, dtype=torch.float64) + torch.tensor(kl, dtype=torch.float64)
    found = algorithm.coefficients(rollouts, signals)
    assert set(found) == {"logprobs"}
    same(found["logprobs"], expected, "coefficients")

    # Objectives: row 0 min(1, 1)a + min(1.5, 1.2)a + min(0.5, 0.8)a = 2.7 a;
    #             row 1 min(-1.1a, -1.1a) + min(-0.5a, -0.8a) = -1.9 a
    # k3: 2 - ln 2 - 1 and 1/2 + ln 2 - 1
    value = -(2.7 * a / 6 - 1.9 * a / 4) + 0.04 * ((1 - math.log(2)) / 6 + (math.log(2) - 0.5) / 4)
    loss, metrics = algorithm.loss(signals, plan.updates[0])
    assert float(loss) == pytest.approx(value, abs=1e-12)
    result = metrics.result()
    assert result["loss/policy"] == pytest.approx(-(2.7 * a / 6 - 1.9 * a / 4))
    assert result["surrogate/clipped"] == pytest.approx(2 / 5)
    assert result["ratio/mean"] == pytest.approx((1 + 1.5 + 0.5 + 1.1 + 0.5) / 5)


def test_the_nll_of_right_answers_has_its_own_scale_and_weights() -> None:
    # Two right rows of 2 and 1 tokens, a wrong one of 3: 3 tokens are counted, each gets coef / 3.
    rollouts = batch([1.0, 0.0, 1.0], [2, 3, 1])
    nll = {"part": "vapo/positive-nll", "coef": 0.1, "weight": ["vapo/positive"],
           "aggregate": {"part": "token-mean", "count": "weights"}}  # fmt: skip
    algorithm = Algorithm.compose(advantage={"part": "reinforce", "baseline": 0.0}, terms=[nll])
    got = algorithm.coefficients(rollouts, zeros(rollouts))["logprobs"]
    # The policy term has its own mean over 6 tokens and A = reward.
    c = 1 / 6 + 0.1 / 3
    same(got, torch.tensor([[c, c, 0], [0, 0, 0], [c, 0, 0]], dtype=torch.float64), "nll")


def test_weights_of_a_term_leave_those_of_the_policy_alone() -> None:
    rollouts, signals = random_batch(2)
    alone = Algorithm.compose(advantage="grpo", weight=[{"part": "entropy-8020", "rho": 0.3}])
    # Two weight parts: the second sees the product so far, which must not become the policy's.
    beside = alone.override(terms=[{"part": "entropy-bonus", "weight": ["vapo/positive", "tis"]}])
    a, b = (x.plan(rollouts, signals) for x in (alone, beside))
    assert torch.equal(a.updates[0].tensors["weights"], b.updates[0].tensors["weights"])
    assert torch.equal(a.values["weights"], b.values["weights"])
    c, d = (x.coefficients(rollouts, signals)["logprobs"] for x in (alone, beside))
    same(c, d, "policy coefficients")


def test_value_pretraining_silences_the_policy_and_nothing_else() -> None:
    rollouts, signals = random_batch(3)
    algorithm = Algorithm.from_recipe({"preset": "vapo", "value_pretraining": 5})
    before = algorithm.coefficients(rollouts, signals, step=4)
    after = algorithm.coefficients(rollouts, signals, step=5)
    assert (before["logprobs"] == 0).all()
    assert (after["logprobs"] != 0).any()
    assert (before["values"] != 0).any()
    same(before["values"], after["values"], "the critic learns alike")


DETACHED = {"aspo", "cispo", "ctpo", "dhpo", "gspo-token", "hapo/redistribute"}


@pytest.mark.parametrize("slug", PRESETS)
def test_coefficients_are_finite_differences_of_the_loss(slug: str) -> None:
    rollouts, signals = random_batch(21, rows=5, width=3)
    algorithm = Algorithm.from_recipe(slug)
    if algorithm.refill:
        algorithm = algorithm.override(select=None)
    if slug == "troll":
        # The pull back to the projection holds the projection still.
        algorithm = algorithm.override(terms=None)
    plan = algorithm.plan(rollouts, signals, one_update=True, step=60)
    plan = Plan(tuple(algorithm.refresh(u, signals.rows(u.rows)) for u in plan.updates), plan.values, {}, {})
    found = algorithm.coefficients(rollouts, signals, step=60)
    assert set(found) == algorithm.loss_needs
    h = 1e-6
    for name, coefficients in found.items():
        value = signals.named()[name]
        numeric = torch.zeros_like(value)
        for at in range(value.numel()):
            up, down = value.clone(), value.clone()
            up.view(-1)[at] += h
            down.view(-1)[at] -= h
            high, low = (loss_of(algorithm, signals.replace(**{name: v}), plan) for v in (up, down))
            numeric.view(-1)[at] = -(high - low) / (2 * h)
        if name == "logprobs" and DETACHED & {b.part.name for _, b in algorithm.bound_parts()}:
            # A weight is detached on purpose: the difference quotient sees what the gradient must not.
            continue
        torch.testing.assert_close(coefficients, numeric, rtol=1e-5, atol=1e-7)


# -- what is needed ---------------------------------------------------------------------------------

NEEDS: dict[str, tuple[set[str], set[str]]] = {
    "reinforce": (set(), {"logprobs"}),
    "rloo": (set(), {"logprobs"}),
    "reinforce-pp": (set(), {"logprobs"}),
    "ppo-clip": ({"old_logprobs"}, {"logprobs"}),  # four epochs
    "ppo-gae": ({"old_values"}, {"logprobs", "values"}),
    "grpo": ({"ref_logprobs"}, {"logprobs"}),
    "dr-grpo": (set(), {"logprobs"}),
    "dapo": (set(), {"logprobs"}),
    "gspo": (set(), {"logprobs"}),
    "gspo-token": (set(), {"logprobs"}),
    "cispo": (set(), {"logprobs"}),
    "sapo": (set(), {"logprobs"}),
    "dual-clip": (set(), {"logprobs"}),
    "entropy-8020": ({"entropies"}, {"logprobs"}),
    "clip-cov": (set(), {"logprobs"}),
    "kl-cov": (set(), {"logprobs"}),
    "tis": ({"old_logprobs"}, {"logprobs"}),  # compared with the sampler's in the plan
    "mis": ({"old_logprobs"}, {"logprobs"}),
    "vapo": ({"old_values"}, {"logprobs", "values"}),
    "a3po": ({"old_logprobs"}, {"logprobs"}),  # which tokens were unlikely
    "aapo": (set(), {"logprobs"}),
    "ar-lopti": ({"old_logprobs", "ref_logprobs"}, {"logprobs"}),
    "aspo": ({"old_logprobs", "ref_logprobs"}, {"logprobs", "entropies"}),  # three epochs
    "balanced-aggregation": (set(), {"logprobs"}),
    "canon": ({"entropies"}, {"logprobs"}),
    "copo": (set(), {"logprobs"}),
    "ctpo": ({"old_logprobs"}, {"logprobs"}),  # several mini-batches
    "d3s": ({"entropies"}, {"logprobs"}),
    "delta-credit": ({"old_logprobs", "head_inputs"}, {"logprobs"}),
    "dhpo": (set(), {"logprobs"}),
    "gtpo-entropy": ({"entropies"}, {"logprobs"}),
    "gtpo-trajectory": ({"entropies"}, {"logprobs"}),
    "ha-dw": (set(), {"logprobs"}),
    "hapo": ({"entropies"}, {"logprobs"}),
    "holder-po": (set(), {"logprobs"}),
    "ktae": (set(), {"logprobs"}),
    "length-curriculum": ({"ref_logprobs"}, {"logprobs"}),
    "rmt": (set(), {"logprobs"}),
    "segment-po": ({"old_logprobs", "ref_logprobs"}, {"logprobs"}),
    "spine": ({"entropies"}, {"logprobs", "entropies"}),
    "tempo": (set(), {"logprobs"}),
    "temporal-scheduling": (set(), {"logprobs"}),
    "thr": ({"hidden_influence", "ref_logprobs"}, {"logprobs"}),
    "troll": ({"old_support"}, {"logprobs", "support_logprobs"}),
    "flow-tracer": ({"answer_flow"}, {"logprobs"}),
    "attention-entropy": ({"attention_entropy"}, {"logprobs"}),
    "tw-grpo": ({"position_divergence"}, {"logprobs"}),
}


def test_every_preset_is_in_the_table() -> None:
    assert sorted(NEEDS) == PRESETS


@pytest.mark.parametrize("slug", PRESETS)
def test_a_preset_asks_for_what_it_reads_and_nothing_else(slug: str) -> None:
    algorithm = Algorithm.from_recipe(slug)
    assert (set(algorithm.needs), set(algorithm.loss_needs)) == NEEDS[slug]
    rollouts, signals = random_batch(4)
    named = signals.named()
    before = Signals().replace(**{n: named[n] for n in algorithm.needs})
    plan = algorithm.plan(rollouts, before, step=60)
    assert plan.updates
    alive = Signals().replace(**{n: named[n] for n in algorithm.loss_needs})
    for update in plan.updates:
        loss, _ = algorithm.loss(alive.rows(update.rows), update)
        assert loss.isfinite()
    for name in algorithm.loss_needs:
        with pytest.raises(ValueError, match=name):
            algorithm.loss(alive.replace(**{name: None}).rows(plan.updates[0].rows), plan.updates[0])


def test_several_updates_need_the_old_policy() -> None:
    for updates in ({"epochs": 2}, {"mini_batches": 2}):
        algorithm = Algorithm.from_recipe({"preset": "grpo", "updates": updates})
        assert algorithm.needs == {"old_logprobs", "ref_logprobs"}


def test_an_updates_part_of_ones_own_may_step_twice() -> None:
    @part("test/two-pass", stage="updates", scope="batch", paper="none")
    def two_pass(keep: Tensor) -> list[Tensor]:
        return [keep.nonzero().reshape(-1)] * 2

    algorithm = Algorithm.compose(advantage="grpo", updates="test/two-pass")
    # Without the old policy the second pass would compare the new policy with itself.
    assert "old_logprobs" in algorithm.needs
    rollouts, signals = random_batch(4)
    assert len(algorithm.plan(rollouts, signals).updates) == 2


def test_on_policy_the_old_policy_is_the_forward_itself() -> None:
    rollouts, signals = random_batch(5)
    algorithm = Algorithm.from_recipe("gspo")
    without = algorithm.coefficients(rollouts, signals.replace(old_logprobs=None))
    with_it = algorithm.coefficients(rollouts, signals.replace(old_logprobs=signals.logprobs))
    same(without["logprobs"], with_it["logprobs"], "on policy")


def test_missing_things_are_named() -> None:
    rollouts, signals = random_batch(5)
    algorithm = Algorithm.from_recipe("grpo")
    with pytest.raises(ValueError, match=r"plan needs rollouts\.rewards"):
        algorithm.plan(rollouts.replace(rewards=None), signals)
    with pytest.raises(ValueError, match="needs 'values', which is not there"):
        Algorithm.from_recipe("ppo-gae").plan(rollouts, Signals(logprobs=signals.logprobs))
    plan = algorithm.plan(rollouts, signals)
    with pytest.raises(ValueError, match=r"the loss needs the signals \['logprobs'\]; got \['entropies'\]"):
        algorithm.loss(Signals(entropies=signals.entropies), plan.updates[0])
    with pytest.raises(ValueError, match="pass the same rows"):
        algorithm.loss(signals, plan.updates[0][[0, 1]])
    with pytest.raises(ValueError, match=r"coefficients need signals\.logprobs"):
        algorithm.coefficients(rollouts, signals.replace(logprobs=None))


# -- the whole batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", [s for s in PRESETS if s != "clip-cov"])
def test_two_ranks_with_groups_straddling_plan_as_one(slug: str) -> None:
    rollouts, signals = random_batch(6)
    algorithm = Algorithm.from_recipe(slug)
    if any("order-dependent" in b.part.properties for _, b in algorithm.bound_parts()):
        # Of answers with as many votes the first wins, so only the order of a group's rows must stay.
        rollouts = rollouts.replace(answers=tuple(str(int(g)) for g in rollouts.group_ids))
    order = torch.tensor([8, 1, 0, 5, 3, 2, 4, 7, 6])
    ranks = [rollouts.rows(order[:5]), rollouts.rows(order[5:])]
    assert set(ranks[0].group_ids.tolist()) & set(ranks[1].group_ids.tolist())
    together = algorithm.plan(rollouts, signals, one_update=True, step=60)
    gathered = algorithm.plan(Rollouts.concat(ranks), signals.rows(order), one_update=True, step=60)
    for name in ("rewards", "token_rewards", "advantages", "weights", "scale", "keep"):
        same(together.values[name][order], gathered.values[name], name)
    assert together.metrics == pytest.approx(gathered.metrics)
    # What a rank would have decided alone is something else.
    assert not torch.allclose(algorithm.plan(ranks[0], signals.rows(order[:5])).values["scale"],
                              gathered.values["scale"][:5])  # fmt: skip


def test_state_is_carried_from_plan_to_plan_and_never_written_into() -> None:
    algorithm = Algorithm.from_recipe("reinforce")
    first = batch([1.0, 0.0], [1, 1])
    second = batch([4.0, 2.0], [1, 1])
    one = algorithm.plan(first, zeros(first))
    # The first batch is its own baseline, 1/2.
    assert one.values["advantages"].tolist() == [[0.5], [-0.5]]
    assert one.state == {"advantage": {"baseline": pytest.approx(0.5)}}
    two = algorithm.plan(second, zeros(second), one.state)
    assert two.values["advantages"].reshape(-1).tolist() == pytest.approx([3.5, 1.5])
    # 0.9 * 0.5 + 0.1 * 3
    assert two.state["advantage"]["baseline"] == pytest.approx(0.75)
    assert one.state["advantage"]["baseline"] == pytest.approx(0.5)
    algorithm.coefficients(second, zeros(second), one.state)
    assert one.state["advantage"]["baseline"] == pytest.approx(0.5)


def test_dynamic_sampling_asks_for_more_and_leaves_no_trace_of_dropped_rows() -> None:
    rollouts, signals = random_batch(7)
    assert rollouts.rewards is not None
    algorithm = Algorithm.from_recipe("dapo")
    assert algorithm.refill
    assert not Algorithm.from_recipe("grpo").refill
    keep = algorithm.keep(rollouts)
    # Group 3 has equal rewards by construction, group 40 a single row.
    assert not keep[(rollouts.group_ids == 3) | (rollouts.group_ids == 40)].any()
    assert keep.any()
    plan = algorithm.plan(rollouts, signals)
    assert torch.equal(plan.values["keep"], keep)
    assert plan.metrics["kept"] == pytest.approx(float(keep.double().mean()))
    visited = torch.cat([u.rows for u in plan.updates])
    assert sorted(visited.tolist()) == keep.nonzero().reshape(-1).tolist()

    found = algorithm.coefficients(rollouts, signals)["logprobs"]
    assert (found[~keep] == 0).all()
    rows = keep.nonzero().reshape(-1)
    alone = algorithm.coefficients(rollouts.rows(rows), signals.rows(rows))["logprobs"]
    same(found[rows], alone, "as if the dropped rows had not been there")
    hostile = signals.logprobs.clone()  # type: ignore[union-attr]  # random_batch gives them
    hostile[~keep] = NAN
    again = algorithm.coefficients(rollouts, signals.replace(logprobs=hostile, old_logprobs=signals.old_logprobs))
    assert torch.equal(found, again["logprobs"])


def test_a_select_part_may_carry_state_into_keep() -> None:
    @part("test/threshold", stage="select", scope="batch", paper="none", refill=True)
    def threshold(outcomes: Tensor, state: float | None) -> tuple[Tensor, float]:
        level = 0.0 if state is None else state
        return outcomes >= level, float(outcomes.mean())

    algorithm = Algorithm.compose(advantage="grpo", select="test/threshold")
    rollouts = batch([0.0, 1.0], [1, 1])
    assert algorithm.keep(rollouts).tolist() == [True, True]
    state = algorithm.plan(rollouts, zeros(rollouts)).state
    assert algorithm.keep(rollouts, state).tolist() == [False, True]
    assert algorithm.plan(rollouts, zeros(rollouts), state).values["keep"].tolist() == [False, True]


def test_a_batch_with_nothing_kept() -> None:
    rollouts = batch([1.0, 1.0], [2, 1])
    algorithm = Algorithm.from_recipe("dapo")
    plan = algorithm.plan(rollouts, zeros(rollouts))
    assert plan.updates == ()
    assert (plan.metrics["kept"], plan.metrics["live"]) == (0, 0)
    assert (plan.values["scale"] == 0).all()
    assert (algorithm.coefficients(rollouts, zeros(rollouts))["logprobs"] == 0).all()


@pytest.mark.parametrize("slug", PRESETS)
def test_empty_batches_and_empty_responses(slug: str) -> None:
    algorithm = Algorithm.from_recipe(slug)
    full, signals = random_batch(8)
    nobody = algorithm.plan(full.rows([]), signals.rows([]))
    assert nobody.updates == ()
    silent, nothing = full.rows([0, 1]), signals.rows([0, 1])
    silent = replace(
        silent,
        **{n: getattr(silent, n)[:, :0] for n in ("tokens", "mask", "sampler_logprobs")},
        lengths=silent.lengths * 0,
        extras={n: v[:, :0] if v.ndim > 1 else v for n, v in silent.extras.items()},
    )
    nothing = Signals().replace(**{n: v[:, :0] for n, v in nothing.named().items()})
    for values in algorithm.coefficients(silent, nothing).values():
        assert values.shape[:2] == (2, 0)


def test_a_group_of_one_gets_no_credit() -> None:
    rollouts = batch([1.0, 1.0, 0.0], [1, 1, 1], [5, 9, 9])
    for slug in ("grpo", "rloo", "dr-grpo"):
        found = Algorithm.from_recipe(slug).plan(rollouts, zeros(rollouts)).values["advantages"]
        assert found[0].item() == 0
        assert found[1].item() > 0


@pytest.mark.parametrize("slug", PRESETS)
def test_unscorable_rows_teach_nothing(slug: str) -> None:
    rollouts, signals = random_batch(9)
    rewards = rollouts.rewards.clone()  # type: ignore[union-attr]  # random_batch gives them
    rewards[1] = NAN
    algorithm = Algorithm.from_recipe(slug).override(terms=None, select=None)
    found = algorithm.coefficients(rollouts.replace(rewards=rewards), signals, step=60)
    assert (found["logprobs"][1] == 0).all()
    assert found["logprobs"].isfinite().all()
    assert (found["logprobs"] != 0).any()
    advantages = algorithm.plan(rollouts.replace(rewards=rewards), signals).values["advantages"]
    others = torch.tensor([0, *range(2, 9)])
    alone = algorithm.plan(rollouts.rows(others), signals.rows(others)).values["advantages"]
    same(advantages[others], alone, "statistics are those of the other rows")


# -- updates, splits, schedules ---------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["token-mean", "sequence-mean"])
def test_each_update_is_normalized_by_itself(aggregate: str) -> None:
    rollouts, signals = random_batch(10)
    algorithm = Algorithm.compose(
        advantage="grpo", aggregate=aggregate, updates={"part": "mini-batches", "epochs": 2, "mini_batches": 3}
    )
    plan = algorithm.plan(rollouts, signals)
    assert len(plan.updates) == 6
    for epoch in (plan.updates[:3], plan.updates[3:]):
        assert sorted(torch.cat([u.rows for u in epoch]).tolist()) == list(range(len(rollouts)))
    for update in plan.updates:
        if update.tensors["mask"].any():
            assert float(update.tensors["scale"].sum()) == pytest.approx(1.0)
        # A group is whole in every update, and advantages were settled before the deal.
        for group in rollouts.group_ids[update.rows].unique():
            assert int((rollouts.group_ids[update.rows] == group).sum()) == int((rollouts.group_ids == group).sum())
        assert torch.equal(update.tensors["advantages"], plan.values["advantages"][update.rows])
        assert torch.equal(update.tensors["old_logprobs"], plan.values["old_logprobs"][update.rows])


def test_the_deal_follows_the_generator() -> None:
    rollouts, signals = random_batch(10)
    algorithm = Algorithm.compose(advantage="grpo", updates={"part": "mini-batches", "mini_batches": 3})

    def deal(**rest: Any) -> list[list[int]]:
        return [u.rows.tolist() for u in algorithm.plan(rollouts, signals, **rest).updates]

    assert deal(step=3) == deal(step=3)
    assert deal(generator=torch.Generator().manual_seed(1)) == deal(generator=torch.Generator().manual_seed(1), step=4)
    assert len({str(deal(step=s)) for s in range(6)}) > 1


@pytest.mark.parametrize("slug", PRESETS)
@pytest.mark.parametrize("size", [1, 4])
def test_any_split_gives_the_same_gradient(slug: str, size: int) -> None:
    rollouts, signals = random_batch(11)
    algorithm = Algorithm.from_recipe({"preset": slug, "updates": {"mini_batches": 1, "epochs": 1}})
    if slug == "clip-cov":
        algorithm = algorithm.override(weight={"clip-cov": {"lb": 0.0, "k": 0.2}})
    update = algorithm.plan(rollouts, signals, step=60).updates[0]
    update = algorithm.refresh(update, signals.rows(update.rows))
    whole = gradient(algorithm, signals, [update])
    assert (whole != 0).any()
    order = torch.randperm(len(update), generator=torch.Generator().manual_seed(size))
    same(whole, gradient(algorithm, signals, [update[rows] for rows in order.split(size)]), "split")


# A reference, the other prompts, or the entropy still tell the rows of a constant group apart.
TEACHES_CONSTANT_GROUPS = {"aapo", "copo", "gtpo-trajectory", "rmt"}


@pytest.mark.parametrize("slug", PRESETS)
def test_rows_that_are_not_live_may_be_skipped(slug: str) -> None:
    rollouts, signals = random_batch(12)
    algorithm = Algorithm.from_recipe(slug).override(select=None)
    update = algorithm.plan(rollouts, signals, one_update=True, step=60).updates[0]
    update = algorithm.refresh(update, signals.rows(update.rows))
    same(gradient(algorithm, signals, [update]), gradient(algorithm, signals, [update[update.live_rows]]), "live rows")
    if not algorithm.terms and algorithm.advantage.part.scope == "group" and slug not in TEACHES_CONSTANT_GROUPS:
        # The rows of a constant group, of a group of one and without tokens teach nothing.
        dead = (rollouts.group_ids == 3) | (rollouts.group_ids == 40) | (rollouts.lengths == 0)
        assert not update.live[dead].any()
        assert len(update.live_rows) < len(update)


def test_a_row_with_only_a_term_is_live() -> None:
    rollouts = batch([1.0, 1.0], [2, 1])
    update = Algorithm.from_recipe("grpo").plan(rollouts, zeros(rollouts)).updates[0]
    assert update.live_rows.tolist() == [0, 1]


def test_a_late_credit_part_keeps_rows_without_advantage_alive() -> None:
    @part("test/revive", stage="credit", scope="token", paper="none")
    def revive(advantages: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
        return advantages + mask.to(advantages.dtype)

    rollouts = batch([1.0, 1.0], [2, 0])
    algorithm = Algorithm.compose(advantage="grpo", credit="test/revive")
    update = algorithm.plan(rollouts, zeros(rollouts)).updates[0]
    assert (update.tensors["advantages"] == 0).all()
    assert update.live_rows.tolist() == [0]
    assert (gradient(algorithm, zeros(rollouts), [update]) != 0).any()


def test_schedules_are_resolved_by_step() -> None:
    rollouts, signals = random_batch(13)

    def scheduled(start: float, end: float) -> dict[str, Any]:
        return {"schedule": "linear", "start": start, "end": end, "steps": 4}

    moving = Algorithm.from_recipe({"preset": "grpo", "kl_coef": scheduled(0.4, 0.0),
                                    "bounds": {"high": scheduled(0.1, 0.5)}, "advantage": {"eps": scheduled(1.0, 0.0)},
                                    "weight": [{"part": "entropy-8020", "rho": scheduled(0.2, 1.0)}]})  # fmt: skip
    expected = {0: (0.4, 0.1, 1.0, 0.2), 1: (0.3, 0.2, 0.75, 0.4), 3: (0.1, 0.4, 0.25, 0.8)}
    for step, (kl, high, eps, rho) in expected.items():
        spec = {"preset": "grpo", "kl_coef": kl, "bounds": {"high": high}, "advantage": {"eps": eps}}
        fixed = Algorithm.from_recipe(spec | {"weight": [{"part": "entropy-8020", "rho": rho}]})
        a = moving.coefficients(rollouts, signals, step=step)["logprobs"]
        same(a, fixed.coefficients(rollouts, signals, step=step)["logprobs"], f"step {step}")
    first, last = (moving.coefficients(rollouts, signals, step=s)["logprobs"] for s in (0, 3))
    assert not torch.allclose(first, last)


LIFTS = {
    ("aapo", "low"): -1.0,
    ("delta-credit", "high"): 1.0,
    ("delta-credit", "low"): 0.3,
    ("length-curriculum", "budget"): 9.0,
    ("rmt", "budget"): 9.0,
    ("tw-grpo", "alpha"): 1.0,
}
# The ends of a schedule that the preset makes itself.
ENDS = {("d3s", n) for n in ("rows", "rows_end", "tokens", "tokens_end")}

FLOATS = [
    (slug, name)
    for slug in PRESETS
    for name, h in presets()[slug].parameters.items()
    if h.annotation in (float, float | None) and (slug, name) not in ENDS
]


@pytest.mark.parametrize(("slug", "name"), FLOATS)
def test_a_preset_takes_a_schedule_for_every_number(slug: str, name: str) -> None:
    rollouts, signals = random_batch(13)
    # Halfway from 0.2 to 0.6 at step 60; limits of ratios, largest weights and budgets must exceed 1.
    lift = LIFTS.get((slug, name), 1.0 if name in ("cap", "maximum", "ub") else 0.0)
    fixed, moving = lift + 0.4, {"schedule": "linear", "start": lift + 0.2, "end": lift + 0.6, "steps": 120}
    a, b = (
        Algorithm.from_recipe({"preset": slug, name: v}).override(select=None).coefficients(rollouts, signals, step=60)
        for v in (fixed, moving)
    )
    assert a.keys() == b.keys()
    for signal, value in a.items():
        same(value, b[signal], signal)


@pytest.mark.parametrize("slug", PRESETS)
def test_rewards_may_be_whole_numbers(slug: str) -> None:
    rollouts, signals = random_batch(13)
    whole = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1])
    algorithm = Algorithm.from_recipe(slug)
    a, b = (algorithm.coefficients(rollouts.replace(rewards=r), signals, step=60) for r in (whole, whole.double()))
    same(a["logprobs"], b["logprobs"], "int64 and float64 rewards")
    assert torch.equal(
        algorithm.keep(rollouts.replace(rewards=whole)), algorithm.keep(rollouts.replace(rewards=1.0 * whole))
    )


def test_a_schedule_over_the_run_needs_its_length() -> None:
    rollouts, signals = random_batch(13)
    spec = {"preset": "grpo", "advantage": {"eps": {"schedule": "linear", "start": 1.0, "end": 0.0}}}
    algorithm = Algorithm.from_recipe(spec)
    with pytest.raises(ValueError, match="length is unknown"):
        algorithm.plan(rollouts, signals)
    assert algorithm.plan(rollouts, signals, total_steps=10).updates


# -- parts that read the policy and couple rows ------------------------------------------------------


def coupled() -> Algorithm:
    return Algorithm.from_recipe({"preset": "clip-cov", "weight": {"clip-cov": {"lb": 0.0, "k": 0.3}}})


def test_slicing_without_refresh_is_refused() -> None:
    rollouts, signals = random_batch(14)
    algorithm = coupled()
    assert algorithm.needs_refresh
    update = algorithm.plan(rollouts, signals).updates[0]
    piece = update[[0, 1]]
    with pytest.raises(ValueError, match=r"\['clip-cov'\] must see the whole update: call algorithm\.refresh"):
        algorithm.loss(signals.rows(piece.rows), piece)
    with pytest.raises(ValueError, match="pass the whole update, and slice what it gives"):
        algorithm.refresh(piece, signals.rows(piece.rows))


def test_refreshed_slices_equal_the_whole_and_the_part_acts() -> None:
    rollouts, signals = random_batch(14)
    algorithm = coupled()
    update = algorithm.plan(rollouts, signals).updates[0]
    whole = gradient(algorithm, signals, [update])  # refreshed by the loss itself, nothing is sliced
    refreshed = algorithm.refresh(update, signals.rows(update.rows))
    pieces = [refreshed[rows] for rows in torch.arange(len(update)).split(2)]
    same(whole, gradient(algorithm, signals, pieces), "split")
    plain = algorithm.override(weight=None)
    assert not torch.allclose(whole, gradient(plain, signals, [plain.plan(rollouts, signals).updates[0]]))
    assert not plain.needs_refresh
    assert plain.refresh(update, signals) is update


def test_a_weight_after_a_late_credit_sees_its_advantages() -> None:
    @part("test/flip", stage="credit", scope="token", paper="none")
    def flip(advantages: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
        return torch.where(ratio > 1, -advantages, advantages)

    @part("test/positive", stage="weight", scope="batch", paper="none")
    def positive(advantages: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
        return (advantages > 0).to(advantages.dtype)

    @part("test/positive-by-token", stage="weight", scope="token", paper="none")
    def positive_by_token(advantages: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
        return (advantages > 0).to(advantages.dtype)

    rollouts, signals = random_batch(15)
    # Scope decides where a part runs, in `refresh` or beside the loss; the result must not depend on it.
    a, b = (
        Algorithm.compose(advantage="grpo", surrogate="importance", credit="test/flip", weight=w)
        for w in ("test/positive", "test/positive-by-token")
    )
    found = a.coefficients(rollouts, signals)["logprobs"]
    same(found, b.coefficients(rollouts, signals)["logprobs"], "scope changes nothing")
    assert (found >= 0).all()
    assert (found > 0).any()
    update = a.plan(rollouts, signals).updates[0]
    same(gradient(a, signals, [update]), gradient(b, signals, [b.plan(rollouts, signals).updates[0]]), "gradient")


# -- parts of one's own ------------------------------------------------------------------------------


def test_user_parts_at_every_stage() -> None:
    @part("test/by-token", stage="reward", scope="token", paper="none")
    def by_token(token_rewards: Tensor, mask: Tensor) -> Tensor:
        return token_rewards + 0.5 * mask

    @part("test/by-row", stage="reward", scope="row", paper="none")
    def by_row(rewards: Tensor) -> dict[str, Any]:
        return {"rewards": rewards + 1, "metrics": {"mean": rewards.mean()}}

    @part("test/advantage", stage="advantage", scope="row", paper="none")
    def advantage(token_rewards: Tensor, mask: Tensor) -> dict[str, Any]:
        return {"advantages": token_rewards, "metrics": {"largest": token_rewards.max()}}

    @part("test/select", stage="select", scope="row", paper="none")
    def select(lengths: Tensor) -> Tensor:
        return lengths < 3

    @part("test/credit", stage="credit", scope="token", paper="none")
    def credit(advantages: Tensor, state: int | None) -> tuple[Tensor, int]:
        return 2 * advantages, (state or 0) + 1

    @part("test/weight", stage="weight", scope="token", paper="none")
    def weight(weights: Tensor) -> Tensor:
        return 3 * weights

    @part("test/aggregate", stage="aggregate", scope="token", paper="none")
    def aggregate(mask: Tensor) -> Tensor:
        return 0.1 * mask.double()

    @part("test/log-ratio", stage="log_ratio", scope="token", paper="none")
    def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        return logprobs - old_logprobs

    @part("test/bounds", stage="bounds", scope="token", paper="none")
    def bounds(advantages: Tensor) -> tuple[Tensor, float, float]:
        return torch.full_like(advantages, 0.5), 2.0, 9.0

    @part("test/surrogate", stage="surrogate", scope="token", paper="none")
    def surrogate(logprobs: Tensor, advantages: Tensor, lo: Tensor, hi: float, cap: float) -> Tensor:
        assert lo.shape == logprobs.shape
        return logprobs * advantages * (hi + cap)

    @part("test/term", stage="term", scope="token", paper="none")
    def term(logprobs: Tensor) -> Tensor:
        return -logprobs

    @part("test/updates", stage="updates", scope="batch", paper="none")
    def updates(keep: Tensor) -> list[Tensor]:
        return [keep.nonzero().reshape(-1)]

    algorithm = Algorithm.compose(
        reward=["test/by-token", "test/by-row"], advantage="test/advantage", select="test/select", credit="test/credit",
        weight="test/weight", aggregate="test/aggregate", log_ratio="test/log-ratio", bounds="test/bounds",
        surrogate="test/surrogate", terms=[{"part": "test/term", "coef": 0.5}], updates="test/updates",
    )  # fmt: skip
    rollouts = batch([1.0, 2.0, 5.0], [2, 1, 3])
    plan = algorithm.plan(rollouts, zeros(rollouts), {"credit/0/test/credit": 6})
    # Row 0: 0 and 1, +1/2 each, then +1 on the last token: 1/2, 5/2. Row 1: 2 + 1/2 + 1.
    # Row 2 (5 + 3/2 + 1) is dropped.
    assert plan.values["rewards"].tolist() == [3, 3.5, 7.5]
    assert plan.values["token_rewards"][:2].tolist() == [[0.5, 2.5, 0], [3.5, 0, 0]]
    assert plan.state == {"credit/0/test/credit": 7}
    assert plan.metrics["test/by-row/mean"] == pytest.approx((2 + 2.5 + 6.5) / 3)
    assert plan.metrics["test/advantage/largest"] == pytest.approx(6.5)
    assert plan.updates[0].rows.tolist() == [0, 1]
    found = algorithm.coefficients(rollouts, zeros(rollouts))["logprobs"]
    # scale 0.1 * weight 3 * (2 A) * (2 + 9) from the policy, 0.5 * scale 0.1 from the term
    first = torch.tensor([[0.5, 2.5, 0], [3.5, 0, 0], [0, 0, 0]], dtype=torch.float64)
    taught = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.float64)
    same(found, 0.1 * 3 * 2 * 11 * first + 0.05 * taught, "every stage")


@pytest.mark.parametrize(
    ("stage", "value", "message"),
    [
        ("advantage", torch.zeros(2), r"'test/wrong' must give \[B, T\] = \(2, 2\), got \(2,\)"),
        ("advantage", {"returns": torch.zeros(2, 2)}, r"'test/wrong' must give 'advantages', got \['returns'\]"),
        ("reward", torch.zeros(2, 1), r"rewards must be \[B\] or \[B, T\] = \(2, 2\), got \(2, 1\)"),
        ("reward", {}, "'test/wrong' must give 'rewards'"),
        ("select", torch.ones(2), r"'test/wrong' must give bool \[B\] = \(2,\), got \(2,\) torch.float32"),
        ("select", torch.ones(1, dtype=torch.bool), r"must give bool \[B\] = \(2,\), got \(1,\)"),
        ("credit", 1.0, "got float"),
        ("weight", torch.zeros(2, 2, 1), r"got \(2, 2, 1\)"),
        ("aggregate", torch.zeros(()), r"'test/wrong' must give \[B, T\] = \(2, 2\), got \(\)"),
        ("bounds", (0.8, 1.2), r"'test/wrong' must give \(lo, hi, cap\), got \(0.8, 1.2\)"),
        ("surrogate", torch.zeros(2), "'test/wrong' must give"),
        ("term", torch.zeros(2), "'test/wrong' must give"),
    ],
)
def test_results_of_another_shape_are_refused(stage: Any, value: Any, message: str) -> None:
    @part("test/wrong", stage=stage, scope="token", paper="none")
    def wrong(mask: Tensor) -> Any:
        return value

    stages: dict[str, Any] = {"advantage": "grpo"} | {"terms" if stage == "term" else stage: "test/wrong"}
    algorithm = Algorithm.compose(**stages)
    rollouts = batch([1.0, 0.0], [2, 1])
    with pytest.raises(ValueError, match=message):
        algorithm.coefficients(rollouts, zeros(rollouts))


def test_a_stateful_part_must_give_its_state() -> None:
    @part("test/forgets", stage="advantage", scope="row", paper="none")
    def forgets(mask: Tensor, state: int | None) -> Tensor:
        return mask.double()

    rollouts = batch([1.0, 0.0], [2, 1])
    with pytest.raises(ValueError, match=r"takes 'state' and must give \(value, state\)"):
        Algorithm.compose(advantage="test/forgets").plan(rollouts, zeros(rollouts))
