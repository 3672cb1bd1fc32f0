"""Presets that docs/lab.md compares with and that the catalog has no name for.

tokenloom lab --methods scripts/lab_variants.py:grpo_without_kl,... --out runs/lab-variants
"""

from __future__ import annotations

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import preset


def _without_kl() -> Algorithm:
    return Algorithm.from_recipe({"preset": "grpo", "kl_coef": 0.0})


@preset("grpo-without-kl", paper="arXiv:2402.03300")
def grpo_without_kl() -> Algorithm:
    """What most methods of the family are built on; the preset `grpo` has the paper's KL of 0.04."""
    return _without_kl()


@preset("grpo-four-updates", paper="arXiv:2402.03300")
def grpo_four_updates() -> Algorithm:
    """The batch in four updates, as CTPO cuts it."""
    return _without_kl().override(updates={"part": "mini-batches", "mini_batches": 4})


@preset("grpo-three-epochs", paper="arXiv:2402.03300")
def grpo_three_epochs() -> Algorithm:
    """The batch three times, as ASPO takes it."""
    return _without_kl().override(updates={"part": "mini-batches", "epochs": 3})


@preset("negative-only", paper="arXiv:2512.21625")
def negative_only() -> Algorithm:
    """Only wrong responses move the policy."""
    return _without_kl().override(credit=[{"part": "a3po/weighted", "positive": 0.0}])


@preset("positive-only", paper="arXiv:2512.21625")
def positive_only() -> Algorithm:
    """Only right responses move the policy."""
    return _without_kl().override(credit=[{"part": "a3po/weighted", "negative": 0.0}])


@preset("ar-alone", paper="arXiv:2505.12929")
def ar_alone() -> Algorithm:
    """AR without Lopti."""
    return Algorithm.from_recipe({"preset": "ar-lopti", "use": "ar"})


@preset("lopti-alone", paper="arXiv:2505.12929")
def lopti_alone() -> Algorithm:
    """Lopti without AR."""
    return Algorithm.from_recipe({"preset": "ar-lopti", "use": "lopti"})


@preset("grpo-s", paper="arXiv:2508.04349")
def grpo_s() -> Algorithm:
    """The sequence-level half of the GTPO paper."""
    return Algorithm.from_recipe({"preset": "gtpo-entropy", "variant": "grpo-s"})


@preset("segment-samples", paper="arXiv:2505.23564")
def segment_samples() -> Algorithm:
    """SPO as the paper has it: four extra responses from every second cut point, which are paid for."""
    return Algorithm.from_recipe({"preset": "segment-po", "samples": 4, "every": 2})


@preset("segment-tree", paper="arXiv:2505.23564")
def segment_tree() -> Algorithm:
    """SPO on a tree of segments of two tokens."""
    return Algorithm.from_recipe({"preset": "segment-po", "kind": "tree", "segment": 2})


@preset("forking-schedule", paper="arXiv:2605.25381")
def forking_schedule() -> Algorithm:
    """Temporal scheduling of how many forking tokens are trained."""
    return Algorithm.from_recipe({"preset": "temporal-scheduling", "where": "forking"})


@preset("entropy-schedule", paper="arXiv:2605.25381")
def entropy_schedule() -> Algorithm:
    """Temporal scheduling of an entropy bonus in the advantage."""
    return Algorithm.from_recipe({"preset": "temporal-scheduling", "where": "entropy-advantage"})


@preset("short-budget", paper="arXiv:2508.08940")
def short_budget() -> Algorithm:
    """The length curriculum with a budget that the laboratory's responses can meet: seven tokens falling to three."""
    return Algorithm.from_recipe(
        {"preset": "length-curriculum", "budget": 7.0, "decay": 0.8, "every": 10, "kl_coef": 0.0}
    )


@preset("thr-exploring", paper="arXiv:2510.03669")
def thr_exploring() -> Algorithm:
    """THR with p < 0."""
    return Algorithm.from_recipe({"preset": "thr", "p": -0.1})
