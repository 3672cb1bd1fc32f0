"""JSON schemas, patterns, choices and grammars as llguidance reads them; no tokenizer is needed to find them wrong.

llguidance comes with the extra "constraints".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# Without this, text that the grammar leaves no choice about is allowed in one tokenization only. It stands at the end,
# so that the line numbers of messages are the user's.
_OPTIONS = '%llguidance {"no_forcing": true}'
_LISTING = re.compile(r"^ *\d+ \| .*$|^ +\^$", re.MULTILINE)


@dataclass(frozen=True)
class Rules:
    """What llguidance has read, and what messages call it."""

    name: str
    grammar: str


def schema_rules(schema: str | dict[str, Any]) -> Rules:
    """Those of a JSON Schema, given as text or as a dictionary.

    Raises:
        ImportError: without llguidance, naming the extra that brings it.
        ValueError: for a schema that cannot be read.
    """
    name = f"the JSON schema {_short(schema)}"
    try:
        text = json.dumps(json.loads(schema) if isinstance(schema, str) else schema)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    except TypeError as error:
        raise ValueError(
            f"{name} is a {type(schema).__name__}, not JSON ({error}); give a dictionary, such as "
            "Model.model_json_schema() of a Pydantic class, or text"
        ) from None
    return _read(name, f"start: %json {text}", listing=False)


def pattern_rules(pattern: str) -> Rules:
    """Those of a regular expression.

    Raises:
        ImportError, ValueError: as `schema_rules`.
    """
    written = json.loads(llguidance().LLMatcher.grammar_from_regex(pattern))
    return _read(f"the pattern {_short(pattern)}", written["grammars"][0]["lark_grammar"], listing=False)


def choice_rules(options: str) -> Rules:
    """Those of texts between which `|` or a line's end stands; blanks around them are left out.

    Raises:
        ImportError, ValueError: as `schema_rules`.
    """
    given = [option.strip() for option in re.split(r"[|\n]", options)]
    texts = [option for option in dict.fromkeys(given) if option]
    if not texts:
        raise ValueError(f"a choice names its texts, yes|no; got {options!r}")
    alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return _read(f"the choice {_short('|'.join(texts))}", f"start: {alternatives}", listing=False)


def grammar_rules(lark: str) -> Rules:
    """Those of a context-free grammar in Lark's notation.

    Raises:
        ImportError, ValueError: as `schema_rules`; the message shows the place.
    """
    return _read(f"the grammar {_short(lark)}", lark, listing=True)


def llguidance() -> Any:
    """The library.

    Raises:
        ImportError: naming the extra that brings it.
    """
    try:
        import llguidance as found
    except ImportError:
        raise ImportError(
            "JSON schemas, patterns and grammars need llguidance: python -m pip install 'tokenloom[constraints]'"
        ) from None
    return found


def _read(name: str, lark: str, *, listing: bool) -> Rules:
    matcher = llguidance().LLMatcher
    grammar = matcher.grammar_from_lark(f"{lark}\n{_OPTIONS}\n")
    error = matcher.validate_grammar(grammar, None)
    if error and not error.startswith("WARNING"):
        if listing:
            reason = "\n".join(line for line in error.splitlines() if _OPTIONS not in line)
        else:
            # The place would be one in a grammar that the user never saw.
            reason = re.sub(r"^at \d+\(\d+\): ", "", _LISTING.sub("", error))
        remedy = "; leave these out, or judge them by a predicate" if "Unimplemented keys" in reason else ""
        raise ValueError(f"{name} cannot be read: {reason.strip()}{remedy}")
    return Rules(name, grammar)


def _short(text: Any) -> str:
    shown = " ".join(str(text).split())
    return shown if len(shown) <= 60 else shown[:57] + "..."
