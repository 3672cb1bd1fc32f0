"""What README, CONTRIBUTING and docs/ say is true: snippets run, links lead somewhere, commands exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tokenloom import catalog
from tokenloom.algorithm import Algorithm
from tokenloom.policy.config import ModelConfig
from tokenloom.tasks.config import TaskConfig
from tokenloom.train.config import LogConfig, TrainConfig
from tokenloom.train.recipe import load_recipe, recipe_names, recipe_schema

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
GENERATED = {ROOT / "docs" / "recipe-keys.md"}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path, *languages: str) -> Iterator[str]:
    """The bodies of the fenced blocks in any of `languages`, in order."""
    for _, language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield body


@pytest.mark.parametrize("folder", ["", pytest.param("docs/decoding/", marks=pytest.mark.slow)])
def test_python_snippets_run(folder: str, tmp_path: Path) -> None:
    """The snippets of a page are one program, in their order. One process for all pages: importing torch is slow.

    The pages that show every decoding method take minutes.
    """
    programs = []
    for page in [p for p in PAGES if name(p).startswith("docs/decoding/") == bool(folder)]:
        if snippets := list(fences(page, "python")):
            programs.append(tmp_path / f"{name(page).replace('/', '-')}.py")
            programs[-1].write_text("\n".join(snippets), encoding="utf-8")
    assert len(programs) >= 4
    runner = "import runpy, sys\nfor path in sys.argv[1:]: runpy.run_path(path, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", runner, *map(str, programs)],
        cwd=tmp_path, capture_output=True, text=True, timeout=900 if folder else 120, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path)
        # These pages are made while the site is built, which checks links to them by itself.
        if file.resolve() in GENERATED or file.resolve().is_relative_to(ROOT / "docs" / "methods"):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        t for p in PAGES for t in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", p.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"quickstart", "test"} <= named <= targets


def test_no_line_tells_of_a_measurement_that_was_not_made() -> None:
    """`<!-- measured -->` marks a place that waits for a figure; none may be left in what users read."""
    waiting = [name(p) for p in PAGES if "<!-- measured -->" in p.read_text(encoding="utf-8")]
    assert waiting == []


def yaml_sections(page: Path, section: str) -> list[Any]:
    return [found[section] for found in map(yaml.safe_load, fences(page, "yaml")) if section in found]


def test_tasks_in_the_recipes_page_are_accepted() -> None:
    found = [TaskConfig.model_validate(t) for t in yaml_sections(ROOT / "docs" / "recipes.md", "task")]
    assert len(found) >= 2


def test_algorithms_in_the_recipes_page_are_accepted() -> None:
    found = [Algorithm.from_recipe(a) for a in yaml_sections(ROOT / "docs" / "recipes.md", "algorithm")]
    assert [t.part.part.name for t in found[0].terms] == ["entropy-bonus"]
    assert found[0].bounds.params["high"] == 0.4


def test_methods_that_the_readme_lists_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| preset |") :].split("\n\n")[0]
    listed = [slug for row in table.splitlines()[2:] for slug in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(listed) >= 18
    assert set(listed) <= set(catalog.presets())


def load_script(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py"), ROOT / "scripts" / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_of_recipes_is_up_to_date_and_valid() -> None:
    script = load_script("recipe_schema.py")
    assert script.SCHEMA.read_text(encoding="utf-8") == script.text(), "run `make update`"
    jsonschema.Draft202012Validator.check_schema(json.loads(script.text()))


def test_the_schema_agrees_with_the_program_about_shipped_recipes() -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    names = recipe_names()
    assert "quickstart" in names
    for name in names:
        text = (resources.files("tokenloom.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        assert list(validator.iter_errors(yaml.safe_load(text))) == []
        assert list(validator.iter_errors(yaml.safe_load(text) | {"rollouts": {}})) != []
        load_recipe(name, check_files=False)


def test_every_recipe_key_has_its_line_in_the_docs() -> None:
    page = load_script("gen_recipe_keys.py").page(recipe_schema())
    for model, prefix in ((ModelConfig, "model"), (TaskConfig, "task"), (TrainConfig, "train"), (LogConfig, "log")):
        for key in model.model_fields:
            assert f"| `{prefix}.{key}` |" in page
    assert "| `train.eval.every` | `0` | an integer ≥ 0 |" in page


@pytest.mark.parametrize("slug", sorted(catalog.methods()))
def test_every_method_has_a_page(slug: str) -> None:
    method = catalog.methods()[slug]
    text = load_script("gen_docs.py").method_page(method)
    assert text.startswith(f"# {slug}\n")
    for part in method.parts:
        assert f"## Part `{part.name}`" in text
    if method.preset is not None:
        assert f"algorithm={slug}" in text
        assert "nan" not in text.split("What it does to each token")[-1].split("## Part")[0]
