"""What is collected beside the responses: where the answer stands, and what the reference would have got."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenloom.batch import Rollouts
from tokenloom.policy import Policy
from tokenloom.train.extras import answer_mask, with_extras


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

    def never() -> Rollouts:
        raise AssertionError("the reference was asked")

    assert with_extras([], rollouts, tokenizer, never) is rollouts
    assert set(with_extras(["answer_mask"], rollouts, tokenizer, never).extras) == {"answer_mask"}
    rewards = torch.tensor([0.25])
    found = with_extras(["reference_rewards"], rollouts, tokenizer, lambda: rollouts.replace(rewards=rewards))
    assert torch.equal(found.extras["reference_rewards"], rewards)


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
