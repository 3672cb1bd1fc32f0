"""`Item`: one problem, known by the content of its prompt, never by its position or seed."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

Message = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One problem: what the model is shown and what is expected of it.

    Exactly one of `messages` (a chat, each message with `role` and `content`) and `prompt`
    (plain text to be continued) is given. `answer` is whatever the verifier compares with;
    `metadata` carries what else a verifier needs. Both must be JSON-able, since they travel
    to worker processes and into run folders.

    Raises:
        ValueError: when neither or both prompts are given, or a message is malformed.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    answer: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("an item has either `messages` (a chat) or `prompt` (plain text), exactly one of them")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise ValueError(f"`prompt` must be text, got {type(self.prompt).__name__}")
        if self.messages is not None:
            object.__setattr__(self, "messages", _checked_messages(self.messages))

    @cached_property
    def key(self) -> str:
        """Hex SHA-256 of the prompt's content.

        Depends on roles and contents only: not on the answer, the metadata, the order of JSON
        keys, Unicode composition, or blanks around a message. A plain prompt and a chat of one
        user message with the same text have the same key, since a model that saw one saw the other.
        """
        chat = self.messages if self.messages is not None else ({"role": "user", "content": self.prompt or ""},)
        normal = [[message["role"], unicodedata.normalize("NFC", message["content"]).strip()] for message in chat]
        return hashlib.sha256(json.dumps(normal).encode("ascii")).hexdigest()

    @property
    def text(self) -> str:
        """The prompt as a person would read it; roles are shown when there is more than one message."""
        if self.messages is None:
            return self.prompt or ""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_dict` turns back into an equal item."""
        messages = None if self.messages is None else [dict(message) for message in self.messages]
        return {"messages": messages, "prompt": self.prompt, "answer": self.answer, "metadata": self.metadata}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The item that `to_dict` wrote."""
        messages = None if data["messages"] is None else tuple(data["messages"])
        return cls(messages, data["prompt"], data["answer"], dict(data["metadata"]))


def _checked_messages(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"`messages` must be a non-empty list of messages, got {messages!r:.80}")
    for position, message in enumerate(messages):
        where = f"message {position + 1} of {len(messages)}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be an object with `role` and `content`, got {type(message).__name__}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                found = "is missing" if name not in message else f"is {type(message[name]).__name__}, not text"
                raise ValueError(f"`{name}` of {where} {found}")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)
