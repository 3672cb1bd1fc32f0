"""What the parts of an algorithm ask for: signals before the plan, signals in the loss, extras of the rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenloom.composition import Bound
from tokenloom.signals import ATTENTION_SIGNALS, CHUNK_SIGNALS, SIGNAL_NAMES, signal_names
from tokenloom.vocabulary import CURRENT, EXTRAS

if TYPE_CHECKING:
    from tokenloom.assembly import Assembly


def signals_of(bound: Bound) -> set[str]:
    """The signals that a part reads."""
    return {n for n in bound.part.inputs if n in SIGNAL_NAMES or n in signal_names()}


def for_plan(assembly: Assembly) -> frozenset[str]:
    """See `Algorithm.needs`."""
    planned = list(_planned(assembly))
    names = {n for bound in planned for n in signals_of(bound) - CURRENT}
    names = {"old_values" if n == "values" else n for n in names}
    for bound in assembly.late_parts():
        names |= {n for n in signals_of(bound) if n.startswith(("old_", "ref_"))}
    names |= given(assembly)
    if _one_update(assembly) and not any("old_logprobs" in b.part.inputs for b in planned):
        # With a single update the old policy is the policy at the forward of the loss itself.
        names -= {"old_logprobs"}
    return frozenset(names)


def for_loss(assembly: Assembly) -> frozenset[str]:
    """See `Algorithm.loss_needs`."""
    names = {"logprobs"}
    for bound in assembly.late_parts():
        names |= {n for n in signals_of(bound) if not n.startswith(("old_", "ref_"))}
    return frozenset(names - {"log_ratio", "ratio"})


def for_corpus(assembly: Assembly) -> frozenset[str]:
    """See `Algorithm.corpus_needs`."""
    names = {n for t in assembly.corpus for n in signals_of(t.part)}
    return frozenset(names | {"logprobs"}) if assembly.corpus else frozenset()


def given(assembly: Assembly) -> frozenset[str]:
    """See `Algorithm.given`."""
    chunks = [CHUNK_SIGNALS[n] for n in for_loss(assembly) if n in CHUNK_SIGNALS]
    return frozenset(n for signal in chunks for n in signal.given)


def of_rollouts(assembly: Assembly) -> frozenset[str]:
    """See `Algorithm.rollout_needs`."""
    names = {n for _, bound in assembly.bound_parts() for n in bound.part.inputs}
    names |= {n for signal in names & ATTENTION_SIGNALS.keys() for n in ATTENTION_SIGNALS[signal].inputs}
    if assembly.branch is None:
        names -= {"segment_values"}  # there is nothing to draw; parts fall back on what they have
    return frozenset(names & EXTRAS.keys())


def _planned(assembly: Assembly) -> Iterator[Bound]:
    """The parts that run in the plan."""
    elsewhere = {"surrogate", "log_ratio", "bounds", "blend/surrogate", "branch"}
    for key, bound in assembly.bound_parts():
        if not bound.late and key not in elsewhere and bound.part.stage not in ("term", "sampling"):
            yield bound
    yield from (t.aggregate for t in assembly.terms if t.aggregate)


def _one_update(assembly: Assembly) -> bool:
    """Surely one optimizer step a batch; an updates part that does not say so may make several."""
    updates = assembly.updates
    known = {k: h.default for k, h in updates.part.hyperparameters.items()} | updates.params
    return all(known.get(k) == 1 for k in ("epochs", "mini_batches"))
