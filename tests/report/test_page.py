"""The HTML file itself: self-contained, closed to the network, with data that cannot leave its place."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from report.make_run import HOSTILE, make_run
from tokenloom.report import compare_report, write_report
from tokenloom.report.html import embed
from tokenloom.report.page import MAX_SAMPLES_PER_OUTCOME
from tokenloom.report.tokens import MAX_RESPONSES


def _data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_embedding_is_inert_and_exact() -> None:
    payload = {"text": HOSTILE, "key</script>": [1.5, None, True]}
    text = embed(payload)
    assert text.isascii()
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == payload
    assert embed([float("nan"), float("-inf"), (1, 2)]) == "[null,null,[1,2]]"


def test_file_is_self_contained(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run", steps=4, hostile=True))
    assert page == tmp_path / "run" / "report.html"
    html = page.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]
    # What the policy admits is exactly what is there.
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy[1]
    assert set(re.findall(r"https?://[^'\"\s]+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|@import|url\(", html)
    assert not list(page.parent.glob("*.part"))


def test_hostile_text_arrives_unchanged(tmp_path: Path) -> None:
    data = _data(write_report(make_run(tmp_path / "run", steps=4, hostile=True)))
    assert data["samples"]["pairs"][0]["after"]["response"] == HOSTILE
    assert HOSTILE in [piece for _, piece in data["tokens"]["pieces"]]


def test_before_and_after_are_the_same_prompt(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=4)
    lines = [
        {
            "step": step,
            "prompt": [{"role": "user", "content": name}],
            "response": f"{name}{step}",
            "correct": right,
        }
        for step, outcome in ((0, "nnyy"), (2, "yyyy"), (4, "yn y"))
        for name, right in zip("abcd", (c == "y" for c in outcome), strict=True)
    ]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    samples = _data(write_report(folder))["samples"]
    assert (samples["before"], samples["after"]) == (0, 4)
    assert samples["counts"] == {"learned": 1, "missed": 1, "lost": 1, "kept": 1}
    assert [(p["before"]["response"], p["after"]["response"], p["outcome"]) for p in samples["pairs"]] == [
        ("a0", "a4", "learned"),
        ("b0", "b4", "missed"),
        ("c0", "c4", "lost"),
        ("d0", "d4", "kept"),
    ]


def test_size_is_capped_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=4)
    many = [
        {"step": s, "prompt": f"p{i}", "response": "x" * 9_000, "correct": False} for s in (0, 4) for i in range(100)
    ]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, many)), encoding="utf-8")
    line = (folder / "tokens.jsonl").read_text(encoding="utf-8").splitlines()[0]
    lines = [json.dumps(json.loads(line) | {"row": i}) for i in range(MAX_RESPONSES + 60)]
    (folder / "tokens.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = _data(write_report(folder))
    assert len(data["samples"]["pairs"]) == MAX_SAMPLES_PER_OUTCOME
    assert data["samples"]["counts"] == {"missed": 100}
    assert data["samples"]["pairs"][0]["after"]["response"].endswith("[+1,000 characters]")
    assert len(data["tokens"]["rows"]) == MAX_RESPONSES
    assert data["tokens"]["total"] == MAX_RESPONSES + 60


def test_almost_empty_run_still_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"algorithm": {"description": "one line"}, "machine": 3}', encoding="utf-8")
    data = _data(write_report(tmp_path, tmp_path / "sub" / "page.html"))
    assert data["charts"] == data["samples"]["pairs"] == data["tokens"]["rows"] == []
    assert data["runs"][0]["status"] == "no step on record"
    assert data["runs"][0]["description"] == ["one line"]
    assert len(data["runs"][0]["notes"]) == 5


def test_out_may_be_a_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    assert write_report(folder, tmp_path) == tmp_path / "report.html"
    assert compare_report([folder, folder], tmp_path) == tmp_path / "compare.html"


def test_comparison(tmp_path: Path) -> None:
    a = make_run(tmp_path / "x" / "run", steps=4)
    b = make_run(tmp_path / "y" / "run", steps=6, seed=1, algorithm="dapo")
    data = _data(compare_report([a, b], tmp_path / "both.html"))
    assert [run["name"] for run in data["runs"]] == ["1: x/run", "2: y/run"]
    reward = next(chart for chart in data["charts"] if chart["key"] == "reward")
    assert [len(s["steps"]) for s in reward["series"]] == [4, 6]
    assert {"key": "algorithm", "values": ["grpo", "dapo"]} in data["differences"]
    with pytest.raises(ValueError, match="2 to 6 run folders, got 1"):
        compare_report([a], tmp_path / "one.html")
