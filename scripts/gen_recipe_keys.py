"""MkDocs hook: the page of every recipe key, written from the JSON schema while the site is built."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenloom.train.recipe import recipe_schema


def on_files(files: Any, config: Any) -> Any:
    """Add the page to the site's files."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "recipe-keys.md", content=page(recipe_schema())))
    return files


def page(schema: dict[str, Any]) -> str:
    """The page, Markdown: one section for each section of a recipe."""
    lines = [
        "# All recipe keys",
        "",
        "Written from the [JSON schema](recipe.schema.json) of recipes. To have an editor complete and check a recipe,",
        "begin the file with `# yaml-language-server: $schema=` and the path of that file.",
    ]
    for name, node in schema["properties"].items():
        target = referred(schema, node)
        lines += ["", f"## {name}", "", node.get("description") or (target or {}).get("description", ""), ""]
        if target is None:
            lines += [f"Takes {kinds(schema, node)}. Default: {default(node)}."]
            continue
        lines += ["| key | default | takes | meaning |", "| --- | --- | --- | --- |", *rows(schema, target, f"{name}.")]
    return "\n".join(lines) + "\n"


def rows(schema: dict[str, Any], node: dict[str, Any], prefix: str) -> Iterator[str]:
    """One table row for each key below `node`, nested sections in place."""
    for key, inner in node["properties"].items():
        below = referred(schema, inner)
        meaning = inner.get("description") or (below or {}).get("description", "")
        cells = (f"`{prefix}{key}`", default(inner), kinds(schema, inner), meaning.replace("\n", " "))
        yield "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
        if below is not None:
            yield from rows(schema, below, f"{prefix}{key}.")
        elif isinstance(inner.get("items"), dict) and (item := referred(schema, inner["items"])) is not None:
            yield from rows(schema, item, f"{prefix}{key}[].")


def referred(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a key holds, if it holds one and nothing else but null."""
    choices = [c for c in node.get("anyOf", [node]) if c.get("type") != "null"]
    if len(choices) != 1 or "$ref" not in choices[0]:
        return None
    found: dict[str, Any] = schema["$defs"][choices[0]["$ref"].rpartition("/")[2]]
    return found


def default(node: dict[str, Any]) -> str:
    """The default as YAML writes it; a dash where a section holds the defaults of its own keys."""
    if "default" not in node:
        return "–"
    return f"`{json.dumps(node['default'], ensure_ascii=False)}`"


def kinds(schema: dict[str, Any], node: dict[str, Any]) -> str:
    """What a key takes, with its limits."""
    if "anyOf" in node:
        return " or ".join(kinds(schema, choice) for choice in node["anyOf"])
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    if "$ref" in node:
        return "a section"
    if "items" in node:
        return "a list of " + kinds(schema, node["items"]).removeprefix("a ").replace("section", "sections")
    words = {"string": "text", "boolean": "true or false", "object": "a mapping", "array": "a list"}
    kind = {"integer": "an integer", "number": "a number", "null": "null"} | words
    limits = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    said = [f"{sign} {node[name]}" for name, sign in limits.items() if name in node]
    return " ".join([kind.get(node.get("type", ""), "anything"), ", ".join(said)]).strip()
