"""The leaderboard as one self-contained HTML file: a sortable table, plots and the meanings of the figures.

Data and assets are inlined; the content security policy admits exactly them and no network, so that names and error
messages, which may come from a user's files, have nothing to reach.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any


def write(payload: dict[str, Any], path: Path) -> Path:
    """Render into `path`, replacing it in one move."""
    part = path.with_name(path.name + ".part")
    part.write_text(render(payload), encoding="utf-8", newline="\n")
    os.replace(part, path)
    return path


def render(payload: dict[str, Any]) -> str:
    """The page of `payload`: `summary` (of `results`), `figures`, `claims`, `compositions` and `about`."""
    script = "(() => {\n'use strict';\n" + _asset("draw.js") + _asset("main.js") + "\n})();"
    style = _asset("style.css")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # The data must not be able to end its script element.
    data = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    parts = {"policy": policy, "style": style, "data": data, "script": script}
    # One pass, so that a placeholder inside the data stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m.group(1)], _asset("page.html"))


def _asset(name: str) -> str:
    return (files("tokenloom.lab") / "assets" / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
