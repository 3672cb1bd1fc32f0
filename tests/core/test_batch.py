"""`Rollouts`: validation, cutting, stacking, saving; the padding id never matters."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom import Algorithm, Rollouts, Sampling, Signals
from tokenloom.testing import random_batch

NAN = float("nan")


def small(**changes: Any) -> Rollouts:
    """Three rows of 3, 0 and 2 tokens, the middle token of row 0 a tool's."""
    return Rollouts.build(
        [[1, 2, 3], [4], []],
        [[5, 6, 7], [], [8, 9]],
        [10, -4, 10],
        **{
            "pad_id": 99,
            "response_masks": [[True, False, True], [], [True, True]],
            "sampler_logprobs": [[-0.5, -1.5, -2.5], [], [-3.5, -4.5]],
            "rewards": torch.tensor([1.0, NAN, 0.25]),
            "reward_components": {"format": torch.tensor([0.0, NAN, 1.0])},
            "truncated": torch.tensor([False, True, False]),
            "answers": ("4", None, "π ≠ 3"),
            "prompts": ({"text": "naïve 日本\ud800"}, {}, {"levels": [1, {"x": None}]}),
            "sampling": Sampling(temperature=0.7, top_k=3, stop=("\n", "</s>"), seed=5, max_tokens=3),
            "policy_version": torch.tensor([1, 1, 2]),
            **changes,
        },
    )


def assert_same(a: Rollouts, b: Rollouts) -> None:
    for name in ("tokens", "lengths", "mask", "group_ids", "rewards", "truncated", "sampler_logprobs",
                 "policy_version"):  # fmt: skip
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert len(a.prompt_tokens) == len(b.prompt_tokens)
    for p, q in zip(a.prompt_tokens, b.prompt_tokens, strict=True):
        assert p.dtype == q.dtype == torch.int64
        assert p.tolist() == q.tolist()
    assert (a.answers, a.prompts, a.sampling) == (b.answers, b.prompts, b.sampling)
    assert a.reward_components.keys() == b.reward_components.keys()
    for name, x in a.reward_components.items():
        torch.testing.assert_close(x, b.reward_components[name], rtol=0, atol=0, equal_nan=True)


def test_build_pads_on_the_right() -> None:
    r = small()
    assert r.tokens.tolist() == [[5, 6, 7], [99, 99, 99], [8, 9, 99]]
    assert r.mask.tolist() == [[True, False, True], [False] * 3, [True, True, False]]
    assert r.lengths.tolist() == [3, 0, 2]
    assert r.sampler_logprobs is not None
    assert r.sampler_logprobs.tolist() == [[-0.5, -1.5, -2.5], [0, 0, 0], [-3.5, -4.5, 0]]
    assert [r.response(i).tolist() for i in range(3)] == [[5, 6, 7], [], [8, 9]]
    assert [p.tolist() for p in r.prompt_tokens] == [[1, 2, 3], [4], []]
    assert len(r) == 3


def test_a_sampled_token_equal_to_the_padding_id_counts() -> None:
    rows = [[0, 5, 0], [0]]
    a, b = (Rollouts.build([[1], [1]], rows, [0, 0], pad_id=p) for p in (0, 7))
    assert torch.equal(a.mask, b.mask)
    assert a.mask.tolist() == [[True, True, True], [True, False, False]]
    assert [a.response(i).tolist() for i in range(2)] == rows


def test_the_padding_id_changes_no_coefficient() -> None:
    rewards = torch.tensor([1.0, 0.0])
    made = [Rollouts.build([[1], [1]], [[3, 4], [5]], [0, 0], pad_id=p, rewards=rewards) for p in (0, 3)]
    signals = Signals(logprobs=torch.tensor([[-1.0, -2.0], [-0.5, NAN]]))
    a, b = (Algorithm.from_recipe("reinforce").coefficients(r, signals)["logprobs"] for r in made)
    assert torch.equal(a, b)
    assert a.isfinite().all()


