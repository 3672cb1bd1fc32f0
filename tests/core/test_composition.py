"""The recipe's grammar: compose, presets, overrides, and every message for what is not allowed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom import Algorithm, Schedule, Term, bind, part, presets
from tokenloom.catalog import Preset


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every preset, in every dialect."""
    for slug, found in presets().items():
        if found.family != "user":
            yield from ((slug, {"preset": slug} | ({"dialect": d} if d else {})) for d in _dialects(found))


def _dialects(found: Preset) -> tuple[str | None, ...]:
    return found.dialects or (None,)


VARIANTS = list(variants())
IDS = [f"{slug}-{spec.get('dialect', 'plain')}" for slug, spec in VARIANTS]


@pytest.mark.parametrize(("slug", "spec"), VARIANTS, ids=IDS)
def test_every_preset_spells_itself_out_and_is_read_back(slug: str, spec: dict[str, Any]) -> None:
    algorithm = Algorithm.from_recipe(spec)
    assert algorithm.preset == slug
    spelled = algorithm.recipe()
    assert replace(Algorithm.from_recipe(spelled), preset=slug) == algorithm
    assert Algorithm.from_recipe(spelled).recipe() == spelled
    lines = algorithm.describe()
    inside = sum(len(t.weight) for t in algorithm.terms)
    inside += sum(key.startswith("blend/") for key, _ in algorithm.bound_parts())
    assert len(lines) == len(list(algorithm.bound_parts())) - inside + len(algorithm.corpus)
    for _, bound in algorithm.bound_parts():
        assert any(bound.part.name in line for line in lines)


def test_a_recipe_survives_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    spec = {"preset": "grpo", "terms": [{"part": "kl", "coef": {"schedule": "linear", "start": 0.1, "end": 0.0},
            "weight": ["entropy-8020"], "aggregate": "token-mean", "estimator": "k2"}]}  # fmt: skip
    algorithm = Algorithm.from_recipe(spec)
    again = Algorithm.from_recipe(yaml.safe_load(yaml.safe_dump(algorithm.recipe())))
    assert replace(again, preset="grpo") == algorithm


def test_compose_has_the_plain_defaults() -> None:
    a = Algorithm.compose(advantage="grpo")
    names = {k: b.part.name for k, b in a.bound_parts()}
    assert names == {"advantage": "grpo", "surrogate": "ppo-clip", "aggregate": "token-mean", "bounds": "clip",
                     "log_ratio": "token-ratio", "updates": "mini-batches"}  # fmt: skip
    assert a.preset == "custom"
    assert Algorithm.from_recipe({"advantage": "grpo"}) == a


def test_description_shows_every_hyperparameter_and_paper() -> None:
    lines = Algorithm.from_recipe({"preset": "grpo", "bounds": {"high": 0.28}}).describe()
    assert "bounds     clip(low=0.2, high=0.28, cap=None)  [arXiv:1707.06347]" in lines
    assert any(line.startswith("term       0.04 x kl(estimator=k3") for line in lines)


# -- overriding -------------------------------------------------------------------------------------


def test_part_parameters_merge_and_a_named_part_replaces() -> None:
    base = Algorithm.compose(advantage="grpo", bounds={"part": "clip", "low": 0.1})
    assert base.override(bounds={"high": 0.3}).bounds.params == {"low": 0.1, "high": 0.3}
    assert base.override(bounds={"part": "clip", "high": 0.3}).bounds.params == {"high": 0.3}
    assert base.override(bounds="clip").bounds.params == {}
    assert base.override(advantage=bind("rloo")).advantage.part.name == "rloo"
    assert base.bounds.params == {"low": 0.1}


