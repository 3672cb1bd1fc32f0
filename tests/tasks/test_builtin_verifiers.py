"""What each built-in verifier takes for the answer, as tables."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenloom.tasks import Item
from tokenloom.tasks.verifiers import check, load
from tokenloom.tasks.verifiers.choice import pick
from tokenloom.tasks.verifiers.gym import extracted
from tokenloom.tasks.verifiers.number import last_number, value_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", "7"),
        ("The answer is 7.", "7"),
        ("1 + 2 = 3\n\n", "3"),
        ("x = -3", "-3"),
        ("(-3)", "-3"),
        ("\u22123", "-3"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("5 - -2", "-2"),
        ("+5", "5"),
        ("- 5", "5"),
        ("1,234", "1234"),
        ("$1,234,567.80", "1234567.80"),
        ("-$5", "-5"),
        ("1,2345", "2345"),
        ("1, 2, 3", "3"),
        ("50%", "50"),
        (".5", ".5"),
        ("3.14.", "3.14"),
        ("v1.2.3", "3"),
        ("3/4", "3/4"),
        ("-3/4 of it", "-3/4"),
        ("on 12/25/2024", "2024"),
        ("1e3", "1e3"),
        ("\\boxed{42}", "42"),
        ("42 apples, then 6", "6"),
        ("\u0663", None),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("7.0", "7", 1),
        ("007", 7, 1),
        ("1,000", "1000", 1),
        ("0.75", "3/4", 1),
        ("2/6", "1/3", 1),
        ("1e3", 1000, 1),
        ("-7", "7", 0),
        ("17", "7", 0),
        ("7 or 8", "7", 0),
        ("1/0", "1", 0),
        ("so it is 72", "3 * 24 = 72\n#### 72", 1),
        ("9" * 10_000, "9" * 10_000, 1),
        ("9" * 10_000, "9" * 9_999, 0),
        ("", "7", 0),
    ],
)
def test_number(response: str, answer: object, reward: float) -> None:
    assert load("number")(response, Item(prompt="q", answer=answer))[0] == reward


def test_number_tolerance_and_missing_answer() -> None:
    number = load("number")
    assert number("0.333", Item(prompt="q", answer="1/3"))[0] == 0
    assert number("0.333", Item(prompt="q", answer="1/3"), tolerance=0.001)[0] == 1
    with pytest.raises(ValueError, match="holds no number"):
        number("3", Item(prompt="q", answer="three"))


@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc \n=:,.!?", max_size=20))
def test_any_integer_is_found_after_any_words(value: int, words: str) -> None:
    for written in (str(value), f"{value:,}", f"{value}.", f"**{value}**"):
        found = last_number(f"{words} {written}")
        assert found is not None
        assert value_of(found) == value


@given(st.text(max_size=200))
def test_in_process_verifiers_never_raise_on_responses(response: str) -> None:
    assert load("number")(response, Item(prompt="q", answer="1"))[0] in (0, 1)
    assert load("choice")(response, Item(prompt="q", answer="A"))[0] in (0, 1)
    assert load("exact")(response, Item(prompt="q", answer=response)) == (1.0, response.strip())


@pytest.mark.parametrize(
    "hostile",
    [
        "1,",
        "1/",
        "9",
        "111,",
        "-",
        "answer ",
        " ",
        "1e1",
        "answer is \\boxed{",
        "(A",
        ".",
        "$",
        "answer: ",
        "9.",
        "A [",
    ],
)
def test_in_process_verifiers_are_linear(hostile: str) -> None:
    # They run without a process around them, so no text may make them slow: a quadratic scan of
    # 200,000 characters takes minutes, a linear one milliseconds.
    text = hostile * (200_000 // len(hostile)) + "/x"
    start = time.perf_counter()
    last_number(text)
    pick(text)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(c)", "C"),
        ("c.", "C"),
        ("**B**", "B"),
        ("The answer is B because A is wrong", "B"),
        ("Answer: (D)", "D"),
        ("The correct answer is: **B**", "B"),
        ("\\boxed{C}", "C"),
        ("the answer is \\boxed{\\text{C}}", "C"),
        ("A. Paris", "A"),
        ("C) yes\nbecause A fails", "C"),
        ("Option A is wrong, so (B)", "B"),
        ("I think it must be D", "D"),
        ("A dog is an animal", None),
        ("F", None),
        ("Because", None),
        ("", None),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    assert pick(text) == letter


def test_choice_letters() -> None:
    choice = load("choice")
    assert choice("G", Item(prompt="q", answer="(G)"), letters="ABCDEFG") == (1.0, "G")
    with pytest.raises(ValueError, match="holds none of the letters ABCDE"):
        choice("G", Item(prompt="q", answer="G"))


@pytest.mark.parametrize(
    ("response", "answer", "params", "expected"),
    [
        (" yes\n", "yes", {}, (1.0, "yes")),
        ("Yes", "yes", {}, (0.0, "Yes")),
        ("Yes", "yes", {"case_sensitive": False}, (1.0, "Yes")),
        ("a\nb", "a\nb", {}, (1.0, "a\nb")),
        ("\u00fc\U0001f600", "\u00fc\U0001f600", {}, (1.0, "\u00fc\U0001f600")),
        (" a", "a", {"strip": False}, (0.0, " a")),
        ("3", 3, {}, (1.0, "3")),
    ],
)
def test_exact(response: str, answer: object, params: dict[str, bool], expected: tuple[float, str]) -> None:
    assert load("exact")(response, Item(prompt="q", answer=answer), **params) == expected


@pytest.mark.parametrize(
    ("response", "params", "expected"),
    [
        ("a=1 a=2", {"pattern": r"a=(\d)"}, (1.0, "2")),
        ("a=1 a=2", {"pattern": r"a=(\d)", "last": False}, (0.0, "1")),
        ("a=1 a=2", {"pattern": r"\d"}, (1.0, "2")),
        ("A=2", {"pattern": r"(a)=(\d)", "group": 2, "ignore_case": True}, (1.0, "2")),
        ("none", {"pattern": r"a=(\d)"}, (0.0, None)),
    ],
)
def test_regex(response: str, params: dict[str, object], expected: tuple[float, str | None]) -> None:
    assert load("regex")(response, Item(prompt="q", answer="2"), **params) == expected


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("So $\\frac{1}{2}$.", "0.5", 1),
        ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", 1),
        ("the answer is 1/2", "1/2", 1),
        ("$x^2 + 2x + 1$", "(x+1)^2", 1),
        ("\\boxed{3}", "4", 0),
        ("no idea", "4", 0),
    ],
)
def test_math(response: str, answer: str, reward: float) -> None:
    assert load("math")(response, Item(prompt="q", answer=answer))[0] == reward


def test_math_sets_no_alarm() -> None:
    # math-verify's own time limit works in a main thread only; it must be off, the pool keeps the time.
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(load("math"), "$2$", Item(prompt="q", answer="2")).result() == (1.0, "2")


@pytest.mark.parametrize(
    ("name", "params", "response", "answer"),
    [
        ("exact", {}, " yes\n", "yes"),
        ("number", {}, "it is 1,000.", "1000"),
        ("number", {}, "no idea", None),
        ("choice", {}, "Answer: (D)", "D"),
        ("regex", {"pattern": r"a=(\S+)"}, "a=1 a=None", "None"),
        ("regex", {"pattern": r"a=(\S+)"}, "b", None),
        ("math", {}, "so $\\frac{1}{2}$", "\\frac{1}{2}"),
        ("math", {}, "no idea", None),
    ],
)
def test_an_item_without_a_label_earns_nothing_and_is_parsed(
    name: str, params: dict[str, str], response: str, answer: str | None
) -> None:
    assert load(name)(response, Item(prompt="q"), **params) == (0.0, answer)


@pytest.mark.parametrize(
    ("response", "extract", "found"),
    [
        ("so <answer> 3 </answer> or <answer>4</answer>", "tag", "4"),
        (" 3\n", "tag", "3"),
        ("<answer>3</answer>", "response", "<answer>3</answer>"),
        ("first\n\n last \n\n", "last_line", "last"),
        (" \n", "last_line", None),
        ("it is 1,000.", "number", "1000"),
    ],
)
def test_reasoning_gym_extraction(response: str, extract: str, found: str | None) -> None:
    assert extracted(response, extract) == found


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("numbr", {}, "unknown verifier 'numbr'; did you mean 'number'"),
        ("number", {"tolerence": 1}, "did you mean 'tolerance'"),
        ("number", {"tolerance": "a"}, "must be float, got 'a'"),
        ("exact", {"strip": 1}, "must be bool, got 1"),
        ("regex", {}, "cannot be called"),
        ("regex", {"pattern": "("}, "not a regular expression"),
        ("reasoning_gym", {"extract": "numbers"}, "did you mean 'number'"),
        ("missing.py:f", {}, "there is no file 'missing.py'"),
        ("a b:f", {}, "neither a module name"),
        ("module:", {}, "not an import path"),
    ],
)
def test_mistakes_are_named(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(name, params)
