"""Running many cells on a few processes, keeping each as soon as it is done."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from tokenloom.lab.cells import Cell, key, run_cell

Report = Callable[[int, int, str], None]
"""(cells done, cells in all, what was done last)."""

_Work = tuple[int, Cell, Path]


def run(cells: Sequence[Cell], folder: Path, *, workers: int, report: Report | None = None) -> list[dict[str, Any]]:
    """The records of `cells`, in their order; those that `folder` keeps from before are not computed again.

    With one worker everything happens in this process. Failed cells are not kept.
    """
    tell = report or (lambda done, total, what: None)
    folder.mkdir(parents=True, exist_ok=True)
    tell(0, len(cells), "looking for what is known")
    paths = [folder / f"{key(cell)}.json" for cell in cells]
    records = {i: known for i, path in enumerate(paths) if (known := _read(path)) is not None}
    tell(len(records), len(cells), f"{len(records)} known")
    missing = [(i, cells[i], paths[i]) for i in range(len(cells)) if i not in records]
    for done in _computed(_units(missing), workers):
        records |= done
        last = records[max(done)]
        tell(len(records), len(cells), f"{last['method']} on {last['family']}")
    return [records[i] for i in range(len(cells))]


def _units(work: Sequence[_Work]) -> list[list[_Work]]:
    """What one process computes in a row. Cells that begin with the same transformer stay together, and first."""
    units: dict[tuple[Any, ...], list[_Work]] = {}
    for i, cell, path in work:
        shared = (0, cell.family, cell.seed) if cell.kind == "transformer" else (1, i)
        units.setdefault(shared, []).append((i, cell, path))
    return [units[shared] for shared in sorted(units)]


def _computed(units: list[list[_Work]], workers: int) -> Iterator[dict[int, dict[str, Any]]]:
    if workers == 1 or len(units) < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for unit in units:
                yield _run_and_keep(unit)
        finally:
            torch.set_num_threads(threads)
        return
    # Not fork: PyTorch's thread pool does not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(units)), mp_context=context, initializer=_prepare) as pool:
        try:
            for done in as_completed([pool.submit(_run_and_keep, unit) for unit in units]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    # Ctrl-C reaches every process of the terminal. A cell is kept whole or not at all, so workers may just die.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A pool's workers wait forever when the parent is killed: each keeps the others' pipe open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_and_keep(unit: Sequence[_Work]) -> dict[int, dict[str, Any]]:
    records = {}
    for i, cell, path in unit:
        records[i] = run_cell(cell)
        if records[i]["status"] != "failed":
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(records[i]), encoding="utf-8")
            os.replace(part, path)
    return records


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record
