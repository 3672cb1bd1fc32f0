"""Lean forms of a decoder's modules: the same functions in fewer steps, for decoding without gradients.

One token through a layer of a small model is some hundred microseconds of arithmetic, and as much again goes into
calling its pieces. A form stands in for the `forward` of one module while a rollout lasts: an RMS norm becomes one
call; a gated MLP and attention with rotary positions take one product where Hugging Face's code takes two or three.

On some processors a whole layer becomes one call of compiled code instead (see `native.block`).

A form is only used where it reproduced what its module did in a short forward of the model itself. Modules that no
form fits, or whose code changes some day, stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokenloom.policy.own_logits import run_trunk, trunk_of
from tokenloom.rollout.attention import attend
from tokenloom.rollout.native import block as compiled
from tokenloom.rollout.native.fitting import is_a_stack, reproduces
from tokenloom.rollout.native.trunk import CompiledTrunk
from tokenloom.rollout.native.weights import Space
from tokenloom.rollout.products import kernel_dtype, product, products

Form = Callable[..., Any]
Make = Callable[[Any], Form]
# Scores of a head up to which attention is two products; more, as in a long prefill, are left to a fused kernel.
_FEW = 4096
_PROBE = 6
_fitting: WeakKeyDictionary[nn.Module, list[tuple[nn.Module, Make]]] = WeakKeyDictionary()
_compilable: WeakKeyDictionary[nn.Module, dict[torch.dtype, tuple[list[nn.Module], type[Any] | None]]]
_compilable = WeakKeyDictionary()
"""Layers that can be compiled code, and what a trunk returns that is made up of them and nothing else."""


@dataclass(frozen=True)
class Lean:
    """What of a model is in lean forms: all of its attention, and whether its layers are compiled code."""

    attention: bool = False
    compiled: bool = False


@dataclass
class _Leaned:
    """Forms that stand in a model, what they are, and how many have asked for them."""

    stack: ExitStack
    lean: Lean
    users: int = 0


_leaned: WeakKeyDictionary[nn.Module, _Leaned] = WeakKeyDictionary()


@contextmanager
def lean_modules(causal: Any, *, in_chunks: bool = False) -> Iterator[Lean]:
    """While it lasts, `causal` runs on lean forms where they fit, and on `product` in all other linear layers.

    Yields what is lean. The caller holds `contexts.sampling_mode`; weights must not change.
    On other devices than the CPU nothing is replaced. Several may hold it at once and let go in any order.
    `in_chunks`: where weights are laid out anew, see `native.weights.Space`.
    """
    if next(causal.parameters()).device.type != "cpu":
        yield Lean()
        return
    held = _leaned.get(causal)
    if held is None:
        held = _leaned[causal] = _lean(causal, Space(in_chunks=in_chunks))
    held.users += 1
    try:
        yield held.lean
    finally:
        held.users -= 1
        if not held.users:
            del _leaned[causal]
            held.stack.close()


@torch.no_grad()
def _lean(causal: Any, space: Space) -> _Leaned:
    if causal not in _fitting:
        _fitting[causal] = _forms_that_fit(causal)
    # What fitted may have been changed since: another number format, other attention.
    forms = [(module, make) for module, make in _fitting[causal] if make in _candidates(module)]
    with ExitStack() as stack:
        covered: set[nn.Module] = set()
        count = 0
        for module, form in _compiled(causal, dict(forms), space):
            stack.enter_context(_replaced(module, form))
            covered.update(module.modules())
            count += isinstance(form, compiled.CompiledLayer)
        for module, make in forms:
            if module not in covered:
                stack.enter_context(_replaced(module, make(module)))
                covered.update(module.children())
        for module in causal.modules():
            if module not in covered and kernel_dtype([module]) is not None:
                stack.enter_context(_replaced(module, product([module])))
        attentions = sum(make is _attention for _, make in forms)
        layers = causal.config.get_text_config(decoder=True).num_hidden_layers
        return _Leaned(stack.pop_all(), Lean(attentions == layers, count == layers))


class _StandIn:
    """A form in its module's place. It works on that module's weights, so a copy of the module is given none."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        self._own, self.form = module.forward, form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.form(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._own, memo)


@contextmanager
def _replaced(module: nn.Module, form: Form) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = _StandIn(module, form)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


# -- the forms --------------------------------------------------------------------------------------


