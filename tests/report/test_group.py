"""A dumped group on the terminal and in a notebook: values, signs, escaping, and errors that say what there is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from report.make_batch import store_batches
from report.make_run import HOSTILE, make_run
from tokenloom.report import token_group
from tokenloom.report.group import ColoredRow, TokenGroup, hex_color
from tokenloom.report.token_terminal import print_group


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_batches(make_run(tmp_path_factory.mktemp("group") / "run", steps=6, algorithm="dapo"))


def _made(values: tuple[float | None, ...], sampled: tuple[bool, ...]) -> TokenGroup:
    row = ColoredRow("as trained", 3, 1.0, ("The", " sum", "\n", " is"), sampled, values)
    return TokenGroup(5, 0, 2, "What is 1 + 1?", "advantage", (row,), 2.0, 2.0)


def _printed(group: TokenGroup, *, color: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=60, color_system="truecolor" if color else None, force_terminal=color, no_color=not color
    )
    print_group(group, console)
    return out.getvalue()


def test_marks_stand_under_their_tokens() -> None:
    lines = _printed(_made((2.0, -1.0, None, 0.001), (True, True, True, True))).splitlines()
    assert lines[0] == "What is 1 + 1?"
    assert "row 3 · reward 1 · 4 tokens" in lines
    assert lines[-2:] == ["The  sum \\n  is ", "+9  -4   ?  +1  "]
    assert _printed(_made((0.0, 0.0, 0.0, 0.0), (True, False, True, True))).splitlines()[-1] == "0   x    0  0   "


def test_color_says_size_and_underline_says_sign() -> None:
    text = _printed(_made((2.0, -2.0, None, 0.0), (True, True, True, True)), color=True)
    assert "48;2;245;156;66" in text
    assert "\x1b[4;30;48;2;90;165;232m sum" in text
    assert (hex_color(0.0), hex_color(1.0), hex_color(-1.0)) == ("#ffffff", "#f59c42", "#5aa5e8")


def test_the_widest_group_of_the_last_step_is_shown(run: Path) -> None:
    group = token_group(run)
    assert group.step == 6
    assert group.groups == 3
    assert len(group.rows) == 4
    rewards = {r.reward for r in group.rows}
    assert rewards == {0.0, 1.0} or all(len({r.reward for r in token_group(run, prompt=i).rows}) == 1 for i in range(3))
    assert token_group(run, step=3, prompt=1, quantity="entropy").rows[0].row == 4


def test_comparison_puts_the_answers_of_both_side_by_side(run: Path) -> None:
    group = token_group(run, quantity="coefficient", compare=["reinforce"])
    names = [(r.row, r.algorithm) for r in group.rows]
    first = group.rows[0].row
    assert names[:2] == [(first, "as trained"), (first, "reinforce")]
    assert len(names) == 8
    assert "reinforce" in _printed(group)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"step": 99}, "no token dump of step 99; dumped: 1, 2, 3, 4, 5, 6"),
        ({"prompt": 7}, "no prompt 7 at step 6; there are 0 to 2"),
        ({"quantity": "luck"}, "unknown quantity 'luck'; this dump has advantage, coefficient"),
        ({"quantity": "entropy", "compare": ["dapo"]}, "does not depend on the algorithm"),
        ({"compare": ["ppo-gae"]}, "ppo-gae cannot be shown: it needs old_values"),
    ],
)
def test_errors_say_what_there_is(run: Path, wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        token_group(run, **wrong)  # type: ignore[arg-type]


def test_no_dump(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    (folder / "tokens.jsonl").unlink()
    with pytest.raises(ValueError, match=r"log\.tokens_every"):
        token_group(folder)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    group = token_group(make_run(tmp_path / "run", steps=1, hostile=True), step=1, prompt=0)
    assert HOSTILE in group.rows[0].pieces
    html = group._repr_html_()
    assert "<script" not in html
    assert "<img" not in html
    for char in ("\u202e", "\x00", "\x1b", "\ud800"):
        assert char not in html
        assert char not in _printed(group)
    assert 'title="advantage ' in html
    html.encode("utf-8")
