"""The names that parts may take as positional parameters, with shape and meaning.

A part's needs are read off its signature, so a name here is a contract: one meaning, one shape.
B rows, T response tokens. Everything a plan-time part sees is without gradient.
"""

from __future__ import annotations

from tokenloom.signals import signal_names

EXTRAS: dict[str, str] = {
    "reference_rewards": "[B] reward of one response of the frozen reference to the row's prompt",
    "segment_values": "[B, T] mean reward of extra responses branched before token t; NaN where none were drawn",
    "branch_weights": "[B] product of 1 / branches along the row's path in a tree of responses",
    "answer_mask": "[B, T] bool, the token belongs to the final answer; all False where none was found",
}
"""What is collected beside the responses when a part asks for it, into `Rollouts.extras`."""

VOCABULARY: dict[str, str] = {
    # rollouts
    "tokens": "[B, T] int64 response token ids",
    "lengths": "[B] int64 valid response tokens, tool output included",
    "mask": "[B, T] bool, the policy sampled this token (and its row is kept, after the select stage)",
    "group_ids": "[B] int64, the prompt a row answers",
    "truncated": "[B] bool, stopped by length",
    "answers": "tuple of B parsed answers",
    "prompts": "tuple of B dicts of item metadata",
    "sampler_logprobs": "[B, T] log-probs as the sampling engine reported them",
    "policy_version": "[B] int64, the weights that produced the row",
    "max_tokens": "int, the longest response that could have been sampled",
    # collected on demand
    **EXTRAS,
    # rewards
    "outcomes": "[B] rewards as the verifiers gave them, before the reward stage",
    "rewards": "[B] rewards after the reward stage; NaN marks a row that could not be scored",
    "reward_components": "dict of [B] unweighted rewards by verifier",
    "token_rewards": "[B, T] rewards by token; an outcome sits on the last sampled token",
    # signals
    "logprobs": "[B, T] log-probs under the policy being trained, with gradient in the loss",
    "old_logprobs": "[B, T] log-probs at the start of the update",
    "ref_logprobs": "[B, T] log-probs of the frozen reference",
    "entropies": "[B, T] nats; with gradient in the loss, those of the start of the update in the plan",
    "values": "[B, T] critic before token t; with gradient in the loss, old_values in the plan",
    "old_values": "[B, T] critic at the start of the update",
    # what stages hand on
    "advantages": "[B, T]",
    "normalized_entropies": "[B, T] in [-1, 1], how uncertain a token was compared with the batch",
    "returns": "[B, T] regression targets of the critic",
    "blend_advantages": "[B, T] advantages of the second branch",
    "blend": "[B, T] share of the first branch, in [0, 1]",
    "keep": "[B] bool, rows that survive the select stage",
    "weights": "[B, T] product of the plan-time weight parts so far",
    "log_ratio": "[B, T] from the log_ratio stage, with gradient",
    "ratio": "[B, T] exp of the clamped log_ratio, with gradient",
    "lo": "lower limit of the ratio, a number or [B, T]",
    "hi": "upper limit of the ratio, a number or [B, T]",
    "cap": "limit of the ratio for negative advantages, a number or [B, T]",
    # sampling
    "logits": "[N, V] float32 next-token logits while sampling, before the temperature",
    # surroundings
    "step": "int, 0-based training step",
    "total_steps": "int, or None when open-ended",
    "generator": "torch.Generator on the tensors' device",
    "state": "what the part returned as state at the previous step, None at first",
}

CURRENT = frozenset({"logprobs", "log_ratio", "ratio"})
"""Names that exist only once the policy being trained has spoken."""

GIVEN_BY_ADVANTAGES = frozenset({"normalized_entropies", "returns"})
"""Names that exist when the advantage part hands them on beside its advantages."""


def known_names() -> list[str]:
    """Every injectable name, registered signals included."""
    return [*VOCABULARY, *signal_names()]
