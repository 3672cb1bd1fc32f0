"""FIM-SE: fill in the middle of a text by whole lines, with the line's start and end as hints (arXiv 2405.17103).

A text is cut at two characters into prefix, middle, suffix. L is what follows the prefix's last newline, R_pre the rest
with the newline; F is the suffix up to its first newline, inclusive, R_suf the rest. Training text:
    PRE R_pre SUF R_suf START L END F MID L middle F EOT
with the hints blanked at random: both, only L, only F, none, each 1/4; the completion always has L and F. A completion
is taken if it starts with L and ends with F. No token boundary falls inside L or F, as whole lines are written anew.
Deviations: the released helper appends a newline to both rests, which changes text of a single line, and lets END be
the end-of-text token; here R_pre + L + middle + F + R_suf is the text for every cut, and the markers differ.
Fidelity: code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenloom.catalog import part
from tokenloom.draw import Draw

_PAPER = "arXiv:2405.17103"
RATE = 0.9
"""Share of training texts that are cut at all."""


@dataclass(frozen=True)
class Hole:
    """Text around a hole, cut at whole lines: `before` + `start` + middle + `end` + `after` is the text."""

    before: str
    start: str
    end: str
    after: str


@dataclass(frozen=True)
class Markers:
    """The control tokens of the format, as text; all different.

    Raises:
        ValueError: for two that are the same, or an empty one.
    """

    prefix: str = "<fim_prefix>"
    suffix: str = "<fim_suffix>"
    start: str = "<fim_start>"
    end: str = "<fim_end>"
    middle: str = "<fim_middle>"
    stop: str = "<fim_stop>"

    def __post_init__(self) -> None:
        if len(set(self.all)) < len(self.all) or not all(self.all):
            raise ValueError(f"fim-se: the markers must all differ and none be empty, got {self.all}")

    @property
    def all(self) -> tuple[str, ...]:
        """In order of appearance."""
        return (self.prefix, self.suffix, self.start, self.end, self.middle, self.stop)


@part("fim-se", stage="bytes", scope="row", paper=_PAPER)
def whole_lines(prefix: str, suffix: str) -> Hole:
    """The hole between `prefix` and `suffix`, widened to whole lines."""
    line = prefix.rfind("\n") + 1
    newline = suffix.find("\n") + 1 or len(suffix)
    return Hole(prefix[:line], prefix[line:], suffix[:newline], suffix[newline:])


@part("fim-se/prompt", stage="bytes", scope="row", paper=_PAPER)
def prompt_text(hole: Hole, markers: Markers) -> str:
    """What the model reads before it writes the middle."""
    m = markers
    return f"{m.prefix}{hole.before}{m.suffix}{hole.after}{m.start}{hole.start}{m.end}{hole.end}{m.middle}"


@part("fim-se/training", stage="bytes", scope="row", paper=_PAPER)
def training_text(text: str, draw: Draw, markers: Markers, *, rate: float = RATE) -> str:
    """A training text, of which all tokens count: cut with probability `rate`, at two different places.

    A text of fewer than two characters has no two places besides its ends and stays as it is, like one that contains
    a marker's text.
    """
    if len(text) < 2 or any(marker in text for marker in markers.all) or not draw.bernoulli(rate):
        return text + markers.stop
    places = torch.ones(len(text) + 1, dtype=torch.float64)
    one = draw.categorical(places)
    places[one] = 0.0
    low, high = sorted((one, draw.categorical(places)))
    hole = whole_lines(text[:low], text[high:])
    blank = draw.categorical(torch.ones(4))
    shown = Hole(hole.before, "" if blank in (0, 1) else hole.start, "" if blank in (0, 2) else hole.end, hole.after)
    return prompt_text(shown, markers) + hole.start + text[low:high] + hole.end + markers.stop


@part("fim-se/check", stage="bytes", scope="row", paper=_PAPER)
def filled(hole: Hole, completion: str) -> str | None:
    """The whole text with `completion` in the hole, or None where it breaks the hints.

    The hints may not overlap in the completion.
    """
    long_enough = len(completion) >= len(hole.start) + len(hole.end)
    if not long_enough or not completion.startswith(hole.start) or not completion.endswith(hole.end):
        return None
    return hole.before + completion + hole.after
