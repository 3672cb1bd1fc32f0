"""A command called as on the command line, but in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner, Result

from tokenloom.cli.app import app


def call(*arguments: object, **options: Any) -> Result:
    """`tokenloom ARGUMENTS`, in a terminal so wide that the name of a temporary folder wraps no line."""
    return CliRunner(env={"COLUMNS": "240"}).invoke(app, [str(a) for a in arguments], **options)
