"""`tokenloom doctor`: what this machine has and what that means."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.text import Text

from tokenloom.cli.console import console, pairs
from tokenloom.cli.guard import guarded


@guarded
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this machine: Python, PyTorch, processor, memory, devices, packages, models, disk, and advice.

    Examples:
      tokenloom doctor
      tokenloom doctor --json
    """
    from tokenloom.cli.machine import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps({s.title: {f.name: {"value": f.value, "means": f.means} for f in s.facts} for s in found},
                              indent=2, ensure_ascii=False))  # fmt: skip
        return
    screen = console()
    for section in found:
        screen.print(section.title, style="bold")
        rows: list[tuple[str, str | Text]] = []
        for fact in section.facts:
            text = Text(fact.value, style="" if fact.good else "yellow")
            rows.append((fact.name, text.append(f"  {fact.means}" if fact.means else "", style="dim")))
        pairs(screen, rows)
