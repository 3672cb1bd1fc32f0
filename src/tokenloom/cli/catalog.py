"""`tokenloom methods`: the catalog of algorithms and their parts."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tokenloom.cli.console import console, pairs, program, table
from tokenloom.cli.guard import UsageError, guarded
from tokenloom.hints import suggest

if TYPE_CHECKING:
    from tokenloom.catalog import Method
    from tokenloom.decode.registry import Decoder
    from tokenloom.parameters import Hyperparameter


@guarded
def methods(
    slug: Annotated[str | None, typer.Argument(metavar="SLUG", help="A method to show in full.")] = None,
    family: Annotated[str | None, typer.Option(help="Only methods of this family.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only methods with a part of this stage.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects, everything in them.")] = False,
) -> None:
    """Show the catalog: methods with their stages and papers, or everything about one.

    Examples:
      tokenloom methods
      tokenloom methods gspo
      tokenloom methods --stage surrogate
      tokenloom methods --json
    """
    from tokenloom import catalog

    chosen = list(catalog.methods().values())
    if slug is not None:
        known = [m.slug for m in chosen]
        chosen = [m for m in chosen if m.slug == slug.partition("/")[0]]
        if not chosen:
            raise UsageError(f"unknown method {slug!r}{suggest(slug, known)}")
    chosen = _filtered(chosen, "family", family, lambda m: [m.family])
    chosen = _filtered(chosen, "stage", stage, lambda m: m.stages)
    if as_json:
        typer.echo(json.dumps([described(m) for m in chosen], indent=2, ensure_ascii=False))
    elif slug is not None:
        for method in chosen:
            _print_method(method, console())
    else:
        _print_table(chosen, console())


def _filtered(chosen: list[Method], what: str, wanted: str | None, of: Any) -> list[Method]:
    if wanted is None:
        return chosen
    known = {value for m in chosen for value in of(m)}
    if wanted not in known:
        raise UsageError(f"unknown {what} {wanted!r}{suggest(wanted, known)}")
    return [m for m in chosen if wanted in of(m)]


def described(method: Method) -> dict[str, Any]:
    """Everything that the catalog knows of a method, as JSON data."""
    parts = [
        {
            "name": p.name,
            "stage": p.stage,
            "scope": p.scope,
            "paper": p.paper,
            "summary": p.summary,
            "reads": {name: "required" if required else "if present" for name, required in p.inputs.items()},
            "defaults": _defaults(p.hyperparameters),
            "takes": _takes(p.hyperparameters),
        }
        for p in method.parts
    ]
    preset = method.preset
    return {
        "slug": method.slug,
        "family": method.family,
        "stage": ", ".join(method.stages),
        "stages": method.stages,
        "paper": method.paper,
        "summary": _headline(method),
        "formula": method.document,
        "defaults": {p["name"]: p["defaults"] for p in parts},
        "parts": parts,
        "dialects": list(preset.dialects) if preset else [],
        "preset": None
        if preset is None
        else {
            "defaults": _defaults(preset.parameters),
            "takes": _takes(preset.parameters),
            "composition": _compositions(method),
        },
    }


def _print_table(chosen: list[Method], out: Console) -> None:
    wide = out.width >= 100
    shown = table("method", *(("preset", "stage", "paper") if wide else ()), "what it does")
    # Rich folds the last column of a narrow terminal; the slug must stay whole, since people copy it.
    shown.columns[0].no_wrap = True
    if wide:
        shown.columns[2].max_width = 20
        shown.columns[3].max_width = 18
    for method in chosen:
        name = Text(method.slug, style="bold" if method.preset else "")
        # The paper has a column of its own.
        headline = re.sub(r"\s*\([^()]*\d{4}[^()]*\)\.?$", "", _headline(method))
        about = ("yes" if method.preset else "", ", ".join(method.stages), method.paper) if wide else ()
        shown.add_row(name, *about, headline)
    out.print(shown)
    presets = sum(m.preset is not None for m in chosen)
    out.print(f"\n{len(chosen)} methods, {presets} of them with a preset.", style="dim")
    out.print(f"Train with a preset: {program()} train RECIPE algorithm=METHOD", style="dim")
    out.print(f"Decode with a method: {program()} generate MODEL PROMPT --sampler METHOD", style="dim")
    out.print(f"Everything about one: {program()} methods METHOD", style="dim")


def _decoders(method: Method) -> list[Decoder]:
    """What `tokenloom.decode` builds under the method's name; importing it takes a moment, so only where it may."""
    from tokenloom.catalog import DECODING_STAGES

    if not set(method.stages) & set(DECODING_STAGES):
        return []
    from tokenloom.decode.registry import KINDS, decoders

    return [decoders(kind)[method.slug] for kind in KINDS if method.slug in decoders(kind)]


