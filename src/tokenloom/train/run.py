"""The run folder: what a run leaves behind, appended so that a kill at any moment costs nothing.

metrics.jsonl is deterministic; wall-clock times stand apart in timing.jsonl. A checkpoint remembers how
long each file was, and resuming cuts the files back to there.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import tokenloom
from tokenloom.train.errors import RecipeError
from tokenloom.train.plain import read_yaml
from tokenloom.train.recipe import Recipe, build_recipe, differences

JSONL = ("metrics.jsonl", "timing.jsonl", "samples.jsonl", "tokens.jsonl")
_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "reasoning-gym", "math-verify", "numpy")


class RunFolder:
    """A folder that one process writes at a time.

    Raises:
        ValueError: when another process holds it, or it is a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{str(self.path)!r} is a file; a run needs a folder of its own")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(self.path / ".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process is writing {str(self.path)!r}; choose another folder") from None

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line to a .jsonl file, flushed to the operating system."""
        line = json.dumps(rounded(record), ensure_ascii=False, allow_nan=False, default=str)
        # Half of a surrogate pair cannot be UTF-8; its backslash form is what JSON writes for it anyway.
        with (self.path / name).open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(line + "\n")

    def sizes(self) -> dict[str, int]:
        """Bytes of each .jsonl file, for `cut`; what is counted is on disk when this returns."""
        found = dict.fromkeys(JSONL, 0)
        for name in JSONL:
            file = self.path / name
            if file.exists():
                with file.open("r+b") as handle:
                    os.fsync(handle.fileno())
                found[name] = file.stat().st_size
        return found

    def cut(self, sizes: Mapping[str, int]) -> list[str]:
        """Cut the .jsonl files back to remembered sizes; returns the names of those that are shorter than that.

        A shorter file is left as it is, but for a last line without an end.
        """
        shorter = []
        for name in JSONL:
            file, size = self.path / name, sizes.get(name, 0)
            held = file.stat().st_size if file.exists() else 0
            if held < size:
                shorter.append(name)
                size = file.read_bytes().rfind(b"\n") + 1 if held else 0
            if held > size:
                with file.open("r+b") as handle:
                    handle.truncate(size)
        return shorter

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file in one piece."""
        write_text(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file, {} when it is missing."""
        file = self.path / name
        if not file.is_file():
            return {}
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return value

    def begin(self, recipe: Recipe) -> None:
        """Record the resolved recipe, versions, machine and seed."""
        algorithm = recipe.build_algorithm()
        self.write_json(
            "run.json",
            {
                "version": tokenloom.__version__,
                "versions": versions(),
                "machine": machine(),
                "seed": recipe.train.seed,
                "started": now(),
                "finished": None,
                "model": recipe.model.name,
                "task": recipe.task.source or [s.source for s in recipe.task.sources],
                "algorithm": {"name": algorithm.preset, "description": algorithm.describe()},
            },
        )
        # Last, because a folder with a recipe is a run that can be resumed.
        write_text(self.path / "recipe.yaml", recipe.to_yaml())

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "recipe.yaml").is_file()

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Record the end of the run."""
        self.write_json("run.json", self.read_json("run.json") | {"finished": now()} | dict(outcome))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.read_json("run.json").get("finished"))

    def saved_recipe(self) -> dict[str, Any]:
        """The resolved recipe that the folder was begun with, {} when it was not."""
        file = self.path / "recipe.yaml"
        loaded = read_yaml(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}
        return loaded if isinstance(loaded, dict) else {}

    def changed(self, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
        """What differs between the saved recipe and this one; {} when nothing was saved.

        A key that did not exist yet when the run was begun had its default's effect.
        """
        saved = self.saved_recipe()
        if not saved:
            return {}
        with suppress(RecipeError):  # for keys that are gone since: they count as changed
            saved = build_recipe(saved, str(self.path), check_files=False).resolved()
        return differences(saved, recipe.resolved())


def next_run_folder(name: str, root: str | Path = "runs") -> Path:
    """The first of runs/NAME-001, runs/NAME-002, ... that does not exist."""
    number = 1
    while (path := Path(root) / f"{name}-{number:03d}").exists():
        number += 1
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats to significant digits, NaN and infinities to None, in containers too."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): rounded(v, digits) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(v, digits) for v in value]
    return value


def versions() -> dict[str, str]:
    """Installed versions of what decides the numbers."""
    found = {"python": platform.python_version(), "tokenloom": tokenloom.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the run ran on; metrics repeat exactly on the same machine with the same number of threads."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def now() -> str:
    """Local time with its offset, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
