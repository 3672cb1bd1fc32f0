"""Decoding methods side by side: their measures, and one HTML page of what they wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from tokenloom.decode.respond import Responses, distinct, repeated
from tokenloom.report.html import replace_text
from tokenloom.report.text import visible


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

    def cells(self, judged: bool) -> list[str]:
        """The numbers as they are shown, below `headings(judged)`."""
        found = [f"{self.distinct:.2f}", f"{self.repeated:.2f}", f"{self.logprob:.2f}", f"{self.length:.0f}"]
        return [*found, f"{self.speed:,.0f}", *([f"{self.fulfilled:.0%}"] if judged else [])]


LEGEND = (
    "distinct: of all 2-grams of the responses to a prompt; repeated: 4-grams that a response had before; "
    "log-prob in nats under the model alone; tokens: mean length"
)


def headings(judged: bool) -> list[str]:
    """What a method's row tells; under a constraint (`judged`) also how many responses fulfill it."""
    found = ["method", "distinct 2-grams", "repeated 4-grams", "log-prob a token", "tokens", "tok/s"]
    return [*found, *(["fulfilled"] if judged else [])]


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
    out: Path,
    heading: str,
    prompts: Sequence[str],
    columns: Sequence[Column],
    decode: Callable[[list[int]], str],
    *,
    judged: bool = False,
) -> Path:
    """Write the page to `out`, replacing it in one move; it needs no script and no network.

    `heading` says which model it was and how it was asked, `judged` whether there was a constraint. Control characters
    are shown as text, since what a model writes may hide or turn around other text.
    """
    parts = [_HEAD, f"<h1>Decoding methods side by side</h1><p>{_text(heading)}</p>", _measures(columns, judged)]
    for number, prompt in enumerate(prompts):
        parts.append(f'<section><h2>{_text(prompt)}</h2><div class="columns" tabindex="0">')
        for column in columns:
            parts.append(f"<article><h3>{_text(column.name)}</h3>")
            for a in column.responses.answers:
                if a.prompt == number:
                    note = f"{len(a.ids)} tokens, log-prob {a.logprob:.2f} a token{', cut off' if a.truncated else ''}"
                    note += "" if a.standing is None else f", constraint {a.standing}"
                    parts.append(f"<p>{_text(decode(a.ids))}</p><small>{note}</small>")
            parts.append("</article>")
        parts.append("</div></section>")
    return replace_text(out, "\n".join([*parts, "</main></body></html>\n"]))


def _text(text: str) -> str:
    return escape(visible(text))


def _measures(columns: Sequence[Column], judged: bool) -> str:
    rows = []
    for column in columns:
        m = measured(column)
        bar = f'<meter min="0" max="1" value="{m.distinct:.3f}"></meter> '
        first, *rest = m.cells(judged)
        cells = f"<td>{bar}{first}</td>" + "".join(f"<td>{c}</td>" for c in rest)
        rows.append(f"<tr><th>{_text(column.name)}</th>{cells}</tr>")
    head = "".join(f"<th>{h}</th>" for h in headings(judged))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide" tabindex="0">{table}</div><p class="legend">{LEGEND}</p>'


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Decoding methods side by side</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { padding: 1.5rem clamp(1rem, 4vw, 3rem); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: right; padding: .35rem .8rem; border-bottom: 1px solid var(--line); font-weight: normal; }
th, td { white-space: nowrap; }
th:first-child { text-align: left; font-weight: 600; }
thead th { font-size: .85rem; }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(17rem, 1fr); gap: 1rem; overflow-x: auto; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .2rem 1rem 1rem; }
article p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .8rem 0 .2rem; }
small, .legend { opacity: .7; }
.legend { font-size: .85rem; }
section { margin-top: 2rem; }
h2 { font-size: 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
h3 { font-size: 1rem; }
</style></head><body><main>"""
