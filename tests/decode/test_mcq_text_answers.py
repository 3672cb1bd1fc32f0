"""Answers in texts, and perturbations that keep what a question asks."""

from __future__ import annotations

import pytest

from tokenloom.decode.mcq_text_answers import (
    NO_OPTION,
    Question,
    swapped_words,
    text_answer,
    typos,
    with_options,
)
from tokenloom.draw import law_of

QUESTION = Question("Which is a prime?", ("12", "12 apples", "seven", "8"), truth=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C", 2),
        ("The answer is (B).", 1),
        ("It must be seven, clearly.", 2),
        ("SEVEN", 2),
        ("I see 12 apples there.", 1),
        ("12 or 8", NO_OPTION),
        ("no idea", NO_OPTION),
        ("I'm sorry, I cannot answer that. A", NO_OPTION),
        ("I can\u2019t say that C", NO_OPTION),
        ("128", NO_OPTION),
        ("", NO_OPTION),
        ("E", NO_OPTION),
    ],
)
def test_answers_in_texts(text: str, expected: int) -> None:
    assert text_answer(text, QUESTION) == expected


def test_orders_move_contents_and_not_letters() -> None:
    order = [3, 2, 1, 0]
    assert QUESTION.render(order) == "Which is a prime?\nA. 8\nB. seven\nC. 12 apples\nD. 12\nAnswer:"
    assert text_answer("seven", QUESTION, order) == 1
    assert text_answer("C", QUESTION, order) == 2


def test_other_letters() -> None:
    question = Question("?", ("yes", "no"), letters="XY")
    assert question.render(tail="").startswith("?\nX. yes\nY. no")
    assert text_answer("Y", question) == 1
    assert text_answer("B", question) == NO_OPTION


def test_typos_swap_neighboring_letters_with_their_rate() -> None:
    question = Question("ab c", ("1", "2"))
    assert law_of(lambda draw: typos(question, draw, rate=0.25).text) == pytest.approx({"ab c": 0.75, "ba c": 0.25})
    assert typos(question, _Never(), rate=0.0) == question


class _Never:
    def bernoulli(self, a: float) -> bool:
        return False

    def categorical(self, p: object) -> int:
        raise AssertionError


def test_words_change_places() -> None:
    question = Question("a b c", ("1", "2"), truth=1)
    assert law_of(lambda draw: swapped_words(question, draw).text) == pytest.approx({"b a c": 0.5, "a c b": 0.5})
    one = Question("a", ("1", "2"))
    assert law_of(lambda draw: swapped_words(one, draw).text) == {"a": 1.0}


def test_options_are_added_behind() -> None:
    more = with_options(QUESTION, "I don't know", "None of the above")
    assert more.options[-2:] == ("I don't know", "None of the above")
    assert more.truth == 2
    assert text_answer("None of the above", more) == 5


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="options that differ"):
        Question("?", ("same", "same"))
    with pytest.raises(ValueError, match="more letters"):
        Question("?", ("1", "2", "3"), letters="AB")
