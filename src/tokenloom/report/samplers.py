"""Decoding methods side by side: their measures, and one HTML page of what they wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from tokenloom.decode.respond import Responses, distinct, repeated


@dataclass(frozen=True)
class Column:
    """A method and its responses."""

    name: str
    responses: Responses


@dataclass(frozen=True)
class Measures:
    """Means over responses: distinct 2-grams (by prompt), repeated 4-grams, log-prob of a token, tokens, tokens/s.

    `fulfilled` is the share that fulfills the constraint, 1 without one.
    """

    distinct: float
    repeated: float
    logprob: float
    length: float
    speed: float
    fulfilled: float


def measured(column: Column) -> Measures:
    """The measures of a column."""
    answers = column.responses.answers
    by_prompt: dict[int, list[list[int]]] = {}
    for a in answers:
        by_prompt.setdefault(a.prompt, []).append(a.ids)
    return Measures(
        distinct=fmean(distinct(ids) for ids in by_prompt.values()),
        repeated=fmean(repeated(a.ids) for a in answers),
        logprob=fmean(a.logprob for a in answers),
        length=fmean(len(a.ids) for a in answers),
        speed=column.responses.tokens / max(column.responses.seconds, 1e-9),
        fulfilled=fmean(a.standing in (None, "fulfilled") for a in answers),
    )


def write_samplers(
    out: Path, model: str, prompts: Sequence[str], columns: Sequence[Column], decode: Callable[[list[int]], str]
) -> Path:
    """Write the page to `out`, replacing it in one move; it needs no script and no network."""
    parts = [_HEAD, f"<h1>Decoding methods side by side</h1><p>{escape(model)}</p>", _measures(columns)]
    for number, prompt in enumerate(prompts):
        parts.append(f'<section><h2>{escape(prompt)}</h2><div class="columns">')
        for column in columns:
            parts.append(f"<article><h3>{escape(column.name)}</h3>")
            for a in column.responses.answers:
                if a.prompt == number:
                    note = f"{len(a.ids)} tokens, log-prob {a.logprob:.2f}{', cut off' if a.truncated else ''}"
                    note += "" if a.standing is None else f", constraint {a.standing}"
                    parts.append(f"<p>{escape(decode(a.ids))}</p><small>{note}</small>")
            parts.append("</article>")
        parts.append("</div></section>")
    part = out.with_name(out.name + ".part")
    part.write_text("\n".join([*parts, "</main></body></html>\n"]), encoding="utf-8", newline="\n")
    os.replace(part, out)
    return out


def _measures(columns: Sequence[Column]) -> str:
    found = [measured(c) for c in columns]
    heads = ("method", "distinct 2-grams", "repeated 4-grams", "log-prob a token", "tokens", "tokens/s")
    rows = []
    for column, m in zip(columns, found, strict=True):
        cells = (f"{m.distinct:.2f}", f"{m.repeated:.2f}", f"{m.logprob:.2f}", f"{m.length:.0f}", f"{m.speed:,.0f}")
        bar = f'<meter min="0" max="1" value="{m.distinct:.3f}"></meter> '
        rows.append(f"<tr><th>{escape(column.name)}</th><td>{bar}{cells[0]}</td>" + "".join(
            f"<td>{c}</td>" for c in cells[1:]) + "</tr>")  # fmt: skip
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Decoding methods side by side</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { padding: 1.5rem clamp(1rem, 4vw, 3rem); }
table { border-collapse: collapse; margin: 1rem 0 2rem; }
th, td { text-align: right; padding: .35rem .8rem; border-bottom: 1px solid var(--line); font-weight: normal; }
th:first-child { text-align: left; font-weight: 600; }
thead th { font-size: .85rem; }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(17rem, 1fr); gap: 1rem; overflow-x: auto; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .2rem 1rem 1rem; }
article p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .8rem 0 .2rem; }
small { opacity: .7; }
h2 { font-size: 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
h3 { font-size: 1rem; }
</style></head><body><main>"""
