"""The JSON schema of recipes, checked in as docs/recipe.schema.json, so that editors complete and check recipes.

python scripts/recipe_schema.py            # write it
python scripts/recipe_schema.py --check    # exit 1 with the difference when it is out of date
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

from tokenloom.train.recipe import recipe_schema

SCHEMA = Path(__file__).resolve().parent.parent / "docs" / "recipe.schema.json"


def text() -> str:
    """The schema as the file holds it."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Write or check the schema; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    now = text()
    if not parser.parse_args().check:
        SCHEMA.write_text(now, encoding="utf-8", newline="\n")
        return 0
    then = SCHEMA.read_text(encoding="utf-8") if SCHEMA.exists() else ""
    if now == then:
        return 0
    lines = difflib.unified_diff(then.splitlines(True), now.splitlines(True), "docs/recipe.schema.json", "source")
    sys.stdout.writelines(lines)
    print("The recipes' schema has changed. If that is meant, run `make update`, and say so in CHANGELOG.md.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