def _rms_norm(module: Any) -> Form:
    weight, shape, eps = module.weight, tuple(module.weight.shape), _eps(module)
    return lambda x: nn.functional.rms_norm(x, shape, weight, eps)


def _shifted_rms_norm(module: Any) -> Form:
    """Gemma's, whose weight is what is to be added to 1."""
    weight, shape, eps = 1.0 + module.weight.float(), tuple(module.weight.shape), _eps(module)
    return lambda x: nn.functional.rms_norm(x.float(), shape, weight, eps).to(x.dtype)


def _gated_mlp(module: Any) -> Form:
    inner, down = products([module.gate_proj, module.up_proj]), product([module.down_proj])
    activation = module.act_fn

    def forward(x: Tensor) -> Tensor:
        gate, up = inner(x)
        return down(activation(gate).mul_(up))

    return forward


def _attention(module: Any) -> Form:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from tokenloom.rollout.cache import masked_layer

    inner, outer = product([module.q_proj, module.k_proj, module.v_proj]), product([module.o_proj])
    size, scaling, number, shared = module.head_dim, module.scaling, module.layer_idx, module.num_key_value_groups
    q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        b, n, _width = hidden_states.shape
        heads = inner(hidden_states).view(b, n, -1, size)
        groups = heads.shape[2] // (shared + 2)
        both, value = heads[:, :, :-groups], heads[:, :, -groups:]
        if q_norm is not None and k_norm is not None:
            both = torch.cat((q_norm(both[:, :, :-groups]), k_norm(both[:, :, -groups:])), 2)
        both = _turned(both, position_embeddings)
        query, key = both[:, :, :-groups], both[:, :, -groups:]
        cache = past_key_values if cache is None else cache
        layer = masked_layer(cache, number)
        if layer is not None and attention_mask is not None:
            keys, values = layer.write(key, value)
            if n == 1 or n * keys.shape[1] <= _FEW:
                return outer(attend(query, keys, values, attention_mask, scaling)), None
            key, value = (x.view(b, groups, *x.shape[1:]) for x in (keys, values))
        else:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
            if cache is not None:
                key, value = cache.update(key, value, number)
        mixed, _none = sdpa_attention_forward(
            module, query.transpose(1, 2), key, value, attention_mask, scaling=scaling
        )
        return outer(mixed.reshape(b, n, -1)), None

    return forward


def _turned(x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, n, heads, D] at its rotary positions, the two halves of a head being the coordinates of each plane."""
    if not isinstance(position_embeddings, _Angles):
        position_embeddings = _Angles(position_embeddings)
    across = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * position_embeddings.cos, across, position_embeddings.sin)


class _Angles(tuple[Tensor, Tensor]):
    """Cosines and sines [B, n, D] with what `_turned` makes of them, the same for all layers."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        cos, sin = pair
        half = sin.shape[-1] // 2
        self.cos = cos[:, :, None]
        self.sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)[:, :, None]


def _angles(module: Any) -> Form:
    forward = module.forward
    return lambda *args, **kwargs: _Angles(forward(*args, **kwargs))


