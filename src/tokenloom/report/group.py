"""One dumped group, each token with a value: what `tokenloom tokens` prints and a notebook shows.

from tokenloom.report import token_group
token_group("runs/quickstart-001", quantity="coefficient", compare=["dapo"])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tokenloom.report.read import read_run
from tokenloom.report.replay import QUANTITIES
from tokenloom.report.text import printable
from tokenloom.report.token_payload import AS_TRAINED, replayed, variant_values
from tokenloom.report.tokens import TokenRow

SIGNED = ("advantage", "coefficient", "log_ratio")
BELOW, ABOVE = (90, 165, 232), (245, 156, 66)


@dataclass(frozen=True)
class ColoredRow:
    """A response of L tokens under one algorithm; `values` [L] is None where there is none."""

    algorithm: str
    row: int
    reward: float | None
    pieces: tuple[str, ...]
    sampled: tuple[bool, ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class TokenGroup:
    """The responses to one prompt at one step; colors end at `limit`, and `largest` is the largest size.

    `number` of `groups` says which of the step's prompts it is, from 0. In a notebook it shows itself.
    """

    step: int
    number: int
    groups: int
    prompt: str
    quantity: str
    rows: tuple[ColoredRow, ...]
    limit: float
    largest: float

    @property
    def signed(self) -> bool:
        """Whether the scale has two ends."""
        below = any(v is not None and v < 0 for r in self.rows for v in r.values)
        above = any(v is not None and v > 0 for r in self.rows for v in r.values)
        return self.quantity in SIGNED or (below and above)

    def share(self, value: float) -> float:
        """How far a value is from zero to the end of the scale, in [-1, 1]."""
        return max(-1.0, min(1.0, value / self.limit))

    def _repr_html_(self) -> str:
        what = (
            f"step {self.step}, prompt {self.number} of {self.groups}, {self.quantity}: colors end at {self.limit:.4g}"
        )
        signs = " (a line above: positive; below: negative)" if self.signed else ""
        parts = [
            '<div style="font-family: monospace; line-height: 2; max-width: 100ch">',
            f'<div style="white-space: pre-wrap"><b>{escape(printable(self.prompt, 2_000))}</b></div>',
            f"<div>{escape(what + signs)}</div>",
        ]
        several = len({r.algorithm for r in self.rows}) > 1
        for row in self.rows:
            reward = "not scored" if row.reward is None else f"reward {row.reward:g}"
            name = f" · {row.algorithm}" if several else ""
            parts.append(f'<div style="margin-top: 6px"><small>{escape(f"row {row.row} · {reward}{name}")}</small><br>')
            tokens = zip(row.pieces, row.values, row.sampled, strict=True)
            parts += [self._html_token(*token) for token in tokens]
            parts.append("</div>")
        return "".join([*parts, "</div>"])

    def _html_token(self, piece: str, value: float | None, sampled: bool) -> str:
        text = escape(printable(piece) or "∅").replace(" ", "&middot;")
        style = "unicode-bidi: isolate; padding: 2px 1px; margin-right: 1px; border-radius: 3px;"
        if not sampled or value is None:
            title = "not sampled" if not sampled else "no value"
            return f'<span style="{style} opacity: 0.5" title="{title}">{text}</span><wbr>'
        style += f" color: #1b1d21; background: {hex_color(self.share(value))};"
        if self.signed and value:
            style += f" box-shadow: inset 0 {'2px' if value > 0 else '-2px'} 0 #444;"
        return f'<span style="{style}" title="{escape(self.quantity)} {value:.4g}">{text}</span><wbr>'


def token_group(
    run: str | Path, *, step: int | None = None, prompt: int | None = None, quantity: str = "advantage",
    compare: Sequence[str] = (),
) -> TokenGroup:  # fmt: skip
    """The dumped responses to one prompt: `step` is the last one by default, `prompt` the one with the widest rewards.

    `compare` names presets that are asked about the same responses; their rows follow those of the run.

    Raises:
        ValueError: when there is no such run, step, prompt, quantity or preset, or a preset's signals were not stored.
    """
    data = read_run(run, step=-1 if step is None else step)
    dump = data.tokens
    if not dump.rows:
        steps = ", ".join(map(str, dump.step_numbers)) or "none: log.tokens_every says how often a run dumps tokens"
        raise ValueError(f"{data.path} has no token dump{'' if step is None else f' of step {step}'}; dumped: {steps}")
    groups: dict[object, list[TokenRow]] = {}
    for row in dump.rows:
        groups.setdefault(row.prompt if row.group is None else row.group, []).append(row)
    ordered = list(groups.values())
    number = max(range(len(ordered)), key=lambda i: (_spread(ordered[i]), -i)) if prompt is None else prompt
    if not 0 <= number < len(ordered):
        raise ValueError(f"there is no prompt {number} at step {dump.rows[0].step}; there are 0 to {len(ordered) - 1}")
    chosen = ordered[number]
    known = list(dict.fromkeys(name for row in chosen for name in row.quantities))
    if quantity not in known:
        raise ValueError(f"unknown quantity {quantity!r}; this dump has {', '.join(known)}")
    if compare and quantity not in QUANTITIES:
        raise ValueError(f"{quantity} does not depend on the algorithm; compare {', '.join(QUANTITIES)}")
    shown = [_colored(AS_TRAINED, row, row.quantities.get(quantity, [])) for row in chosen]
    for one in replayed(data, dump.rows, compare):
        if one.reason and one.name in compare:
            raise ValueError(f"{one.name} cannot be shown: {one.reason}")
        if not one.reason:
            shown += [_colored(one.name, row, variant_values(one, row, quantity)) for row in chosen]
    rows = sorted(shown, key=lambda r: r.row)
    sizes = sorted(abs(v) for r in rows for v, s in zip(r.values, r.sampled, strict=True) if s and v is not None)
    largest = sizes[-1] if sizes else 0.0
    high = sizes[int(0.99 * (len(sizes) - 1))] if sizes else 0.0
    limit = high if len(sizes) >= 100 and 0 < 2 * high < largest else largest
    return TokenGroup(
        chosen[0].step, number, len(ordered), chosen[0].prompt, quantity, tuple(rows), limit or 1.0, largest
    )


def hex_color(share: float) -> str:
    """White at zero, orange toward 1 and blue toward -1."""
    end = ABOVE if share > 0 else BELOW
    mixed = (round(255 + (c - 255) * abs(share) ** 0.8) for c in end)
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _colored(algorithm: str, row: TokenRow, values: Sequence[float]) -> ColoredRow:
    told = [None if math.isnan(v) else v for v in values] or [None] * len(row.pieces)
    return ColoredRow(algorithm, row.row, row.reward, tuple(row.pieces), tuple(row.mask), tuple(told))


def _spread(rows: Sequence[TokenRow]) -> float:
    rewards = [r.reward for r in rows if r.reward is not None]
    return max(rewards) - min(rewards) if rewards else 0.0
