"""What is collected beside the responses: where the answer stands, and what the reference would have got."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenloom.batch import Rollouts
from tokenloom.policy import Policy
from tokenloom.train.extras import answer_mask, segment_values, with_extras


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer with merges: tokens of several characters, characters of several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    raw.train_from_iterator(["the answer is 42, the answer is 42 again and again"] * 3, trainer)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def rollouts_of(tokenizer: Any, texts: list[str], answers: list[Any]) -> Rollouts:
    ids = [[*tokenizer(t).input_ids, tokenizer.eos_token_id] for t in texts]
    return Rollouts.build([[1]] * len(texts), ids, [0] * len(texts), answers=tuple(answers))


@pytest.mark.parametrize(
    ("text", "answer", "marked"),
    [
        ("the answer is 42", "42", "42"),
        ("first 42, then the answer is 42.", "42", "42"),
        ("so 17 is it", 17, "17"),
        ("Größe: 3 €", "3 €", "3 €"),
        ("日本語 が答え", "本語", "本語"),
    ],
)
def test_the_last_occurrence_is_marked(tokenizer: Any, text: str, answer: Any, marked: str) -> None:
    rollouts = rollouts_of(tokenizer, [text], [answer])
    mask = answer_mask(tokenizer, rollouts)[0]
    positions = mask.nonzero()[:, 0]
    assert positions.tolist() == list(range(int(positions[0]), int(positions[-1]) + 1))
    held = tokenizer.decode(rollouts.response(0)[mask])
    assert marked in held
    # No token could be left out: one fewer on either side no longer holds the answer.
    inside = rollouts.response(0)[mask]
    assert marked not in tokenizer.decode(inside[1:])
    assert marked not in tokenizer.decode(inside[:-1])
    before = tokenizer.decode(rollouts.response(0)[: int(positions[0])])
    assert len(before.rstrip("\ufffd")) <= text.rfind(marked)


def test_no_answer_no_mark(tokenizer: Any) -> None:
    rollouts = rollouts_of(tokenizer, ["the answer is 42"] * 3, [None, "", "43"])
    assert not bool(answer_mask(tokenizer, rollouts).any())


def test_tool_output_is_not_marked(tokenizer: Any) -> None:
    rollouts = rollouts_of(tokenizer, ["the answer is 42"], ["42"])
    silent = rollouts.replace(mask=torch.zeros_like(rollouts.mask))
    assert not bool(answer_mask(tokenizer, silent).any())


def test_only_what_is_needed_is_collected(tokenizer: Any) -> None:
    rollouts = rollouts_of(tokenizer, ["the answer is 42"], ["42"])

    def never(*_: Any) -> Rollouts:
        raise AssertionError("the policy was asked")

    none: dict[str, Any] = {"answered": never, "continued": never, "branches": None}
    assert with_extras([], rollouts, tokenizer, **none) is rollouts
    assert set(with_extras(["answer_mask"], rollouts, tokenizer, **none).extras) == {"answer_mask"}
    rewards = torch.tensor([0.25])
    asked = none | {"answered": lambda: rollouts.replace(rewards=rewards)}
    found = with_extras(["reference_rewards"], rollouts, tokenizer, **asked)
    assert torch.equal(found.extras["reference_rewards"], rewards)


def test_rows_share_the_continuations_of_a_shared_prefix() -> None:
    rollouts = Rollouts.build([[1], [1], [2]], [[5, 6, 7], [5, 6, 8], [5, 6, 7]], [0, 0, 1])
    branches = torch.tensor([[2, 0, 2], [3, 0, 0], [0, 1, 0]])
    asked: list[Any] = []

    def continued(rows: list[int], prefixes: list[Any], counts: list[int]) -> Rollouts:
        asked.extend(zip(rows, [p.tolist() for p in prefixes], counts, strict=True))
        groups = [g for g, n in enumerate(counts) for _ in range(n)]
        rewards = torch.arange(len(groups), dtype=torch.float32)
        rewards[0] = float("nan")
        return Rollouts.build([[1]] * len(groups), [[3]] * len(groups), groups, rewards=rewards)

    values = segment_values(rollouts, branches, continued)
    assert asked == [(0, [1], 3), (0, [1, 5, 6], 2), (2, [2, 5], 1)]
    nan = float("nan")
    # Rewards nan, 1, 2 at the shared root; 3, 4 behind two tokens; 5 in the other prompt.
    wanted = torch.tensor([[1.5, nan, 3.5], [1.5, nan, nan], [nan, 5.0, nan]])
    torch.testing.assert_close(values, wanted, equal_nan=True)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_the_frozen_policy_is_the_one_at_load(lora: Any) -> None:
    from tiny_models import tiny_llama
    from tokenloom.policy import ModelConfig

    model = tiny_llama()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(ids).logits
    policy = Policy(model, config=ModelConfig(lora=lora))
    policy.prepare(["ref_logprobs"])
    with torch.no_grad():
        for _, p in policy.trainable_parameters():
            p.add_(0.1)
        with policy.frozen() as old:
            torch.testing.assert_close(old.model(ids).logits, before)
        assert not torch.allclose(policy.model(ids).logits, before)
