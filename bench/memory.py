"""Peak memory of Tokenloom's GRPO step by what can be traded for it: moments, micro-batches, recomputation.

4 prompts × 8 responses of 60 + 32 tokens, and 512 + 32; bf16 autocast over float32 weights. Every configuration runs
in processes of its own, two steps each: the first one is no measure, since moments may appear only then. What saves
memory for little time, and what saves most, is compared with TRL's whole batch at once, as
`per_device_train_batch_size=32` asks it; with long prompts with as many rows at once as are fastest for TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.grpo_step import FASTEST, INSTALL, SHAPES, SMALL, WHOLE, described, trl_settings
from bench.harness import PEAK, SECONDS, Row, Side, Table, Target, main
from bench.inputs import SMOLLM2

STATES = {"float32": (), "bfloat16": (), "int8": ("bitsandbytes",)}
"""Formats of the moments, with the packages that they need."""


def rows(quick: bool) -> list[Row]:
    """The defaults, then one thing changed at a time, then what saves most together, that also beside TRL."""
    if quick:
        return [_row("random-1024", SMALL, states="bfloat16", recompute=True, peer=trl_settings(8, "sdpa"))]
    short, long = SHAPES["(1) short"], SHAPES["(2) long prompts"]
    made = [_row(SMOLLM2, short, states=states) for states in STATES]
    made += [_row(SMOLLM2, short, states="bfloat16", micro=micro) for micro in (256, 512)]
    made += [_row(SMOLLM2, short, states=states, recompute=True) for states in STATES]
    made += [_row(SMOLLM2, long, states="bfloat16", recompute=recompute) for recompute in (False, True)]
    slim, whole = {"states": "bfloat16", "micro": 512}, {"states": "bfloat16", "recompute": True}
    return [
        *made,
        _row(SMOLLM2, short, **slim, peer=WHOLE),
        _row(SMOLLM2, short, **whole, peer=WHOLE),
        _row(SMOLLM2, long, **whole, peer=FASTEST["(2) long prompts", "bf16"]),
    ]


def _row(
    model: str,
    shape: Mapping[str, int],
    *,
    states: str,
    micro: int = 1024,
    recompute: bool = False,
    peer: Mapping[str, Any] | None = None,
) -> Row:
    work = {"model": model, **shape, "precision": "bf16", "warm_up": True}
    settings: dict[str, Any] = {
        **work,
        "gradient_checkpointing": recompute,
        "train": {"optimizer_states": states, "micro_batch_tokens": micro},
    }
    label = f"{shape['prompt_tokens']} + {shape['new_tokens']} tokens; moments in {states}; {micro} tokens at once"
    label += "; layers recomputed" if recompute else ""
    install = "install it with: pip install 'tokenloom[lowmem]'"
    side = Side("Tokenloom", "bench.grpo_step:tokenloom", settings, ("tokenloom", *STATES[states]), install)
    if peer is None:
        return Row(label, (side,), runs=2, fresh=True)
    label += f"; TRL: {described(peer)}"
    trl = Side("TRL", "bench.grpo_step:trl", {**work, **peer}, ("trl",), INSTALL)
    # Peaks of processes of their own hardly differ; with long prompts a process of TRL takes some minutes.
    runs = 3 if shape["prompt_tokens"] < 100 else 1
    return Row(label, (side, trl), runs=runs, fresh=True, targets=(Target("peak_rss", "TRL", at_least=3.0),))


TABLE = Table("memory", "Peak memory of a step", rows, (PEAK, SECONDS))

if __name__ == "__main__":
    main(TABLE)
