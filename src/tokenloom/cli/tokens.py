"""`tokenloom tokens`: what an algorithm does to each token, on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenloom.cli.console import console
from tokenloom.cli.guard import guarded


@guarded
def tokens(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with a token dump.")],
    step: Annotated[int | None, typer.Option(help="A dumped step; default the last.")] = None,
    prompt: Annotated[
        int | None, typer.Option(min=0, help="Which of the step's prompts, from 0; default the one with mixed rewards.")
    ] = None,
    quantity: Annotated[
        str,
        typer.Option(help="advantage, coefficient, weight, entropy, log_ratio, kl, probability or logprob."),
    ] = "advantage",
    compare: Annotated[str, typer.Option(help="Presets to ask about the same responses, separated by commas.")] = "",
) -> None:
    """Show a group of responses, each token colored by a quantity.

    Orange is above zero, blue below (and underlined); without color, marks stand under the tokens.

    Examples:
      tokenloom tokens runs/quickstart-001
      tokenloom tokens runs/quickstart-001 --quantity entropy --step 11
      tokenloom tokens runs/quickstart-001 --quantity coefficient --compare dapo,gspo
    """
    from tokenloom.report import token_group
    from tokenloom.report.token_terminal import print_group

    names = [name.strip() for name in compare.split(",") if name.strip()]
    print_group(token_group(run, step=step, prompt=prompt, quantity=quantity, compare=names), console())
