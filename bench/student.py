"""The shallow student that draft-model rows need: `python -m bench.student` makes it, in half an hour on two cores.

Six of SmolLM2's layers, distilled on its own samples as `tokenloom distill` does it; half of the prompts are the
built-in instructions, half exercises such as `bench.speculative` decodes, none of which is among those measured. It
is kept in the cache folder; an interrupted call goes on when it is repeated.
"""

from __future__ import annotations

import sys

from bench.inputs import SMOLLM2, STUDENT, model_folder
from bench.speculative import prompts
from tokenloom.cli.distill import built_in_prompts
from tokenloom.cli.fit_progress import fit_progress
from tokenloom.cli.prompts import encoded
from tokenloom.decode.pair_quality import Quality
from tokenloom.decode.student import Settings, distill
from tokenloom.policy import ModelConfig, Policy

SETTINGS = Settings(layers=6, tokens=120_000)
_FIRST_TURN = 10_000  # of exercises; benchmarks measure turns far below


def make() -> Quality:
    """Distill it, or go on with that."""
    from rich.console import Console

    policy = Policy.load(model_folder(SMOLLM2), ModelConfig(autocast="bf16"))
    instructions = built_in_prompts()
    exercises = [text for turn in range(len(instructions)) for text in prompts(_FIRST_TURN + turn, 1, same=True)]
    ids = [*encoded(policy, instructions), *encoded(policy, exercises, raw=True)]
    STUDENT.parent.mkdir(parents=True, exist_ok=True)
    with fit_progress(Console(stderr=True)) as report:
        return distill(policy, ids, STUDENT, SETTINGS, name="smollm2-135m-instruct", report=report)


if __name__ == "__main__":
    sys.stdout.write(f"{make().line()}\n{STUDENT}\n")
