"""Multiple choice by text and by first token: questions as data, perturbations, and the answer in a text.

question = Question("Which is a prime?", ("4", "6", "7", "8"), truth=2)
question.render()                                       # text with "A. 4" ... in any order
text_answer("It must be C.", question)                  # 2
moved = typos(question, draw, rate=0.05)                # and swapped_words, with_options, render(order), other letters
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenloom.draw import Draw
from tokenloom.tasks.verifiers.choice import pick

NO_OPTION = -1
"""A refusal, or a text in which no option can be found."""

_REFUSAL = re.compile(
    r"\b(?:i (?:can ?not|(?:can|won)['\u2019]t|am (?:unable|not able))|i['\u2019]m (?:sorry|unable|not able))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Question:
    """A question with its options; `truth` is the number of the right content."""

    text: str
    options: tuple[str, ...]
    truth: int | None = None
    letters: str = "ABCDEFGHIJ"

    def __post_init__(self) -> None:
        """Raises ValueError for fewer than two options, equal ones, or too few letters."""
        if not 2 <= len(self.options) <= len(self.letters) or len(set(self.options)) < len(self.options):
            raise ValueError(
                f"a question needs 2 to {len(self.letters)} options that differ, got {self.options}; give more letters"
            )

    def render(self, order: Sequence[int] | None = None, *, tail: str = "Answer:") -> str:
        """Text with one option a line; `order` says which content stands under each letter."""
        shown = range(len(self.options)) if order is None else order
        lines = [f"{letter}. {self.options[i]}" for letter, i in zip(self.letters, shown, strict=False)]
        return "\n".join([self.text, *lines, tail])


def text_answer(text: str, question: Question, order: Sequence[int] | None = None) -> int:
    """The number, as shown in `order`, of the option that a response settles on, or `NO_OPTION`.

    A refusal comes first; then a letter, as the verifier `choice` reads it; then the only option whose text occurs.
    """
    if _REFUSAL.search(text):
        return NO_OPTION
    n = len(question.options)
    letter = pick(text, question.letters[:n])
    if letter is not None:
        return question.letters[:n].upper().index(letter)
    shown = range(n) if order is None else order
    said = [place for place, i in enumerate(shown) if _says(text, question.options[i])]
    # "12" is also said where "12 apples" is: the longer option then is what is meant.
    longest = [p for p in said if not any(_inside(question, shown[p], shown[q]) for q in said if q != p)]
    return longest[0] if len(longest) == 1 else NO_OPTION


def typos(question: Question, draw: Draw, *, rate: float = 0.05) -> Question:
    """Each letter of the question's text is swapped with the next one with probability `rate`, if that is a letter."""
    chars = list(question.text)
    i = 0
    while i + 1 < len(chars):
        swaps = chars[i].isalpha() and chars[i + 1].isalpha() and draw.bernoulli(rate)
        if swaps:
            chars[i], chars[i + 1] = chars[i + 1], chars[i]
        i += 2 if swaps else 1
    return dataclasses.replace(question, text="".join(chars))


def swapped_words(question: Question, draw: Draw, *, swaps: int = 1) -> Question:
    """`swaps` times, two neighboring words of the question's text change places."""
    words = question.text.split(" ")
    for _ in range(swaps if len(words) > 1 else 0):
        i = draw.categorical(torch.ones(len(words) - 1))
        words[i], words[i + 1] = words[i + 1], words[i]
    return dataclasses.replace(question, text=" ".join(words))


def with_options(question: Question, *added: str) -> Question:
    """More options at the end, such as "I don't know" and "None of the above"; the truth stays what it was."""
    return dataclasses.replace(question, options=(*question.options, *added))


def _says(text: str, option: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text, re.IGNORECASE) is not None


def _inside(question: Question, short: int, long: int) -> bool:
    one, other = question.options[short], question.options[long]
    return len(one) < len(other) and _says(other, one)
