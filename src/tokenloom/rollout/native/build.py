"""Compiles the C++ files beside it with the machine's compiler, once, and loads them.

Nothing depends on it: without a compiler, on another processor, or with `TOKENLOOM_NATIVE=0` in the environment,
decoding takes PyTorch's operations. The library lies in the cache folder, under a name that changes with the source,
the flags and the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from tokenloom.policy.cache import build_once, cache_folder

_SOURCES = [Path(__file__).with_name(name) for name in ("block.cpp", "session.cpp")]
_NAME = "native.so"
# Named one by one, not -march=native: a home folder may be shared with machines that have other instructions.
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
_FLAGS += ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
_BFLOAT16 = "-mavx512bf16"
_SECONDS = 120
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_LINEAR = [_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _COUNT]
_BLOCKS = [_POINTER, _COUNT, _POINTER, _POINTER, _POINTER, _POINTER, _COUNT]
_MOVE = [_POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _COUNT, _COUNT]
_ARGUMENTS = {
    "linear_float32": _LINEAR,
    "blocks_float32": _BLOCKS,
    "largest_scores": [_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _COUNT],
    "move_float32": _MOVE,
    "move_bfloat16": _MOVE,
    "large_pages": [_POINTER, _COUNT, _COUNT],
}
_ARGUMENTS_BFLOAT16 = {
    "linear_bfloat16": _LINEAR,
    "blocks_bfloat16": _BLOCKS,
    "pack": [_POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _COUNT],
}
_log = logging.getLogger(__name__)


def serves(dtype: torch.dtype) -> bool:
    """Whether there is compiled code for this machine and this format."""
    wanted = {torch.float32: True, torch.bfloat16: _has("_is_avx512_bf16_supported")}
    return wanted.get(dtype, False) and library() is not None


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they are not to be had."""
    return found()[0]


@functools.cache
def found() -> tuple[ctypes.CDLL | None, str]:
    """The compiled functions, or None and why there are none."""
    if os.environ.get("TOKENLOOM_NATIVE", "1") == "0":
        return None, "switched off by TOKENLOOM_NATIVE=0"
    if not _runs_here():
        return None, "they need Linux on an x86-64 processor with AVX-512, and PyTorch with OpenMP"
    at_hand = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
    compiler = shlex.split(os.environ.get("CXX", at_hand))
    if not compiler:
        return None, "they need a C++ compiler, such as g++"
    narrow = _has("_is_avx512_bf16_supported")
    flags = [*_FLAGS, _BFLOAT16] if narrow else _FLAGS
    try:
        folder = build_once(_target(compiler, flags), lambda folder: _compile(compiler, flags, folder))
        loaded = ctypes.CDLL(str(folder / _NAME))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _log.warning("decoding goes on with PyTorch's operations, compiled layers did not compile: %s", said)
        return None, f"{shlex.join(compiler)} did not compile them: {said}"
    for name, arguments in (_ARGUMENTS | (_ARGUMENTS_BFLOAT16 if narrow else {})).items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded, ""


def _runs_here() -> bool:
    """Whether the processor has what the code is made of, and PyTorch's threads are the code's."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    return _has("_is_avx512_supported") and "OpenMP" in torch.__config__.parallel_info()


def _has(feature: str) -> bool:
    return bool(getattr(torch.cpu, feature, lambda: False)())


def _target(compiler: list[str], flags: list[str]) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True)
    known = hashlib.sha256()
    for part in (*(source.read_bytes() for source in _SOURCES), " ".join(flags).encode(), version.stdout.encode()):
        known.update(part)
    return cache_folder() / "kernels" / known.hexdigest()[:16]


def _compile(compiler: list[str], flags: list[str], folder: Path) -> None:
    _log.info("compiling layers for decoding, once")
    command = [*compiler, *flags, *map(str, _SOURCES), "-o", str(folder / _NAME)]
    subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
