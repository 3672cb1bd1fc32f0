"""Where Tokenloom keeps what it builds once: the user's cache folder, on every platform."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder, not created: `TOKENLOOM_CACHE` if set, else the platform's place for caches."""
    override = os.environ.get("TOKENLOOM_CACHE")
    if override:
        return Path(override).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "tokenloom"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tokenloom"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "tokenloom"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, a folder that `build(folder)` fills once; atomic.

    The build happens in a temporary folder beside the target and is renamed into place, so a
    target that exists is complete. Two processes may build at the same time: the first rename
    wins, the other discards its copy. An interrupted build leaves a temporary folder that nobody
    reads; it is removed by the next build once it is a day old, when no process can still own it.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.building-"
    _remove_stale(target.parent, prefix)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        build(work)
        # mkdtemp makes private folders; a cache is as readable as the user's other files.
        work.chmod(0o755)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _remove_stale(parent: Path, prefix: str, *, older_than: float = 86400.0) -> None:
    for folder in parent.glob(f"{prefix}*"):
        try:
            age = time.time() - folder.stat().st_mtime
        except OSError:
            continue  # another process removed it first
        if age > older_than:
            shutil.rmtree(folder, ignore_errors=True)
