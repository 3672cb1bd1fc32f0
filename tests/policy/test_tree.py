"""Prefix trees: their bookkeeping against brute force, and the tree forward against one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoConfig

from full_logits import full_logits_signals
from tiny_models import TINY, build, tiny_gemma3, tiny_llama
from tokenloom.batch import Rollouts
from tokenloom.policy import Policy
from tokenloom.policy.config import LoraSection, ModelConfig
from tokenloom.policy.forward import PaddedForward
from tokenloom.policy.head import LogprobHead
from tokenloom.policy.own_logits import run_trunk, trunk_of
from tokenloom.policy.selftest import self_test
from tokenloom.policy.tree import ancestor_mask, build_tree, pad_tree, shared_lengths, sorted_rows
from tokenloom.policy.tree_forward import BEYOND, MaskKinds, TreeForward, _parts

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


def test_padding_nodes_see_only_themselves_and_are_seen_by_none() -> None:
    row = torch.tensor([4, 5, 6])
    tree = pad_tree(build_tree([0], [row], [0]), 8)
    assert tree.tokens.tolist() == [4, 5, 6, 6, 6, 6, 6, 6]
    seen = ancestor_mask(tree)
    assert torch.equal(seen[:3, :3], torch.ones(3, 3, dtype=torch.bool).tril())
    assert torch.equal(seen[3:], torch.eye(8, dtype=torch.bool)[3:])
    assert not seen[:3, 3:].any()
    assert len(pad_tree(tree, 8)) == 8


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


# In blocks wherever attention is fused, under a dense mask for eager attention and where blocks do not serve.
STYLES = [(name, attention, None) for name in sorted(TINY) for attention in ("sdpa", "eager")]
STYLES += [(name, "sdpa", "dense") for name in ("llama", "gemma3", "mistral")]


@pytest.mark.parametrize(("name", "attention", "style"), STYLES)
def test_signals_and_gradients_equal_one_row_at_a_time(name: str, attention: str, style: str | None) -> None:
    model = TINY[name](attention=attention)
    # Eager attention's softmax and most models' norms are in float32 whatever the weights are; these two are not.
    exact = name in ("gpt2", "phi") and model.config._attn_implementation == "sdpa"
    dtype = torch.float64 if exact else torch.float32
    policy = Policy(model.to(dtype), config=small(token_budget=70))
    assert isinstance(policy.forward, TreeForward)
    assert (policy.forward.kinds.style == "dense") == (model.config._attn_implementation == "eager")
    if style is not None:
        policy.forward.kinds = replace(policy.forward.kinds, style=style)
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_computed_are_the_distinct_prefixes(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeForward, "_joins", lambda *_: True)
    policy = Policy(tiny_llama(attention=attention), config=small(token_budget=10_000))
    forward = policy.forward
    assert isinstance(forward, TreeForward)
    rollouts = shared_rollouts()
    fed = count_fed(forward, policy, rollouts)
    prefixes = set()
    for i in range(len(rollouts)):
        sampled = rollouts.mask[i].nonzero()
        if len(sampled):
            row = [*rollouts.prompt_tokens[i].tolist(), *rollouts.response(i).tolist()]
            needed = len(rollouts.prompt_tokens[i]) + int(sampled[-1])
            prefixes |= {tuple(row[: n + 1]) for n in range(needed)}
    assert forward.computed == len(prefixes)
    assert fed == [len(prefixes)]


def count_fed(forward: TreeForward, policy: Policy, rollouts: Rollouts) -> list[int]:
    """Tokens that reach the model in each call, padding included; `forward.computed` starts from 0."""
    fed: list[int] = []

    def trunk(tokens: Tensor, **rest: Any) -> Tensor:
        fed.append(tokens.numel())
        return run_trunk(policy.trunk, tokens, **rest)

    forward.computed = 0
    with torch.no_grad():
        for part in forward.gather(trunk, rollouts):
            assert part.at is not None
            assert len(part.states) == len(part.rows)
            # Each state once: a shared one predicts several tokens.
            assert part.at.unique().tolist() == list(range(len(part.hidden)))
    return fed


def test_calls_hold_trees_side_by_side_without_padding_and_within_the_budget() -> None:
    policy = Policy(tiny_llama(), config=small())
    rollouts = shared_rollouts()
    whole = TreeForward(policy.device, policy.forward.kinds, token_budget=10_000)
    assert len(count_fed(whole, policy, rollouts)) == 1
    for budget in (20, 40):
        forward = TreeForward(policy.device, policy.forward.kinds, token_budget=budget)
        fed = count_fed(forward, policy, rollouts)
        longest = int((rollouts.lengths + torch.tensor([len(p) for p in rollouts.prompt_tokens])).max())
        assert max(fed) <= max(budget, BEYOND * longest)
        assert sum(fed) == forward.computed
        # What a cut repeats is at most the prefix of the row behind it.
        assert whole.computed <= sum(fed) <= whole.computed + len(fed) * longest
        assert len(fed) <= 2 * sum(fed) / budget + 1


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(1, 40))
def test_parts_hold_all_rows_in_order_within_the_budget(rows: list[list[int]], budget: int) -> None:
    chosen = [torch.tensor(rows[i]) for i in sorted_rows(rows)]
    shared = shared_lengths(chosen)
    parts = _parts(chosen, shared, budget)
    assert [a for a, _ in parts] == [0, *(b for _, b in parts)][:-1]
    assert parts[-1][1] == len(rows)
    for start, end in parts:
        nodes = len({tuple(r[:n].tolist()) for r in chosen[start:end] for n in range(1, len(r) + 1)})
        assert nodes <= max(budget, BEYOND * len(chosen[start])) or end == start + 1


def test_parts_end_with_a_group_when_its_prompt_is_long() -> None:
    def groups(prompt: int) -> list[Tensor]:
        return [torch.cat([torch.full((prompt,), g), torch.full((32,), 10 + i)]) for g in range(4) for i in range(8)]

    # Three groups of 512 + 8 x 32 nodes and two rows of the fourth would fit, at the price of computing 512 again.
    long = groups(512)
    assert _parts(long, shared_lengths(long), 2900) == [(0, 24), (24, 32)]
    # A prompt of 20 is cheaper to compute again than a quarter of a call is to leave empty.
    short = groups(20)
    assert _parts(short, shared_lengths(short), 1080) == [(0, 31), (31, 32)]


def test_parts_of_a_prompt_near_the_budget_or_longer_keep_its_rows_together() -> None:
    rows = [torch.cat([torch.zeros(1000), torch.full((60,), 1.0 + i)]).long() for i in range(8)]
    shared = shared_lengths(rows)
    # 1,000 + 8 x 60 nodes are 1.4 times those of one row.
    assert _parts(rows, shared, 1024) == [(0, 8)]
    assert _parts(rows, shared, 100) == [(0, 8)]
    more = [*rows, torch.cat([torch.zeros(1000), torch.full((60,), 9.0)]).long(), rows[-1] + 10]
    assert _parts(more, shared_lengths(more), 1024) == [(0, 9), (9, 10)]
    # Rows that add more than they share would not save half of what they cost.
    apart = [torch.cat([torch.zeros(400), torch.full((500,), 1.0 + i)]).long() for i in range(3)]
    assert _parts(apart, shared_lengths(apart), 1000) == [(0, 1), (1, 2), (2, 3)]


def test_sharing_stops_where_attention_would_cost_more() -> None:
    forward = TreeForward(torch.device("cpu"), MaskKinds(), token_budget=10_000)
    assert forward._joins(size=150, fresh=12, common=52)
    assert not forward._joins(size=250, fresh=31, common=33)
    assert forward._joins(size=2000, fresh=32, common=512)
    assert not forward._joins(size=10, fresh=5, common=0)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes",
    [{"lora": LoraSection(rank=2)}, {"gradient_checkpointing": True}],
    ids=["lora", "checkpointing"],
)
def test_trees_under_adapters_and_checkpointing(
    changes: dict[str, object], attention: str, build: Callable[..., Any]
) -> None:
    shared, padded = (
        Policy(build(attention=attention), config=small(share_prefixes=share, **changes), seed=3)
        for share in (True, False)
    )
    rollouts = shared_rollouts(2)
    gradients = []
    for policy in (shared, padded):
        policy.backward(policy.signals(rollouts, ["logprobs"], grad=True).named()["logprobs"].sum())
        gradients.append({n: p.grad for n, p in policy.trainable_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_under_autocast_trees_are_as_exact_as_padded_rows() -> None:
    rollouts = shared_rollouts()
    exact = Policy(tiny_llama(), config=small()).signals(rollouts, ["logprobs"]).named()["logprobs"]
    errors = []
    for share in (True, False):
        policy = Policy(tiny_llama(), config=small(share_prefixes=share, autocast="bf16"))
        assert isinstance(policy.forward, TreeForward if share else PaddedForward)
        logprobs = policy.signals(rollouts, ["logprobs"], grad=True).named()["logprobs"]
        errors.append(float((logprobs - exact)[rollouts.mask].detach().pow(2).mean().sqrt()))
        policy.backward(logprobs.sum())
        assert all(p.grad is not None for _, p in policy.trainable_parameters())
    # Root mean squares of two roundings of the same kind (0.01 nats here) over the same 119 tokens: the estimate of
    # their ratio is off by 1 / sqrt(119) = 9 % a side, and 1.5 is four such errors.
    assert errors[0] < 1.5 * errors[1] < 0.1


def test_micro_batches_cover_live_rows_once_and_keep_groups_together() -> None:
    policy = Policy(tiny_llama(), config=small())
    rollouts = shared_rollouts()
    live = rollouts.mask.any(-1).nonzero()[:, 0].tolist()
    counts = []
    for budget in (1, 30, 10_000):
        parts = policy.micro_batches(rollouts, budget)
        assert sorted(i for part in parts for i in part.tolist()) == live
        counts.append(len(parts))
    # Some of the rows that are beyond any budget of 1 share most of their tokens.
    assert len(live) / 2 <= counts[0] < len(live)
    assert counts[0] > counts[1] > counts[2] == 1


def test_micro_batches_are_as_even_as_they_can_be() -> None:
    """Four groups of 2 x 5 tokens behind a prompt of 10: where three fit, two go together, not three and one.

    All 80 go together where a budget is short of them by no more than a tenth of itself.
    """
    policy = Policy(tiny_llama(), config=small())
    prompts = [torch.arange(10) + 10 * g for g in range(4)]
    rows = [(prompts[g], torch.arange(6) + 7 * i) for g in range(4) for i in range(2)]
    rollouts = Rollouts.build([p for p, _ in rows], [r for _, r in rows], [g for g in range(4) for _ in range(2)])
    for budget, sizes in ((20, [2] * 4), (40, [4] * 2), (60, [4] * 2), (72, [4] * 2), (73, [8]), (80, [8])):
        assert sorted(len(part) for part in policy.micro_batches(rollouts, budget)) == sizes


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


def test_a_model_that_computes_with_its_mask_gets_a_dense_one(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    trunk: Any = trunk_of(model)
    forward = trunk.forward

    def touching(*args: object, attention_mask: Tensor | None = None, **rest: object) -> object:
        return forward(*args, attention_mask=None if attention_mask is None else attention_mask + 0, **rest)

    trunk.forward = touching
    result = self_test(model, LogprobHead(model), MaskKinds.from_config(model.config))
    assert result.tree_agrees
    assert (result.failed, result.kinds.style) == (("blocks",), "dense")
    result.warn("Touching")
    assert [r.getMessage() for r in caplog.records if "prefix trees by blocks" in r.getMessage()]


def test_a_model_with_layers_of_unknown_sight_shares_nothing() -> None:
    model = tiny_gemma3()
    # Chunked attention: no test of a few tokens would notice that its chunks are ignored.
    kinds = replace(MaskKinds.from_config(model.config), names=("chunked_attention", "full_attention"))
    result = self_test(model, LogprobHead(model), kinds)
    assert result.tree_error == float("inf")
    assert not result.tree_agrees


def test_a_model_whose_window_counts_places_shares_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-Neo's local layers; a window wider than the self-test's rows, so the self-test alone would not notice."""
    layers = [[["global", "local"], 1]]
    config = GPTNeoConfig(
        vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, window_size=14, attention_types=layers
    )
    model = build(config)
    policy = Policy(model, config=small())
    assert isinstance(policy.forward, PaddedForward)
    assert len([r for r in caplog.records if "shared prefixes" in r.getMessage()]) == 1
    rollouts = shared_rollouts()
    logprobs = policy.signals(rollouts, ["logprobs"]).named()["logprobs"]
    torch.testing.assert_close(logprobs, full_logits_signals(model, rollouts)["logprobs"], rtol=5e-5, atol=5e-5)


