"""What a machine has, as facts with their meaning."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fact:
    """One thing found, what it means for the user, and whether it is as one would wish."""

    name: str
    value: str
    means: str = ""
    good: bool = True


@dataclass(frozen=True)
class Section:
    """Facts under one heading."""

    title: str
    facts: list[Fact]


PACKAGES = (
    ("transformers", "train", "models"),
    ("peft", "train", "LoRA (model.lora)"),
    ("datasets", "train", "tasks from hf:..."),
    ("reasoning-gym", "train", "tasks from reasoning_gym:..., the quickstart"),
    ("math-verify", "train", "the verifier math"),
    ("tensorboard", "tensorboard", "log.trackers: [tensorboard]"),
    ("trackio", "trackio", "log.trackers: [trackio]"),
    ("wandb", "wandb", "log.trackers: [wandb]"),
)


def examine() -> list[Section]:
    """Everything worth knowing, measured and looked up now; takes about a second."""
    return [
        Section("Software", _software()),
        Section("Processor", _processor()),
        Section("Devices", _devices()),
        Section("Packages", [_package(*entry) for entry in PACKAGES]),
        Section("Models and disk", _storage()),
    ]


def _software() -> list[Fact]:
    import torch

    import tokenloom

    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    cuda = torch.version.cuda
    build = f"CUDA {cuda}" if cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "no CUDA"
    return [
        Fact("tokenloom", tokenloom.__version__),
        Fact("Python", platform.python_version(), "" if fits else "tested with 3.11 to 3.13", fits),
        Fact("PyTorch", torch.__version__, f"built with {build}"),
        Fact("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
    ]


def _processor() -> list[Fact]:
    import torch

    from tokenloom.train.estimate import matmul_rate
    from tokenloom.train.run import processor

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    features = cpu_features()
    facts = [
        Fact("processor", processor(), f"{cores} cores, {usable} of them usable"),
        Fact("threads", str(threads), _threads(threads, usable), threads <= usable),
        Fact("vector units", ", ".join(features) or torch.backends.cpu.get_cpu_capability()),
        _memory(),
    ]
    if loaded := _load(usable):
        facts.append(loaded)
    single, half = matmul_rate(torch.float32), matmul_rate(torch.bfloat16)
    where = "this machine's fastest device"
    facts.append(Fact("float32 products", f"{single / 1e9:,.0f} GFLOP/s", f"measured on {where}"))
    faster = half / single
    advice = "use model.autocast=bf16" if faster > 1.2 else "leave model.autocast at none: bf16 gains nothing here"
    facts.append(Fact("bf16 products", f"{half / 1e9:,.0f} GFLOP/s", f"{faster:.1f} x float32: {advice}"))
    return [*facts, _compiled_layers()]


def _compiled_layers() -> Fact:
    import torch

    from tokenloom.rollout.native import build

    formats = [name for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)) if build.serves(dtype)]
    if formats:
        return Fact("compiled layers", ", ".join(formats), "decoding of Llama-like models in one call a layer")
    return Fact("compiled layers", "none", f"decoding takes twice as long or more: {build.found()[1]}", good=False)


def _threads(threads: int, usable: int) -> str:
    if threads > usable:
        return f"more than usable cores: OMP_NUM_THREADS={usable} is faster"
    return "of PyTorch" if threads == usable else f"of PyTorch; OMP_NUM_THREADS={usable} would use all cores"


def cpu_features() -> list[str]:
    """Names of vector units that matter to matrix products, as far as the system tells."""
    known = {
        "amx_bf16": "AMX bf16",
        "avx512_bf16": "AVX-512 bf16",
        "avx512f": "AVX-512",
        "avx2": "AVX2",
        "bf16": "Arm bf16",
        "sve": "SVE",
        "asimd": "NEON",
    }
    info = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                flags = set(line.partition(":")[2].split())
                break
    return [name for flag, name in known.items() if flag in flags]


def _memory() -> Fact:
    total, available = memory_bytes()
    if not total:
        return Fact("memory", "unknown", "`tokenloom train RECIPE --dry-run` estimates what a run needs")
    free = "" if available is None else f", {available / 1e9:,.1f} GB available"
    needs = "the quickstart needs about 6 GB; `tokenloom train RECIPE --dry-run` estimates others"
    return Fact("memory", f"{total / 1e9:,.1f} GB{free}", needs, total > 6e9)


def memory_bytes() -> tuple[int, int | None]:
    """Total and available memory in bytes; 0 and None where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = (line.split() for line in info.read_text(encoding="utf-8").splitlines())
        sizes = {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if len(parts) > 1}
        return sizes.get("MemTotal", 0), sizes.get("MemAvailable")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, ValueError, OSError):
        return 0, None


def _load(usable: int) -> Fact | None:
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
    busy = load > 0.75 * usable
    means = "other programs slow training down, and the rates below" if busy else ""
    return Fact("load", f"{load:.1f} in the last minute", means, not busy)


def _devices() -> list[Fact]:
    import torch

    from tokenloom.policy.loading import pick_device

    facts: list[Fact] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            info: Any = torch.cuda.get_device_properties(i)
            facts.append(Fact(f"cuda:{i}", info.name, f"{info.total_memory / 1e9:,.0f} GB"))
    else:
        why = "this build of PyTorch has no CUDA" if torch.version.cuda is None else "no GPU or driver was found"
        facts.append(Fact("CUDA", "no", why))
    mps = torch.backends.mps.is_available()
    if mps or sys.platform == "darwin":
        facts.append(Fact("MPS", "yes" if mps else "no"))
    return [*facts, Fact("training runs on", str(pick_device(None)))]


def _package(name: str, extra: str, use: str) -> Fact:
    try:
        return Fact(name, metadata.version(name), use)
    except metadata.PackageNotFoundError:
        found = importlib.util.find_spec(name.replace("-", "_")) is not None
        if found:
            return Fact(name, "installed", use)
        core = extra == "train"
        return Fact(name, "missing", f"needed for {use}: pip install 'tokenloom[{extra}]'", not core)


def _storage() -> list[Fact]:
    from tokenloom.policy.builtin import BUILTIN_MODELS, find_weights
    from tokenloom.policy.cache import cache_folder

    facts: list[Fact] = [Fact("cache", str(cache_folder()), "safe to delete")]
    for name in BUILTIN_MODELS:
        built = sorted((cache_folder() / "models").glob(f"{name}-*/config.json"))
        if built:
            facts.append(Fact(name, "ready", str(built[-1].parent)))
            continue
        try:
            find_weights()
            facts.append(Fact(name, "installed", "made ready at its first use: some seconds, 0.5 GB of disk"))
        except FileNotFoundError as error:
            facts.append(Fact(name, "missing", str(error), False))
    free = shutil.disk_usage(Path.cwd()).free
    small = "a run of the quickstart takes about 2.2 GB: its model, and a checkpoint with the optimizer"
    return [*facts, Fact("disk for runs", f"{free / 1e9:,.0f} GB free here", small, free > 5e9)]
