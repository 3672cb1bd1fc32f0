"""FIM-SE: every cut of every text comes back, hints are blanked by quarters, completions are checked."""

from __future__ import annotations

import pytest

from tokenloom.draw import law_of
from tokenloom.methods.decoding.fim_se import Hole, Markers, filled, prompt_text, training_text, whole_lines

M = Markers("<P>", "<S>", "<L>", "<E>", "<M>", "<T>")
TEXTS = ["ab\ncd\nef", "one line", "\n\n", "x\n", "\ny", "a\nb"]


@pytest.mark.parametrize("text", TEXTS)
def test_whole_lines_join_to_the_text_for_every_cut(text: str) -> None:
    for low in range(len(text) + 1):
        for high in range(low, len(text) + 1):
            hole = whole_lines(text[:low], text[high:])
            completion = hole.start + text[low:high] + hole.end
            assert filled(hole, completion) == text
            assert hole.before == "" or hole.before.endswith("\n")
            assert "\n" not in hole.start
            assert "\n" not in hole.end[:-1]
            assert hole.after == "" or hole.end.endswith("\n")


def test_the_worked_format() -> None:
    hole = whole_lines("def f():\n    retu", " x\nprint()\n")
    assert hole == Hole("def f():\n", "    retu", " x\n", "print()\n")
    assert prompt_text(hole, M) == "<P>def f():\n<S>print()\n<L>    retu<E> x\n<M>"
    assert filled(hole, "    return x\n") == "def f():\n    return x\nprint()\n"
    assert filled(hole, "    return y\n") is None
    assert filled(hole, "return x\n") is None
    assert filled(Hole("", "aa", "aa", ""), "aaa") is None, "the hints may not overlap"
    assert filled(Hole("p\n", "", "", "s"), "anything\n") == "p\nanything\ns"


def test_training_texts_by_enumeration() -> None:
    text = "ab\ncd"
    law = law_of(lambda draw: training_text(text, draw, M, rate=0.9))
    assert sum(law.values()) == pytest.approx(1.0)
    assert law[text + "<T>"] == pytest.approx(0.1, abs=1e-12)
    shown: dict[tuple[bool, bool], float] = {}
    for trained, mass in law.items():
        if trained == text + "<T>":
            continue
        assert trained.endswith("<T>")
        before, rest = trained.removeprefix("<P>").split("<S>")
        after, rest = rest.split("<L>")
        start, rest = rest.split("<E>")
        end, rest = rest.split("<M>")
        completion = rest.removesuffix("<T>")
        assert before + completion + after == text
        assert completion.startswith(start)
        assert completion.endswith(end)
        shown[bool(start), bool(end)] = shown.get((bool(start), bool(end)), 0.0) + mass
    # Cut inside both lines (low in {1, 2}, high in {3, 4}): 4 of the 15 pairs give two hints that can be blanked.
    assert shown[True, True] >= 0.9 * 4 / 15 / 4 - 1e-12
    one = law_of(lambda draw: training_text("abcd", draw, M, rate=1.0))
    only = "<P><S><L>a<E>d<M>abcd<T>"
    assert one[only] == pytest.approx(1 / 10 / 4, abs=1e-12), "one of 10 pairs of places, one of 4 blankings"


def test_texts_that_are_not_cut() -> None:
    for text in ("", "x", "with <M> inside"):
        assert law_of(lambda draw, text=text: training_text(text, draw, M, rate=1.0)) == {text + "<T>": 1.0}  # type: ignore[misc]


def test_markers_must_differ() -> None:
    with pytest.raises(ValueError, match="differ"):
        Markers(end="<fim_stop>")
    with pytest.raises(ValueError, match="differ"):
        Markers(start="")
