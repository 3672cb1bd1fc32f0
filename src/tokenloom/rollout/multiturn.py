"""Episodes of several turns: the model writes, an environment answers, until it says done.

The unit is the token, never the text: what was sampled is kept as ids, what the environment says is
tokenized once and appended with `mask` False. So log-probs recorded at sampling stay those of the
same ids in the same context, which re-tokenizing a transcript would not guarantee.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tokenloom.batch import Rollouts, Sampling
from tokenloom.rollout.decode import ShapeLogits
from tokenloom.rollout.engine import sample
from tokenloom.rollout.forward import model_positions
from tokenloom.rollout.randomness import base_seed, row_key
from tokenloom.rollout.record import Request, Response
from tokenloom.rollout.sampler import check_sampling
from tokenloom.rollout.transcript import answer_ids
from tokenloom.tasks.environment import Environment
from tokenloom.tasks.item import Item

log = logging.getLogger(__name__)


@dataclass
class _Episode:
    environment: Environment
    group: int
    copy: int
    prompt: tuple[int, ...]
    chat: bool
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reward: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    truncated: bool = False

    def append(self, ids: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """Sampled tokens with their log-probs, or tool output (None)."""
        self.tokens += ids
        self.mask += [logprobs is not None] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


def run_episodes(
    policy: Any,
    environment: Callable[[], Environment],
    items: Sequence[Item],
    sampling: Sampling,
    *,
    copies: int,
    max_turns: int = 8,
    total_tokens: int | None = None,
    generator: torch.Generator | None = None,
    max_rows: int | None = None,
    shape_logits: ShapeLogits | None = None,
    speculate: int = 0,
) -> Rollouts:
    """`copies` episodes of each item, one environment each; the episodes' turns are generated together.

    `sampling.max_tokens` bounds one turn, `total_tokens` the whole response, tool output included
    (None: only the model's positions bound it), `max_turns` the model's turns. `truncated` says that
    a bound ended the episode, or its last turn; the reward is what had been earned by then. `tokens` and
    `lengths` include tool output, `mask` and `sampler_logprobs` speak of sampled tokens only.
    `answers` are the `answer` entries of each episode's last `info`. `group_ids` index `items`; all
    copies of an item are reset with the same seed, and so start equal.

    Tool output continues the model's own turn as plain text when a stop string ended the turn (a
    call in mid-sentence), and becomes a user message of the chat template when an end token did.
    Its text never turns into special tokens. Every turn prefills the whole context again, once for
    equal contexts.

    An environment that raises in `step` costs its episode: it ends, with the reward it had, and a
    warning is logged. Errors of `reset` are raised.

    Raises:
        ValueError: as `generate` does, and when bounds are not positive.
    """
    check_sampling(sampling)
    for name, bound in (("max_turns", max_turns), ("copies", copies), ("total_tokens", total_tokens)):
        if bound is not None and bound < 1:
            raise ValueError(f"{name} is {bound}, must be >= 1")
    seed = base_seed(generator, sampling.seed)
    episodes = _start(policy, environment, items, copies, seed)
    positions = model_positions(policy)
    for turn in range(max_turns):
        going = []
        for episode in (e for e in episodes if not e.done):
            # An episode that goes on has room; only a first prompt may not, and `sample` refuses it.
            limit = max(1, min(_room(episode, total_tokens, positions), sampling.max_tokens))
            going.append((episode, Request(episode.prompt + tuple(episode.tokens), episode.copy, limit)))
        if not going:
            break
        requests = [request for _, request in going]
        responses = sample(
            policy, requests, sampling, seed, max_rows=max_rows, shape_logits=shape_logits, speculate=speculate
        )
        for (episode, _), response in zip(going, responses, strict=True):
            _turn(policy, episode, response, _room(episode, total_tokens, positions), turn == max_turns - 1)
    return _collect(policy, episodes, replace(sampling, seed=seed))


def _start(
    policy: Any, environment: Callable[[], Environment], items: Sequence[Item], copies: int, seed: int
) -> list[_Episode]:
    episodes = []
    seen: dict[tuple[int, ...], int] = {}
    for group, item in enumerate(items):
        # 31 bits, which every random number generator of an environment takes as a seed.
        start = row_key(seed, tuple(item.key.encode("ascii")), 0) & (2**31 - 1)
        for _ in range(copies):
            played = environment()
            first = played.reset(item, start)
            shown = first.messages if first.messages is not None else first.text
            prompt = tuple(policy.encode_prompt(shown).tolist())
            copy = seen.get(prompt, 0)
            seen[prompt] = copy + 1
            episodes.append(_Episode(played, group, copy, prompt, first.messages is not None))
    return episodes


def _room(episode: _Episode, total_tokens: int | None, positions: int | None) -> int:
    """How many more response tokens fit."""
    used = len(episode.tokens)
    room = [2**31] if total_tokens is None else [total_tokens - used]
    if positions is not None:
        room.append(positions - len(episode.prompt) - used)
    return min(room)


def _turn(policy: Any, episode: _Episode, response: Response, room: int, last: bool) -> None:
    """Append what was sampled and, if the episode goes on and it fits, what the environment answers."""
    ids = response.tokens.tolist()
    episode.append(ids, response.logprobs.tolist())
    ended = bool(ids) and ids[-1] in policy.eos_ids
    text = policy.tokenizer.decode(
        ids[:-1] if ended else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    try:
        step = episode.environment.step(text)
        reward = float(step.reward)
    except Exception as error:
        log.warning("an environment raised %s: %s; its episode ends here", type(error).__name__, error)
        episode.done, episode.info = True, {"error": f"{type(error).__name__}: {error}"}
        return
    episode.reward += reward
    episode.info = dict(step.info)
    episode.done = step.done
    if step.done or last:
        episode.truncated = response.truncated if step.done else True
        return
    answer = answer_ids(policy, step.observation or "", ended_by=ids[-1] if ended else None, chat=episode.chat)
    if len(answer) < room - len(ids):
        episode.append(answer, None)
    else:
        # An answer that leaves no room to react to it would be dead weight: the episode ends before it.
        episode.done = episode.truncated = True


def _collect(policy: Any, episodes: Sequence[_Episode], sampling: Sampling) -> Rollouts:
    answers = tuple(episode.info.get("answer") for episode in episodes)
    return Rollouts.build(
        [e.prompt for e in episodes],
        [e.tokens for e in episodes],
        [e.group for e in episodes],
        pad_id=0 if policy.pad_id is None else policy.pad_id,
        response_masks=[e.mask for e in episodes],
        sampler_logprobs=[e.logprobs for e in episodes],
        rewards=torch.tensor([e.reward for e in episodes], dtype=torch.float32),
        truncated=torch.tensor([e.truncated for e in episodes], dtype=torch.bool),
        answers=answers,
        sampling=sampling,
    )