def test_a_list_replaces_a_mapping_edits_null_empties() -> None:
    base = Algorithm.compose(advantage="grpo", weight=["tis", {"part": "entropy-8020", "rho": 0.5}])

    def names(a: Algorithm) -> list[str]:
        return [b.part.name for b in a.weight]

    assert names(base) == ["tis", "entropy-8020"]
    assert names(base.override(weight="mis")) == ["mis"]
    assert names(base.override(weight=["mis"])) == ["mis"]
    assert names(base.override(weight={"part": "mis"})) == ["mis"]
    assert names(base.override(weight=bind("mis"))) == ["mis"]
    assert names(base.override(weight={"mis": {}})) == ["tis", "entropy-8020", "mis"]
    assert names(base.override(weight={"tis": None})) == ["entropy-8020"]
    assert base.override(weight=None).weight == ()
    edited = base.override(weight={"tis": {"maximum": 3.0}})
    assert names(edited) == ["tis", "entropy-8020"]
    assert [b.params for b in edited.weight] == [{"maximum": 3.0}, {"rho": 0.5}]


def test_terms_edit_alike() -> None:
    base = Algorithm.compose(advantage="grpo", terms=[{"part": "kl", "coef": 0.1, "aggregate": "sequence-mean"}])

    def coefs(a: Algorithm) -> dict[str, Any]:
        return {t.part.part.name: t.coef for t in a.terms}

    assert coefs(base.override(terms={"kl": {"coef": 0.2}})) == {"kl": 0.2}
    assert base.override(terms={"kl": {"coef": 0.2}}).terms[0].aggregate is not None
    assert base.override(terms={"kl": {"aggregate": None}}).terms[0].aggregate is None
    assert base.override(terms={"kl": {"estimator": "k2"}}).terms[0].part.params == {"estimator": "k2"}
    assert coefs(base.override(terms={"entropy-bonus": {"coef": 0.01}})) == {"kl": 0.1, "entropy-bonus": 0.01}
    assert coefs(base.override(terms={"kl": None})) == {}
    assert coefs(base.override(terms="entropy-bonus")) == {"entropy-bonus": 1.0}
    assert coefs(base.override(terms={"part": "entropy-bonus", "coef": 2})) == {"entropy-bonus": 2}
    assert coefs(base.override(terms=Term(bind("entropy-bonus"), 0.5))) == {"entropy-bonus": 0.5}
    assert base.override(terms=None).terms == ()
    weighted = base.override(terms={"kl": {"weight": ["entropy-8020"]}})
    assert [w.part.name for w in weighted.terms[0].weight] == ["entropy-8020"]
    again = weighted.override(terms={"kl": {"weight": {"entropy-8020": {"rho": 0.4}}}})
    assert again.terms[0].weight[0].params == {"rho": 0.4}
    assert coefs(base.with_term("entropy-bonus", coef=0.3)) == {"kl": 0.1, "entropy-bonus": 0.3}


def test_a_preset_takes_its_parameters_and_stages_at_once() -> None:
    a = Algorithm.from_recipe({"preset": "dapo", "high": 0.3, "overlong": "filter", "bounds": {"low": 0.1}})
    assert (a.bounds.params["low"], a.bounds.params["high"]) == (0.1, 0.3)
    assert [b.part.name for b in a.select] == ["dapo/dynamic-sampling", "dapo/overlong-filter"]


