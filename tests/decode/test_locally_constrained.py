"""Constrained loops over tables and tiny models: valid always, exact where weighted, clear where impossible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from decode.tokenizers_at_hand import byte_level
from tests.decode.even_ids import IDS, OPTIONS, Even
from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.constraints import PredicateConstraint, RegexConstraint
from tokenloom.decode.token_bytes import ByteVocabulary


@pytest.mark.parametrize("name", sorted(TINY)[:4])
@pytest.mark.parametrize("sample", [False, True])
def test_always_valid_whatever_the_model(name: str, sample: bool) -> None:
    loop = decode.loop("locally-constrained", constraint=Even())
    ids = TINY[name]().generate(IDS, do_sample=sample, custom_generate=loop, **OPTIONS)
    for row in ids[:, 5:].tolist():
        new = row[: row.index(1)]
        assert len(new) == 3
        assert all(t % 2 == 0 for t in new)
        assert new == sorted(new)
    assert all(-math.inf < w <= 0 for w in loop.log_weights)


def test_without_a_constraint_greedy_is_generates() -> None:
    class All:
        def accept(self, prefix: Sequence[int], token: int) -> bool:
            return True

    model = tiny_llama()
    ours = model.generate(
        IDS, do_sample=False, custom_generate=decode.loop("locally-constrained", constraint=All()), **OPTIONS
    )
    assert torch.equal(ours, model.generate(IDS, do_sample=False, **OPTIONS))


def test_a_dead_end_returns_the_prefix_and_weight_zero() -> None:
    class Trap:
        def accept(self, prefix: Sequence[int], token: int) -> bool:
            return len(prefix) < 2 and token > 3

    loop = decode.loop("locally-constrained", constraint=Trap())
    ids = tiny_llama().generate(IDS, do_sample=True, custom_generate=loop, **OPTIONS)
    assert ids.shape == (2, 7)
    assert loop.log_weights == [-math.inf, -math.inf]


def test_impossible_from_the_start_is_an_error_that_names_it() -> None:
    class Never:
        name = "the constraint that nothing fulfills"

        def accept(self, prefix: Sequence[int], token: int) -> bool:
            return False

    for slug in ("locally-constrained", "awrs"):
        with pytest.raises(ValueError, match="the constraint that nothing fulfills"):
            tiny_llama().generate(IDS, do_sample=True, custom_generate=decode.loop(slug, constraint=Never()), **OPTIONS)
    with pytest.raises(ValueError, match="end token"):
        tiny_llama().generate(IDS, do_sample=True, max_new_tokens=3, eos_token_id=None,
                              custom_generate=decode.loop("locally-constrained", constraint=Even()))  # fmt: skip


@pytest.mark.parametrize("kind", ["regex", "predicate"])
def test_text_constraints_through_a_tokenizer(kind: str) -> None:
    tokenizer: Any = byte_level()
    if kind == "regex":
        pytest.importorskip("llguidance")
        constraint: Any = RegexConstraint(tokenizer, pattern="[0-9]{2}-[a-c]+")
    else:
        constraint = PredicateConstraint(tokenizer, lambda t: len(t) == 3, lambda t: t.isdigit() and len(t) <= 3)
    model = tiny_llama(vocab=320)
    loop = decode.loop("locally-constrained", constraint=constraint)
    pieces = ByteVocabulary(tokenizer)
    options = OPTIONS | {"max_new_tokens": 30}
    ids = model.generate(IDS, do_sample=True, custom_generate=loop, **options)
    for row in ids[:, 5:].tolist():
        text = pieces.decode([t for t in row if t > 2]).decode()
        if kind == "predicate":
            assert len(text) == 3
            assert text.isdigit()
        else:
            assert text[:2].isdigit()
            assert text[2] == "-"
            assert set(text[3:]) <= set("abc")
