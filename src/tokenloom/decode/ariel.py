"""AriEL with a model: texts to codes in a box, and a loop that decodes codes under `generate`.

    code = encode(model, prompt_ids, ids)
    model.generate(**inputs, custom_generate=decode.loop("ariel", codes=[code]))     # gives `ids` again

Both read the model token by token, one text at a time, since a code is only as good as the laws are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.session import open_session
from tokenloom.methods.decoding.ariel import center, decoded_token, fractions, interval, narrowed, volume, whole_box


@dataclass(frozen=True)
class Code:
    """The center of a text's box, exact, and the box's volume: the text's probability."""

    center: tuple[Fraction, ...]
    volume: Fraction

    def floats(self) -> list[float]:
        """The center as floats: enough for texts of about 50 bits on each axis."""
        return [float(z) for z in self.center]


def encode(model: Any, prompt: Sequence[int], tokens: Sequence[int], *, axes: int = 16) -> Code:
    """The code of `tokens` (with their end token, if they have one) after `prompt`.

    Raises:
        ValueError: for a token of probability 0, or without an axis.
    """
    box = whole_box(axes)
    with open_session(model, [list(prompt)]) as session:
        scores = session.start()
        for step, token in enumerate(tokens):
            box = narrowed(box, step, interval(scores[0].double().cpu().softmax(-1), int(token)))
            if step < len(tokens) - 1:
                scores = session.step(torch.tensor([token]))
    return Code(center(box), volume(box))


@decoder("ariel", kind="loop")
class Ariel(Loop):
    """The text at a point of the box: `codes` holds, for each row, numbers in [0, 1) (a `Code`, floats or fractions).

    Codes speak of the model's own law: processors would move every text, and are refused.
    """

    unmasked = "finds points of a box by the model's own law"

    def __init__(self, codes: Any) -> None:
        self.codes = [fractions(c.center if isinstance(c, Code) else c) for c in codes]
        if not self.codes or any(not c for c in self.codes):
            raise ValueError("ariel: every row needs a code of at least one number")

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`.

        Raises:
            ValueError: for another number of codes than rows, a code outside [0, 1), or processors.
        """
        if len(self.codes) != len(run):
            raise ValueError(f"ariel: got {len(self.codes)} codes for {len(run)} rows")
        if run.processors:
            names = ", ".join(type(p).__name__ for p in run.processors)
            raise ValueError(f"ariel decodes under the model's own law and cannot apply {names}; use do_sample=False")
        return [self._row(run, row, list(code)) for row, code in enumerate(self.codes)]

    @staticmethod
    def _row(run: Run, row: int, code: list[Fraction]) -> list[int]:
        generated: list[int] = []
        with run.session([row]) as session:
            scores = session.start()
            while True:
                axis = len(generated) % len(code)
                token, code[axis] = decoded_token(scores[0].double().cpu().softmax(-1), code[axis])
                _, stopped = run.until_stop(row, generated, [token])
                generated.append(token)
                run.stream(row, [token])
                if stopped:
                    return generated
                scores = session.step(torch.tensor([token]))
