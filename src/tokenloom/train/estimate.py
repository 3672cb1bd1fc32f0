"""What a run will take, before any weights are loaded: memory from shapes, time from a measured rate.

Bytes that the backward keeps for one token in one layer of a gated decoder, read off the graph of `transformers`'
Llama (D width, F inner width, Q and K widths of queries and keys, r bytes of the residual stream, a of products):

    4 r D  (two norms)  +  n a D  (inputs of products, n = 5 under autocast, else 2)  +  4 a F  (gate, up, act, product)
    +  2 a (Q + K)  (attention)

Operations are counted as 2 per weight and token, three times that with a backward, four with recomputation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from tokenloom.policy import loading
from tokenloom.policy.chat import encode_prompt
from tokenloom.tasks import Item, Task
from tokenloom.train.recipe import Recipe

LIBRARIES = 0.45e9
"""Bytes that Python with its libraries holds, measured."""
EFFICIENCY = 0.5
"""Share of the rate of bare matrix products that a model reaches with all that stands between them."""
UNKNOWN_PROMPT = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: all weights, those in layers (`trunk`), those trained, and widths."""

    weights: int
    trunk: int
    trained: int
    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes by what holds it, at its peak and in which phase; times in seconds; sizes of the run."""

    shape: Shape
    memory: dict[str, float]
    peak: float
    phase: str
    step_seconds: float
    evaluation_seconds: float
    total_seconds: float
    rate: float
    prompt_tokens: int
    responses: int
    tokens: int
    updates: int
    micro_batches: int
    needs: list[str]
    assumptions: list[str] = field(default_factory=list)


def estimate(recipe: Recipe, task: Task | None = None) -> Estimate:
    """Estimate a run; `task` gives the lengths of its prompts, which are otherwise assumed.

    Raises:
        ValueError: when the model cannot be found.
    """
    source = loading.resolve(recipe.model.name)
    shape = model_shape(recipe, source)
    prompt, prompt_note = _prompt_tokens(source, task)
    algorithm, rollout, train = recipe.build_algorithm(), recipe.rollout, recipe.train
    needs = sorted(algorithm.needs | algorithm.loss_needs)
    rows = rollout.prompts_per_step * rollout.group_size
    length = prompt + rollout.max_tokens
    settings = {k: h.default for k, h in algorithm.updates.part.hyperparameters.items()} | algorithm.updates.params
    epochs, parts = int(settings.get("epochs", 1)), int(settings.get("mini_batches", 1))
    micro_rows = max(1, min(-(-rows // parts), train.micro_batch_tokens // length))
    micro_batches = -(-rows // (parts * micro_rows)) * parts * epochs

    memory, peak, phase = _memory(recipe, shape, needs, rows, length, micro_rows, micro_batches > parts * epochs)
    rate = matmul_rate(torch.bfloat16 if _product_bytes(recipe) == 2 else torch.float32, shape.hidden, shape.inner)
    speed = rate * EFFICIENCY
    decode = _decode_seconds(recipe, shape, rows, speed)
    step = decode + _train_seconds(recipe, shape, needs, rows, length, epochs, speed)
    held_out = 0 if task is None else len(task.heldout[: train.eval.problems])
    evaluations = _evaluation_responses(recipe, held_out)
    evaluation = decode / rows * sum(evaluations)
    return Estimate(
        shape=shape,
        memory=memory,
        peak=peak,
        phase=phase,
        step_seconds=step,
        evaluation_seconds=evaluation,
        total_seconds=step * train.steps + evaluation,
        rate=rate,
        prompt_tokens=prompt,
        responses=rows * train.steps,
        tokens=rows * train.steps * rollout.max_tokens,
        updates=parts * epochs,
        micro_batches=micro_batches,
        needs=needs,
        assumptions=[
            prompt_note,
            f"every response has {rollout.max_tokens} tokens, the most allowed; shorter ones take less of everything",
            f"the model runs at {EFFICIENCY:.0%} of the rate of bare matrix products, {rate / 1e9:,.0f} GFLOP/s, "
            "measured just now, and has the machine for itself",
            *([] if task is not None else ["time for evaluations is left out: the task was not loaded"]),
            *(["groups dropped and sampled anew are not counted"] if algorithm.refill else []),
        ],
    )


def model_shape(recipe: Recipe, source: str) -> Shape:
    """Sizes of the model at `source`, from its config: it is built without storage."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the config of the model {source!r}: {str(error).splitlines()[0]}") from error
    text = config.get_text_config()
    with torch.device("meta"):
        model = cast(Any, AutoModelForCausalLM).from_config(config)
    weights = sum(p.numel() for p in model.parameters())
    outer = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m}
    trained, lora = weights, recipe.model.lora
    if lora is not None:
        linear = [m for n, m in model.named_modules() if _adapted(n, m, lora.target_modules, model)]
        trained = sum(lora.rank * (m.in_features + m.out_features) for m in linear)
    heads = int(text.num_attention_heads)
    head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return Shape(
        weights=weights,
        trunk=weights - sum(outer.values()),
        trained=trained + (text.hidden_size + 1 if recipe.model.value_head else 0),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        inner=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        queries=heads * head,
        keys=int(getattr(text, "num_key_value_heads", None) or heads) * head,
        vocabulary=int(text.vocab_size),
    )


