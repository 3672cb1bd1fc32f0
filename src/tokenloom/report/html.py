"""One self-contained HTML file out of a payload: assets and data inlined, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

SCRIPTS = (
    "dom.js", "charts.js", "overview.js", "samples.js", "inflate.js", "store.js", "scale.js", "virtual.js",
    "choice.js", "responses.js", "tip.js", "tree.js", "tokens.js", "main.js",
)  # fmt: skip


def render(payload: dict[str, Any], blobs: Mapping[str, str] | None = None) -> str:
    """The page of `payload`, with packed numbers (base64, see `encode`) by name beside it.

    The content security policy admits exactly the inlined style and script (by hash) and no
    network at all, so that untrusted text has nothing to reach even if it escaped its place.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();"
    style = _asset("style.css")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    packed = "".join(
        f'<script type="text/plain" data-blob="{escape(k)}">{v}</script>\n' for k, v in (blobs or {}).items()
    )
    parts = {"policy": policy, "style": style, "data": embed(payload), "blobs": packed, "script": script}
    # One pass, so that a placeholder inside the data stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m.group(1)], _asset("page.html"))


def embed(payload: Any) -> str:
    """`payload` as JSON that cannot end its script element: ASCII, <, > and & escaped, NaN and inf as null.

    Lone surrogates and U+2028/2029 are escaped like everything that is not ASCII.
    """
    text = json.dumps(_finite(payload), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(payload: dict[str, Any], out: Path, blobs: Mapping[str, str] | None = None) -> Path:
    """Render into `out` (parent made if missing), replacing it in one move: no half page is ever seen."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return replace_text(out, render(payload, blobs))


def replace_text(out: Path, text: str) -> Path:
    """Write `text` to `out` in one move; what is no file, such as /dev/null, is written into, and a link stays one."""
    if out.exists() and not out.is_file():
        out.write_text(text, encoding="utf-8", newline="\n")
        return out
    place = out.resolve()
    part = place.with_name(place.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, place)
    return out


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _asset(name: str) -> str:
    return (files("tokenloom.report") / "assets" / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
