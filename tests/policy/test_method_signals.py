"""Signals that methods declare, on real (tiny) models against one padded eager forward's logits, states, attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_gemma2, tiny_llama
from tokenloom.algorithm import Algorithm
from tokenloom.batch import Rollouts, Sampling
from tokenloom.methods.policy_optimization import troll
from tokenloom.methods.policy_optimization.flow_tracer import trace
from tokenloom.policy import ModelConfig, Policy
from tokenloom.policy.tree_forward import TreeForward

LAYERS = 3
"""So that the middle third is one layer, the second."""
MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "gemma2": tiny_gemma2}
NAMES = ("old_support", "head_inputs", "hidden_influence", "position_divergence", "answer_flow", "attention_entropy")

# Three layers of four projections and two sums over at most 32 keys, each of at most 32 products; a value of size m
# differs by at most m times this.
TOLERANCE = LAYERS * (4 * 32 + 2 * 32) * torch.finfo(torch.float32).eps


def rollouts_of_two_prompts() -> Rollouts:
    """Responses that share beginnings, one with a tool's tokens, one dead, one without an answer; mixed outcomes."""
    g = torch.Generator().manual_seed(5)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 64, (n,), generator=g).tolist()

    first, second, base, other = ids(4), ids(6), ids(8), ids(7)
    prompts = [first, second, first, second, first, second, first]
    responses = [base, other, base[:4] + ids(3), other[:5] + ids(2), base[:2], other[:3], base[:5]]
    masks = [[True] * len(r) for r in responses]
    masks[2][2:4] = [False, False]
    masks[6] = [False] * 5
    rollouts = Rollouts.build(
        prompts,
        responses,
        [8, 3, 8, 3, 8, 3, 8],
        response_masks=masks,
        pad_id=-(10**9),
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]),
        sampling=Sampling(temperature=0.7),
        answers=("A", "B", "A", "A,B", "A", None, None),
        prompts=tuple({"right_options": ["A", "B"]} for _ in prompts),
    )
    answer = rollouts.mask & (torch.arange(rollouts.mask.shape[1]) >= rollouts.lengths[:, None] - 2)
    answer[4] = False
    return rollouts.replace(extras={"answer_mask": answer})


@dataclass
class Whole:
    """What one padded eager forward of all rows gives: `logits` [B, T, V] (at the temperature) and `states` [B, T, D]
    that predict each response token; `maps` [B, L, H, S, S]."""

    logits: Tensor
    states: Tensor
    maps: Tensor


def whole_of(model: Any, rollouts: Rollouts) -> Whole:
    """By the model's own code."""
    rows = [torch.cat([p, rollouts.response(i)]) for i, p in enumerate(rollouts.prompt_tokens)]
    width = max(len(r) for r in rows)
    tokens = torch.stack([torch.nn.functional.pad(r, (0, width - len(r))) for r in rows])
    attended = torch.arange(width) < torch.tensor([len(r) for r in rows])[:, None]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(
            tokens,
            attention_mask=attended.long(),
            output_hidden_states=True,
            output_attentions=True,
            use_cache=False,
        )
    model.set_attn_implementation(before)
    prompts = torch.tensor([len(p) for p in rollouts.prompt_tokens])
    at = (prompts[:, None] + torch.arange(rollouts.mask.shape[1]) - 1).clamp(max=width - 1)
    rows_at = torch.arange(len(rows))[:, None]
    return Whole(
        out.logits[rows_at, at] / rollouts.sampling.temperature,
        out.hidden_states[-1][rows_at, at],
        torch.stack(out.attentions, 1),
    )


def model_of(name: str) -> Any:
    return MODELS[name](num_hidden_layers=LAYERS)


@dataclass
class Case:
    rollouts: Rollouts
    whole: Whole
    found: dict[str, Tensor]


@pytest.fixture(scope="module", params=[(n, s) for n in MODELS for s in (True, False)], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    name, share = request.param
    model = model_of(name)
    policy = Policy(model, config=ModelConfig(chunk_rows=3, token_budget=40, share_prefixes=share))
    assert isinstance(policy.forward, TreeForward) == share
    rollouts = rollouts_of_two_prompts()
    signals = policy.signals(rollouts, [*NAMES, "logprobs"])
    assert set(signals.extras) == set(NAMES)
    for value in signals.extras.values():
        assert not value.requires_grad
        assert bool((value[~rollouts.mask] == 0).all())
    return Case(rollouts, whole_of(model, rollouts), signals.named())


def near(found: Tensor, wanted: Tensor, factor: float = 1.0) -> None:
    """Equal up to `factor` times the tolerance at the size of the values."""
    assert found.shape == wanted.shape
    size = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=factor * size * TOLERANCE)


def test_head_inputs(case: Case) -> None:
    mask = case.rollouts.mask
    near(case.found["head_inputs"][mask], case.whole.states[mask])


def test_old_support(case: Case) -> None:
    mask = case.rollouts.mask
    law = case.whole.logits[mask].log_softmax(-1)
    found = case.found["old_support"][mask]
    size = (found.shape[-1] - 1) // 2
    ids, logs = found[:, :size].long(), found[:, size:-1]
    assert bool((ids.sort(-1).values.diff() > 0).all())
    kept = logs.isfinite()
    near(logs[kept], law.gather(-1, ids)[kept])
    mass = (law.gather(-1, ids).exp() * kept).sum(-1)
    assert float(mass.min()) >= 1 - troll.TAIL - TOLERANCE
    near(found[:, -1], law.gather(-1, case.rollouts.tokens[mask][:, None])[:, 0])
    near(found[:, -1], case.found["logprobs"][mask])


def test_hidden_influence(case: Case) -> None:
    rollouts, whole = case.rollouts, case.whole
    for group in (8, 3):
        rows = (rollouts.group_ids == group).nonzero()[:, 0]
        mask = rollouts.mask[rows]
        ids, states = rollouts.tokens[rows][mask], whole.states[rows][mask].double()
        here = torch.unique(ids)
        errors = (ids[:, None] == here).double() - whole.logits[rows][mask].double().softmax(-1)[:, here]
        # Every pair of tokens at once, [N, N], by the definition.
        pairs = (errors @ errors.T) * (states @ states.T)
        right = (rollouts.rewards[rows] == 1)[:, None].expand(mask.shape)[mask].double()
        length = mask.sum(-1, keepdim=True).expand(mask.shape)[mask]
        wanted = torch.stack([pairs @ (right / length), pairs @ right], -1)
        found = case.found["hidden_influence"][rows][mask].double()
        # Four factors, each with the tolerance of its own size, in sums of at most 20 pairs.
        size = 4 * 20 * float(pairs.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=size * TOLERANCE)
        assert float(wanted.abs().max()) > 100 * size * TOLERANCE


def test_position_divergence(case: Case) -> None:
    rollouts, whole = case.rollouts, case.whole
    uniform = -torch.tensor(float(whole.logits.shape[-1])).log()
    for group in (8, 3):
        rows = (rollouts.group_ids == group).nonzero()[:, 0]
        mask = rollouts.mask[rows]
        law = torch.where(mask[..., None], whole.logits[rows].log_softmax(-1), uniform)
        x = (law.mean(0) - law).clamp(-11, 11)
        wanted = (x.exp() - x - 1).sum(-1).mean(0).expand(mask.shape)
        # The slope by x is e^x - 1, and x is a difference of log-probs.
        slope = float(((x.exp() - 1).abs().sum(-1)).max()) * 2 * float(law.abs().max())
        found = case.found["position_divergence"][rows]
        torch.testing.assert_close(found[mask], wanted[mask], rtol=0, atol=slope * TOLERANCE)
        assert float(wanted[mask].max()) > 100 * slope * TOLERANCE


def row_maps(case: Case, row: int) -> tuple[Tensor, int]:
    """Maps [L, H, S, S] of a row without padding, and its prompt's length."""
    prompt = len(case.rollouts.prompt_tokens[row])
    size = prompt + int(case.rollouts.lengths[row])
    return case.whole.maps[row, :, :, :size, :size], prompt


def test_answer_flow(case: Case) -> None:
    rollouts = case.rollouts
    for row in range(len(rollouts)):
        maps, prompt = row_maps(case, row)
        length, size = int(rollouts.lengths[row]), maps.shape[-1]
        answer = torch.zeros(size, dtype=torch.bool)
        answer[prompt:] = rollouts.extras["answer_mask"][row, :length]
        found = case.found["answer_flow"][row, :length]
        mask = rollouts.mask[row, :length]
        if not bool(answer.any()):
            assert bool((found == 0).all())
            continue
        # The second of three layers is the middle third.
        middle = maps[1].mean(0)
        wanted = trace(middle.T, torch.arange(size) < prompt, answer).throughput[prompt:].float()
        # Products of at most S steps of the law, each a quotient of two rounded numbers.
        torch.testing.assert_close(found[mask], wanted[mask], rtol=0, atol=2 * size * TOLERANCE)
        assert float(wanted[mask].max()) > 0.3


