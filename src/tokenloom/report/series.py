"""Curves: every numeric metric of a run as (steps, values), with the group, unit and meaning of its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenloom.report.jsonl import number
from tokenloom.report.read import RunData

MAX_POINTS = 1_000
_NOT_METRICS = {"step", "kind", "samples", "problems"}


@dataclass(frozen=True)
class Series:
    """One metric over steps. `values` holds None where a finite number is missing."""

    steps: list[int]
    values: list[float | None]

    def finite(self) -> list[float]:
        """The values that are numbers, in order."""
        return [v for v in self.values if v is not None]

    def tail(self) -> tuple[float | None, int]:
        """Mean of the last tenth of the finite values (at least one), and how many those are.

        A single step of a noisy metric says little; this is the "final" number of tables.
        """
        finite = self.finite()
        count = max(1, len(finite) // 10)
        last = finite[-count:]
        return (sum(last) / len(last), len(last)) if last else (None, 0)


@dataclass(frozen=True)
class Meaning:
    """How to show a metric: heading, unit ("%" for fractions, else a word) and one sentence."""

    group: str
    unit: str = ""
    about: str = ""


_KNOWN = {
    "reward": Meaning("Learning", "", "Mean reward of the step's responses."),
    "accuracy": Meaning("Learning", "%", "Responses of the step that the verifier calls right."),
    "eval/greedy": Meaning("Held-out", "%", "Held-out problems answered right by the most likely tokens."),
    "eval/sampled": Meaning("Held-out", "%", "Held-out responses at the sampling temperature that are right."),
    "entropy": Meaning("Behavior", "nats", "Mean entropy of the policy over sampled tokens; 0 is deterministic."),
    "response_length": Meaning("Behavior", "tokens", "Mean tokens per response."),
    "truncated": Meaning("Behavior", "%", "Responses cut off at the maximal length."),
    "loss": Meaning("Optimization", "", "The minimized loss; its sign and size depend on the algorithm."),
    "grad_norm": Meaning("Optimization", "", "Norm of the gradient before clipping."),
    "lr": Meaning("Optimization", "", "Learning rate."),
    "surrogate/clipped": Meaning("Stages", "%", "Acting tokens that the clip holds: their gradient is exactly zero."),
    "weight/acting": Meaning("Stages", "%", "Sampled tokens with scale, weight and advantage other than zero."),
    "plan/kept": Meaning("Stages", "%", "Responses that the select stage kept."),
    "plan/live_tokens": Meaning("Stages", "%", "Sampled tokens whose gradient could be other than zero."),
    "tokens/ess": Meaning(
        "Stages", "%", "Effective sample size over sample size, trainer against sampler, of the dumped tokens."
    ),
    "tokens/mismatch": Meaning(
        "Stages", "nats", "Mean size of the log-ratio between trainer and sampler before the update, dumped tokens."
    ),
    "timing/seconds": Meaning("Timing", "s", "Wall clock of the step."),
    "timing/rollout_seconds": Meaning("Timing", "s", "Time spent generating and scoring responses."),
    "timing/train_seconds": Meaning("Timing", "s", "Time spent in forward and backward passes."),
    "timing/tokens_per_second": Meaning("Timing", "tokens/s", "Response tokens generated per second."),
}
_LEAVES = {
    "clip_fraction": ("%", "Tokens whose ratio lies outside the clip bounds, so that they give no gradient."),
    "kl": ("nats", "Estimated KL divergence."),
    "ratio": ("", "Mean importance ratio, 1 on policy."),
    "ess": ("%", "Effective sample size over actual sample size."),
}
_ORDER = ["Held-out", "Learning", "Behavior", "Optimization", "Stages"]


def meaning(key: str) -> Meaning:
    """Group, unit and sentence of a metric's key; unknown `prefix/name` keys are grouped by prefix."""
    if key in _KNOWN:
        return _KNOWN[key]
    prefix, _, leaf = key.rpartition("/")
    unit, about = _LEAVES.get(leaf, ("%" if leaf.endswith(("fraction", "accuracy")) else "", ""))
    if prefix in {"eval", "timing"}:
        return Meaning({"eval": "Held-out", "timing": "Timing"}[prefix], unit or ("%" if "pass@" in leaf else ""))
    return Meaning(prefix.split("/")[0] if prefix else "Other", unit, about)


def all_series(run: RunData) -> dict[str, Series]:
    """Every numeric metric of the run by key: training metrics as named, `eval/…` and `timing/…` prefixed;
    `tokens/…` is what the token dump says.

    Keys are ordered for display: held-out, learning, behavior, optimization, prefixes, other, timing.
    """
    found: dict[str, Series] = {}
    for prefix, lines in (("", run.train), ("eval/", run.evals), ("timing/", run.timing)):
        rows = [(int(line["step"]), dict(_flat(line))) for line in lines]
        # Only keys that ever held a number: texts and lists are not curves, a diverged (null) loss is.
        for key in dict.fromkeys(k for _, row in rows for k in row):
            points = [(step, row[key]) for step, row in rows if key in row]
            if any(v is not None for _, v in points):
                found[prefix + key] = Series([s for s, _ in points], [v for _, v in points])
    told = run.tokens.mismatch
    if told:
        found["tokens/mismatch"] = Series(list(told), [size for size, _ in told.values()])
        found["tokens/ess"] = Series(list(told), [ess for _, ess in told.values()])
    known = list(_KNOWN)
    groups = list(dict.fromkeys(meaning(key).group for key in found))
    return dict(
        sorted(
            found.items(),
            key=lambda kv: (_rank(kv[0], groups), known.index(kv[0]) if kv[0] in known else len(known)),
        )
    )


def thinned(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most about `limit` points: the smallest and the largest of each bucket, so that no spike is lost."""
    n = len(series.steps)
    if n <= limit:
        return series
    keep: set[int] = {0, n - 1}
    buckets = limit // 2
    for b in range(buckets):
        index = range(b * n // buckets, (b + 1) * n // buckets)
        finite = [(v, i) for i in index if (v := series.values[i]) is not None]
        # A bucket without numbers keeps one gap, or a line would be drawn across it.
        keep |= {min(finite)[1], max(finite)[1]} if finite else {index[0]}
    at = sorted(keep)
    return Series([series.steps[i] for i in at], [series.values[i] for i in at])


def _rank(key: str, groups: list[str]) -> tuple[int, int]:
    """Place of a key's group: the usual ones, then prefixes in order of appearance, then the rest."""
    group = meaning(key).group
    if group in _ORDER:
        return 0, _ORDER.index(group)
    return {"Other": 2, "Timing": 3}.get(group, 1), groups.index(group)


def _flat(line: dict[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, float | None]]:
    for key, value in line.items():
        if isinstance(value, dict) and depth < 4:
            yield from _flat(value, f"{prefix}{key}/", depth + 1)
        elif (prefix or key not in _NOT_METRICS) and (value is None or isinstance(value, int | float)):
            yield f"{prefix}{key}", number(value)
