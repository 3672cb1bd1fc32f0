"""Checkpoints: complete, atomic, rotated.

A checkpoint is a folder `checkpoints/step-000010` that appears by one rename, after everything in it was
flushed to disk: trainable weights, optimizer, algorithm state, random states, data position, and the
sizes of the run's .jsonl files. `manifest.json` lists the files with their sizes; a folder that does not match
its manifest is passed over with a warning. What a kill leaves behind starts with a dot and goes when it is resumed.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})")
_WRITING, _REMOVING = ".writing-", ".removing-"


@dataclass(frozen=True)
class Checkpoint:
    """What is saved: tensors by name in four groups, and plain data."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    algorithm: dict[str, Any]
    progress: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint under `folder` and remove all but the `keep` newest; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    target = folder / f"step-{checkpoint.step:06d}"
    temporary = folder / f"{_WRITING}{target.name}"
    temporary.mkdir()
    save_file({k: v.detach().contiguous() for k, v in checkpoint.weights.items()}, temporary / "weights.safetensors")
    save_file(checkpoint.optimizer, temporary / "optimizer.safetensors")
    tensors, plain = pack(checkpoint.algorithm)
    save_file(tensors, temporary / "algorithm.safetensors")
    progress = {"step": checkpoint.step, "algorithm": plain, "random": random_states(), **checkpoint.progress}
    (temporary / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    manifest = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
    (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    flush(temporary)
    if target.exists():
        _remove(target)
    os.rename(temporary, target)
    _flush(folder)
    # A damaged checkpoint, or one of later steps that were undone, must not push a whole one out.
    for step in steps(folder):
        path = folder / f"step-{step:06d}"
        if step > checkpoint.step or damage(path):
            _remove(path)
    tidy(folder, keep=keep)
    return target


def tidy(folder: Path, *, keep: int) -> None:
    """Finish what a kill left unfinished: remove half-written and half-removed folders, and all but the newest."""
    _sweep(folder)
    for step in [s for s in steps(folder) if not damage(folder / f"step-{s:06d}")][:-keep]:
        _remove(folder / f"step-{step:06d}")


def _sweep(folder: Path) -> None:
    for left in [*folder.glob(f"{_WRITING}*"), *folder.glob(f"{_REMOVING}*")]:
        shutil.rmtree(left, ignore_errors=True)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None; damaged ones are passed over with a warning. Restores random states."""
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:06d}"
        problem = damage(path)
        if problem:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, problem)
            continue
        progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        set_random_states(progress.pop("random"))
        algorithm = unpack(load_file(path / "algorithm.safetensors"), progress.pop("algorithm"))
        weights, optimizer = load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
        return Checkpoint(progress.pop("step"), weights, optimizer, algorithm, progress)
    return None


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(f.name) for f in folder.iterdir())
    return sorted(int(m.group(1)) for m in found if m)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, "" when it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "manifest.json is missing or unreadable"
    for name, size in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or cut short"
    return ""


def pack(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a nested state into named tensors and JSON data.

    Raises:
        ValueError: for values that are neither tensors, numbers, text, None, nor lists, tuples or mappings (with
            keys of text) of those.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            # Numbered, because keys may hold dots; cloned, because safetensors refuses shared memory.
            name = f"{len(tensors)}:{path}"
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        if isinstance(value, Mapping):
            wrong = [k for k in value if not isinstance(k, str)]
            if wrong:
                raise ValueError(f"state {path!r} has the key {wrong[0]!r}; keys must be text to be saved")
            return {"mapping": {k: walk(v, f"{path}.{k}") for k, v in value.items()}}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [walk(v, f"{path}.{i}") for i, v in enumerate(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise ValueError(f"state {path!r} is a {type(value).__name__}, which cannot be saved; use tensors and numbers")

    return tensors, {k: walk(v, k) for k, v in state.items()}


def unpack(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `pack` split."""

    def build(node: Mapping[str, Any]) -> Any:
        (kind, value), = node.items()  # fmt: skip
        if kind == "tensor":
            return tensors[value]
        if kind == "mapping":
            return {k: build(v) for k, v in value.items()}
        if kind == "value":
            return value
        members = [build(v) for v in value]
        return tuple(members) if kind == "tuple" else members

    return {k: build(v) for k, v in plain.items()}


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and PyTorch's global generators, as JSON data."""
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    python = random.getstate()
    states: dict[str, Any] = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [str(name), numpy.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = [_encode(s) for s in torch.cuda.get_rng_state_all()]
    return states


def seed_random_states(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, which users' own parts and verifiers may draw from."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore what `random_states` read."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = states["numpy"]
    numpy.random.set_state((name, numpy.array(words, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_decode(s) for s in states["cuda"]])


def _encode(state: Tensor) -> str:
    return base64.b64encode(bytes(state.cpu().tolist())).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


def flush(folder: Path) -> None:
    """Make the files of a folder, and the folder itself, outlive a power failure."""
    for path in [*folder.iterdir(), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    # Windows cannot open folders; there the rename itself is what can be had.
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" or path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    # Renamed first, so that a kill inside the removal leaves nothing that looks like a checkpoint.
    doomed = path.with_name(f"{_REMOVING}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