def _block(module: Any) -> Form:
    """A layer of attention and MLP, each behind a norm and added to its input."""
    attention, mlp = module.self_attn, module.mlp
    first, second = module.input_layernorm, module.post_attention_layernorm

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        mixed, _weights = attention(hidden_states=first(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        changed: Tensor = mlp(second(hidden_states))
        return hidden_states + changed

    return forward


# -- which fit --------------------------------------------------------------------------------------


def _forms_that_fit(causal: Any) -> list[tuple[nn.Module, Make]]:
    """Modules with a form that gives what they give in a forward of a few tokens."""
    found = []
    with torch.autocast("cpu", enabled=False):
        for module, call in _calls(causal, lambda module: bool(_candidates(module))).items():
            makes = [make for make in _candidates(module) if _fits(make(module), *call)]
            found += [(module, make) for make in makes[:1]]
    return found


def _calls(causal: Any, wanted: Callable[[nn.Module], bool]) -> dict[nn.Module, tuple[Any, Any, Any]]:
    """Arguments and outputs of the wanted modules in a forward of a few tokens, in float32."""
    trunk = trunk_of(causal)
    calls: dict[nn.Module, tuple[Any, Any, Any]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module] = (args, kwargs, output)

    ids = torch.arange(2 * _PROBE).remainder(causal.config.get_text_config(decoder=True).vocab_size).view(2, _PROBE)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # so that attention is given a mask
    with ExitStack() as stack, torch.autocast("cpu", enabled=False):
        for module in trunk.modules():
            if wanted(module):
                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        run_trunk(trunk, ids, mask=mask)
    return calls


def _compiled(causal: Any, makes: dict[nn.Module, Make], space: Space) -> Iterator[tuple[nn.Module, Form]]:
    """Layers that are compiled code here, and with them the trunk that they make up and the head."""
    dtype = compiled.format_here()
    if dtype is None:
        return
    norms = {
        m: (_scale(m, make), _eps(m) or 0.0) for m, make in makes.items() if make in (_rms_norm, _shifted_rms_norm)
    }
    trunk: Any = trunk_of(causal)
    known = _compilable.setdefault(causal, {})
    if dtype not in known:
        layers = [m for m, make in makes.items() if make is _block and _is_plain(m, makes) and compiled.describes(m)]
        calls = _calls(causal, lambda module: module in layers or module in (trunk, *trunk.children()))
        layers = [m for m in layers if m in calls and reproduces(m, norms, dtype, calls[m])]
        known[dtype] = layers, type(calls[trunk][2]) if is_a_stack(trunk, layers, calls) else None
    layers, output = known[dtype]
    made = [
        (module, compiled.CompiledLayer(module, norms, dtype, type(module).forward.__get__(module), space))
        for module in layers
        if _is_plain(module, makes) and compiled.describes(module) and not any(compiled.hooks_inside(module))
    ]
    yield from made
    # What was a stack may have been given other parts since.
    if output is not None and [module for module, _ in made] == list(trunk.layers) and trunk.norm in norms:
        own, forms = type(trunk).forward.__get__(trunk), [form for _, form in made]
        if "forward" not in trunk.__dict__ and not _tells_more(trunk):
            yield trunk, CompiledTrunk(trunk, forms, norms[trunk.norm], output, own)
    head = causal.get_output_embeddings()
    if layers and compiled.is_linear(head) and compiled.most_rows(dtype) is None:
        yield head, compiled.linear(head, dtype, space)


def _tells_more(trunk: Any) -> bool:
    """Whether its configuration has a trunk return more than the last hidden states."""
    return any(getattr(trunk.config, name, False) for name in ("output_hidden_states", "output_attentions"))


def _is_plain(layer: Any, makes: dict[nn.Module, Make]) -> bool:
    """Whether each part of a layer is one that a compiled layer has too."""
    attention = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    plain = makes.get(attention) is _attention and makes.get(layer.mlp) is _gated_mlp
    return plain and all(makes.get(norm) in (_rms_norm, _shifted_rms_norm) for norm in norms)


def _scale(norm: Any, make: Make) -> Tensor:
    weight: Tensor = norm.weight.detach().float()
    return (weight + 1.0 if make is _shifted_rms_norm else weight).contiguous()


def _candidates(module: Any) -> list[Make]:
    """The forms that a module's parts suggest."""
    children, parameters = set(module._modules), set(module._parameters)
    if not children and parameters == {"weight"} and _eps(module) is not None:
        # Hugging Face's RMS norms compute in float32 even in a float64 model; that is left to them.
        return [] if module.weight.dtype == torch.float64 else [_rms_norm, _shifted_rms_norm]
    if children - {"act_fn"} == {"gate_proj", "up_proj", "down_proj"} and not parameters:
        return [_gated_mlp] if hasattr(module, "act_fn") else []
    if children - {"q_norm", "k_norm"} == {"q_proj", "k_proj", "v_proj", "o_proj"} and not parameters:
        kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
        plain = kind == "sdpa" and getattr(module, "attn_logit_softcapping", None) is None
        return [_attention] if plain and hasattr(module, "scaling") and hasattr(module, "head_dim") else []
    if children == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"} and not parameters:
        return [_block]
    return [_angles] if any(name.endswith("inv_freq") for name in module._buffers) and not parameters else []


def _eps(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _fits(form: Form, args: Any, kwargs: Any, output: Any) -> bool:
    try:
        ours = form(*args, **kwargs)
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return False  # made for other arguments, or other shapes
    ours, theirs = (x[0] if isinstance(x, tuple) else x for x in (ours, output))
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    # Sums of some thousand terms in another order; a form of another function is off by the size of its output.
    tolerance = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 0.05
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
