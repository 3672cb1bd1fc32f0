"""Attention on trees, by blocks and by FlexAttention's block masks, against softmax under the dense ancestor mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tokenloom.policy import tree_attention as blocks_module
from tokenloom.policy import tree_flex_attention as flex_module
from tokenloom.policy.tree import PrefixTree, ancestor_mask, build_tree, pad_tree, shared_lengths, sorted_rows
from tokenloom.policy.tree_attention import Blocks, tree_attention
from tokenloom.policy.tree_attention_mask import TreeMask
from tokenloom.policy.tree_flex_attention import FlexBlocks, ancestor_test, block_kinds, flex_tree_attention

ROWS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=12)
WINDOWS = st.sampled_from([None, 1, 3])
CPU = torch.device("cpu")


def tree_of(rows: list[list[int]]) -> PrefixTree:
    order = sorted_rows(rows)
    chosen = [torch.tensor(rows[i]) for i in order]
    return build_tree(order, chosen, shared_lengths(chosen))


def group(prompt: int, responses: int, length: int) -> PrefixTree:
    """Responses that share nothing but their prompt."""
    return tree_of([[0] * prompt + [1 + i] * length for i in range(responses)])


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(i < 3) for i in range(4)]


def dense(query: Tensor, key: Tensor, value: Tensor, tree: PrefixTree, window: int | None, scale: float) -> Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    return torch.softmax(scores.masked_fill(~ancestor_mask(tree, window=window), float("-inf")), -1) @ value


@settings(deadline=None, max_examples=40)
@given(ROWS, WINDOWS, st.integers(1, 5), st.integers(0, 40), st.integers(1, 4))
def test_blocks_of_any_cut_equal_the_dense_mask(
    rows: list[list[int]], window: int | None, longest: int, overhead: int, lanes: int
) -> None:
    tree = tree_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "BLOCK", longest)
        patch.setattr(blocks_module, "OVERHEAD", overhead)
        patch.setattr(blocks_module, "LANES", lanes)
        blocks = Blocks(tree, window)
    assert [b.start for b in blocks.blocks] == [0, *(b.stop for b in blocks.blocks)][:-1]
    assert blocks.blocks[-1].stop == len(tree)
    *inputs, grad = drawn(2, len(tree), 4)
    ours, wanted = tree_attention(*inputs, blocks, 0.3), dense(*inputs, tree, window, 0.3)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "tree", [group(64, 8, 256), group(512, 8, 32), group(60, 32, 32), group(5, 900, 1)], ids=lambda tree: str(len(tree))
)
def test_scores_computed_stay_near_those_that_are_seen(tree: PrefixTree) -> None:
    blocks = Blocks(tree).blocks
    computed, seen = sum(b.seen.numel() for b in blocks), int(ancestor_mask(tree).sum())
    # At most a block of hidden keys for each node, and what joining short responses adds: no more than calls cost.
    allowance = len(tree) * (blocks_module.BLOCK + blocks_module.LANES) + len(tree.nodes) * blocks_module.OVERHEAD
    assert seen <= computed <= seen + allowance
    assert max(b.stop - b.start for b in blocks) <= 2 * blocks_module.BLOCK


def test_in_bf16_it_is_as_exact_as_plain_products() -> None:
    tree = group(20, 6, 40)
    blocks = Blocks(tree)
    exact = dense(*drawn(4, len(tree), 32)[:3], tree, None, 32**-0.5)
    low = drawn(4, len(tree), 32, dtype=torch.bfloat16)
    errors = []
    for out in (tree_attention(*low[:3], blocks, 32**-0.5), dense(*low[:3], tree, None, 32**-0.5)):
        errors.append(float((out.double() - exact).detach().pow(2).mean().sqrt()))
    assert errors[0] <= 1.2 * errors[1]
    for x in torch.autograd.grad(tree_attention(*low[:3], blocks, 32**-0.5), low[:3], low[3]):
        assert x.dtype == torch.bfloat16


def test_gradients_are_the_same_each_time() -> None:
    tree = group(40, 12, 50)
    *inputs, grad = drawn(3, len(tree), 8, dtype=torch.float32)
    once, again = (torch.autograd.grad(tree_attention(*inputs, Blocks(tree), 0.3), inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 90), st.sampled_from([None, 1, 70, 200]))
def test_flex_sees_what_the_dense_mask_shows(prompt: int, responses: int, length: int, window: int | None) -> None:
    tree = pad_tree(group(prompt, responses, length), flex_module.BLOCK)
    seen = ancestor_mask(tree, window=window)
    node = torch.arange(len(tree))
    asked = ancestor_test(tree.leave, tree.depth, window)(None, None, node[:, None], node[None, :])
    assert torch.equal(asked, seen)
    n, side = len(tree) // flex_module.BLOCK, flex_module.BLOCK
    pairs = seen.view(n, side, n, side).transpose(1, 2)
    mixed, whole = block_kinds(tree, window)
    assert not (mixed & whole).any()
    assert not pairs[~(mixed | whole)].any()
    assert pairs[whole].all()
    if window is None:
        empty = ~pairs.flatten(2).any(-1)
        assert not (mixed & empty).any()


@pytest.mark.slow  # PyTorch loads its compiler for this, which takes a while
@pytest.mark.parametrize("window", [None, 50])
def test_flex_attention_equals_blocks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not compiled: that is for CUDA. The uncompiled function is PyTorch's own reference.
    monkeypatch.setattr(flex_module, "_compiled", lambda: flex_attention)
    plain = group(150, 3, 40)
    tree = pad_tree(plain, flex_module.BLOCK)
    # Without gradients: on a CPU PyTorch has FlexAttention's forward only.
    inputs = [x.detach() for x in drawn(1, 2, len(tree), 16)[:3]]
    flexed = flex_tree_attention(*inputs, FlexBlocks(tree, window, CPU), 0.25)
    blocked = tree_attention(*(x[0] for x in inputs), Blocks(tree, window), 0.25)
    torch.testing.assert_close(flexed[0], blocked, rtol=1e-9, atol=1e-9)
    kept = FlexBlocks(tree, window, CPU).mask
    assert kept.shape == (1, 1, len(tree), len(tree))
    with pytest.raises(ValueError, match="pad_tree"):
        FlexBlocks(plain, window, CPU)


@pytest.mark.parametrize("flex", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_mask_takes_over_fused_attention(flex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_module, "_compiled", lambda: flex_attention)
    tree = pad_tree(group(30, 4, 10), flex_module.BLOCK)
    mask = TreeMask.build(tree, None, torch.float64, CPU, flex=flex)
    assert mask.shape == (1, 1, len(tree), len(tree))
    assert (mask.dtype, mask.device, mask.ndim) == (torch.float64, CPU, 4)
    assert mask.untyped_storage().nbytes() == 8
    query, key, value = (x.detach() for x in drawn(1, 4, len(tree), 16)[:3])
    shared = [x[:, :2] for x in (key, value)]
    ours = scaled_dot_product_attention(query, *shared, attn_mask=mask, enable_gqa=True)
    wanted = dense(query, *(x.repeat_interleave(2, 1) for x in shared), tree, None, 0.25)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_the_mask_refuses_what_it_cannot_do() -> None:
    tree = group(3, 2, 4)
    mask = TreeMask.build(tree, None, torch.float32, CPU)
    query, key, value, _ = drawn(1, 2, len(tree), 4, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="dense mask"):
        query @ key.transpose(-1, -2) + mask
    with pytest.raises(NotImplementedError, match="dense mask"):
        mask[:, :, :, :2]
    for arguments in ({"dropout_p": 0.1}, {"is_causal": True}):
        with pytest.raises(NotImplementedError, match="one sequence"):
            scaled_dot_product_attention(query, key, value, attn_mask=mask, **arguments)
    longer = torch.cat([key, key], 2)
    with pytest.raises(NotImplementedError, match=r"11 nodes|one sequence"):
        scaled_dot_product_attention(query, longer, longer, attn_mask=mask)


def test_a_single_node_sees_itself_in_any_layout() -> None:
    mask = TreeMask.build(group(1, 1, 0), None, torch.float64, CPU)
    key = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    # transformers puts the heads that share a key in the place of positions.
    out = scaled_dot_product_attention(torch.randn(1, 1, 3, 4, dtype=torch.float64), key, key, attn_mask=mask)
    torch.testing.assert_close(out, key.expand(1, 1, 3, 4))


def test_autocast_reaches_the_products() -> None:
    tree = group(3, 2, 4)
    query, key, value, _ = drawn(1, 2, len(tree), 4, dtype=torch.float32)
    mask = TreeMask.build(tree, None, torch.float32, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float32
