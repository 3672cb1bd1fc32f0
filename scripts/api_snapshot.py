"""The public API as text, checked in as docs/api.txt: a change to it is seen in review or not made at all.

    python scripts/api_snapshot.py            # write the snapshot
    python scripts/api_snapshot.py --check    # exit 1 with the difference when it is out of date

Public means: no underscore at the front of any part of the name. The source is read, never imported.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = ROOT / "docs" / "api.txt"
HEADER = "# Public API of Tokenloom, written by scripts/api_snapshot.py: review its changes, do not edit it.\n"


def snapshot(source: Path = ROOT / "src") -> str:
    """The public API of the package in `source`, one line a name, with signatures."""
    package = griffe.load("tokenloom", search_paths=[source], allow_inspection=False)
    assert isinstance(package, griffe.Module)
    return HEADER + "".join(f"{line}\n" for line in _module(package))


def _module(module: griffe.Module) -> Iterator[str]:
    lines = [line for member in _public(module) for line in _member(member, "  ")]
    if lines:
        yield f"\n{module.path}"
        yield from lines
    for name, child in sorted(module.modules.items()):
        if not name.startswith("_") and not child.is_alias:
            yield from _module(child)


def _public(owner: griffe.Module | griffe.Class) -> Iterator[griffe.Object | griffe.Alias]:
    exported = set(map(str, owner.exports or ())) if isinstance(owner, griffe.Module) else set()
    for name, member in sorted(owner.members.items()):
        # Of the imports, only those that `__all__` names; submodules have entries of their own.
        if name in exported or not (member.is_alias or member.is_module or name.startswith("_")):
            yield member


def _member(member: griffe.Object | griffe.Alias, indent: str) -> Iterator[str]:
    if isinstance(member, griffe.Alias):
        yield f"{indent}{member.name} = {member.target_path}"
    elif isinstance(member, griffe.Function):
        yield f"{indent}def {member.signature()}"
    elif isinstance(member, griffe.Class):
        bases = ", ".join(map(str, member.bases))
        yield f"{indent}class {member.name}" + (f"({bases})" if bases else "")
        constructor = member.members.get("__init__")
        if isinstance(constructor, griffe.Function):
            yield f"{indent}  def {constructor.signature()}"
        for child in _public(member):
            yield from _member(child, indent + "  ")
    elif isinstance(member, griffe.Attribute):
        yield f"{indent}{member.name}" + (f": {member.annotation}" if member.annotation else "")


def main() -> int:
    """Write or check the snapshot; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    now = snapshot()
    if not parser.parse_args().check:
        SNAPSHOT.write_text(now, encoding="utf-8", newline="\n")
        return 0
    then = SNAPSHOT.read_text(encoding="utf-8") if SNAPSHOT.exists() else ""
    if now == then:
        return 0
    sys.stdout.writelines(difflib.unified_diff(then.splitlines(True), now.splitlines(True), "docs/api.txt", "source"))
    print("The public API has changed. If that is meant, run `make update`, and say so in CHANGELOG.md.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
