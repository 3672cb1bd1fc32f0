"""Training forms of a decoder's modules: the same functions, of which the backward needs less kept.

Autograd keeps the input of every elementwise step. Written as one function each,

    norm:  y = w * n,  n = r x,  r = (mean x^2 + eps)^-1/2     keeps x and r, not n
           dx = r (g - n mean(g n)),  g = w dy                 dw = sum over rows of n dy
    gate:  h = silu(a) * b                                     keeps a and b, not silu(a)
           da = silu'(a) b dh,  db = silu(a) dh

and what is not kept is computed again. Under autocast the two products that read a gated MLP's input share one cast
of it. With float32 weights of width d and an inner width f, that is 10 d + 2 f bytes a token and layer in bf16.
Embeddings add their gradient to `.grad` themselves (see `kernels.accumulation`).

Products stay with the modules' own linear layers, so adapters and hooks on them act as ever. A form stands in for a
module's `forward` only while signals with gradient are taken, and only where it reproduced what the module gave in a
short forward of the model itself. First derivatives only. Papers: RMSNorm arXiv:1910.07467, SwiGLU arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenloom.kernels.accumulation import accumulator
from tokenloom.policy.own_logits import run_trunk, trunk_of

Form = Callable[[Tensor], Tensor]
Make = Callable[[Any], Form]
Forms = list[tuple[nn.Module, Make]]
_TOKENS = 6


@contextmanager
def lean_training(forms: Forms) -> Iterator[None]:
    """While it lasts, modules run on `forms`, but for those that were changed since: another forward or format."""
    replaced = []
    try:
        for module, make in forms:
            if make in _candidates(module):
                module.__dict__["forward"] = make(module)
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.__dict__["forward"]


# -- functions --------------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    """x [..., d] over its root mean square; float32 inside, the format of x outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, shifted: bool) -> Tensor:
        wide = _wide(x)
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, root)
        ctx.shifted = shifted
        if shifted:
            return (wide * root).mul_(1.0 + _wide(weight)).to(x.dtype)
        return weight * (wide * root).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, root = ctx.saved_tensors
        grad, normed, scale = _wide(grad), _wide(x) * root, _wide(weight)
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = grad * (1.0 + scale if ctx.shifted else scale)
            along = (inner * normed).mean(-1, keepdim=True)
            of_x = inner.sub_(normed.mul_(along)).mul_(root).to(x.dtype)
        return of_x, of_weight, None, None


class _Gate(torch.autograd.Function):
    """silu(a) * b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return nn.functional.silu(a).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        of_a: Tensor = torch.ops.aten.silu_backward(grad * b, a)
        return of_a, nn.functional.silu(a).mul_(grad)


class _Cast(torch.autograd.Function):
    """x twice in another format, in the same memory; the gradients are added in the format of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.dtype = x.dtype
        cast = x.to(dtype)
        return cast, cast.view_as(cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None]:
        return first.to(ctx.dtype).add_(second), None


class _Embedding(torch.autograd.Function):
    """Rows of a table; that of padding is never learned."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding = padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        ids, weight = ctx.saved_tensors
        total = accumulator(weight) if ctx.needs_input_grad[1] else None
        if total is None:
            dense = torch.ops.aten.embedding_dense_backward
            return None, dense(grad, ids, len(weight), ctx.padding, False) if ctx.needs_input_grad[1] else None, None
        ids, grad = ids.flatten(), grad.flatten(0, -2)
        if ctx.padding >= 0:
            grad = grad.masked_fill((ids == ctx.padding)[:, None], 0.0)
        total.index_add_(0, ids, grad.to(total.dtype))
        return None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- forms ------------------------------------------------------------------------------------------


def _rms_norm(module: Any) -> Form:
    eps = _eps(module)
    return lambda hidden_states: _Norm.apply(hidden_states, module.weight, eps, False)  # type: ignore[no-untyped-call]


def _shifted_rms_norm(module: Any) -> Form:
    """Gemma's, whose weight is what is to be added to 1."""
    eps = _eps(module)
    return lambda x: _Norm.apply(x, module.weight, eps, True)  # type: ignore[no-untyped-call]


def _gated_mlp(module: Any) -> Form:
    def forward(x: Tensor) -> Tensor:
        first, second = x, x
        if x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
            first, second = _Cast.apply(x, torch.get_autocast_dtype("cpu"))  # type: ignore[no-untyped-call]
        down: Tensor = module.down_proj(_Gate.apply(module.gate_proj(first), module.up_proj(second)))  # type: ignore[no-untyped-call]
        return down

    return forward


def _embedding(module: Any) -> Form:
    padding = -1 if module.padding_idx is None else module.padding_idx
    apply: Callable[..., Tensor] = _Embedding.apply  # torch leaves it without a type
    return lambda ids: apply(ids, module.weight, padding)


def _candidates(module: Any) -> list[Make]:
    """The forms that a module's parts suggest; none for a module whose forward somebody has replaced."""
    own = module.__dict__.get("forward")
    if own is not None and own != type(module).forward.__get__(module):
        return []
    if type(module) is nn.Embedding:
        plain = module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
        return [_embedding] if plain else []
    children, parameters = set(module._modules), set(module._parameters)
    if not children and parameters == {"weight"} and _eps(module) is not None:
        # Hugging Face's norms compute in float32 even in a float64 model; that is left to them.
        return [] if module.weight.dtype == torch.float64 else [_rms_norm, _shifted_rms_norm]
    gated = children - {"act_fn"} == {"gate_proj", "up_proj", "down_proj"} and not parameters
    # Hooks on the activation would not be called.
    silent = not getattr(getattr(module, "act_fn", None), "_forward_hooks", None)
    return [_gated_mlp] if gated and silent and hasattr(module, "act_fn") else []


def _eps(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def forms_that_fit(causal: Any, dtype: torch.dtype | None) -> Forms:
    """Modules with a form that gives what they give in a forward of a few tokens under autocast to `dtype`, if any.

    None on other devices than the CPU, where nothing of this was measured.
    """
    trunk = trunk_of(causal)
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args:
            calls[module] = (args[0], output)

    def products() -> AbstractContextManager[Any]:
        # Casts made without gradients must not be kept for a caller's autocast: it would train through them.
        return torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False)

    modules = [module for module in trunk.modules() if _candidates(module)]
    if not modules or next(causal.parameters()).device.type != "cpu":
        return []
    ids = torch.arange(2 * _TOKENS).remainder(causal.config.get_text_config(decoder=True).vocab_size).view(2, _TOKENS)
    with ExitStack() as stack, torch.no_grad(), products():
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        run_trunk(trunk, ids)
    with torch.no_grad(), products():
        fitting = [(module, [m for m in _candidates(module) if _fits(m(module), *calls[module])]) for module in calls]
    return [(module, makes[0]) for module, makes in fitting if makes]


def _fits(form: Form, given: Tensor, output: Tensor) -> bool:
    try:
        ours = form(given)
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return False  # made for other arguments, or other shapes
    # The same steps in the same order: nothing but the order inside a sum may differ.
    return (
        ours.shape == output.shape
        and ours.dtype == output.dtype
        and bool((ours - output).abs().max() <= 8 * torch.finfo(ours.dtype).eps * output.abs().max())
    )
