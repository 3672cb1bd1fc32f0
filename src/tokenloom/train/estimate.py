"""What a run will take, before any weights are loaded: memory from shapes, time from a measured rate.

Memory is what the largest phase holds: sampling, the first micro-batch of an update (whose gradients come as its
activations go), or a later one (on top of all gradients). Bytes that the backward keeps for one token in one layer of
a gated decoder, read off the graph of `transformers`' Llama (D width, F inner width, Q width of the queries, to which
keys and values are repeated; r bytes of the residual stream, a of products):

    4 r D  (two norms)  +  n a D  (inputs of products, n = 5 under autocast, else 2)  +  4 a F  (gate, up, act, product)
    +  4 a Q  (attention: query, key, value, result)

On a CPU the lean forms of `policy.lean_training` keep half of the norms' share, three of the four inner ones, and one
cast less.

Not covered: verifiers (processes of their own), what writing a checkpoint copies, GPU libraries, chunk signals.
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
from tokenloom.policy.tree_forward import ABOUT, BEYOND
from tokenloom.tasks import Item, Task
from tokenloom.train.recipe import Recipe

LIBRARIES = 0.45e9
"""Bytes that Python with its libraries holds, measured."""
EFFICIENCY = 0.5
"""Share of the rate of bare matrix products that a model reaches with all that stands between them."""
UNKNOWN_PROMPT = 128
MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4 / 256}
"""Of one number of one moment; int8 has a float32 scale for every 256."""
HEAD_TILE = 3.2e7
"""Bytes of logits that exist at once."""
FRAGMENTS = 0.25
"""What the C library holds back on a CPU, as a share of activations and gradients; measured with glibc 2.36."""


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
    micro = micro_batch_sizes(recipe, prompt, -(-rollout.prompts_per_step // parts))
    nodes = sum(micro_batch_sizes(recipe, prompt, rollout.prompts_per_step))

    memory, peak, phase = _memory(recipe, shape, needs, rows, length, micro)
    rate = matmul_rate(torch.bfloat16 if _product_bytes(recipe) == 2 else torch.float32, shape.hidden, shape.inner)
    speed = rate * EFFICIENCY
    decode = _decode_seconds(recipe, shape, rows, speed)
    step = decode + _train_seconds(recipe, shape, needs, rows, nodes, epochs, speed)
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
        micro_batches=len(micro) * parts * epochs,
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


def micro_batch_sizes(recipe: Recipe, prompt: int, groups: int) -> list[int]:
    """Computed tokens of each micro-batch of an update of `groups` prompts.

    Where prefixes are shared, a micro-batch computes a prompt once for all of its responses that it holds. The last
    token of a response is predicted, and predicts nothing.
    """
    size, answer = recipe.rollout.group_size, recipe.rollout.max_tokens - 1
    if not recipe.model.share_prefixes:
        row = prompt + answer
        return [n * row for n in _dealt(groups * size, recipe.train.micro_batch_tokens // row)]

    def of(budget: int) -> list[int]:
        group = prompt + size * answer
        if group <= budget:
            return [n * group for n in _dealt(groups, budget // group)]
        if prompt > answer:
            budget = max(budget, int(BEYOND * (prompt + answer)))
        return [prompt + n * answer for n in _dealt(size, (budget - prompt) // max(answer, 1))] * groups

    sizes, roomier = (of(round(f * recipe.train.micro_batch_tokens)) for f in (1, ABOUT))
    return roomier if len(roomier) < len(sizes) else sizes


def _dealt(total: int, most: int) -> list[int]:
    """`total` in as few parts of at most `most` (at least 1) as will do, the largest as small as can be."""
    parts = -(-total // max(most, 1))
    most = -(-total // max(parts, 1))
    return [most] * (total // most) + [total % most] * (total % most > 0)


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
    recipe: Recipe, s: Shape, needs: list[str], rows: int, length: int, micro: list[int]
) -> tuple[dict[str, float], float, str]:
    """What holds how much, the peak, and the phase in which it comes; `micro` as `micro_batch_sizes` gives it."""
    weight, product = (2 if recipe.model.dtype == "bfloat16" else 4), _product_bytes(recipe)
    autocast, lora = product < weight, recipe.model.lora is not None
    together, states = recipe.rollout.max_rows or rows, recipe.train.optimizer_states
    embedding = s.vocabulary * s.hidden
    # Without a share of the base model, the reference is a copy of it.
    copied = not lora and any(n.startswith("ref_") for n in needs)
    held = {
        "Python and libraries": LIBRARIES,
        "weights": s.weights * weight,
        "reference model": s.weights * weight * copied,
        f"optimizer, two moments in {states}": 2 * s.trained * MOMENT_BYTES[states],
    }
    sampling = {
        "key/value cache of the rollout": 2 * together * length * s.layers * s.keys * product,
        "logits of one decoding step": 4 * together * s.vocabulary * 4,
        "weights in bf16 while sampling": 2 * (s.trunk + embedding) * autocast,
    }
    token = _kept_bytes(recipe, s)
    casts = 2 * s.trunk * autocast / (s.layers if recipe.model.gradient_checkpointing else 1)
    # The head's gradient waits for the embedding's, which is as large.
    embedded = 0 if lora else 4 * embedding
    gradients = s.trained * weight

    fragments = FRAGMENTS * (max(micro) * token + gradients)

    def forward_and_back(tokens: int) -> float:
        return tokens * token + casts + HEAD_TILE + embedded

    # Gradients come as activations go; from the second micro-batch on they are all there.
    updating = max(forward_and_back(micro[0]), gradients + embedded)
    if len(micro) > 1:
        updating = max(updating, gradients + forward_and_back(micro[1]), gradients + 2 * embedded)
    updating += fragments
    shown = {
        "gradients": gradients,
        f"activations of {max(micro)} tokens": max(micro) * token,
        "weights in bf16 while updating": casts,
        "head and embedding": HEAD_TILE + embedded,
        "held back by the C library": fragments,
    }
    phases = {"sampling": float(sum(sampling.values())), "updating": updating}
    phase = max(phases, key=lambda k: phases[k])
    memory = {k: float(v) for k, v in (held | sampling | shown).items() if v}
    return memory, sum(held.values()) + phases[phase], phase


def _kept_bytes(recipe: Recipe, s: Shape) -> float:
    """What the backward keeps for one token, all layers together; see the module's docstring."""
    weight, product = (2 if recipe.model.dtype == "bfloat16" else 4), _product_bytes(recipe)
    inputs = 5 if product < weight else 2
    norms, inner = 4, 4
    if loading.pick_device(None).type == "cpu":
        norms, inner, inputs = 2, 3, inputs - (product < weight)
    layer = (norms * weight + inputs * product) * s.hidden + product * (inner * s.inner + 4 * s.queries)
    if recipe.model.gradient_checkpointing:
        return s.layers * weight * s.hidden + layer
    return s.layers * layer


