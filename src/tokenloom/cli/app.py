"""The commands and their help."""

from __future__ import annotations

import inspect
import os
from typing import Annotated

import typer

from tokenloom.cli.catalog import methods
from tokenloom.cli.compare_samplers import compare_samplers
from tokenloom.cli.detect_watermark import detect_watermark
from tokenloom.cli.distill import distill
from tokenloom.cli.doctor import doctor
from tokenloom.cli.evaluate import evaluate
from tokenloom.cli.fit_head import fit_head
from tokenloom.cli.generate import generate
from tokenloom.cli.lab import lab
from tokenloom.cli.recipes import recipes
from tokenloom.cli.report import report
from tokenloom.cli.runs import compare
from tokenloom.cli.tokens import tokens
from tokenloom.cli.train import train
from tokenloom.cli.unslop import unslop

HELP = """Token-level methods for language models: train, measure, look.

First steps:
  tokenloom train quickstart            teach a small model one-digit sums
  tokenloom train quickstart --dry-run  what that would take
  tokenloom generate smollm2-135m-instruct "Hello!" --draft token-recycling
                                        let a model write, decoded so
  tokenloom methods                     algorithms, decoding, their parts
  tokenloom lab --quick                 measure them against exact truth
  tokenloom doctor                      what this machine can do

Examples of each command: tokenloom COMMAND --help
Exit codes: 0 done, 1 failed, 2 wrong command line or recipe, 130 Ctrl-C.
"""


def flowing(text: str) -> str:
    """Help without the line breaks of the source; paragraphs with indented lines, such as examples, keep theirs."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(p if "\n " in p else p.replace("\n", " ") for p in paragraphs)


app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function, name in (
    (train, "train"),
    (evaluate, "eval"),
    (compare, "compare"),
    (report, "report"),
    (tokens, "tokens"),
    (generate, "generate"),
    (compare_samplers, "compare-samplers"),
    (detect_watermark, "detect-watermark"),
    (distill, "distill"),
    (fit_head, "fit-head"),
    (unslop, "unslop"),
    (methods, "methods"),
    (recipes, "recipes"),
    (lab, "lab"),
    (doctor, "doctor"),
):
    app.command(name, help=flowing(function.__doc__ or ""))(function)


def _version(wanted: bool) -> None:
    if wanted:
        import tokenloom

        typer.echo(f"tokenloom {tokenloom.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where errors come from.")] = False,
) -> None:
    if debug:
        os.environ["TOKENLOOM_DEBUG"] = "1"


options.__doc__ = HELP
