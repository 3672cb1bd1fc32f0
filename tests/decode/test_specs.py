"""Decoding methods as text."""

from __future__ import annotations

import pytest

from tokenloom.decode import specs
from tokenloom.decode.plain import Plain
from tokenloom.decode.specs import Spec


def test_methods_and_parameters_are_read() -> None:
    found = specs.parse("temperature:value=0.7 + top-h:alpha=0.4,top-n=50+plain")
    assert found == [
        Spec("temperature", {"value": "0.7"}),
        Spec("top-h", {"alpha": "0.4", "top_n": "50"}),
        Spec("plain", {}),
    ]
    assert isinstance(specs.made(found[2], specs.find(found[2]), {}), Plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name is missing"),
        ("top-h+", "name is missing"),
        ("top-h:alpha", "not key=value"),
        ("top-h:=3", "key=value"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs.parse(text)


def test_unknown_methods_get_suggestions() -> None:
    with pytest.raises(ValueError, match="did you mean 'plain'"):
        specs.find(Spec("plane", {}))


def test_values_are_yaml_and_nothing_more() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        specs.made(Spec("plain", {"x": "!!python/object:os.system []"}), specs.find(Spec("plain", {})), {})
    with pytest.raises(ValueError, match="unknown parameter 'x'"):
        specs.made(Spec("plain", {"x": "1"}), specs.find(Spec("plain", {})), {})


def test_of_two_forms_the_one_that_can_be_built_is_taken() -> None:
    assert specs.find(Spec("token-alignment", {})).kind == "loop"
    assert specs.find(Spec("distortion-free-watermark", {})).kind == "shaper"