def test_attention_entropy(case: Case) -> None:
    rollouts = case.rollouts
    for row in rollouts.mask.any(-1).nonzero()[:, 0].tolist():
        maps, prompt = row_maps(case, row)
        mask = rollouts.mask[row, : int(rollouts.lengths[row])]
        at = mask.nonzero()[:, 0] + prompt - 1
        heads = torch.stack([torch.special.entr(layer).sum(-1).mean(0) for layer in maps]).mean(0)
        wanted = torch.stack([heads[at], torch.special.entr(maps.mean((0, 1))).sum(-1)[at], (at + 1).log()], -1)
        # The slope by ln a is a (ln a + 1).
        near(case.found["attention_entropy"][row, : len(mask)][mask], wanted, 4.0)


def moved(model: Any, by: float) -> None:
    """Train a little, so to speak."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=g))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [8, 64])
def test_support_logprobs_after_an_update(name: str, share: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(troll, "SUPPORT", size)
    model = model_of(name)
    policy = Policy(model, config=ModelConfig(chunk_rows=3, token_budget=40, share_prefixes=share))
    rollouts = rollouts_of_two_prompts()
    mask, targets = rollouts.mask, rollouts.tokens[rollouts.mask]
    before = whole_of(model, rollouts).logits[mask]
    given = policy.signals(rollouts, ["old_support"]).extras
    moved(model, 0.05)
    now = whole_of(model, rollouts).logits[mask]
    found = policy.signals(rollouts, ["support_logprobs"], grad=True, given=given).extras["support_logprobs"]
    assert found.requires_grad
    assert bool((found[~mask] == 0).all())
    found = found[mask].detach()
    wanted = troll.support_logprobs(now, targets, troll.old_support(before, targets))
    used = wanted.isfinite()
    assert torch.equal(found.isfinite(), used)
    # In a float32 law of 64 tokens, what is left beside the support has an error of 64 eps; its share is 0.01 or more.
    factor = 1.0 if size == 64 else 2.0
    near(found[used], wanted[used], factor)
    current, old = found.chunk(2, -1)
    if size == 64:
        for slots, logits in ((current, now), (old, before)):
            near(slots.sort(-1).values[:, -64:], logits.log_softmax(-1).sort(-1).values)
    assert float((current[:, 0] - old[:, 0]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slug", ["troll", "thr", "delta-credit", "tw-grpo", "flow-tracer", "attention-entropy"])
def test_a_training_step(slug: str, name: str) -> None:
    model = model_of(name)
    policy = Policy(model, config=ModelConfig(chunk_rows=3, token_budget=40))
    algorithm = Algorithm.from_recipe(slug)
    rollouts = rollouts_of_two_prompts()
    assert algorithm.rollout_needs <= rollouts.extras.keys()
    algorithm = algorithm.override(updates={"mini_batches": 2})
    policy.prepare(sorted(algorithm.needs | algorithm.loss_needs))
    plan = algorithm.plan(rollouts, policy.signals(rollouts, sorted(algorithm.needs)))
    assert len(plan.updates) == 2
    values = []
    for update in plan.updates:
        for rows in torch.arange(len(update)).split(2):
            batch = update[rows]
            acting = rollouts.rows(batch.rows).replace(mask=batch.live)
            live = policy.signals(acting, sorted(algorithm.loss_needs), grad=True, given=batch.given)
            loss, metrics = algorithm.loss(live, batch)
            policy.backward(loss)
            values.append(metrics.result())
        grads = [p.grad for _, p in policy.trainable_parameters() if p.grad is not None]
        assert all(bool(g.isfinite().all()) for g in grads)
        assert sum(float(g.square().sum()) for g in grads) > 1e-8
        model.zero_grad()
        # Far enough that the second update is off policy.
        moved(model, 0.1)
    if slug == "troll":
        assert values[0]["loss/troll/return"] == 0.0
        assert values[-1]["loss/troll/return"] > 0.0
