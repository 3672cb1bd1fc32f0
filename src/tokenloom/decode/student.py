"""A shallow student of a causal LM: a few of its layers, taught by its own samples to give the laws that it gives.

    policy = Policy.load("smollm2-135m-instruct")
    quality = distill(policy, prompts, "student", layers=6, tokens=60_000)      # an ordinary Hugging Face folder

Samples y come from the teacher p at temperature 1. The student q minimizes the mean over their tokens of

    KL(p_t || q_t) = sum_v p_t(v) (log p_t(v) - log q_t(v)),       over the whole vocabulary, nats

which is word-level distillation (arXiv:1606.07947) on the teacher's own sequences. Embeddings and head are the
teacher's and stay as they are; what trains is the kept layers and the final norm. The teacher reads its samples once:
its last hidden states lie on disk, and its head gives the laws again whenever they are needed. That is 4 D bytes a
sampled token, for a hidden size D.

Letters: N sampled tokens, D hidden size, V vocabulary, B rows.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.decode.hidden_states import padded
from tokenloom.decode.layers import decoder_layers
from tokenloom.decode.pair_quality import QUALITY_FILE, Quality, measure
from tokenloom.decode.student_samples import Sampled, Samples, collect
from tokenloom.policy.head import LogprobHead
from tokenloom.policy.lean_training import forms_that_fit, lean_training
from tokenloom.policy.own_logits import run_trunk, trunk_of
from tokenloom.policy.saving import save_policy
from tokenloom.rollout.forward import base_model

WORK = "unfinished"
"""The folder inside the student's that holds samples and the state of training until it is done."""
_SAVE_SECONDS = 60.0
_WARMUP = 0.05
_SCORES = 2**21
"""Scores at a time, so that a cache holds them."""
_NEVER = -1e4

Report = Callable[[str, int, int, int, float | None], None]
"""Called with the stage, what is done of it and in all, the tokens of this call so far, and the loss, if any."""


@dataclass(frozen=True)
class Settings:
    """What decides on the student; the same settings, teacher and prompts give the same student."""

    layers: int = 6
    tokens: int = 60_000
    max_tokens: int = 128
    epochs: int = 4
    batch: int = 4
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "tokens", "max_tokens", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"distill: {name} is {getattr(self, name)}, must be 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"distill: learning_rate is {self.learning_rate}, must be above 0")


def distill(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    folder: str | Path,
    settings: Settings | None = None,
    *,
    name: str = "",
    report: Report | None = None,
) -> Quality:
    """Make a student of `policy` (a `Policy`) in `folder` and say how good it is on samples that it never saw.

    `prompts` are ids; a tenth of them is held out with all that the teacher says to them. The folder holds an ordinary
    Hugging Face model with the teacher's tokenizer, and `quality.json`. Samples and training are saved on the way: the
    same call goes on where an interrupted one stopped, and a finished student is only reported. `name` is what the
    quality says of the teacher.

    Raises:
        ValueError: for fewer than two prompts, impossible settings, or a folder of other settings, prompts or teacher.
    """
    wanted, target = settings or Settings(), Path(folder)
    tell: Report = report or (lambda *_: None)
    causal = base_model(policy.model)
    kept = kept_layers(len(decoder_layers(causal)), wanted.layers)
    identity = {"settings": asdict(wanted), "teacher": _checksum(causal), "prompts": _checksum_of(prompts)}
    if (target / QUALITY_FILE).is_file():
        return _finished(target, identity)
    work = target / WORK
    _claim(work, identity)
    samples = collect(policy, prompts, work, wanted, report=tell)
    student = slim(causal, kept).to(policy.device)
    _train(student, policy, samples.training, work, wanted, tell)
    quality = measure(
        policy, student, samples.heldout, teacher=name, layers=kept, training_tokens=samples.training_tokens,
        report=lambda done, of, tokens: tell("measuring", done, of, tokens, None),
    )  # fmt: skip
    save_policy(student, policy.tokenizer, None, target)
    _write(target / "distilled.json", identity)
    quality.save(target)
    shutil.rmtree(work)
    return quality


