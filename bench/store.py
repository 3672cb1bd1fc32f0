"""Results as JSON, one checked-in file a table, and the machine that they were taken on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.harness import ROOT, Measured, Row
from tokenloom.policy.cache import cache_folder

RESULTS = ROOT / "bench" / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system of this machine."""
    graphics = _graphics()
    return {
        **({"gpu": graphics} if graphics else {}),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _graphics() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def commit() -> str:
    """The git commit of this checkout, with a plus sign when files differ from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "bench")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def row_record(row: Row, measured: Mapping[str, Measured], skipped: list[str], failed: str) -> dict[str, Any]:
    """A row's measurements with all that decides them."""
    return {
        "key": row_key(row),
        "label": row.label,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "fresh": row.fresh,
        "skipped": skipped,
        "failed": failed,
        "targets": [vars(t) for t in row.targets],
        "sides": [
            {
                "name": side.name,
                "settings": portable(side.settings),
                "about": side.about,
                **measured[side.name].facts,
                "measurements": measured[side.name].measurements,
            }
            for side in row.sides
            if side.name in measured
        ],
    }


def row_key(row: Row) -> str:
    """Names what a row measures: a result stored under another key does not stand for it."""
    # Round trip, so that a tuple in the settings equals the list that was stored.
    what = {s.name: portable(s.settings) for s in row.sides}
    return json.dumps([row.label, row.runs, row.fresh, what], sort_keys=True)


def portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are stored: of what lies in the cache folder, where it lies there, not where that folder is."""
    folder = f"{cache_folder()}{os.sep}"
    return {
        key: "cache:" + value.removeprefix(folder).replace(os.sep, "/")
        if isinstance(value, str) and value.startswith(folder)
        else value
        for key, value in settings.items()
    }


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The stored results of a table, None when there are none."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def save(results: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Write a table's results in one piece."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results['table']}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or "unknown"
    first = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    name = fields.get("model name", "unknown")
    # A name without a number, as virtual machines have it, stands for processors of quite different speed.
    which = [f"{key.removeprefix('cpu ')} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(which)})" if which else name
