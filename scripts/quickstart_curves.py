"""Draw the held-out accuracy of several runs of one recipe as an SVG, and print the table for the docs.

python scripts/quickstart_curves.py docs/assets/quickstart.svg runs/quickstart-001 runs/quickstart-002 ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 680, 340, 52, 24, 150, 44
COLORS = ("#0b6bcb", "#c4590a", "#5b8c00", "#7a4bb5")


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The evaluation lines of a run, in order."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "eval"]


def minutes(run: Path) -> float:
    """Wall time from the start of the run to its end, as run.json has it."""
    from datetime import datetime

    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    started, finished = (datetime.strptime(info[k], "%Y-%m-%dT%H:%M:%S%z") for k in ("started", "finished"))
    return (finished - started).total_seconds() / 60


def draw(runs: list[Path]) -> str:
    """One line per run and metric: greedy solid, sampled dashed."""
    table = [evaluations(run) for run in runs]
    last = max(line["step"] for lines in table for line in lines)
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + wide * step / last

    def y(value: float) -> float:
        return TOP + tall * (1 - value)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="Held-out accuracy over training steps">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{LEFT + wide}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#444">{tick:.0%}</text>')
    for step in sorted({line["step"] for line in table[0]}):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 24}" text-anchor="middle" fill="#444">{step}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 6}" text-anchor="middle" fill="#444">training step</text>')
    for i, (run, lines) in enumerate(zip(runs, table, strict=True)):
        seed = json.loads((run / "run.json").read_text(encoding="utf-8"))["seed"]
        for j, (metric, dash) in enumerate((("greedy", ""), ("sampled", ' stroke-dasharray="5 4"'))):
            points = " ".join(f"{x(line['step']):.1f},{y(line[metric]):.1f}" for line in lines)
            color = COLORS[i % len(COLORS)]
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
            row = TOP + 18 * (2 * i + j) + 8
            parts.append(f'<path d="M{LEFT + wide + 12} {row}h26" stroke="{color}" stroke-width="2"{dash}/>')
            parts.append(f'<text x="{LEFT + wide + 44}" y="{row + 4}" fill="#222">seed {seed}, {metric}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Write the drawing and print a Markdown row for each run."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    target, runs = Path(sys.argv[1]), [Path(a) for a in sys.argv[2:]]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(draw(runs), encoding="utf-8")
    for run in runs:
        info, lines = json.loads((run / "run.json").read_text(encoding="utf-8")), evaluations(run)
        first, end = lines[0], lines[-1]
        cells = [f"{e[m]:.0%}" for m in ("greedy", "sampled") for e in (first, end)]
        print(f"| {info['seed']} | {' | '.join(cells)} | {minutes(run):.1f} |")


if __name__ == "__main__":
    main()
