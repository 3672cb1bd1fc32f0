"""The page: self-contained and safe with hostile names; in a browser, it sorts, switches and highlights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.test_results import record
from report import browser
from tokenloom.lab.bench import Plan, _payload
from tokenloom.lab.leaderboard import render, write
from tokenloom.lab.results import FIGURES, summarize

HOSTILE = '</script><img src=x onerror="document.title=1">&{{data}}'


def payload(hostile: str = "") -> dict[str, Any]:
    """Three methods on two families, one more on a transformer, and one that was not run."""
    records = [
        record(m, f, s, gradient={"cosine": c - 0.01 * s, "noise": 100 / c, "bias": 1 - c},
               learning={"samples_needed": None if m == "grpo" and f == "conflict" else 100 * c})
        for m, c in (("rloo", 0.9), ("grpo", 0.5), ("dapo", 0.2)) for f in ("spurious", "conflict") for s in (0, 1)
    ]  # fmt: skip
    records += [record("rloo", "spurious", 0, kind="transformer")]
    done = summarize(records)
    done["not_run"] = [{"method": "vapo", "family": "x", "status": "failed", "reason": f"broken {hostile}"}]
    return _payload(Plan(seeds=2), records, done)


def test_everything_is_inside_and_nothing_is_markup() -> None:
    page = render(payload(HOSTILE))
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page)
    assert page.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    assert json.loads(data.group(1))["summary"]["not_run"][0]["reason"] == f"broken {HOSTILE}"
    assert "default-src 'none'" in page


def test_the_page_replaces_an_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text("old", encoding="utf-8")
    assert write(payload(), path) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(payload(HOSTILE), tmp_path_factory.mktemp("lab") / "index.html").as_uri()


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Browser]:
    with browser.Browser() as opened:
        yield opened


needs_browser = [pytest.mark.browser, pytest.mark.skipif(not browser.AVAILABLE, reason=browser.REASON)]
METHODS = "[...document.querySelectorAll('#board tbody label span')].map((s) => s.textContent)"


def choose(tab: browser.Browser, name: str, value: str) -> None:
    """Set a select of the page as a user does."""
    tab.run(f"""
        {{ const box = document.querySelector('[name={name}]');
           box.value = '{value}';
           box.dispatchEvent(new Event('change')); }}""")


# The lowest contrast of any text with the page, as WCAG defines it.
CONTRAST = """
    (() => {
      const channel = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => channel(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const back = light(getComputedStyle(document.body).backgroundColor);
      const texts = [...document.querySelectorAll('main *')].filter((e) => e.innerText);
      const each = texts.map((e) => light(getComputedStyle(e).color));
      return Math.min(...each.map((l) => (Math.max(l, back) + 0.05) / (Math.min(l, back) + 0.05)));
    })()"""


class TestInABrowser:
    pytestmark = needs_browser

    def test_it_shows_every_method_and_figure_and_asks_for_nothing(self, page: str, tab: browser.Browser) -> None:
        tab.open(page)
        assert tab.run(METHODS) == ["dapo", "grpo", "rloo"]
        headings = tab.run("[...document.querySelectorAll('#board thead th')].map((h) => h.textContent)")
        assert headings == ["method", *(f.label for f in FIGURES)]
        text = tab.run("document.body.innerText")
        assert HOSTILE in text
        assert "reached by 50 %" in text
        assert tab.run("document.title") == "Tokenloom laboratory"
        assert tab.problems == []

    def test_headings_sort_both_ways_and_by_keyboard(self, page: str, tab: browser.Browser) -> None:
        tab.open(page)
        tab.run("document.querySelector('[data-sort=cosine]').click()")
        assert tab.run(METHODS) == ["rloo", "grpo", "dapo"]
        assert tab.run("document.querySelector('[data-sort=cosine]').parentNode.ariaSort") == "descending"
        # The focus stays on the heading, so that the same key sorts the other way.
        tab.run("document.querySelector('[data-sort=cosine]').focus()")
        tab.run("document.activeElement.click()")
        assert tab.run("document.activeElement.dataset.sort") == "cosine"
        assert tab.run(METHODS) == ["dapo", "grpo", "rloo"]
        tab.run("document.querySelector('[data-sort=method]').click()")
        assert tab.run(METHODS) == ["dapo", "grpo", "rloo"]
        assert tab.problems == []

    def test_choosing_a_family_a_policy_and_methods(self, page: str, tab: browser.Browser) -> None:
        tab.open(page)
        choose(tab, "family", "conflict")
        assert "reached by 50 %" not in tab.run("document.body.innerText")
        assert "reached by 0 %" in tab.run("document.body.innerText")
        tab.run("document.querySelector('[data-method=dapo]').click()")
        assert tab.run("document.querySelectorAll('#curves > svg .line').length") == 1
        assert tab.run("document.querySelectorAll('#scatter .mark').length") == 1
        assert tab.run("document.querySelector('#scatter .name').textContent") == "dapo"
        tab.run("document.querySelector('#scatter .dot').dispatchEvent(new Event('pointerenter'))")
        assert "samples to 95 %" in tab.run("document.querySelector('#scatter .readout').textContent")
        choose(tab, "figure", "noise")
        assert tab.run("document.querySelectorAll('#by-family tbody td').length") == 6
        assert "family=conflict" in tab.run("location.hash")
        tab.open(page + tab.run("location.hash"))
        assert tab.run("document.querySelector('[name=family]').value") == "conflict"
        assert tab.run("document.querySelector('[data-method=dapo]').checked") is True
        choose(tab, "kind", "transformer")
        assert tab.run(METHODS) == ["rloo"]
        assert tab.problems == []

    @pytest.mark.parametrize("dark", [False, True])
    def test_it_fits_a_phone_and_text_stays_legible(self, page: str, tab: browser.Browser, dark: bool) -> None:
        tab.open(page, width=390, dark=dark)
        assert tab.run("document.documentElement.scrollWidth") == 390
        assert tab.run(CONTRAST) > 4.5
        assert tab.problems == []
