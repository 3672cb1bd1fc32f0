"""Responses with their scores, single-turn or through an environment: what training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.batch import Rollouts, Sampling
from tokenloom.policy import Policy
from tokenloom.rollout import generate
from tokenloom.rollout.decode import ShapeLogits
from tokenloom.rollout.multiturn import run_episodes
from tokenloom.rollout.record import Response
from tokenloom.tasks import Item, Scores, Verifier
from tokenloom.tasks.task import EnvironmentFactory

Report = Callable[[int, int, int], None]

RIGHT = 1 - 1e-9
"""An environment's reward from which an episode counts as right; verifiers say so themselves."""


@dataclass(frozen=True)
class Responses:
    """Rollouts with rewards, their texts (special tokens left out), and which rows are right."""

    rollouts: Rollouts
    texts: list[str]
    correct: list[bool]
    errors: int
    messages: list[str]


class Responder:
    """Lets a policy answer items and scores the answers with a verifier, or with the task's environment."""

    def __init__(
        self,
        policy: Policy,
        verifier: Verifier,
        *,
        environment: EnvironmentFactory | None = None,
        max_rows: int | None = None,
        max_turns: int = 8,
        total_tokens: int | None = None,
    ) -> None:
        self.policy, self.verifier, self.environment, self.max_rows = policy, verifier, environment, max_rows
        self.max_turns, self.total_tokens = max_turns, total_tokens

    def respond(
        self,
        items: Sequence[Item],
        sampling: Sampling,
        *,
        copies: int,
        generator: torch.Generator,
        report: Report | None = None,
        shape: Callable[[Tensor], Tensor] | None = None,
    ) -> Responses:
        """`copies` responses to each item, rows item by item, `group_ids` the item's index."""
        shape_logits = None if shape is None else (lambda logits, _step: shape(logits))
        if self.environment is not None:
            rollouts = run_episodes(
                self.policy,
                self.environment,
                items,
                sampling,
                copies=copies,
                max_turns=self.max_turns,
                total_tokens=self.total_tokens,
                generator=generator,
                max_rows=self.max_rows,
                shape_logits=shape_logits,
            )
            rewards = rollouts.rewards if rollouts.rewards is not None else torch.zeros(len(rollouts))
            texts = self._texts([rollouts.response(i).tolist() for i in range(len(rollouts))])
            return Responses(rollouts, texts, [bool(r >= RIGHT) for r in rewards], 0, [])
        rollouts, texts, scores = self._scored(
            [self.policy.encode_prompt(i.messages or i.prompt or "") for i in items],
            items,
            sampling,
            counts=[copies] * len(items),
            generator=generator,
            report=report,
            shape_logits=shape_logits,
        )
        rollouts = rollouts.replace(
            rewards=torch.tensor(scores.rewards, dtype=torch.float32),
            reward_components={k: torch.tensor(v, dtype=torch.float32) for k, v in scores.components.items()},
            answers=tuple(scores.answers),
            prompts=tuple(items[int(g)].metadata for g in rollouts.group_ids),
        )
        return Responses(rollouts, texts, scores.correct, scores.errors + scores.timeouts, scores.messages)

    def under(self, policy: Policy) -> Responder:
        """The same with another policy."""
        return Responder(
            policy,
            self.verifier,
            environment=self.environment,
            max_rows=self.max_rows,
            max_turns=self.max_turns,
            total_tokens=self.total_tokens,
        )

    def continue_from(
        self,
        items: Sequence[Item],
        prompt_lengths: Sequence[int],
        prefixes: Sequence[Tensor],
        sampling: Sampling,
        *,
        counts: Sequence[int],
        generator: torch.Generator,
        report: Report | None = None,
    ) -> Rollouts:
        """`counts` rewarded continuations of each of `prefixes` (prompt and begun response), `group_ids` its number.

        Raises:
            ValueError: for a task with an environment, whose state in the middle of a response is not kept.
        """
        if self.environment is not None:
            raise ValueError(
                "responses of a multi-turn task cannot be continued from the middle; use another algorithm"
            )
        begun = [prefix[length:] for prefix, length in zip(prefixes, prompt_lengths, strict=True)]
        rollouts, _, scores = self._scored(
            prefixes, items, sampling, counts=counts, generator=generator, report=report, begun=begun
        )
        return rollouts.replace(rewards=torch.tensor(scores.rewards, dtype=torch.float32))

    def _scored(
        self,
        prompts: Sequence[Tensor],
        items: Sequence[Item],
        sampling: Sampling,
        *,
        counts: Sequence[int],
        generator: torch.Generator,
        report: Report | None,
        shape_logits: ShapeLogits | None = None,
        begun: Sequence[Tensor] | None = None,
    ) -> tuple[Rollouts, list[str], Scores]:
        """Responses to `prompts`, their texts and scores; `begun` is what each prompt has of the response already.

        Verifiers get a response as soon as it has ended, while others still decode.
        """
        groups = [group for group, count in enumerate(counts) for _ in range(count)]
        with self.verifier.stream([items[g] for g in groups]) as stream:

            def finished(row: int, response: Response) -> None:
                head = [] if begun is None else begun[groups[row]].tolist()
                stream.add(row, self._texts([head + response.tokens.tolist()])[0])

            rollouts = generate(
                self.policy,
                prompts,
                sampling,
                copies=counts,
                generator=generator,
                progress=report,
                max_rows=self.max_rows,
                shape_logits=shape_logits,
                on_finished=finished,
            )
            return rollouts, stream.responses, stream.scores()

    def _texts(self, rows: list[list[int]]) -> list[str]:
        texts: list[str] = self.policy.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts
