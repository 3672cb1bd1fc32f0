"""The pictures of docs/report.md, drawn anew: `PYTHONPATH=src:tests python tests/report/screenshots.py docs/assets`.

They show a made-up run, so that they change when the page does and not with a model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from report.browser import Browser
from report.make_batch import store_batches
from report.make_run import make_run
from tokenloom.report import write_report

VIEWS: dict[str, tuple[str, str, int, int, bool]] = {
    "responses": ("tokens", "#step=11&row=1&quantity=log_ratio&token=6", 1180, 820, False),
    "compare": ("tokens", "#step=11&row=1&quantity=coefficient&against=2&token=6", 1180, 820, True),
    "tree": ("tokens", "#step=11&row=3&quantity=entropy&view=tree", 1180, 700, False),
    "curves": ("curves", "#theme=light", 1180, 900, False),
    "phone": ("tokens", "#step=11&row=3&quantity=log_ratio&token=5", 390, 844, True),
}


def take(folder: Path) -> None:
    """Write one PNG for each main view into `folder`."""
    with tempfile.TemporaryDirectory() as made, Browser() as browser:
        run = store_batches(make_run(Path(made) / "quickstart-001", algorithm="dapo"))
        page = write_report(run, compare=["gspo", "reinforce", "ppo-gae"]).as_uri()
        for name, (section, link, width, height, dark) in VIEWS.items():
            browser.open(page + link, width=width, height=height, dark=dark)
            browser.run(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
            browser.run("new Promise((done) => setTimeout(done, 200))")
            browser.screenshot(folder / f"report-{name}.png", whole=False)


if __name__ == "__main__":
    take(Path(sys.argv[1]))