ONE: dict[str, Any] = {"prompt_tokens": (torch.tensor([1]),), "tokens": torch.tensor([[1, 2]]),
       "lengths": torch.tensor([1]), "mask": torch.tensor([[True, False]]), "group_ids": torch.tensor([0])}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.tensor([1, 2])}, r"tokens must be \[B, T\], got shape \(2,\)"),
        ({"lengths": torch.tensor([1, 1])}, r"lengths has shape \(2,\), expected \(1,\)"),
        ({"mask": torch.tensor([[True]])}, r"mask has shape \(1, 1\), expected \(1, 2\)"),
        ({"group_ids": torch.tensor([[0]])}, r"group_ids has shape"),
        ({"rewards": torch.zeros(2)}, r"rewards has shape \(2,\)"),
        ({"truncated": torch.zeros(2, dtype=torch.bool)}, "truncated has shape"),
        ({"sampler_logprobs": torch.zeros(1)}, "sampler_logprobs has shape"),
        ({"policy_version": torch.zeros(3)}, "policy_version has shape"),
        ({"reward_components": {"x": torch.zeros(2)}}, r"reward component 'x' has shape \(2,\)"),
        ({"prompt_tokens": ()}, "prompt_tokens has 0 entries for 1 rows"),
        ({"answers": ("a", "b")}, "answers has 2 entries"),
        ({"prompts": ()}, "prompts has 0 entries"),
        ({"mask": torch.tensor([[1, 0]])}, r"mask must be bool.*use mask\.bool\(\)"),
        ({"truncated": torch.tensor([1])}, r"truncated must be bool"),
        ({"group_ids": torch.tensor([0.5])}, r"group_ids must be integers.*use group_ids\.long\(\)"),
        ({"lengths": torch.tensor([1.0])}, "lengths must be integers"),
        ({"lengths": torch.tensor([3])}, r"lengths must lie in \[0, 2\]"),
        ({"lengths": torch.tensor([-1])}, r"lengths must lie in \[0, 2\]"),
        ({"mask": torch.tensor([[True, True]])}, "beyond a row's length"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    Rollouts(**ONE)
    with pytest.raises(ValueError, match=message):
        Rollouts(**(ONE | changes))


@pytest.mark.parametrize(
    "beside",
    [
        {"response_masks": [[True], [True]]},  # a mask of one entry would broadcast over both tokens
        {"response_masks": [[True, True]]},
        {"sampler_logprobs": [[-1.0, -1.0, -1.0], [-1.0]]},
    ],
)
def test_build_wants_one_entry_per_token(beside: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one entry per response token"):
        Rollouts.build([[1], [1]], [[3, 4], [5]], [0, 0], **beside)


def test_fields_cannot_be_set() -> None:
    r = small()
    with pytest.raises(FrozenInstanceError):
        r.rewards = torch.zeros(3)  # type: ignore[misc]  # the point of the test
    with pytest.raises(FrozenInstanceError):
        r.sampling.temperature = 2.0  # type: ignore[misc]  # the point of the test


def test_replace_validates_and_leaves_the_original() -> None:
    r = small()
    changed = r.replace(rewards=torch.zeros(3))
    assert changed.rewards is not None
    assert changed.rewards.tolist() == [0, 0, 0]
    assert r.rewards is not None
    assert r.rewards[0] == 1
    with pytest.raises(ValueError, match="rewards has shape"):
        r.replace(rewards=torch.zeros(2))


def test_writing_into_cut_rows_leaves_the_batch() -> None:
    r = small()
    cut = r.rows([0, 2])
    cut.tokens.zero_()
    cut.reward_components["format"].fill_(7)
    assert r.tokens[0].tolist() == [5, 6, 7]
    assert r.reward_components["format"][0] == 0


def test_rows_cut_every_field_in_order_and_may_repeat() -> None:
    r = small()
    cut = r.rows([2, 0, 2])
    assert cut.tokens.tolist() == [[8, 9, 99], [5, 6, 7], [8, 9, 99]]
    assert cut.answers == ("π ≠ 3", "4", "π ≠ 3")
    assert cut.group_ids.tolist() == [10, 10, 10]
    assert cut.reward_components["format"].tolist() == [1, 0, 1]
    assert [p.tolist() for p in cut.prompt_tokens] == [[], [1, 2, 3], []]
    assert cut.policy_version is not None
    assert cut.policy_version.tolist() == [2, 1, 2]
    assert len(r.rows([])) == 0


@pytest.mark.parametrize("index", [torch.tensor([True, False, True]), [True, False, True]])
def test_a_bool_mask_is_no_index(index: Tensor | list[bool]) -> None:
    # Read as integers it would give rows 1, 0, 1 without a word.
    rollouts, signals = random_batch(rows=3)
    with pytest.raises(ValueError, match=r"not by a bool mask; use mask\.nonzero"):
        rollouts.rows(index)
    with pytest.raises(ValueError, match="not by a bool mask"):
        signals.rows(index)
    update = Algorithm.from_recipe("reinforce").plan(rollouts, signals).updates[0]
    with pytest.raises(ValueError, match="not by a bool mask"):
        update[index]


def test_concat_inverts_a_cut() -> None:
    r = small()
    assert_same(Rollouts.concat([r.rows([0, 1]), r.rows([2])]), r)
    assert_same(Rollouts.concat([r, r.rows([])]), r)


def test_concat_pads_to_the_widest() -> None:
    a = Rollouts.build([[1]], [[5]], [0])
    b = Rollouts.build([[2]], [[6, 7, 8]], [1])
    both = Rollouts.concat([a, b])
    assert both.tokens.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert both.mask.tolist() == [[True, False, False], [True, True, True]]


def test_concat_refuses_what_does_not_match() -> None:
    r = small()
    with pytest.raises(ValueError, match="at least one"):
        Rollouts.concat([])
    with pytest.raises(ValueError, match="rewards is present in some"):
        Rollouts.concat([r, r.replace(rewards=None)])
    with pytest.raises(ValueError, match="answers is present in some"):
        Rollouts.concat([r, r.replace(answers=None)])
    with pytest.raises(ValueError, match="different reward components"):
        Rollouts.concat([r, r.replace(reward_components={})])
    with pytest.raises(ValueError, match="sampled differently"):
        Rollouts.concat([r, r.replace(sampling=Sampling(temperature=1.0))])


def test_concat_lets_seeds_differ() -> None:
    r = small()
    other = r.replace(sampling=Sampling(temperature=0.7, top_k=3, stop=("\n", "</s>"), seed=6, max_tokens=3))
    assert Rollouts.concat([r, other]).sampling.seed == 5


@pytest.mark.parametrize("rows", [[0, 1, 2], [1], []])
def test_save_and_load_round_trip(tmp_path: Path, rows: list[int]) -> None:
    r = small().rows(rows)
    r.save(tmp_path / "deep" / "er")
    assert_same(Rollouts.load(tmp_path / "deep" / "er"), r)


def test_save_and_load_without_optional_fields(tmp_path: Path) -> None:
    r = Rollouts.build([[1]], [[2]], [0])
    r.save(tmp_path)
    assert_same(Rollouts.load(tmp_path), r)
    empty = Rollouts.build([], [], [])
    empty.save(tmp_path)
    assert_same(Rollouts.load(tmp_path), empty)


def test_save_takes_fields_that_share_memory(tmp_path: Path) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5])
    r = small(rewards=rewards, reward_components={"a.b": rewards, "c": rewards[:]})
    r.save(tmp_path)
    assert_same(Rollouts.load(tmp_path), r)


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.integers(-3, 3)), max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_ragged_batch_survives_cut_and_stack(rows: list[tuple[list[int], int]]) -> None:
    r = Rollouts.build([[1]] * len(rows), [x for x, _ in rows], [g for _, g in rows])
    assert [r.response(i).tolist() for i in range(len(rows))] == [x for x, _ in rows]
    back = Rollouts.concat([r.rows([i]) for i in range(len(rows))]) if rows else r.rows([])
    assert_same(back, r)