def _option(method: Method, called: Decoder) -> str:
    """How `generate` is asked for a method, with what it needs besides the model."""
    needed = [name for name, required in called.inputs.items() if required and name not in ("model", "tokenizer")]
    given = ",".join(f"{name}=..." for name in needed if name != "constraint")
    option = "--draft" if {"draft", "verify"} & set(method.stages) else "--sampler"
    constraint = " --constraint KIND=VALUE" if "constraint" in needed else ""
    return f"{option} {method.slug}{':' if given else ''}{given}{constraint}"


def _print_method(method: Method, out: Console) -> None:
    from tokenloom.catalog import TRAINING_STAGES
    from tokenloom.parameters import describe_type

    out.print(method.slug, style="bold")
    rows: list[tuple[str, str | Text]] = [
        ("family", method.family), ("stages", ", ".join(method.stages)), ("paper", method.paper),
    ]  # fmt: skip
    if method.preset is not None:
        rows.append(("preset", f"algorithm={method.slug}"))
        if method.preset.dialects:
            rows.append(("dialects", ", ".join(method.preset.dialects)))
    built = _decoders(method)
    if called := next((found for found in built if found.kind in ("shaper", "loop")), None):
        rows.append(("on the command line", f"{program()} generate MODEL PROMPT {_option(method, called)}"))
    pairs(out, rows)
    out.print()
    for line in method.document.splitlines():
        out.print(line, soft_wrap=True)
    for part in sorted(method.parts, key=lambda p: (p.stage, p.name)):
        out.print()
        out.print(Text(f"part {part.name}", style="bold cyan").append(f"  {part.stage}, scope {part.scope}", "default"))
        out.print(f"  {part.summary}")
        reads = ", ".join(n if required else f"{n} (if present)" for n, required in part.inputs.items())
        out.print(f"  reads {reads}", style="dim")
        _print_parameters(part.hyperparameters, out)
    if method.preset is not None:
        out.print()
        out.print(f"preset {method.slug}", style="bold cyan")
        _print_parameters(method.preset.parameters, out)
        for dialect, lines in _compositions(method).items():
            out.print()
            out.print(f"  made of{'' if dialect == 'default' else f', dialect={dialect}'}:")
            for line in lines:
                out.print(f"    {line}", soft_wrap=True)
    for found in built:
        out.print()
        out.print(Text(f"{found.kind} {found.slug}", style="bold cyan"))
        out.print(f"  {found.summary}")
        if found.inputs:
            taken = (n if required else f"{n} (may be left out)" for n, required in found.inputs.items())
            out.print(f"  takes {', '.join(taken)}", style="dim")
        _print_parameters(found.parameters, out)
    training = [p for p in method.parts if p.stage in TRAINING_STAGES]
    if any(describe_type(h.annotation) == "a number" for p in training for h in p.hyperparameters.values()):
        out.print("\nA schedule over the steps may stand wherever a number may.", style="dim")


def _print_parameters(parameters: dict[str, Hyperparameter], out: Console) -> None:
    from tokenloom.parameters import describe_type

    if not parameters:
        return
    shown = table("  parameter", "default", "takes")
    for name, held in parameters.items():
        shown.add_row(f"  {name}", str(_plain(held.default)), describe_type(held.annotation))
    out.print(shown)


def _compositions(method: Method) -> dict[str, list[str]]:
    """What the preset is made of, by dialect; "default" when it has none."""
    from tokenloom.algorithm import Algorithm

    if method.preset is None:
        return {}
    if not method.preset.dialects:
        return {"default": Algorithm.from_recipe(method.slug).describe()}
    return {
        dialect: Algorithm.from_recipe({"preset": method.slug, "dialect": dialect}).describe()
        for dialect in method.preset.dialects
    }


def _headline(method: Method) -> str:
    return method.document.partition("\n")[0] or (method.parts[0].summary if method.parts else "")


def _defaults(parameters: dict[str, Hyperparameter]) -> dict[str, Any]:
    return {name: _plain(held.default) for name, held in parameters.items()}


def _takes(parameters: dict[str, Hyperparameter]) -> dict[str, str]:
    from tokenloom.parameters import describe_type

    return {name: describe_type(held.annotation) for name, held in parameters.items()}


def _plain(value: Any) -> Any:
    """JSON data, with YAML's word for nothing."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
