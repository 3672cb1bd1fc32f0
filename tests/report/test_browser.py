"""The page in a real browser: it draws, shows hostile text as text, answers links, keys and the pointer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from report.browser import AVAILABLE, REASON, Browser, dump_dom
from report.make_run import HOSTILE, make_run
from tokenloom.report import compare_report, write_report

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not AVAILABLE, reason=REASON)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).as_uri()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=True)).as_uri()


class _Elements(HTMLParser):
    """Tag names, and the text outside of script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.text += data


def test_dumped_document_is_drawn_and_hostile_text_did_not_run(hostile: str) -> None:
    html = dump_dom(hostile + "#step=1&row=0&quantity=advantage&token=0")
    found = _Elements(html)
    assert 'data-ready="true"' in html
    assert "data-error" not in found.tags
    assert "img" not in found.tags
    # Data, program, and what was not inflated yet: packed numbers, which are no program.
    assert re.findall(r"<script(?! data-blob)(?! type=\"text/plain\")[^>]*>", html) == [
        '<script type="application/json" id="data">', "<script>",
    ]  # fmt: skip
    assert "<title>hostile · Tokenloom</title>" in html
    shown = HOSTILE.split("\u2028")[0].replace(" ", "·")
    assert shown in found.text
    for name in ("LS", "RLO", "NUL", "ESC", "U+D800", "ZWSP"):
        assert f'<span class="sign">{name}</span>' in html


def test_no_error_no_request_and_every_section(browser: Browser, page: str) -> None:
    browser.open(page)
    assert browser.problems == []
    assert browser.run("document.querySelectorAll('[data-error]').length") == 0
    sections = browser.run("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert {"overview", "curves", "samples", "tokens", "settings"} <= set(sections)
    big = browser.run("[...document.querySelectorAll('.big')].map((e) => e.textContent)")
    assert big == ["31 %→74 %+43 points", "11.8 %→61.4 %+49.6 points"]
    keys = browser.run("[...document.querySelectorAll('.chart')].map((e) => e.dataset.key)")
    assert {"lead", "reward", "entropy", "loss", "grad_norm", "kl/kl", "surrogate/clip_fraction"} <= set(keys)
    # Every chart has a line in it, and none has a number that is none.
    assert browser.run(
        "[...document.querySelectorAll('.chart path.line')].every((p) => p.getAttribute('d').length > 20)"
    )
    assert browser.run("document.querySelector('main').innerHTML.search(/NaN|undefined|\\[object/)") == -1


@pytest.mark.parametrize("width", [375, 760, 1280])
def test_nothing_is_wider_than_the_window(browser: Browser, hostile: str, width: int) -> None:
    browser.open(hostile + "#step=1&row=0&quantity=advantage&token=1", width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_stays_legible_on_the_ends_of_the_scale(browser: Browser, page: str, dark: bool) -> None:
    browser.open(page, dark=dark)
    ratios = browser.run(
        """(() => {
          const paint = (color) => {
            const ink = new OffscreenCanvas(1, 1).getContext('2d');
            ink.fillStyle = color; ink.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...ink.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
              .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const probe = document.body.appendChild(document.createElement('i'));
          const value = (name) => { probe.style.color = `var(${name})`; return paint(getComputedStyle(probe).color); };
          const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          return [['ink', 'below'], ['ink', 'above'], ['ink', 'card'], ['muted', 'hatch-gap'],
            ['muted', 'page'], ['muted', 'card'], ['muted', 'soft'], ['good', 'card'], ['bad', 'card'],
            ['good', 'soft'], ['bad', 'soft']]
            .map(([a, b]) => contrast(value(`--${a}`), value(`--${b}`)));
        })()"""
    )
    assert min(ratios) >= 4.5, ratios


def test_damaged_run_says_what_is_missing(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "torn", steps=3)
    (run / "tokens.jsonl").unlink()
    (run / "samples.jsonl").write_text("", encoding="utf-8")
    (run / "run.json").write_text('{"model": "Smo', encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "kind": "tr')
    browser.open(write_report(run).as_uri())
    assert browser.problems == []
    notes = browser.run("document.querySelector('#notes').textContent")
    for words in ("tokens.jsonl is missing", "samples.jsonl is empty", "run.json is not valid", "is torn"):
        assert words in notes
    assert browser.run("document.querySelectorAll('[data-error]').length") == 0


def test_page_says_what_it_leaves_out(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", steps=1)
    line = json.loads((run / "tokens.jsonl").read_text(encoding="utf-8").splitlines()[0])
    rows = (json.dumps(line | {"row": i}) for i in range(2003))
    (run / "tokens.jsonl").write_text("\n".join(rows), encoding="utf-8")
    train = (json.dumps({"step": s, "kind": "train", "reward": s % 7}) for s in range(1, 3000))
    (run / "metrics.jsonl").write_text("\n".join(train), encoding="utf-8")
    browser.open(write_report(run).as_uri())
    assert "2,000 of 2,003 dumped responses" in browser.run("document.querySelector('#tokens').textContent")
    assert "Very long curves keep" in browser.run("document.querySelector('#curves').textContent")


def test_comparison_overlays_runs(browser: Browser, run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", seed=1, algorithm="dapo", steps=20)
    browser.open(compare_report([run, other], tmp_path / "both.html").as_uri())
    assert browser.problems == []
    assert browser.run("document.querySelectorAll('[data-error]').length") == 0
    assert browser.run("['color-0', 'color-1'].every((c) => document.querySelector(`[data-key=reward] .line.${c}`))")
    recipe = browser.run("document.querySelector('#recipe').innerText")
    assert "algorithm" in recipe
    assert "dapo" in recipe
    assert "temperature" not in recipe
