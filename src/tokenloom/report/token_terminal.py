"""A dumped group on the terminal: tokens on colored ground, negative ones underlined; without color, marks below them.

A mark is the sign and the size in ninths of the scale's end: +9 is its end, -1 a small negative value, 0 zero,
x not sampled, ? no value.
"""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from tokenloom.report.group import ColoredRow, TokenGroup, hex_color
from tokenloom.report.text import printable


def print_group(group: TokenGroup, out: Console) -> None:
    """Print the prompt, the scale and every response."""
    out.print(Text(printable(group.prompt, 600), "bold"), soft_wrap=True)
    clipped = f", the largest size is {group.largest:.4g}" if group.largest > group.limit else ""
    out.print(
        Text(f"step {group.step} · prompt {group.number} of {group.groups} · {group.quantity}: ", "dim")
        + _scale(group, out)
        + Text(clipped, "dim")
    )
    several = len({r.algorithm for r in group.rows}) > 1
    for row in group.rows:
        reward = "not scored" if row.reward is None else f"reward {row.reward:g}"
        name = f" · {row.algorithm}" if several else ""
        out.print()
        out.print(Text(f"row {row.row} · {reward} · {len(row.pieces)} tokens{name}", "cyan"))
        if out.color_system:
            out.print(_painted(group, row))
        else:
            _print_marked(group, row, out)


def _scale(group: TokenGroup, out: Console) -> Text:
    ends = (-1.0, 1.0) if group.signed else (0.0, 1.0 if _positive(group) else -1.0)
    if not out.color_system:
        return Text(f"marks from {ends[0] * group.limit:.4g} to {ends[1] * group.limit:.4g}, in ninths")
    text = Text(f"{ends[0] * group.limit:.4g} ")
    for i in range(13):
        share = ends[0] + (ends[1] - ends[0]) * i / 12
        text.append("_" if share < 0 and group.signed else " ", f"black on {hex_color(share)}")
    return text.append(f" {ends[1] * group.limit:.4g}")


def _positive(group: TokenGroup) -> bool:
    return not any(v is not None and v < 0 for r in group.rows for v in r.values)


def _painted(group: TokenGroup, row: ColoredRow) -> Text:
    text = Text(overflow="fold")
    for piece, value, sampled in zip(row.pieces, row.values, row.sampled, strict=True):
        style = "dim"
        if sampled and value is not None:
            underline = "underline " if value < 0 and group.signed else ""
            style = f"{underline}black on {hex_color(group.share(value))}"
        text.append(_shown(piece), style)
    return text


def _print_marked(group: TokenGroup, row: ColoredRow, out: Console) -> None:
    above = below = ""
    for piece, value, sampled in zip(row.pieces, row.values, row.sampled, strict=True):
        shown, mark = _shown(piece), _mark(group, value, sampled)
        width = max(cell_len(shown), len(mark)) + 1
        if above and cell_len(above) + width > out.width:
            out.print(Text(f"{above}\n{below}"), soft_wrap=True)
            above = below = ""
        above += shown + " " * (width - cell_len(shown))
        below += mark.ljust(width)
    out.print(Text(f"{above}\n{below}"), soft_wrap=True)


def _mark(group: TokenGroup, value: float | None, sampled: bool) -> str:
    if not sampled or value is None:
        return "?" if sampled else "x"
    # A value that is not zero is never marked as zero.
    ninths = max(1, round(9 * abs(group.share(value)))) if value else 0
    return f"{'' if not value else '+' if value > 0 else '-'}{ninths}"


def _shown(piece: str) -> str:
    return printable(piece) or "''"
