"""Which parts can stand together in one algorithm: each where it belongs, and what it reads there when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenloom.catalog import parts
from tokenloom.composition import Bound
from tokenloom.demands import signals_of
from tokenloom.signals import CHUNK_SIGNALS
from tokenloom.vocabulary import CURRENT, GIVEN_BY_ADVANTAGES

if TYPE_CHECKING:
    from tokenloom.assembly import Assembly

_STATEFUL = ("reward", "advantage", "select", "credit", "weight", "updates")
_OF_A_CORPUS = frozenset({"tokens", "lengths", "mask", "group_ids", "weights", "step", "total_steps"})


def check(assembly: Assembly) -> None:
    """Refuse parts that cannot stand together.

    Raises:
        ValueError: naming the part, what is wrong with its place, and what to do instead.
    """
    _stages_fit(assembly)
    _corpus_is_enough(assembly)
    _loss_sees_rows_apart(assembly)
    _plan_runs_before_the_policy(assembly)
    _advantages_give_what_is_read(assembly)
    _counted_weights_are_known(assembly)


def _stages_fit(assembly: Assembly) -> None:
    """Every part stands at its own stage, and reads nothing that this stage lacks."""
    placed = [(b, _stage_of(key)) for key, b in assembly.bound_parts()]
    placed += [(t.aggregate, "aggregate") for t in assembly.terms if t.aggregate]
    for bound, stage in placed:
        name, inputs = bound.part.name, set(bound.part.inputs)
        if bound.part.stage != stage:
            raise ValueError(f"{name!r} is a part of stage {bound.part.stage!r} and cannot stand at {stage!r}")
        # A sampling part reads the state of its method and hands nothing on.
        if "state" in inputs and stage not in (*_STATEFUL, "sampling"):
            raise ValueError(f"part {name!r} cannot carry state at stage {stage!r}; stages that do: {_STATEFUL}")
        if stage == "branch" and (signals := signals_of(bound)):
            raise ValueError(f"part {name!r} reads {sorted(signals)}, which is not there before the batch is")
        if stage == "sampling" and (unknown := inputs - {"logits", "step", "total_steps", "state"}):
            raise ValueError(f"part {name!r} reads {sorted(unknown)}, which is not there while sampling")


def _corpus_is_enough(assembly: Assembly) -> None:
    """Text that nobody sampled has no advantages, no rewards and no policy before the update."""
    for term in assembly.corpus:
        signals = {"logprobs", "entropies"} | {n for n, s in CHUNK_SIGNALS.items() if not s.given}
        aggregate = term.aggregate or assembly.aggregate
        placed = [(term.part, "term", _OF_A_CORPUS | signals), (aggregate, "aggregate", _OF_A_CORPUS)]
        placed += [(w, "weight", _OF_A_CORPUS) for w in term.weight]
        for bound, stage, known in placed:
            name, inputs = bound.part.name, bound.part.inputs
            if bound.part.stage != stage:
                raise ValueError(f"corpus: {name!r} is a part of stage {bound.part.stage!r}, here stands a {stage}")
            if missing := sorted(n for n, required in inputs.items() if required and n not in known):
                remedy = "; give the term an aggregate of its own" if bound is assembly.aggregate else ""
                raise ValueError(f"corpus: part {name!r} reads {missing}, which rows of plain text lack{remedy}")
        if term.part.coupled:
            raise ValueError(f"corpus: {term.part.part.name!r} couples rows, but is computed on micro-batches")


def _loss_sees_rows_apart(assembly: Assembly) -> None:
    second = [assembly.blend.surrogate] if assembly.blend and assembly.blend.surrogate else []
    own = [assembly.surrogate, assembly.log_ratio, assembly.bounds]
    for bound in (*own, *second, *(t.part for t in assembly.terms)):
        if bound.coupled:
            raise ValueError(
                f"part {bound.part.name!r} has scope {bound.part.scope!r} and cannot stand in the loss, which is "
                "computed on micro-batches; make what couples the rows a weight part (it may read the policy)"
            )


def _plan_runs_before_the_policy(assembly: Assembly) -> None:
    """What reads the policy being trained runs beside the loss: in the plan, and with state, it cannot stand."""
    for bound in assembly.late_weights():
        if "state" in bound.part.inputs:
            raise ValueError(f"part {bound.part.name!r} reads the policy being trained and cannot carry state")
    second = (assembly.blend.part, assembly.blend.advantage) if assembly.blend else ()
    planned = (*assembly.reward, assembly.advantage, *assembly.select, assembly.updates)
    for bound in (*planned, *(a for a, _ in _aggregates(assembly)), *second, *assembly.metrics):
        if bound.late:
            raise ValueError(
                f"part {bound.part.name!r} reads {sorted(CURRENT & set(bound.part.inputs))}, which does not exist "
                f"yet at stage {bound.part.stage!r}; read 'old_logprobs' instead"
            )


def _advantages_give_what_is_read(assembly: Assembly) -> None:
    advantage = assembly.advantage.part
    for _, bound in assembly.bound_parts():
        for name in GIVEN_BY_ADVANTAGES & bound.part.inputs.keys():
            if bound.part.inputs[name] and name not in advantage.gives:
                givers = sorted(p.name for p in parts().values() if name in p.gives)
                raise ValueError(
                    f"part {bound.part.name!r} needs {name!r}, which the advantage part {advantage.name!r} does not "
                    f"give; parts that do: {', '.join(givers)}"
                )


def _counted_weights_are_known(assembly: Assembly) -> None:
    for aggregate, weights in _aggregates(assembly):
        if aggregate.params.get("count") == "weights" and any(w.late for w in weights):
            late = [w.part.name for w in weights if w.late]
            raise ValueError(f"count='weights' cannot see {late}, which read the policy being trained")


def _aggregates(assembly: Assembly) -> Iterator[tuple[Bound, tuple[Bound, ...]]]:
    """Every aggregate with the weights that it sums."""
    yield assembly.aggregate, assembly.weight
    yield from ((t.aggregate or assembly.aggregate, t.weight) for t in assembly.terms)


def _stage_of(key: str) -> str:
    """The stage that a key of `Assembly.bound_parts` stands for."""
    head, _, rest = key.partition("/")
    if head == "terms":
        return "weight" if rest.split("/")[1] == "weight" else "term"
    if head == "metrics":
        return "metric"
    return rest if head == "blend" and rest else head
