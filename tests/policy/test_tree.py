"""Prefix trees: their bookkeeping against brute force, and the tree forward against one row at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from full_logits import full_logits_signals
from tiny_models import TINY, tiny_llama
from tokenloom.batch import Rollouts
from tokenloom.policy import Policy
from tokenloom.policy.config import LoraSection, ModelConfig
from tokenloom.policy.tree import ancestor_mask, build_tree, shared_lengths, sorted_rows
from tokenloom.policy.tree_forward import MaskKinds, TreeForward

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


def small(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({"attention": "sdpa", **changes})


@settings(deadline=None, max_examples=150)
@given(ROWS)
def test_nodes_are_the_distinct_prefixes_and_see_their_ancestors(rows: list[list[int]]) -> None:
    order = sorted_rows(rows)
    chosen = [torch.tensor(rows[i]) for i in order]
    tree = build_tree(order, chosen, shared_lengths(chosen))
    prefixes = {tuple(r[: n + 1]) for r in rows for n in range(len(r))}
    assert len(tree) == len(prefixes)
    prefix_of: dict[int, tuple[int, ...]] = {}
    for number, nodes in tree.nodes.items():
        for t, node in enumerate(nodes.tolist()):
            prefix = tuple(rows[number][: t + 1])
            assert prefix_of.setdefault(node, prefix) == prefix
            assert (int(tree.tokens[node]), int(tree.depth[node])) == (prefix[-1], t)
    for window in (None, 2):
        seen = ancestor_mask(tree, window=window)
        for query, longer in prefix_of.items():
            for key, shorter in prefix_of.items():
                near = window is None or len(longer) - len(shorter) < window
                assert bool(seen[query, key]) == (longer[: len(shorter)] == shorter and near)


def shared_rollouts(seed: int = 0, vocab: int = 40) -> Rollouts:
    """Groups that share prompts and beginnings: equal responses, one a prefix of another, a group of one, dead rows,
    tool tokens, and two prompts of which one begins the other; rows in scattered order."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        return torch.randint(vocab, (n,), generator=g)

    first = draw(5)
    prompts = [first, torch.cat([first, draw(4)]), draw(1), draw(6)]
    rows: list[tuple[int, Tensor]] = []
    for group, count in enumerate((5, 4, 3, 1)):
        base = draw(11)
        rows += [(group, base[: 11 - 2 * i] if i < 3 else draw(4 + i)) for i in range(count)]
    rows += [rows[0], (3, draw(2))]
    order = torch.randperm(len(rows), generator=g).tolist()
    rollouts = Rollouts.build(
        [prompts[rows[i][0]] for i in order], [rows[i][1] for i in order], [rows[i][0] for i in order]
    )
    mask = rollouts.mask.clone()
    mask[2, 1] = False
    mask[5] = False
    return rollouts.replace(mask=mask)


def tolerance(dtype: torch.dtype) -> float:
    """Two evaluations that sum in another order: a few dozen roundings of values of size 1 to 10 through two layers."""
    return 1e-10 if dtype == torch.float64 else 5e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_signals_and_gradients_equal_one_row_at_a_time(name: str, attention: str) -> None:
    model = TINY[name](attention=attention)
    # Eager attention's softmax and most models' norms are in float32 whatever the weights are; these two are not.
    exact = name in ("gpt2", "phi") and model.config._attn_implementation == "sdpa"
    dtype = torch.float64 if exact else torch.float32
    policy = Policy(model.to(dtype), config=small(token_budget=70))
    assert isinstance(policy.forward, TreeForward)
    rollouts = shared_rollouts()
    wanted = full_logits_signals(model, rollouts)
    signals = policy.signals(rollouts, ["logprobs", "entropies"], grad=True).named()
    weights = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    parameters = [p for _, p in policy.trainable_parameters()]
    ours = torch.autograd.grad(sum((x * weights).sum() for x in signals.values()), parameters, allow_unused=True)
    theirs = torch.autograd.grad(sum((wanted[n] * weights).sum() for n in signals), parameters, allow_unused=True)
    for key, value in signals.items():
        torch.testing.assert_close(value, wanted[key].to(value.dtype), rtol=tolerance(dtype), atol=tolerance(dtype))
    for a, b in zip(ours, theirs, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=20 * tolerance(dtype), atol=20 * tolerance(dtype))


def test_what_is_computed_are_the_distinct_prefixes() -> None:
    policy = Policy(tiny_llama(), config=small(token_budget=10_000))
    forward = policy.forward
    assert isinstance(forward, TreeForward)
    rollouts = shared_rollouts()
    forward.computed = 0
    policy.signals(rollouts, ["logprobs"])
    prefixes = set()
    for i in range(len(rollouts)):
        sampled = rollouts.mask[i].nonzero()
        if len(sampled):
            row = [*rollouts.prompt_tokens[i].tolist(), *rollouts.response(i).tolist()]
            fed = len(rollouts.prompt_tokens[i]) + int(sampled[-1])
            prefixes |= {tuple(row[: n + 1]) for n in range(fed)}
    assert forward.computed == len(prefixes)


def test_sharing_stops_where_attention_would_cost_more() -> None:
    forward = TreeForward(torch.device("cpu"), MaskKinds(), token_budget=10_000)
    assert forward._joins(size=150, fresh=12, common=52)
    assert not forward._joins(size=250, fresh=31, common=33)
    assert forward._joins(size=2000, fresh=32, common=512)
    assert not forward._joins(size=10, fresh=5, common=0)


@pytest.mark.parametrize("changes", [{"lora": LoraSection(rank=2)}, {"gradient_checkpointing": True}], ids=str)
def test_trees_under_adapters_and_checkpointing(changes: dict[str, object]) -> None:
    shared, padded = (
        Policy(tiny_llama(), config=small(share_prefixes=share, **changes), seed=3) for share in (True, False)
    )
    rollouts = shared_rollouts(2)
    gradients = []
    for policy in (shared, padded):
        policy.backward(policy.signals(rollouts, ["logprobs"], grad=True).named()["logprobs"].sum())
        gradients.append({n: p.grad for n, p in policy.trainable_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_micro_batches_cover_live_rows_once_and_keep_groups_together() -> None:
    policy = Policy(tiny_llama(), config=small())
    rollouts = shared_rollouts()
    live = rollouts.mask.any(-1).nonzero()[:, 0].tolist()
    for budget in (1, 30, 10_000):
        parts = policy.micro_batches(rollouts, budget)
        assert sorted(i for part in parts for i in part.tolist()) == live
    assert len(policy.micro_batches(rollouts, 10_000)) == 1
    assert len(policy.micro_batches(rollouts, 1)) == len(live)


def test_a_model_that_ignores_the_mask_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    trunk = model.model
    forward = trunk.forward

    def deaf(*args: object, attention_mask: object = None, **rest: object) -> object:
        return forward(*args, **rest)

    trunk.forward = deaf
    policy = Policy(model, config=small())
    assert not isinstance(policy.forward, TreeForward)
    assert [r.getMessage() for r in caplog.records if "shared prefixes" in r.getMessage()]
