"""`Aux`: scores of a second model for whatever prefixes come, with a cache that follows them.

A call is matched with the rows of the last one by their ids alone: each prefix goes on from the row it shares most
with, the rest is cropped, and only what is new is read. So beams may be reordered, rows may end, tokens may be taken
back, and drafts may be scored in any order. One forward serves all rows, padding is never read.

Letters: B rows, N prefixes, k candidates, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.decode.session import ROOT, ModelSession, Session
from tokenloom.decode.shapers import wide
from tokenloom.policy.own_logits import trunk_of
from tokenloom.rollout.forward import base_model

# Embedding matrices of one tokenizer are padded to different sizes; those of two tokenizers differ by more.
_PADDING_OF_VOCABULARY = 0.01


class Aux:
    """An auxiliary causal LM, or anything a session can be opened on, such as `Headed` or `TableLM`.

    `pad` is the id that fills prompts on the left (default: the model's own padding or end token; -1 for none). A
    prompt that starts with that very id needs `learn_padding`. Its weights may change only with a `reset`.
    """

    def __init__(self, model: Any, *, pad: int | None = None, **model_options: Any) -> None:
        """`model_options` go to every forward, e.g. `output_hidden_states=True`; see `output`."""
        self.model, self._options = model, model_options
        self.pad = _padding_of(model) if pad is None else pad
        self._known_padding: dict[tuple[int, ...], int] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self._session: Session | None = None
        self._last: Tensor | None = None

    @property
    def output(self) -> Any:
        """What the model returned last."""
        return None if self._session is None else getattr(self._session, "output", None)

    def next(self, input_ids: Tensor) -> Tensor:
        """Scores [B, V] of what follows `input_ids` [B, T], padded on the left as `generate` hands them on.

        At least float32, on the device of the ids.

        Raises:
            ValueError: for more tokens than the model was made for.
        """
        return self.scores(self.unpadded(input_ids)).to(input_ids.device)

    def scores(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """Scores [N, V] of what follows each prefix (ids without padding); equal prefixes are read once.

        Raises:
            ValueError: for an empty prefix, or more tokens than the model was made for.
        """
        wanted = [tuple(p) for p in prefixes]
        distinct = list(dict.fromkeys(wanted))
        scores = self._settle([list(p) for p in distinct])
        place = {prefix: i for i, prefix in enumerate(distinct)}
        return wide(scores[[place[p] for p in wanted]])

    def candidates(self, prefixes: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
        """Scores [N, k, V] after each prefix and one of its `tokens` [N, k] more; the prefixes stay what is cached.

        Raises:
            ValueError: as `scores`.
        """
        self._settle([list(p) for p in prefixes], more=1)
        assert self._session is not None
        with evaluating(self.model):
            return wide(self._session.try_nodes(tokens, torch.full_like(tokens, ROOT)))

    def learn_padding(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Note where the prompts `input_ids` [B, P] begin, for those that start with the padding id itself."""
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            self._known_padding[tuple(ids)] = mask.index(1)

    def unpadded(self, input_ids: Tensor) -> list[list[int]]:
        """The ids [B, T] without the padding on the left; one id stays of a row of padding alone."""
        return [ids[self._padding(ids) :] for ids in input_ids.tolist()]

    def _padding(self, ids: list[int]) -> int:
        for width in {len(prompt) for prompt in self._known_padding}:
            if tuple(ids[:width]) in self._known_padding:
                return self._known_padding[tuple(ids[:width])]
        return next((i for i, token in enumerate(ids) if token != self.pad), len(ids) - 1)

    def _settle(self, prefixes: list[list[int]], more: int = 0) -> Tensor:
        """Make the session's rows the prefixes; scores [N, V] after them. Room for `more` tokens is checked."""
        if not prefixes or not all(prefixes):
            raise ValueError("an auxiliary model needs prefixes of at least one token each")
        with evaluating(self.model):
            if self._session is None or self._last is None:
                return self._read_anew(prefixes, more)
            self._check_length(self._session, prefixes, more)
            sources, shared = _sources(self._session.rows, prefixes)
            if all(
                n == len(p) == len(self._session.rows[s]) for s, n, p in zip(sources, shared, prefixes, strict=True)
            ):
                self._follow(sources)
                self._last = self._last[sources]
                return self._last
            # A row gives scores only for tokens that it reads now: at least its last one.
            kept = [min(n, len(p) - 1) for n, p in zip(shared, prefixes, strict=True)]
            if min(kept) == 0:
                return self._read_anew(prefixes, more)
            self._follow(sources)
            if kept != [len(row) for row in self._session.rows]:
                self._session.crop(kept)
            self._last = self._session.extend([p[n:] for p, n in zip(prefixes, kept, strict=True)])
            return self._last

    def _follow(self, sources: list[int]) -> None:
        assert self._session is not None
        if sources != list(range(len(self._session.rows))):
            self._session.branch(sources)

    def _read_anew(self, prefixes: list[list[int]], more: int) -> Tensor:
        own = getattr(self.model, "open_session", None)
        # Not `open_session`: its lean modules would stay in the model between calls, and so would weights of before.
        session = ModelSession(self.model, prefixes, **self._options) if own is None else own(prefixes)
        self._check_length(session, prefixes, more)
        self._session, self._last = session, session.start()
        return self._last

    def _check_length(self, session: Session, prefixes: list[list[int]], more: int) -> None:
        most = getattr(session, "positions", None)
        longest = max(len(p) for p in prefixes) + more
        if most is not None and longest > most:
            raise ValueError(
                f"the auxiliary model {type(self.model).__name__} was made for {most} tokens and the text has "
                f"{longest}; generate fewer, or take an auxiliary model with a longer context"
            )


class Headed(nn.Module):
    """A trunk whose output per token is `head(hidden [B, n, D]) -> [B, n, K]`: values, rewards or embeddings.

    `trunk` is a causal LM, of which its own head is left off, or the part before the head. It is what `Aux` and
    sessions take for a model, and its `logits` are the head's results.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        inner = base_model(trunk)
        self.trunk = trunk_of(inner) if hasattr(inner, "lm_head") else inner
        self.head = head
        self.config = self.trunk.config
        self._accepted = set(inspect.signature(self.trunk.forward).parameters)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """`logits` [B, n, K] of ids [B, n], as a causal LM's forward gives its own."""
        given: dict[str, Any] = {"cache" if "cache" in self._accepted else "past_key_values": past_key_values}
        if "position_ids" in self._accepted:
            given["position_ids"] = position_ids
        output = self.trunk(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            use_cache=use_cache,
            return_dict=True,
            **given,
        )
        return SimpleNamespace(logits=self.head(output[0]), past_key_values=past_key_values)


def aligned(scores: Tensor, vocab: int, missing: float = -torch.inf) -> Tensor:
    """The auxiliary `scores` [..., V'] for a vocabulary of `vocab` ids: cut, or filled up with `missing`.

    Raises:
        ValueError: when the sizes differ by more than padding of one tokenizer's embeddings explains.
    """
    found = scores.shape[-1]
    if abs(found - vocab) > _PADDING_OF_VOCABULARY * max(found, vocab):
        raise ValueError(
            f"the auxiliary model has a vocabulary of {found} tokens and the decoded one of {vocab}; both must have "
            "the same tokenizer"
        )
    return nn.functional.pad(scores, (0, vocab - found), value=missing)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; each module's flag is put back."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _padding_of(model: Any) -> int:
    for owner in (getattr(base_model(model), "generation_config", None), getattr(base_model(model), "config", None)):
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(owner, name, None)
            if found is not None:
                return int(found[0] if isinstance(found, list) else found)
    return -1


def _sources(rows: list[list[int]], prefixes: list[list[int]]) -> tuple[list[int], list[int]]:
    """For each prefix the row that it shares most with, and how many tokens."""
    sources, shared = [], []
    for i, prefix in enumerate(prefixes):
        # Where nothing was reordered, the row of the same number is the one.
        if i < len(rows) and rows[i] == prefix[: len(rows[i])] and len(prefix) - len(rows[i]) <= 1:
            best, source = len(rows[i]), i
        else:
            best, source = max((_common(row, prefix), -j) for j, row in enumerate(rows))
            source = -source
        sources.append(source)
        shared.append(best)
    return sources, shared


def _common(one: list[int], other: list[int]) -> int:
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])
