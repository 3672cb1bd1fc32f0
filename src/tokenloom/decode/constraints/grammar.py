"""JSON schemas, regular expressions, choices and context-free grammars as constraints, through llguidance.

llguidance (the extra "constraints") walks the tokenizer's trie along a parser, so `mask` costs little more than
`accept`. Its tokens come from our bytes of the tokenizer, not from its own reading of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.constraints.rules import (
    Rules,
    choice_rules,
    grammar_rules,
    llguidance,
    pattern_rules,
    schema_rules,
)
from tokenloom.decode.registry import decoder
from tokenloom.decode.token_bytes import ByteVocabulary

_KEPT = 256


class _Matched:
    """A grammar's matcher, with one state for each prefix seen lately."""

    def __init__(self, tokenizer: Any, rules: Rules) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
        lib = llguidance()
        self.name = rules.name
        self.eos: frozenset[int] = frozenset([tokenizer.eos_token_id])
        vocabulary = ByteVocabulary(tokenizer)
        # An unused id keeps the vocabulary's last token from standing for the end.
        own_end = len(vocabulary)
        made = lib.LLTokenizer(lib.TokenizerWrapper(_Tokens(vocabulary, own_end)))
        self._end = own_end
        self._pieces = vocabulary.pieces
        self._twins = _twins(vocabulary.pieces)
        self._start = lib.LLMatcher(made, rules.grammar, log_level=0)
        self._states: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        if not bool(self.mask([]).any()):
            raise ValueError(f"{self.name} has no text that begins with a token of this tokenizer")

    def with_eos(self, eos: Collection[int]) -> Any:
        """The same for other end tokens."""
        other = copy(self)
        other.eos = frozenset(eos)
        # Which prefixes are none depends on the ends.
        other._states = OrderedDict()
        return other

    def accept(self, prefix: Sequence[int], token: int) -> bool:
        """Whether `token` may follow `prefix`."""
        state = self._state(tuple(prefix))
        if state is None:
            return False
        if token in self.eos:
            return bool(state.is_accepting())
        return self._is_text(token) and bool(state.validate_tokens([token]) == 1)

    def mask(self, prefix: Sequence[int]) -> Tensor:
        """[V] bool: what may follow `prefix`, all tokens at once."""
        state = self._state(tuple(prefix))
        size = max(len(self._pieces), max(self.eos) + 1)
        keep = torch.zeros(size, dtype=torch.bool)
        if state is None:
            return keep
        if not state.is_stopped():
            bias = torch.frombuffer(bytearray(state.compute_logit_bias()), dtype=torch.uint8)
            keep[: len(self._pieces)] = bias[: len(self._pieces)] > 0
            # llguidance marks one of several tokens with the same bytes.
            for group in self._twins:
                keep[group] = bool(keep[group].any())
        keep[list(self.eos)] = bool(state.is_accepting())
        return keep

    def _state(self, prefix: tuple[int, ...]) -> Any:
        """The matcher behind `prefix`, None where the grammar does not go."""
        known = len(prefix)
        while known and prefix[:known] not in self._states:
            known -= 1
        state = self._states[prefix[:known]] if known else self._start
        if known == len(prefix):
            if known:
                self._states.move_to_end(prefix)
            return state
        following = list(prefix[known:])
        if state is not None and all(self._is_text(token) for token in following):
            before, state = state, None
            if before.validate_tokens(following) == len(following):
                state = before.deep_copy()
                state.consume_tokens(following)
                if state.is_error():
                    raise RuntimeError(f"{self.name}: {state.get_error()}")
        else:
            state = None
        self._states[prefix] = state
        if len(self._states) > _KEPT:
            self._states.popitem(last=False)
        return state

    def _is_text(self, token: int) -> bool:
        return token not in self.eos and token < len(self._pieces) and self._pieces[token] is not None


@decoder("json-schema", kind="constraint")
class JsonSchemaConstraint(_Matched):
    """Text that is JSON after a schema (JSON Schema as text or as a dictionary)."""

    def __init__(self, tokenizer: Any, *, schema: str | dict[str, Any] = "{}") -> None:
        """Read the schema.

        Raises:
            ImportError: without llguidance, naming the extra that brings it.
            ValueError: for a schema that cannot be read, or whose text no token begins.
        """
        super().__init__(tokenizer, schema_rules(schema))


@decoder("regex", kind="constraint")
class RegexConstraint(_Matched):
    """Text that a regular expression matches as a whole (Rust's syntax: no back-references, no look-around)."""

    def __init__(self, tokenizer: Any, *, pattern: str = ".*") -> None:
        """Read the pattern; raises as `JsonSchemaConstraint`."""
        super().__init__(tokenizer, pattern_rules(pattern))


@decoder("choice", kind="constraint")
class ChoiceConstraint(_Matched):
    """One of several texts, `|` between them."""

    def __init__(self, tokenizer: Any, *, options: str = "yes|no") -> None:
        """Read the options; raises as `JsonSchemaConstraint`."""
        super().__init__(tokenizer, choice_rules(options))


@decoder("grammar", kind="constraint")
class GrammarConstraint(_Matched):
    """Text of a context-free grammar in Lark's notation, whose first rule is named `start`."""

    def __init__(self, tokenizer: Any, *, lark: str = "start: /(.|\\n)*/") -> None:
        """Read the grammar; raises as `JsonSchemaConstraint`."""
        super().__init__(tokenizer, grammar_rules(lark))


class _Tokens:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: ByteVocabulary, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, None
        # Marks tokens that no text contains, as llguidance itself writes them.
        self.tokens = [b"\xff<%d>" % i if piece is None else piece for i, piece in enumerate(vocabulary.pieces)]
        self.tokens.append(b"\xff<end>")
        self.special_token_ids = [i for i, piece in enumerate(vocabulary.pieces) if piece is None] + [end]
        self._vocabulary = vocabulary

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return self._vocabulary.trie.longest(data)


def _twins(pieces: Sequence[bytes | None]) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for i, piece in enumerate(pieces):
        if piece is not None:
            groups.setdefault(piece, []).append(i)
    return [group for group in groups.values() if len(group) > 1]
