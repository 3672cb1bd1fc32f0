"""Constraints as text, `KIND=VALUE`: the value is all that follows, commas included, and `@file` is a file's text.

json-schema=@person.json     regex=[0-9]{2,4}     choice=yes|no     lark=@sums.lark
predicate=rules.py:complete,viable                (see `PredicateConstraint`; viable may be left out)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenloom.decode.constraints.grammar import (
    ChoiceConstraint,
    GrammarConstraint,
    JsonSchemaConstraint,
    RegexConstraint,
)
from tokenloom.decode.constraints.predicate import PredicateConstraint
from tokenloom.decode.constraints.rules import choice_rules, grammar_rules, pattern_rules, schema_rules
from tokenloom.hints import suggest
from tokenloom.tasks.importing import import_target

EXAMPLE = "json-schema=@FILE, regex=PATTERN, choice=yes|no, lark=@FILE or predicate=FILE.py:NAME"


@dataclass(frozen=True)
class Written:
    """A constraint that has been read and found right; `made(tokenizer)` builds it."""

    text: str
    made: Callable[[Any], Any]


def read(text: str) -> Written:
    """The constraint that `text` names.

    Raises:
        ImportError: without the library that its kind needs, naming the extra that brings it.
        ValueError: for an unknown kind, a file that cannot be read, or a value that is none of its kind.
    """
    kind, equals, value = text.partition("=")
    kind = kind.strip()
    if not equals:
        raise ValueError(f"a constraint is KIND=VALUE: {EXAMPLE}; got {text!r}")
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of constraint {kind!r}{suggest(kind, _KINDS)}; write {EXAMPLE}")
    if value.startswith("@"):
        value = _content(value[1:])
    if not value.strip():
        raise ValueError(f"{kind}: the constraint is empty")
    return Written(text, _KINDS[kind](value))


def _schema(value: str) -> Callable[[Any], Any]:
    schema_rules(value)
    return lambda tokenizer: JsonSchemaConstraint(tokenizer, schema=value)


def _pattern(value: str) -> Callable[[Any], Any]:
    # A file's last line ends; the pattern does not.
    pattern = value.rstrip("\r\n")
    pattern_rules(pattern)
    return lambda tokenizer: RegexConstraint(tokenizer, pattern=pattern)


def _choice(value: str) -> Callable[[Any], Any]:
    choice_rules(value)
    return lambda tokenizer: ChoiceConstraint(tokenizer, options=value)


def _grammar(value: str) -> Callable[[Any], Any]:
    grammar_rules(value)
    return lambda tokenizer: GrammarConstraint(tokenizer, lark=value)


def _predicate(value: str) -> Callable[[Any], Any]:
    complete, comma, viable = value.partition(",")
    target = complete.strip()
    # The second function may be named alone: it is in the same file.
    if comma and ":" not in viable:
        viable = f"{target.rpartition(':')[0]}:{viable.strip()}"
    functions = [import_target(t) for t in (target, viable.strip()) if t]
    if not all(callable(f) for f in functions):
        raise ValueError(f"predicate={value}: a predicate is a function of the text so far that gives true or false")
    return lambda tokenizer: PredicateConstraint(tokenizer, *functions)


def _content(name: str) -> str:
    """The text of a file."""
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no file {name!r} (@ names a file; looked from {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from None


_KINDS: dict[str, Callable[[str], Callable[[Any], Any]]] = {
    "json-schema": _schema,
    "regex": _pattern,
    "choice": _choice,
    "lark": _grammar,
    "predicate": _predicate,
}
