"""The file of answers that a command writes: kept while they come, so that an interrupted call can go on."""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from tokenloom.cli.guard import UsageError

SETTINGS = "settings"
Line = dict[str, Any]


def check_place(out: Path | None, *read: Path | None) -> None:
    """Look whether a file can come to `out`, before anything is worked on.

    Raises:
        UsageError: when it is a folder, has none, or is one of the files that are `read`.
    """
    if out is None:
        return
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"nothing can be written into the folder {out.parent}")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file in it")
    if any(file is not None and file.exists() and out.exists() and file.samefile(out) for file in read):
        raise UsageError(f"{out} is read by this call; name another file to write into")


class AnswersFile:
    """JSON lines on their way to `out`.

    They stand in a file of the same name and `.part`, below a line of the call's settings, and take the place of `out`
    when all are there. A call with the same settings goes on from what an interrupted one left: see `lines` and `seed`.
    What is no ordinary file (a pipe, /dev/null) is written to at once, and gone on from never.

    Raises:
        OSError: when the file cannot be written.
        UsageError: when a call with other settings was interrupted here.
    """

    def __init__(self, out: Path, settings: dict[str, Any], seed: int | None) -> None:
        self.out, self.lines, self._settings = out, list[Line](), settings
        self.seed = secrets.randbelow(2**31) if seed is None else seed
        self._plain = not out.exists() or out.is_file()
        # A link keeps its place: what it leads to is replaced.
        self._end = out.resolve() if self._plain else out
        self.part = self._end.with_name(self._end.name + ".part") if self._plain else out
        # What is no file is opened once: the reader of a pipe would leave at its first end.
        self._stream = None if self._plain else _opened(out, "w")
        if self._plain and self.part.exists():
            self._take_up(seed)
        self._save()

    def keep(self, number: int) -> None:
        """Forget all lines but the first `number`."""
        if number < len(self.lines):
            del self.lines[number:]
            self._save()

    def add(self, lines: Sequence[Line]) -> None:
        """Write more lines."""
        with _named(self.part):
            if self._stream is not None:
                self._stream.write(_text(lines))
                self._stream.flush()
            else:
                with _opened(self.part, "a") as file:
                    file.write(_text(lines))
        self.lines += lines

    def finish(self) -> None:
        """Put all lines in their place."""
        if self._plain:
            self._replace(self._end, self.lines)
            self.part.unlink()

    def leave(self) -> None:
        """End before all lines are there: they stay where they are, an empty file does not."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()
        elif not self.lines:
            self.part.unlink(missing_ok=True)

    def _take_up(self, seed: int | None) -> None:
        head, *rest = (_record(line) for line in self.part.read_bytes().split(b"\n"))
        before = None if head is None else head.get(SETTINGS)
        if not isinstance(before, dict):
            raise UsageError(f"{self.part} is in the way, and not of an interrupted call; move it elsewhere")
        # The last line is torn where the call was killed while it wrote.
        lines = list(itertools.takewhile(bool, rest))
        # A seed that nobody asked for is the one that was drawn then.
        wanted = self._settings | {"seed": before.get("seed") if seed is None else seed}
        other = [key for key in wanted if before.get(key) != wanted[key]]
        if lines and other:
            raise UsageError(
                f"{self.part} holds {len(lines)} responses of an interrupted call with other settings "
                f"({', '.join(other)}); repeat that call to go on with it, or delete the file to start afresh"
            )
        if lines:
            self.seed, self.lines = wanted["seed"], [line for line in lines if line is not None]

    def _save(self) -> None:
        if self._plain:
            self._replace(self.part, [{SETTINGS: self._settings | {"seed": self.seed}}, *self.lines])

    def _replace(self, file: Path, lines: Sequence[Line]) -> None:
        # In one move: whenever this is killed, the old file or the new one is there.
        new = self.part.with_name(self.part.name + ".new")
        with _named(new), _opened(new, "w") as opened:
            opened.write(_text(lines))
        os.replace(new, file)


def _opened(file: Path, mode: str) -> TextIO:
    return cast("TextIO", file.open(mode, encoding="utf-8", newline="\n"))


@contextmanager
def _named(file: Path) -> Iterator[None]:
    # A full disk does not say by itself which file it was.
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def _text(lines: Sequence[Line]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _record(line: bytes) -> Line | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
