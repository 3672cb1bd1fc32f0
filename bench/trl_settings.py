"""TRL's own settings compared with each other, bf16, so that the peer runs in its best ones elsewhere.

Not listed: continuous batching (rollouts of 20 s against 7 s in float32 at shape (1); in bf16 it would also turn the
weights themselves into bfloat16) and Liger's kernels (Triton, for GPUs).
"""

from __future__ import annotations

from typing import Any

from bench.grpo_step import FASTEST, INSTALL, METRICS, SHAPES, SMALL, described, trl_settings
from bench.harness import Row, Side, Table, main
from bench.inputs import SMOLLM2

KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(2**26)}
"""What `tokenloom.train.allocator` sets, for a process that does not do so itself."""

TRIED: dict[str, list[dict[str, Any]]] = {
    "(1) short": [
        trl_settings(32, "sdpa"),
        trl_settings(32, "eager"),
        trl_settings(32, "sdpa", gradient_checkpointing=True),
        trl_settings(8, "sdpa"),
        trl_settings(8, "eager"),
        trl_settings(8, "eager", cache_implementation="static"),
        trl_settings(4, "eager"),
    ],
    "(2) long prompts": [trl_settings(4, "sdpa"), trl_settings(2, "sdpa"), trl_settings(2, "eager")],
    "(3) long responses": [trl_settings(4, "sdpa"), trl_settings(4, "eager"), trl_settings(8, "eager")],
}


def rows(quick: bool) -> list[Row]:
    """One row a setting, few steps each: enough to rank them."""
    small = {"model": "random-1024", **SMALL}
    made = []
    for name, tried in TRIED.items():
        shape = small if quick else {"model": SMOLLM2, **SHAPES[name]}
        for settings in [trl_settings(8, "sdpa")] if quick else tried:
            work = {**shape, **settings, "precision": "bf16", "warm_up": False}
            side = Side("TRL", "bench.grpo_step:trl", work, ("trl",), INSTALL)
            label = f"{name}: {described(settings)}"
            made.append(Row(label, (side,), runs=2 if name == "(1) short" else 1, long=True))
    if quick:
        return made
    settings = FASTEST["(1) short", "bf16"]
    work = {"model": SMOLLM2, **SHAPES["(1) short"], **settings, "precision": "bf16", "warm_up": False}
    side = Side("TRL", "bench.grpo_step:trl", work, ("trl",), INSTALL, environment=KEEP_FREED_MEMORY)
    return [*made, Row(f"(1) short: {described(settings)}, freed memory kept", (side,), runs=2, long=True)]


TABLE = Table("trl-settings", "TRL's settings", rows, METRICS)

if __name__ == "__main__":
    main(TABLE)
