"""Parts and presets: registration, names, import paths, parameter checks."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import Tensor

from tokenloom import Algorithm, Schedule, bind, catalog, get_part, get_preset, part, parts, preset, presets
from tokenloom.catalog import methods
from tokenloom.hints import suggest
from tokenloom.parameters import Hyperparameter, check_parameters, describe_type
from tokenloom.testing import check, random_batch

if TYPE_CHECKING:
    from tokenloom.nowhere import Missing

RULE = '''
from torch import Tensor
from tokenloom import part
from tokenloom.masked import to_tokens

@part("mine/rule", stage="advantage", scope="row", paper="none")
def rule(rewards: Tensor, mask: Tensor, *, factor: float = FACTOR) -> Tensor:
    """A user's rule."""
    return to_tokens(rewards.nan_to_num() * factor, mask)

def helper() -> None: ...
NUMBER = 5
'''


def write_rule(folder: Path, factor: float = 2.0, name: str = "my_parts.py") -> Path:
    file = folder / name
    file.write_text(RULE.replace("FACTOR", str(factor)), encoding="utf-8")
    return file


def some(stage: str = "weight", scope: str = "token", name: str = "test/x", **rest: Any) -> Callable[..., Any]:
    return part(name, stage=stage, scope=scope, paper="none", **rest)  # type: ignore[arg-type]  # wrong ones too


# -- registration -----------------------------------------------------------------------------------


def test_a_signature_is_the_whole_declaration() -> None:
    @some(name="test/mine", gives=["returns"], properties=["draws"], refill=True)
    def mine(mask: Tensor, entropies: Tensor | None = None, *, rho: float = 0.2, mode: str = "a") -> Tensor:
        """First line.

        More.
        """
        return mask.float()

    found = get_part("test/mine", "weight")
    assert found.function is mine
    assert found.inputs == {"mask": True, "entropies": False}
    assert found.hyperparameters == {"rho": Hyperparameter(float, 0.2), "mode": Hyperparameter(str, "a")}
    assert (found.slug, found.family, found.summary) == ("test", "user", "First line.")
    assert (set(found.gives), set(found.properties), found.refill) == ({"returns"}, {"draws"}, True)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'test/x': positional parameter 'masks' is not in the vocabulary "
                                         r"\(hyperparameters go behind a bare \*\); did you mean 'mask'"):  # fmt: skip

        @some()
        def rule(masks: Tensor) -> Tensor:
            return masks

    assert "test/x" not in parts()


def test_a_hyperparameter_needs_a_default() -> None:
    with pytest.raises(ValueError, match="hyperparameter 'rho' needs a default"):

        @some()
        def rule(mask: Tensor, *, rho: float) -> Tensor:
            return mask * rho


def test_only_ordinary_parameters() -> None:
    with pytest.raises(ValueError, match="'mask' must be an ordinary one or keyword-only"):

        @some()
        def positional(mask: Tensor, /) -> Tensor:
            return mask

    with pytest.raises(ValueError, match="'tokens' must be an ordinary one"):

        @some()
        def starred(*tokens: Tensor) -> Tensor:
            return tokens[0]


@pytest.mark.parametrize(
    ("stage", "scope", "message"),
    [
        ("advantages", "row", "unknown stage 'advantages'; did you mean 'advantage'"),
        ("weight", "rows", "unknown scope 'rows'; did you mean 'row'"),
        ("weight", "zzzz", "unknown scope 'zzzz'; known: batch, group, row, token"),
    ],
)
def test_unknown_stage_or_scope(stage: str, scope: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        some(stage, scope)


def test_a_name_is_held_by_one_function() -> None:
    @some()
    def first(mask: Tensor) -> Tensor:
        return mask.float()

    with pytest.raises(ValueError, match=r"'test/x' is held by .*first; choose another"):

        @some()
        def second(mask: Tensor) -> Tensor:
            return mask.float()

    with pytest.raises(ValueError, match="'grpo' is held by tokenloom"):

        @some("advantage", "group", "grpo")
        def grpo(rewards: Tensor, mask: Tensor) -> Tensor:
            return mask.float()

    assert get_part("test/x").function is first


def test_two_files_cannot_hold_one_name(tmp_path: Path) -> None:
    # Both functions are called `rule`; the second must not replace the first silently.
    a, b = write_rule(tmp_path, 2.0, "a.py"), write_rule(tmp_path, 3.0, "b.py")
    get_part(f"{a}:rule")
    with pytest.raises(ValueError, match="'mine/rule' is held by"):
        get_part(f"{b}:rule")


def test_a_definition_may_run_again() -> None:
    made = []
    for _ in range(2):

        @some()
        def rule(mask: Tensor) -> Tensor:
            return mask.float()

        made.append(rule)
    assert get_part("test/x").function is made[1]


def test_a_multiplier_is_checked_at_registration() -> None:
    def multiplier(ratios: Tensor) -> Tensor:
        return ratios

    with pytest.raises(ValueError, match=r"test/x \(multiplier\)': positional parameter 'ratios'"):

        @some("surrogate", multiplier=multiplier)
        def rule(log_ratio: Tensor) -> Tensor:
            return log_ratio


@pytest.mark.parametrize(("stage", "name"), [("term", "coef"), ("term", "weight"), ("term", "aggregate"),
                                             ("weight", "part")])  # fmt: skip
def test_names_that_recipes_use_are_refused(stage: str, name: str) -> None:
    # A term's own `coef` would be swallowed by the recipe's key of that name.
    scope: dict[str, Any] = {}
    source = f"def rule(mask, *, {name}: float = 1.0):\n    return mask * {name}\n"
    exec(compile(source, "<rule>", "exec"), scope)
    with pytest.raises(ValueError, match=f"recipes use .*{name}.* themselves"):
        some(stage)(scope["rule"])


def test_annotations_must_exist_at_run_time() -> None:
    with pytest.raises(ValueError, match=r"annotation cannot be read.*Missing.*not under TYPE_CHECKING"):

        @some()
        def rule(mask: Missing) -> None: ...


def test_a_preset_takes_keywords_only() -> None:
    with pytest.raises(ValueError, match="preset 'test-preset': parameters must be keyword-only"):

        @preset("test-preset", paper="none")
        def made(mask: Tensor) -> Algorithm:
            return Algorithm.from_recipe("grpo")


# -- finding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("grop", None, "unknown part 'grop'; did you mean 'grpo'"),
        ("grop", "advantage", "unknown advantage part 'grop'; did you mean 'grpo'"),
        (
            "grpo",
            "surrogate",
            "'grpo' is a part of stage 'advantage' and cannot stand at stage 'surrogate'; .*ppo-clip",
        ),
        ("my_parts.py", "advantage", "a file's part is named 'my_parts.py:function'"),
        (5, "advantage", "advantage: a part is named by text, got 5"),
        (":rule", None, "names no module"),
        ("no_such_module_here:rule", None, "cannot import 'no_such_module_here'"),
        ("tokenloom.masked:where_maks", None, "has no 'where_maks'; did you mean 'where_mask'"),
        ("tokenloom.masked:where_mask", None, r"is not a part: decorate the function with @part"),
        ("tokenloom.masked:LOG_RATIO_LIMIT", None, "is not a part"),
    ],
)
def test_parts_that_are_not_there(name: Any, stage: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_part(name, stage)


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("grop", "unknown algorithm 'grop'; did you mean 'grpo'"),
        ("token-mean", "It names a part: put it into a stage"),
        (None, "named by text, got None"),
        ("tokenloom.masked:where_mask", "is not a preset: decorate it"),
    ],
)
def test_presets_that_are_not_there(slug: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_preset(slug)


def test_parts_by_module_path() -> None:
    path = "tokenloom.methods.policy_optimization.grpo:grpo"
    assert get_part(path) is get_part("grpo")
    assert bind(path, "advantage", eps=1e-4).source == path


def test_a_file_outside_the_tree_is_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rule(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = {"preset": "grpo", "advantage": {"part": "my_parts.py:rule", "factor": 3}, "terms": None}
    algorithm = Algorithm.from_recipe(recipe)
    assert algorithm.recipe()["advantage"] == {"part": "my_parts.py:rule", "factor": 3}
    assert algorithm.describe()[0] == "advantage  my_parts.py:rule(factor=3)  [none]"
    rollouts, signals = random_batch()
    assert rollouts.rewards is not None
    plan = algorithm.plan(rollouts, signals)
    assert torch.equal(plan.values["advantages"], 3 * rollouts.rewards[:, None] * rollouts.mask)
    assert "shape-and-dtype" in check("my_parts.py:rule")
    assert methods()["mine"].family == "user"
    assert not list(tmp_path.glob("__pycache__"))


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    file = write_rule(tmp_path, 2.0)
    stamp = file.stat()
    first = get_part(f"{file}:rule")
    assert get_part(f"{file}:rule") is first
    write_rule(tmp_path, 3.0)
    # Same size, same time: even then the text decides.
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert get_part(f"{file}:rule").hyperparameters["factor"].default == 3.0


def test_files_that_hold_no_part(tmp_path: Path) -> None:
    file = write_rule(tmp_path)
    for name in ("helper", "NUMBER"):
        with pytest.raises(ValueError, match=r"is not a part: decorate the function with @part"):
            get_part(f"{file}:{name}")
    with pytest.raises(ValueError, match="has no 'rul'; did you mean 'rule'"):
        get_part(f"{file}:rul")
    with pytest.raises(ValueError, match=r"there is no file .*absent\.py"):
        get_part(f"{tmp_path / 'absent.py'}:rule")


def test_a_file_that_fails_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('while importing')", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="while importing"):
            get_part(f"{file}:rule")


def test_a_preset_by_import_path(tmp_path: Path) -> None:
    file = tmp_path / "my_preset.py"
    file.write_text(
        "from tokenloom import Algorithm, preset\n\n\n"
        "@preset('mine-preset', paper='none')\n"
        "def mine(*, low: float = 0.1) -> Algorithm:\n"
        "    return Algorithm.compose(advantage='grpo', bounds={'part': 'clip', 'low': low})\n",
        encoding="utf-8",
    )
    algorithm = Algorithm.from_recipe({"preset": f"{file}:mine", "low": 0.3})
    assert algorithm.bounds.params == {"low": 0.3}
    assert algorithm.preset == f"{file}:mine"


def test_entry_points_are_loaded_and_a_broken_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "plugin_of_a_test.py").write_text(RULE.replace("FACTOR", "1.0"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = [
        importlib.metadata.EntryPoint("good", "plugin_of_a_test", "tokenloom.parts"),
        importlib.metadata.EntryPoint("bad", "no_such_plugin_here", "tokenloom.parts"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: found if "parts" in group else [])
    monkeypatch.setattr(catalog, "_loaded", False)
    with pytest.warns(UserWarning, match="entry point bad = 'no_such_plugin_here'.*its parts are missing"):
        assert "mine/rule" in parts()
    assert get_part("mine/rule").family == "user"


def test_the_catalog_by_slug() -> None:
    table = methods()
    assert list(table) == sorted(table)
    grpo = table["grpo"]
    assert grpo.preset is get_preset("grpo")
    assert (grpo.family, grpo.stages, grpo.paper) == ("policy-optimization", ["advantage"], "arXiv:2402.03300")
    assert {p.name for p in grpo.parts} >= {"grpo", "grpo/leave-one-out"}
    assert "trl" in presets()["grpo"].dialects
    assert presets()["sapo"].family == "policy-optimization"
    own = [m for m in table.values() if m.family != "user"]
    assert all(m.document for m in own)
    assert {m.family for m in own} == {"policy-optimization", "decoding"}


# -- hyperparameters --------------------------------------------------------------------------------

KNOWN = {
    "rho": Hyperparameter(float, 0.2),
    "limit": Hyperparameter(float | None, None),
    "steps": Hyperparameter(int, 3),
    "mode": Hyperparameter(Literal["a", "b"], "a"),
    "flag": Hyperparameter(bool, False),
    "name": Hyperparameter(str, ""),
    "anything": Hyperparameter(Any, None),
}


@pytest.mark.parametrize(
    "given",
    [{"rho": 1}, {"rho": 0.5}, {"limit": None}, {"limit": 2}, {"steps": 4}, {"mode": "b"}, {"flag": True},
     {"name": "x"}, {"anything": object()}, {"rho": Schedule("linear", 1.0, 0.0, 3)},
     {"limit": Schedule("linear", 1.0, 0.0, 3)}],
)  # fmt: skip
def test_allowed_parameters(given: dict[str, Any]) -> None:
    assert check_parameters("x", given, KNOWN) == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"roh": 1}, "owner: unknown parameter 'roh'; did you mean 'rho'"),
        ({"zzz": 1}, "owner: unknown parameter 'zzz'; known: anything, flag, limit"),
        ({"rho": True}, "owner: rho = True is not allowed; it takes a number"),
        ({"rho": "0.2"}, "owner: rho = '0.2' is not allowed; it takes a number"),
        ({"rho": None}, "it takes a number"),
        ({"limit": "x"}, "it takes a number or null"),
        ({"steps": 2.0}, "steps = 2.0 is not allowed; it takes an integer"),
        ({"steps": True}, "it takes an integer"),
        ({"steps": Schedule("linear", 1.0, 0.0)}, "it takes an integer"),
        ({"mode": "c"}, "mode = 'c' is not allowed; it takes one of a, b"),
        ({"flag": 1}, "it takes true or false"),
        ({"name": 3}, "it takes text"),
        ({"rho": {"schedule": "linear", "start": 1}}, r"owner: rho: a schedule needs the keys \['end'\]"),
        ({"name": {"schedule": "linear", "start": 1, "end": 0}}, "it takes text"),
        ({"rho": {"start": 1}}, "it takes a number"),
    ],
)
def test_refused_parameters(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parameters("owner", given, KNOWN)


def test_a_schedule_in_recipe_form_is_read() -> None:
    spec = {"schedule": "linear", "start": 1.0, "end": 0.5, "steps": 4}
    assert check_parameters("x", {"rho": spec}, KNOWN) == {"rho": Schedule("linear", 1.0, 0.5, 4)}


def test_words() -> None:
    assert describe_type(float | None) == "a number or null"
    assert suggest("mask", []) == ""
    assert suggest("mas", ["mask", "tokens"]) == "; did you mean 'mask'?"
    assert suggest("qqq", ["b", "a"]) == "; known: a, b"
