"""An attention mask that carries its prefix trees instead of a number for every pair of nodes.

Models take it for an ordinary additive mask [1, 1, M, M] and hand it on to PyTorch's
`scaled_dot_product_attention`, which asks the mask how to be computed: in FlexAttention on CUDA, in blocks elsewhere.
Because the mask itself travels to every layer, this also holds when gradient checkpointing runs a layer again during
the backward, and no configuration of the model changes. Whatever else computes with the mask is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenloom.policy.tree import PrefixTree
from tokenloom.policy.tree_attention import Blocks, tree_attention
from tokenloom.policy.tree_flex_attention import FlexBlocks, flex_tree_attention


class TreeMask(Tensor):
    """Lets a node see its ancestors and itself: [1, 1, M, M] by its shape, one number in memory."""

    blocks: Blocks | FlexBlocks

    @staticmethod
    def build(
        tree: PrefixTree, window: int | None, dtype: torch.dtype, device: torch.device, *, flex: bool = False
    ) -> TreeMask:
        """The mask of `tree`'s nodes in sequence, ancestors within `window` only; `dtype` is what models see of it.

        `flex` chooses FlexAttention, for which the tree must be padded to whole blocks (see `FlexBlocks`).
        """
        shape = torch.zeros((), dtype=dtype, device=device).expand(1, 1, len(tree), len(tree))
        mask = shape.as_subclass(TreeMask)
        mask.blocks = FlexBlocks(tree, window, device) if flex else Blocks(tree, window)
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Attention as the blocks have it; questions about shape and format as for any tensor.

        Raises:
            NotImplementedError: when a model computes with the mask itself.
        """
        if func is scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            raise NotImplementedError(
                f"{getattr(func, '__name__', func)} of a TreeMask: only scaled_dot_product_attention can read it; "
                "give this model a dense mask"
            )
        return result


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: TreeMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of query, key and value [1, H, M, d] under a TreeMask."""
    if dropout_p or is_causal or len(query) != 1 or key.shape[2] != attn_mask.shape[-1]:
        raise NotImplementedError(
            f"a TreeMask of {attn_mask.shape[-1]} nodes met queries {tuple(query.shape)} and keys {tuple(key.shape)}: "
            "it goes with one sequence of just its nodes, without dropout and without another causal mask"
        )
    if torch.is_autocast_enabled(query.device.type):
        wanted = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(wanted), key.to(wanted), value.to(wanted)
    if key.shape[2] == 1:
        # transformers lays the heads of a group along the positions when there is a single node.
        return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(attn_mask.blocks, FlexBlocks):
        return flex_tree_attention(query, key, value, attn_mask.blocks, scale)
    return tree_attention(query[0], key[0], value[0], attn_mask.blocks, scale)[None]