def _decode_seconds(recipe: Recipe, s: Shape, rows: int, speed: float) -> float:
    """All of a step's responses, decoded together; a step of few rows is bound by reading the weights."""
    operations = 2 * (s.trunk + s.vocabulary * s.hidden) * max(rows, 16)
    return recipe.rollout.max_tokens * operations / speed


def _train_seconds(
    recipe: Recipe, s: Shape, needs: list[str], rows: int, nodes: int, epochs: int, speed: float
) -> float:
    """An update of `rows` responses that take `nodes` computed tokens."""
    head = 2 * rows * recipe.rollout.max_tokens * s.vocabulary * s.hidden
    forward = 2 * nodes * s.trunk + head
    with_backward = 4 if recipe.model.gradient_checkpointing else 3
    extra = sum(any(n.startswith(kind) for n in needs) for kind in ("old_", "ref_"))
    # The head is computed again in its backward.
    return (epochs * (with_backward * forward + head) + extra * forward) / speed


def _evaluation_responses(recipe: Recipe, problems: int) -> list[int]:
    """Responses of each evaluation of the run."""
    config, steps = recipe.train.eval, recipe.train.steps
    ends = config.samples if config.final_samples is None else config.final_samples
    between = (steps - 1) // config.every if config.every else 0
    return [problems * (1 + config.samples)] * (1 + between) + [problems * (1 + ends)]