def test_schedules_stand_where_floats_may() -> None:
    spec = {"schedule": "linear", "start": 0.2, "end": 0.1, "steps": 5}
    a = Algorithm.from_recipe({"preset": "grpo", "kl_coef": spec, "bounds": {"high": spec}})
    assert a.terms[0].coef == a.bounds.params["high"] == Schedule("linear", 0.2, 0.1, 5)
    assert a.recipe()["terms"][0]["coef"] == a.recipe()["bounds"]["high"] == spec


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("grop", "unknown algorithm 'grop'; did you mean 'grpo'"),
        (3, "algorithm: expected a preset's name or a mapping, got 3"),
        ({"preset": None}, "named by text, got None"),
        ({}, "name a preset, or at least the stage 'advantage'"),
        ({"surrogate": "ppo-clip"}, "at least the stage 'advantage'"),
        ({"advantages": "grpo"}, "algorithm: unknown key 'advantages'; did you mean 'advantage'"),
        ({"preset": "grpo", "kl_coeff": 1}, "algorithm 'grpo': unknown key 'kl_coeff'; did you mean 'kl_coef'"),
        ({"preset": "grpo", "wieght": []}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"preset": "grpo", "kl_coef": "x"}, "'grpo': kl_coef = 'x' is not allowed; it takes a number or null"),
        ({"preset": "grpo", "dialect": "verll"}, "dialect = 'verll' is not allowed; it takes one of paper, verl"),
        ({"preset": "grpo", "advantage": 5}, "advantage: expected a part's name or a mapping, got 5"),
        ({"preset": "grpo", "advantage": None}, "advantage: expected a part's name or a mapping, got None"),
        ({"preset": "grpo", "advantage": {"part": 5}}, "advantage: a part is named by text, got 5"),
        ({"preset": "grpo", "advantage": "ppo-clip"}, "is a part of stage 'surrogate' and cannot stand at stage 'adv"),
        ({"preset": "grpo", "advantage": {"epss": 1}}, "grpo: unknown parameter 'epss'; did you mean 'eps'"),
        ({"preset": "grpo", "advantage": {"eps": True}}, "grpo: eps = True is not allowed; it takes a number"),
        ({"preset": "grpo", "weight": 5}, "weight: expected a list, a mapping or null, got 5"),
        ({"preset": "grpo", "weight": {"tis": 5}}, "weight: tis: expected parameters or null, got 5"),
        ({"preset": "grpo", "weight": {"tis": None}}, "weight: there is no 'tis' to remove"),
        ({"preset": "grpo", "weight": {"tiss": {}}}, "unknown weight part 'tiss'; did you mean 'tis'"),
        ({"preset": "grpo", "weight": [{"rho": 1}]}, r"weight: \{'rho': 1\} names no part; add the key 'part'"),
        ({"preset": "grpo", "terms": 5}, "terms: expected a list, a mapping or null, got 5"),
        ({"preset": "grpo", "terms": [5]}, "terms: expected a part's name or a mapping, got 5"),
        ({"preset": "grpo", "terms": {"kl": 5}}, "terms: kl: expected parameters or null, got 5"),
        ({"preset": "grpo", "terms": {"k1": None}}, "terms: there is no 'k1' to remove; "),
        ({"preset": "grpo", "terms": {"kl": {"coef": "x"}}}, "terms: kl: coef = 'x' is not allowed; it takes a"),
        ({"preset": "grpo", "terms": {"kl": {"coef": True}}}, "coef = True is not allowed"),
        ({"preset": "grpo", "terms": {"kl": {"coef": {"schedule": "linear"}}}}, "terms: kl: coef: a schedule needs"),
        ({"preset": "grpo", "terms": {"kl": {"estimator": "k4"}}}, "kl: estimator = 'k4' is not allowed; it takes one"),
        ({"preset": "grpo", "terms": ["grpo"]}, "cannot stand at stage 'term'"),
    ],
)  # fmt: skip
def test_messages(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Algorithm.from_recipe(spec)


def test_override_names_an_unknown_stage() -> None:
    with pytest.raises(ValueError, match="unknown stage 'bound'; did you mean 'bounds'"):
        Algorithm.compose(advantage="grpo").override(bound="clip")
    with pytest.raises(ValueError, match="unknown stage 'branches'; did you mean 'branch'"):
        Algorithm.from_recipe("grpo").override(branches=None)


def test_twins_make_a_name_ambiguous() -> None:
    # Editing by name would otherwise drop one of the two without a word.
    twins = Algorithm.compose(
        advantage="grpo", weight=["tis", {"part": "tis", "level": "sequence"}], terms=["kl", "kl"]
    )
    assert len(twins.weight) == 2
    with pytest.raises(ValueError, match=r"weight: \['tis'\] stand there more than once.*give the whole list"):
        twins.override(weight={"tis": {"maximum": 3.0}})
    with pytest.raises(ValueError, match=r"terms: \['kl'\] stand there more than once"):
        twins.override(terms={"kl": {"coef": 3.0}})
    assert replace(Algorithm.from_recipe(twins.recipe()), preset="custom") == twins


def test_a_bound_part_cannot_stand_at_another_stage() -> None:
    with pytest.raises(ValueError, match="'ppo-clip' is a part of stage 'surrogate' and cannot stand at 'advantage'"):
        Algorithm.compose(advantage=bind("ppo-clip"))
    with pytest.raises(ValueError, match="'grpo' is a part of stage 'advantage' and cannot stand at 'term'"):
        Algorithm.compose(advantage="grpo", terms=[Term(bind("grpo"))])
    with pytest.raises(ValueError, match="cannot stand at 'weight'"):
        Algorithm.compose(advantage="grpo", terms=[Term(bind("kl"), weight=(bind("kl"),))])
    with pytest.raises(ValueError, match="cannot stand at 'aggregate'"):
        Algorithm.compose(advantage="grpo", terms=[Term(bind("kl"), aggregate=bind("kl"))])


def test_what_couples_rows_cannot_stand_in_the_loss() -> None:
    @part("test/coupled", stage="surrogate", scope="batch", paper="none")
    def coupled(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return log_ratio * advantages

    with pytest.raises(ValueError, match="'test/coupled' has scope 'batch' and cannot stand in the loss"):
        Algorithm.compose(advantage="grpo", surrogate="test/coupled")


def test_what_reads_the_policy_cannot_stand_in_the_plan() -> None:
    @part("test/early", stage="advantage", scope="row", paper="none")
    def early(logprobs: Tensor, mask: Tensor) -> Tensor:
        return logprobs

    @part("test/late-aggregate", stage="aggregate", scope="row", paper="none")
    def late_aggregate(ratio: Tensor, mask: Tensor) -> Tensor:
        return ratio

    with pytest.raises(ValueError, match=r"reads \['logprobs'\], which does not exist yet.*read 'old_logprobs'"):
        Algorithm.compose(advantage="test/early")
    with pytest.raises(ValueError, match=r"reads \['ratio'\]"):
        Algorithm.compose(advantage="grpo", terms=[{"part": "kl", "aggregate": "test/late-aggregate"}])


def test_state_only_where_it_is_carried() -> None:
    @part("test/bounds", stage="bounds", scope="token", paper="none")
    def adaptive(state: float | None) -> tuple[tuple[float, float, float], float]:
        return (0.8, 1.2, 3.0), 0.0

    @part("test/late-state", stage="weight", scope="token", paper="none")
    def late(ratio: Tensor, mask: Tensor, state: float | None) -> tuple[Tensor, float]:
        return ratio, 0.0

    with pytest.raises(ValueError, match="'test/bounds' cannot carry state at stage 'bounds'"):
        Algorithm.compose(advantage="grpo", bounds="test/bounds")
    with pytest.raises(ValueError, match="reads the policy being trained and cannot carry state"):
        Algorithm.compose(advantage="grpo", weight="test/late-state")


def test_a_critic_term_needs_a_critic() -> None:
    with pytest.raises(
        ValueError, match=r"'ppo-gae/value-loss' needs 'returns', which the advantage part 'grpo' does not"
    ):
        Algorithm.compose(advantage="grpo", terms=["ppo-gae/value-loss"])


def test_late_weights_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match=r"count='weights' cannot see \['clip-cov'\]"):
        Algorithm.compose(advantage="grpo", weight=["clip-cov"], aggregate={"part": "token-mean", "count": "weights"})


def test_sampling_parts_see_logits_only() -> None:
    @part("test/sampler", stage="sampling", scope="row", paper="none")
    def sampler(logits: Tensor, entropies: Tensor) -> Tensor:
        return logits

    with pytest.raises(ValueError, match=r"'test/sampler' reads \['entropies'\], which is not there while sampling"):
        Algorithm.compose(advantage="grpo", sampling="test/sampler")


def test_the_sampling_stage_is_one_function_of_logits() -> None:
    @part("test/temperature", stage="sampling", scope="row", paper="none")
    def temperature(logits: Tensor, step: int = 0, *, tau: float = 2.0) -> Tensor:
        return logits / tau + step

    a = Algorithm.compose(
        advantage="grpo",
        sampling=[{"part": "test/temperature", "tau": {"schedule": "linear", "start": 2.0, "end": 4.0, "steps": 2}},
                  "test/temperature"],
    )  # fmt: skip
    shape = a.shape_logits(step=1)
    assert shape is not None
    # (6 / 3 + 1) / 2 + 1
    assert shape(torch.tensor([[6.0]])).tolist() == [[2.5]]
    assert Algorithm.compose(advantage="grpo").shape_logits() is None
