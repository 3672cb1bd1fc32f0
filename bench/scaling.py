"""How time and memory of a GRPO step grow, on a small random Llama (8 layers of width 256) in bf16.

One quantity at a time around 2 prompts × 8 responses of 128 + 32 tokens and 16 384 words: group size, prompt length,
response length, vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.grpo_step import METRICS, sides, trl_settings
from bench.harness import ROOT, Row, Table, main
from bench.spreads import spread

MIDDLE = {"group_size": 8, "prompt_tokens": 128, "new_tokens": 32, "vocabulary": 16384}
VARIED = {
    "group_size": [4, 16, 32],
    "prompt_tokens": [64, 256, 1024],
    "new_tokens": [64, 128, 256],
    "vocabulary": [8192, 49152, 151936],
}
NAMES = {
    "group_size": "group size",
    "prompt_tokens": "prompt length",
    "new_tokens": "response length",
    "vocabulary": "vocabulary",
}
DRAWING = ROOT / "docs" / "assets" / "bench-scaling.svg"


def rows(quick: bool) -> list[Row]:
    """The middle, and every other value of each quantity."""
    points = [("middle", MIDDLE)]
    for name, values in VARIED.items():
        points += [(f"{NAMES[name]} {value}", MIDDLE | {name: value}) for value in values]
    if quick:
        points = [("middle", {"group_size": 4, "prompt_tokens": 16, "new_tokens": 8, "vocabulary": 1024})]
    return [Row(label, sides(_work(point), trl_settings(8, "sdpa"))) for label, point in points]


def _work(point: Mapping[str, int]) -> dict[str, Any]:
    rest = {k: v for k, v in point.items() if k != "vocabulary"}
    return {"model": f"random-{point['vocabulary']}", "groups": 2, **rest, "precision": "bf16", "warm_up": True}


def blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """The place of the drawing."""
    return {"scaling-drawing": f"![Time and peak memory of a step by size](assets/{DRAWING.name})"}


def draw(results: Mapping[str, Any]) -> None:
    """Time above, peak memory below, one column a quantity; nothing unless every point was measured."""
    if len(results["rows"]) < 1 + sum(map(len, VARIED.values())) or not all(r["sides"] for r in results["rows"]):
        return
    import matplotlib

    matplotlib.use("svg")
    # Reproducible files: the same results give the same bytes.
    matplotlib.rcParams["svg.hashsalt"] = "tokenloom"
    from matplotlib import pyplot

    by_label = {row["label"]: row for row in results["rows"]}
    figure, axes = pyplot.subplots(2, len(VARIED), figsize=(12, 5.5), sharex="col", layout="constrained")
    for column, (name, values) in enumerate(VARIED.items()):
        places = {MIDDLE[name]: by_label["middle"]} | {v: by_label[f"{NAMES[name]} {v}"] for v in values}
        points = sorted(places.items())
        for line, (key, factor, title) in enumerate(
            (("seconds", 1.0, "seconds a step"), ("peak_rss", 1e-9, "peak GB"))
        ):
            ax = axes[line, column]
            for number, side in enumerate(("Tokenloom", "TRL")):
                heights = [
                    spread(
                        [m[key] * factor for s in row["sides"] if s["name"] == side for m in s["measurements"]]
                    ).median
                    for _, row in points
                ]
                ax.plot([x for x, _ in points], heights, "o-s-"[2 * number :][:2], label=side)
            ax.set_ylim(bottom=0)
            ax.set_xscale("log", base=2)
            ax.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
            ax.minorticks_off()
            if column == 0:
                ax.set_ylabel(title)
            if line == 1:
                ax.set_xlabel(NAMES[name])
    axes[0, 0].legend()
    figure.savefig(DRAWING, metadata={"Date": None})
    pyplot.close(figure)


TABLE = Table("scaling", "Scaling", rows, METRICS, blocks, draw)

if __name__ == "__main__":
    main(TABLE)
