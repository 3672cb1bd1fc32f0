"""The page in a real browser: it draws, shows hostile text as text, answers links, keys and the pointer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

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


def _dumped(run: Path, step: int, row: int) -> dict[str, Any]:
    lines = map(json.loads, (run / "tokens.jsonl").read_text(encoding="utf-8").splitlines())
    return next(line for line in lines if (line["step"], line["row"]) == (step, row))


def test_dumped_document_is_drawn_and_hostile_text_did_not_run(hostile: str) -> None:
    html = dump_dom(hostile + "#step=1&row=0&quantity=advantage&token=0")
    found = _Elements(html)
    assert 'data-ready="true"' in html
    assert "data-error" not in found.tags
    assert "img" not in found.tags
    assert found.tags.count("script") == 2
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


def test_link_selects_step_row_quantity_and_token(browser: Browser, page: str, run: Path) -> None:
    line = _dumped(run, 11, 3)
    browser.open(page + "#step=11&row=3&quantity=log_ratio&token=1")
    assert browser.run("document.querySelector('[aria-selected=true]').dataset.row") == "3"
    values = browser.run("[...document.querySelectorAll('.toolbar select')].map((s) => s.value)")
    assert values == ["11", "log_ratio", "all", "group", "step"]
    assert browser.run("document.querySelectorAll('.tok[data-t]').length") == len(line["pieces"])
    assert browser.run("document.querySelector('.tip').hidden") is False
    shown = browser.run(
        "Object.fromEntries([...document.querySelectorAll('.tip dt')]"
        ".map((t) => [t.textContent, t.nextSibling.textContent]))"
    )
    assert set(shown) == set(line["quantities"])
    for name, text in shown.items():
        assert float(text.replace("−", "-")) == pytest.approx(line["quantities"][name][1], rel=1e-3), name


def test_sign_color_and_mask_of_each_token(browser: Browser, page: str, run: Path) -> None:
    line = _dumped(run, 11, 3)
    browser.open(page + "#step=11&row=3&quantity=log_ratio")
    kinds = browser.run(
        "[...document.querySelectorAll('.tok[data-t]')].map((t) => ['above', 'below', 'masked', 'unknown']"
        ".filter((k) => t.classList.contains(k)).join())"
    )
    expected = [
        "masked" if not m else "below" if v < 0 else "above"
        for m, v in zip(line["mask"], line["quantities"]["log_ratio"], strict=True)
    ]
    assert kinds == expected
    assert "masked" in kinds
    shares = browser.run(
        "[...document.querySelectorAll('.tok[data-t]')]"
        ".map((t) => parseFloat(t.style.getPropertyValue('--share')) || 0)"
    )
    sizes = [abs(v) if m else 0 for m, v in zip(line["mask"], line["quantities"]["log_ratio"], strict=True)]
    assert shares.index(max(shares)) == sizes.index(max(sizes))


def test_filter_by_reward_and_order(browser: Browser, page: str) -> None:
    browser.open(page + "#step=16&reward=1&sort=long")
    rows = "[...document.querySelectorAll('.row')].map((r) => r.textContent)"
    texts = browser.run(rows)
    assert texts
    assert all(text.startswith("reward 1") for text in texts)
    lengths = [int(text.split(" · ")[-1].split()[0]) for text in texts]
    assert lengths == sorted(lengths, reverse=True)
    change = (
        "(() => { const s = document.querySelector('select[name=reward]'); s.value = 'all';"
        " s.dispatchEvent(new Event('change')); return location.hash; })()"
    )
    assert "reward" not in browser.run(change)
    assert len(browser.run(rows)) == 12


def test_keyboard_reaches_responses_tokens_and_charts(browser: Browser, page: str) -> None:
    browser.open(page + "#step=11&row=3&quantity=entropy")
    browser.run("document.querySelector('[aria-selected=true]').focus()")
    browser.press("ArrowDown")
    assert browser.run("document.activeElement.dataset.row") == "4"
    assert "row=4" in browser.run("location.hash")
    browser.run("document.querySelector('.tok[data-t]').focus()")
    browser.press("ArrowRight", "ArrowRight")
    assert browser.run("document.activeElement.dataset.t") == "2"
    assert "token 2" in browser.run("document.querySelector('.tip').textContent")
    browser.press("Enter")
    assert "token=2" in browser.run("location.hash")
    browser.run("document.querySelector('[data-key=reward] svg').focus()")
    browser.press("Home", "ArrowRight")
    at = browser.run("[...document.querySelectorAll('.readout .at')].map((e) => e.textContent)")
    assert set(at) == {"step 2"}


def test_pointer_reads_numbers_off(browser: Browser, page: str) -> None:
    browser.open(page + "#step=11&row=3&quantity=entropy")
    browser.run("document.querySelector('.tok[data-t=\"5\"]').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = browser.run("document.querySelector('.tok[data-t=\"5\"]').getBoundingClientRect().toJSON()")
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    assert "token 5" in browser.run("document.querySelector('.tip').textContent")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.run("document.querySelector('.tip').hidden") is True


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
          const style = getComputedStyle(document.documentElement);
          const value = (name) => paint(style.getPropertyValue(name).trim());
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
    rows = (json.dumps(line | {"row": i}) for i in range(300))
    (run / "tokens.jsonl").write_text("\n".join(rows), encoding="utf-8")
    train = (json.dumps({"step": s, "kind": "train", "reward": s % 7}) for s in range(1, 3000))
    (run / "metrics.jsonl").write_text("\n".join(train), encoding="utf-8")
    browser.open(write_report(run).as_uri())
    assert "240 of 300 dumped responses" in browser.run("document.querySelector('#tokens').textContent")
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