def kept_layers(count: int, layers: int) -> list[int]:
    """Which of `count` layers a student of `layers` keeps: evenly spaced, the first and the last among them.

    Raises:
        ValueError: unless 1 <= layers <= count.
    """
    if not 1 <= layers <= count:
        raise ValueError(f"the teacher has {count} layers and a student keeps 1 to {count} of them, not {layers}")
    if layers == 1:
        return [count - 1]
    return [round(i * (count - 1) / (layers - 1)) for i in range(layers)]


def slim(causal: Any, kept: Sequence[int]) -> Any:
    """A model of the same kind with only the layers `kept`, all weights copied, in evaluation mode.

    Raises:
        ValueError: for a model whose layers are no list.
    """
    from transformers import AutoModelForCausalLM

    whole = decoder_layers(causal)
    count = len(whole)
    config = copy.deepcopy(causal.config)
    text = config.get_text_config(decoder=True)
    for key, value in vars(text).items():
        # What each layer is, such as its kind of attention, is listed in the configuration too.
        if isinstance(value, list) and len(value) == count and not key.endswith(("token_id", "architectures")):
            setattr(text, key, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    factory: Any = AutoModelForCausalLM  # its functions have no annotations
    dtype = next(causal.parameters()).dtype
    made = factory.from_config(config, attn_implementation=causal.config._attn_implementation, dtype=dtype)
    inside = next(name for name, module in causal.named_modules() if module is whole) + "."
    places = {str(old): str(new) for new, old in enumerate(kept)}
    state = {}
    for key, value in causal.state_dict().items():
        if key.startswith(inside):
            number, dot, rest = key[len(inside) :].partition(".")
            if number not in places:
                continue
            key = inside + places[number] + dot + rest
        state[key] = value
    made.load_state_dict(state)
    made.generation_config = copy.deepcopy(causal.generation_config)
    return made.eval()


# -- training ---------------------------------------------------------------------------------------


def _train(student: Any, policy: Any, rows: Sequence[Sampled], work: Path, settings: Settings, tell: Report) -> None:
    trained = _trainable(student)
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    each = -(-len(rows) // settings.batch)
    steps = settings.epochs * each
    done = _restore(work, trained, optimizer)
    teach, learn = LogprobHead(base_model(policy.model)), LogprobHead(student)
    trunk = trunk_of(student)
    forms = forms_that_fit(student, torch.bfloat16 if policy.config.autocast == "bf16" else None)
    order: list[int] = []
    tokens, saved, whole = 0, time.monotonic(), True
    try:
        while done < steps:
            if not order or done % each == 0:
                order = _order(len(rows), settings.seed, done // each)
            begin = done % each * settings.batch
            some = [rows[i] for i in order[begin : begin + settings.batch]]
            optimizer.param_groups[0]["lr"] = settings.learning_rate * _pace(done, steps)
            with policy.autocast(), lean_training(forms):
                hidden = _predicting(trunk, some, policy.device)
            loss, gradient = _head_gradient(teach, learn, some, hidden, policy)
            if not math.isfinite(loss):
                raise ValueError(f"distill: the loss became {loss} at step {done + 1}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            hidden.backward(gradient)  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            whole = False
            optimizer.step()
            done, whole = done + 1, True
            tokens += len(hidden)
            tell("training", done, steps, tokens, loss)
            if time.monotonic() - saved > _SAVE_SECONDS:
                _checkpoint(work, trained, optimizer, done)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if whole:  # else some weights have moved and others have not: what was saved before is better
            _checkpoint(work, trained, optimizer, done)
        raise
    _checkpoint(work, trained, optimizer, done)


def _trainable(student: Any) -> dict[str, nn.Parameter]:
    """The layers' parameters and those of what follows them in the trunk; everything else is frozen."""
    trunk = trunk_of(student)
    ends = [student.get_input_embeddings(), student.get_output_embeddings()]
    frozen = {id(p) for module in ends if module is not None for p in module.parameters()}
    # Learned positions go with the embeddings; GPT-2 calls them wpe.
    kinds = {n: n.split(".")[0] for n, _ in trunk.named_parameters()}
    found = {
        n: p
        for n, p in trunk.named_parameters()
        if id(p) not in frozen and "embed" not in kinds[n] and kinds[n] != "wpe"
    }
    student.requires_grad_(False)
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _predicting(trunk: nn.Module, rows: Sequence[Sampled], device: torch.device) -> Tensor:
    """Last hidden states [N, D] where the rows' sampled tokens are predicted, row by row."""
    ids, mask = padded([[*row.prompt, *row.response] for row in rows], device)
    hidden = run_trunk(trunk, ids, mask=mask.long())
    return torch.cat([hidden[i, r.begin : r.begin + len(r.response)] for i, r in enumerate(rows)])


def _head_gradient(
    teach: LogprobHead, learn: LogprobHead, rows: Sequence[Sampled], hidden: Tensor, policy: Any
) -> tuple[float, Tensor]:
    """The mean loss of the rows' tokens and its gradient [N, D] at `hidden` [N, D].

    At the student's logits it is (q - p) / N. Few rows [., V] exist at a time: they are read again and again.
    """
    target = torch.cat([row.states for row in rows]).to(policy.device)
    gradient, total = torch.empty_like(hidden), 0.0
    size = max(1, _SCORES // int(policy.causal.config.get_text_config(decoder=True).vocab_size))
    for begin in range(0, len(hidden), size):
        part = hidden[begin : begin + size].detach().requires_grad_()
        with policy.autocast():
            scores = learn.logits(part)
            with torch.no_grad():
                laws = teach.logits(target[begin : begin + size])
        # What both rule out has chance 0 times a finite number.
        p, q = (x.detach().log_softmax(-1).clamp_(min=_NEVER) for x in (laws, scores))
        chances = p.exp()
        total += float(torch.linalg.vecdot(chances, p.sub_(q)).sum()) / len(hidden)
        slope = q.exp_().sub_(chances).div_(len(hidden))
        scores.backward(slope)  # type: ignore[no-untyped-call]  # PyTorch's has no annotations
        assert part.grad is not None
        gradient[begin : begin + size] = part.grad
    return total, gradient


def _order(rows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator).tolist()


def _pace(step: int, steps: int) -> float:
    """Share of the learning rate: up in a line for the first steps, then down along a cosine."""
    warm = max(1, round(_WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


# -- what lies on disk ------------------------------------------------------------------------------


def _checkpoint(work: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, done: int) -> None:
    from safetensors.torch import save_file

    tensors = {f"value.{n}": p.detach().contiguous() for n, p in trained.items()}
    for name, parameter in trained.items():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    new = work / "training.new"
    save_file(tensors, new, metadata={"done": str(done)})
    new.replace(work / "training.safetensors")


def _restore(work: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Put back what `_checkpoint` wrote; the number of steps done, 0 without a file."""
    from safetensors import safe_open

    path = work / "training.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for name, parameter in trained.items():
            parameter.data.copy_(file.get_tensor(f"value.{name}"))
            state = {k: f"{k}.{name}" for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in keys}
            if state:
                optimizer.state[parameter] = {k: file.get_tensor(v).clone() for k, v in state.items()}
        return int(file.metadata()["done"])


def _claim(work: Path, identity: dict[str, Any]) -> None:
    path = work / "distill.json"
    if path.is_file():
        _check_same(json.loads(path.read_text(encoding="utf-8")), identity, work.parent)
        return
    if work.parent.is_dir() and any(work.parent.iterdir()):
        raise ValueError(f"distill: {work.parent} holds something else already; name a new folder")
    work.mkdir(parents=True, exist_ok=True)
    _write(path, identity)


def _finished(folder: Path, identity: dict[str, Any]) -> Quality:
    path = folder / "distilled.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    _check_same(found, identity, folder)
    return Quality.load(folder)


def _check_same(found: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    before, now = found.get("settings", {}), identity["settings"]
    changed = [f"{k} {before.get(k)} instead of {now[k]}" for k in now if before.get(k) != now[k]]
    changed += [f"another {what}" for what in ("teacher", "prompts") if found.get(what) != identity[what]]
    if changed:
        raise ValueError(
            f"distill: {folder} holds a student of {', '.join(changed)}; repeat the call that began it, or name a "
            "new folder"
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def _checksum(causal: nn.Module) -> int:
    total = 0
    for parameter in causal.parameters():
        raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total = zlib.crc32(raw.numpy().data, total)
    return total


def _checksum_of(prompts: Sequence[Sequence[int]]) -> int:
    return zlib.crc32(json.dumps([list(map(int, p)) for p in prompts]).encode())


__all__ = ["Quality", "Sampled", "Samples", "Settings", "distill", "kept_layers", "slim"]