def matmul_rate(dtype: torch.dtype, hidden: int = 1024, inner: int = 4096, *, seconds: float = 0.3) -> float:
    """Operations a second of a [512, hidden] x [hidden, inner] product on the device that would train.

    The best of those that fit into `seconds`: other programs only make a product slower.
    """
    device = loading.pick_device(None)
    a = torch.randn(512, hidden, dtype=torch.float32).to(device, dtype)
    b = torch.randn(hidden, inner, dtype=torch.float32).to(device, dtype)
    float((a @ b).sum())  # the first product sets libraries up
    best, end = float("inf"), time.perf_counter() + seconds
    while (started := time.perf_counter()) < end or best == float("inf"):
        float((a @ b)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - started)
    return 2.0 * 512 * hidden * inner / best


def _adapted(name: str, module: Any, targets: str | Sequence[str], model: Any) -> bool:
    if not hasattr(module, "in_features") or module is model.get_output_embeddings():
        return False
    return targets == "all-linear" or name.rpartition(".")[2] in ([targets] if isinstance(targets, str) else targets)


def _prompt_tokens(source: str, task: Task | None) -> tuple[int, str]:
    """The longest of a few prompts in tokens, and how it is known."""
    tokenizer = None if task is None else loading.load_tokenizer(source)
    if task is None or tokenizer is None:
        return UNKNOWN_PROMPT, f"prompts have {UNKNOWN_PROMPT} tokens: the task was not loaded"
    items: Sequence[Item] = [*task.train[:64], *task.heldout[:64]]
    longest = max(len(encode_prompt(tokenizer, i.messages or i.prompt or "")) for i in items)
    return longest, f"prompts have {longest} tokens, the longest of {len(items)}"


def _product_bytes(recipe: Recipe) -> int:
    return 2 if recipe.model.autocast == "bf16" or recipe.model.dtype == "bfloat16" else 4


def _memory(
    recipe: Recipe, s: Shape, needs: list[str], rows: int, length: int, micro_rows: int, several: bool
) -> tuple[dict[str, float], float, str]:
    weight, product = (2 if recipe.model.dtype == "bfloat16" else 4), _product_bytes(recipe)
    autocast = recipe.model.autocast == "bf16" and weight == 4
    layer = (
        4 * weight * s.hidden
        + (5 if autocast else 2) * product * s.hidden
        + 4 * product * s.inner
        + 2 * product * (s.queries + s.keys)
    )
    tokens = micro_rows * length
    kept = tokens * s.layers * layer
    if recipe.model.gradient_checkpointing:
        kept = tokens * (s.layers * weight * s.hidden + layer)
    chunk = recipe.model.chunk_rows or max(16, 2**24 // s.vocabulary)
    passes = 3 if "entropies" in needs else 2
    # Without a share of the base model, the reference is a copy of it.
    reference = s.weights * weight if recipe.model.lora is None and any(n.startswith("ref_") for n in needs) else 0
    gradients, casts = s.trained * weight, s.trunk * 2 if autocast else 0
    head = min(chunk, micro_rows * recipe.rollout.max_tokens) * s.vocabulary * 4 * passes
    head += s.vocabulary * s.hidden * 4 if recipe.model.lora is None else 0
    together = recipe.rollout.max_rows or rows
    held = {
        "Python and libraries": LIBRARIES,
        "weights": float(s.weights * weight),
        "reference model": float(reference),
        "optimizer, two moments": 2.0 * gradients,
    }
    sampling = {
        "key/value cache of the rollout": 2.0 * together * length * s.layers * s.keys * product,
        "logits of one decoding step": 4.0 * together * s.vocabulary * 4,
        "weights in bf16": float(casts),
    }
    updating = {
        "gradients": float(gradients),
        "activations of a micro-batch": float(kept),
        "head, one chunk": float(head),
        "weights in bf16": float(casts),
    }
    # With a single micro-batch, activations go as gradients come.
    saved = 0.0 if several else min(kept, gradients)
    phases = {"sampling": sum(sampling.values()), "updating": sum(updating.values()) - saved}
    phase = max(phases, key=lambda k: phases[k])
    total = sum(held.values()) + phases[phase]
    return {k: v for k, v in (held | sampling | updating).items() if v}, total, phase


def _decode_seconds(recipe: Recipe, s: Shape, rows: int, speed: float) -> float:
    """All of a step's responses, decoded together; a step of few rows is bound by reading the weights."""
    operations = 2 * (s.trunk + s.vocabulary * s.hidden) * max(rows, 16)
    return recipe.rollout.max_tokens * operations / speed


def _train_seconds(
    recipe: Recipe, s: Shape, needs: list[str], rows: int, length: int, epochs: int, speed: float
) -> float:
    answers = recipe.rollout.max_tokens
    forward = 2 * rows * (length * s.trunk + answers * s.vocabulary * s.hidden)
    with_backward = 4 if recipe.model.gradient_checkpointing else 3
    # The head is computed again in its backward.
    again = 2 * rows * answers * s.vocabulary * s.hidden
    extra = sum(any(n.startswith(kind) for n in needs) for kind in ("old_", "ref_"))
    return (epochs * (with_backward * forward + again) + extra * forward) / speed


def _evaluation_responses(recipe: Recipe, problems: int) -> list[int]:
    """Responses of each evaluation of the run."""
    config, steps = recipe.train.eval, recipe.train.steps
    ends = config.samples if config.final_samples is None else config.final_samples
    between = (steps - 1) // config.every if config.every else 0
    return [problems * (1 + config.samples)] * (1 + between) + [problems * (1 + ends)]
