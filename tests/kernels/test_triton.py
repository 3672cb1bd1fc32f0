"""The Triton kernels, in Triton's interpreter: no GPU needed, but the package (and the NumPy that it computes with)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("interpreted.py")
ABSENT = [name for name in ("triton", "numpy") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(ABSENT), reason=f"{' and '.join(ABSENT)} not installed: pip install triton numpy (Linux)")
def test_kernels_agree_with_the_definition_in_float64() -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",  # read when the kernels are defined, so it takes a process of its own
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 6
    # In units of a format's eps, relative to the norm of each result: logits add up 64 products at most and are
    # a few units large, so their rounding errors and those of the sums over a vocabulary of 300 stay below sqrt(300).
    assert max(errors) < 300**0.5
