"""Tool output as token ids that continue a response."""

from __future__ import annotations

from typing import Any

# Placeholders that no chat template touches and no tool writes.
_TURN = "\u27eatokenloom-turn\u27eb"
_ANSWER = "\u27eatokenloom-answer\u27eb"


def answer_ids(policy: Any, text: str, *, ended_by: int | None, chat: bool) -> list[int]:
    """Ids to append after a turn for the tool output `text`.

    After an end token (`ended_by`) in a chat, `text` becomes a user message and the template opens
    the model's next turn; otherwise it continues the turn as it is. Special tokens written out in
    `text` are split into ordinary pieces: what a tool returns cannot end or open a turn.
    """
    tokenizer = policy.tokenizer
    if not (chat and ended_by is not None and getattr(tokenizer, "chat_template", None)):
        return _plain(tokenizer, text)
    before, after = _around(tokenizer)
    opening = _special(tokenizer, before)
    # The template closes the model's turn with the end token that the model has already written.
    if opening and opening[0] == ended_by:
        opening = opening[1:]
    return opening + _plain(tokenizer, text) + _special(tokenizer, after)


def _around(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes between a turn and a user message, and from there to the next turn."""
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _TURN},
        {"role": "user", "content": _ANSWER},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    _, found, rest = text.partition(_TURN)
    before, found_too, after = rest.partition(_ANSWER)
    if not (found and found_too):
        raise ValueError(
            "the chat template does not show earlier turns as they are, so tool output has no place in it; "
            "let a stop string end the turns (such as '</calc>'), or give the tokenizer another chat template"
        )
    return before, after


def _special(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