def test_a_window_that_a_models_family_does_not_know_is_not_kept() -> None:
    """As in a Mistral's config.json behind a Llama's name; wider than the self-test's rows, narrower than ours."""
    model = tiny_llama(vocab=40, sliding_window=14)
    policy = Policy(model, config=small())
    assert isinstance(policy.forward, TreeForward)
    rollouts = shared_rollouts()
    logprobs = policy.signals(rollouts, ["logprobs"]).named()["logprobs"]
    torch.testing.assert_close(logprobs, full_logits_signals(model, rollouts)["logprobs"], rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("share", [True, False])
def test_rows_that_are_turned_by_other_angles_share_no_call(share: bool) -> None:
    """LongRoPE: up to 12 tokens one set of angles, beyond another, and the longest row of a call decides for all."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12, "factor": 4.0}
    model = tiny_llama(rope_parameters=rope | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4})
    policy = Policy(model, config=small(share_prefixes=share))
    text = torch.arange(20, 40)
    rollouts = Rollouts.build([text[:5]] * 4, [text[5:n] for n in (9, 17, 11, 20)], [0] * 4)
    logprobs = policy.signals(rollouts, ["logprobs"]).named()["logprobs"]
    torch.testing.assert_close(logprobs, full_logits_signals(model, rollouts)["logprobs"], rtol=5e-5, atol=5e-5)
    if isinstance(policy.forward, TreeForward):
        assert policy.forward.computed == 10 + 19
