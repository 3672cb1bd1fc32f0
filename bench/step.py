"""The training half of a step against the sum of its own matrix products: what is lost to everything else.

One step is recorded: every matrix product in forward, backward and optimizer, with shapes, strides and number formats.
Then, in turn, the step runs as it is and its products run alone, on other numbers. Responses are sampled once before.
Only useful tokens count: products that a micro-batch spends on prefixes that another one also computes do not.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.child import Turns
from bench.grpo_step import SHAPES, SMALL, running_trainer, shown
from bench.harness import PEAK, SECONDS, Metric, Row, Side, Table, Target, main
from bench.inputs import SMOLLM2

if TYPE_CHECKING:
    from tokenloom.batch import Rollouts

Call = tuple[Any, tuple[tuple[Any, Any], ...]]
"""A function of PyTorch, and place and description of each of its arguments."""

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
FUSED = "_scaled_dot_product"
"""Beginning of the names of PyTorch's fused attention, forward and backward."""


def measure(turns: Turns, **settings: Any) -> None:
    """Steps and their products in turn, in one process."""
    with running_trainer(**settings) as trainer:
        collected = trainer.collector.collect(trainer.algorithm, 0)
        trainer.collector.collect = lambda *_, **__: collected  # type: ignore[method-assign]
        trainer.step(0)
        forward: Any = trainer.policy.forward
        forward.computed = 0
        products = replay(recorded(lambda: trainer.step(1)))
        useful = distinct_prefixes(collected.rollouts) / forward.computed
        products()
        for number, _ in enumerate(turns, start=2):
            step = timed(partial(trainer.step, number))
            alone = timed(products) * useful
            turns.report(seconds=step, products=alone, ratio=step / alone, useful=useful)


def timed(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def recorded(run: Callable[[], object]) -> Counter[Call]:
    """How often `run` calls each product with each kind of arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: Counter[Call] = Counter()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in PRODUCTS or name.startswith(FUSED):
                given = [*enumerate(args), *(kwargs or {}).items()]
                calls[func, tuple((place, _described(value)) for place, value in given)] += 1
            return func(*args, **(kwargs or {}))

    with Record():
        run()
    return calls


def replay(calls: Counter[Call]) -> Callable[[], None]:
    """A function that makes these calls. Operands share memory, so it is if anything faster than the originals."""
    import torch

    memory: dict[Any, torch.Tensor] = {}

    def operand(place: Any, described: Any) -> Any:
        if not isinstance(described, Operand):
            return described
        # One buffer for each place and format: a product does not read the same numbers twice.
        size = 1 + sum((n - 1) * step for n, step in zip(described.shape, described.stride, strict=True))
        key = (place, described.dtype)
        if key not in memory or len(memory[key]) < size:
            memory[key] = torch.randn(size).to(described.dtype)
        return memory[key].as_strided(described.shape, described.stride)

    ready = []
    for (function, given), count in calls.items():
        values = {place: operand(place, value) for place, value in given}
        named = {place: value for place, value in values.items() if isinstance(place, str)}
        ready.append((function, [v for place, v in values.items() if place not in named], named, count))

    def run() -> None:
        with torch.no_grad():
            for function, args, named, count in ready:
                for _ in range(count):
                    function(*args, **named)

    return run


@dataclass(frozen=True)
class Operand:
    """What a product knows of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any


def _described(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return Operand(tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def distinct_prefixes(rollouts: Rollouts) -> int:
    """States that a step needs at least: distinct prefixes that end before the last token."""
    import torch

    from tokenloom.policy.tree import shared_lengths, sorted_rows

    rows = [[*p.tolist(), *rollouts.response(i).tolist()][:-1] for i, p in enumerate(rollouts.prompt_tokens)]
    in_order = [torch.tensor(rows[i]) for i in sorted_rows(rows)]
    return sum(map(len, rows)) - sum(shared_lengths(in_order))


# -- table

TARGET = 1.6


def rows(quick: bool) -> list[Row]:
    """The three shapes of `grpo_step` in bf16."""
    shapes = {"small": SMALL} if quick else SHAPES
    model = "random-1024" if quick else SMOLLM2
    made = []
    for name, shape in shapes.items():
        work = {"model": model, **shape, "precision": "bf16"}
        target = (Target("ratio", at_most=TARGET),) if name == "(3) long responses" else ()
        made.append(Row(f"{name}: {shown(work)}", (Side("Tokenloom", "bench.step:measure", work),), targets=target))
    return made


METRICS = (
    replace(SECONDS, compare=False),
    Metric("products", "its useful matrix products alone", "s", compare=False),
    Metric("ratio", "step / products", compare=False),
    replace(PEAK, compare=False),
)
TABLE = Table("step", "A training step and its matrix products", rows, METRICS)

if __name__ == "__main__":
    main(TABLE)
