"""Freed memory is kept by training on a CPU under glibc, and nowhere else is anything touched."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokenloom.train import allocator, session
from train.setups import Tiny


def calls(monkeypatch: pytest.MonkeyPatch, libc: str, **functions: Any) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: (libc, "2.36" if libc else ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: SimpleNamespace(**functions))
    allocator.keep_freed_memory()


def test_glibc_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, int] = {}
    calls(monkeypatch, "glibc", mallopt=lambda setting, value: told.update({setting: value}))
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    assert told == {-4: 0, -1: 2**31 - 1, -2: 2**26}


@pytest.mark.parametrize("libc", ["", "libc", "musl"])
def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, libc: str) -> None:
    calls(monkeypatch, libc, mallopt=lambda *_: pytest.fail("called"))


def test_an_allocator_without_such_settings_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls(monkeypatch, "glibc")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_glibc_takes_the_settings() -> None:
    # mallopt answers 1 for what it knows and accepts.
    assert [ctypes.CDLL(None).mallopt(*setting) for setting in allocator._SETTINGS] == [1, 1, 1]


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0), ("mps", 0)])
def test_a_session_keeps_memory_on_a_cpu_once_the_model_is_loaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, times: int
) -> None:
    """Before the optimizer's state, below which holes that loading leaves would stay."""

    class Reached(Exception):
        pass

    done: list[str] = []

    def trainer(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(session, "pick_device", lambda _: torch.device(device))
    monkeypatch.setattr(session, "keep_freed_memory", lambda: done.append("kept"))
    monkeypatch.setattr(session.Policy, "load", lambda **given: done.append(str(given["device"])))
    monkeypatch.setattr(session, "Trainer", trainer)
    with pytest.raises(Reached), session.Session(tiny.recipe(), tmp_path / "run", []):
        pass
    assert done == [device] + ["kept"] * times
