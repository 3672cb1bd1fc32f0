"""Constraints as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from decode.tokenizers_at_hand import byte_level
from tokenloom import decode
from tokenloom.decode.constraints import ChoiceConstraint, read, standing

pytest.importorskip("llguidance", reason="python -m pip install 'tokenloom[constraints]'")


def fits(text: str, answer: str) -> bool:
    tokenizer = byte_level()
    ids = tokenizer.encode(answer, add_special_tokens=False)
    return standing(read(text).made(tokenizer), ids, [tokenizer.eos_token_id], limit=len(ids))[0] == "fulfilled"


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("regex=a{2,3},b=c", ["aa,b=c", "aaa,b=c"], ["aa", "a,b=c", "aaaa,b=c"]),
        ('regex="/\\.', ['"/.'], ['"/x']),
        ("choice=yes|no, thanks|(maybe)", ["yes", "no, thanks", "(maybe)"], ["", "ye", "yes|no", "maybe"]),
        ("choice=\u20ac5|/|\"", ["\u20ac5", "/", '"'], ["5"]),
        ('json-schema={"enum": ["a", {"b": [1, 2]}]}', ['"a"', '{"b":[1,2]}'], ["a", '{"b":[1]}']),
        ('lark=start: "(" start? ")"', ["()", "((()))"], ["(", ")("]),
        (' regex =a', ["a"], ["b"]),
    ],
)  # fmt: skip
def test_the_value_is_all_that_follows(text: str, right: list[str], wrong: list[str]) -> None:
    assert all(fits(text, answer) for answer in right)
    assert not any(fits(text, answer) for answer in wrong)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "pattern, with = signs.txt"
    file.write_bytes(b"\xef\xbb\xbfa+\r\n")
    assert fits(f"regex=@{file}", "aaa")
    file.write_text("one\ntwo\n")
    assert fits(f"choice=@{file}", "two")
    assert not fits(f"choice=@{file}", "two\n")
    with pytest.raises(ValueError, match="there is no file"):
        read("regex=@" + str(tmp_path / "none.txt"))


def test_a_choice_by_name() -> None:
    made = decode.build("constraint", "choice", {"tokenizer": byte_level()}, options="a|b")
    assert isinstance(made, ChoiceConstraint)
    assert made.name == "the choice a|b"
    with pytest.raises(ValueError, match="has no text that begins with a token"):
        read("regex=[^\\s\\S]").made(byte_level())
