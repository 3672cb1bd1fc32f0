"""Errors of commands: one message that a person can act on, and an exit code that a script can."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from tokenloom.cli.console import console

P = ParamSpec("P")
R = TypeVar("R")

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


class UsageError(ValueError):
    """A command line that cannot be carried out; the message says what would work."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what to tell about it."""


def debugging() -> bool:
    """Whether errors show where they come from: `--debug` or TOKENLOOM_DEBUG."""
    return os.environ.get("TOKENLOOM_DEBUG", "") not in ("", "0")


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """A command whose errors become a message on standard error and an exit code.

    2 for a wrong command line or recipe, 130 for Ctrl-C, 1 for everything else.
    """

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt as stop:
            console(stderr=True).print(str(stop) or "stopped", style="yellow", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        except (OSError, ValueError, RuntimeError, ArithmeticError, ImportError) as error:
            if debugging() or isinstance(error, BrokenPipeError):
                raise
            _explain(error)
            raise typer.Exit(USAGE if isinstance(error, (UsageError, *_recipe_errors())) else FAILURE) from None
        except Exception as error:
            if debugging() or type(error).__module__.startswith(("click", "typer")):
                raise
            _explain(error, "this should not happen; TOKENLOOM_DEBUG=1 shows where it comes from")
            raise typer.Exit(FAILURE) from None

    return command


def _explain(error: Exception, hint: str = "") -> None:
    out = console(stderr=True)
    kind = "" if isinstance(error, ValueError | RuntimeError) and str(error) else f"{type(error).__name__}: "
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    else:
        text = f"{kind if not isinstance(error, FileNotFoundError) else ''}{error}"
    out.print("error: ", style="bold red", end="")
    out.print(text, soft_wrap=True)
    if hint:
        out.print(hint, style="dim")


def _recipe_errors() -> tuple[type[Exception], ...]:
    # Asked for only if it has been imported: an error of that kind cannot come from anywhere else.
    module = sys.modules.get("tokenloom.train.errors")
    return (module.RecipeError,) if module is not None else ()
