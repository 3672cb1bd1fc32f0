"""A check at load: does what Tokenloom computes agree with the model's own code on a few tokens?

Three things are compared in the model's own number format. The padded forward with one row at a
time; the padded forward with itself under another padding token; and the head's log-probs with
the log-softmax of the logits that the model itself returns.
This is what makes "any Hugging Face causal LM" true: a model with a surprise falls back to slower code.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom.policy.head import LogprobHead
from tokenloom.policy.own_logits import run_trunk, trunk_of
from tokenloom.policy.tree import build_tree, shared_lengths, sorted_rows
from tokenloom.policy.tree_forward import MaskKinds

log = logging.getLogger(__name__)

_LENGTHS = (3, 7, 12)


@dataclass(frozen=True)
class SelfTest:
    """Errors found and allowed; `head` in nats, the others relative to the hidden states' norm."""

    forward_error: float
    forward_tolerance: float
    filler_error: float
    filler_tolerance: float
    head_error: float
    head_tolerance: float
    tree_error: float
    kinds: MaskKinds
    """How attention learns of shared prefixes: the best way that agrees, or the last one tried."""
    failed: tuple[str, ...] = ()
    """Better ways that were tried in vain."""

    @property
    def tree_agrees(self) -> bool:
        """Sharing prefixes changes nothing beyond rounding."""
        return self.tree_error <= self.forward_tolerance

    @property
    def forward_agrees(self) -> bool:
        """Right padding changes nothing beyond rounding."""
        return self.forward_error <= self.forward_tolerance and self.filler_error <= self.filler_tolerance

    @property
    def head_agrees(self) -> bool:
        """The fused log-probs are the model's own."""
        return self.head_error <= self.head_tolerance

    def warn(self, name: str) -> None:
        """Say once what disagreed for the model class `name`, and what happens instead."""
        if not self.tree_agrees:
            log.warning(
                "%s: computing shared prefixes once changes the hidden states by %.1e (rounding explains %.1e); "
                "every row now brings its own prefix, which is slower",
                name,
                self.tree_error,
                self.forward_tolerance,
            )
        elif self.failed:
            log.warning(
                "%s: attention on prefix trees by %s disagrees with the model's own; by %s, which is slower, it agrees",
                name,
                " and ".join(self.failed),
                self.kinds.style,
            )
        if not self.forward_agrees:
            log.warning(
                "%s: right padding changes the hidden states: by %.1e (rounding explains %.1e), and by %.1e "
                "(%.1e) with the padding token; rows of different lengths now go through the model "
                "separately, which is slower",
                name,
                self.forward_error,
                self.forward_tolerance,
                self.filler_error,
                self.filler_tolerance,
            )
        if not self.head_agrees:
            log.warning(
                "%s: log-probs from the head's weight, bias, scale and soft-cap differ from the model's own "
                "by %.1e nats (rounding explains %.1e); its own head is used instead, which is slower",
                name,
                self.head_error,
                self.head_tolerance,
            )


@torch.no_grad()
def self_test(causal: nn.Module, head: LogprobHead, kinds: MaskKinds) -> SelfTest:
    """Compare on three rows of 3 to 12 fixed tokens. NaN counts as disagreement."""
    model: Any = causal
    config = model.config.get_text_config()
    vocabulary, layers = int(config.vocab_size), int(getattr(config, "num_hidden_layers", 1))
    trunk = trunk_of(causal)
    weight = next(causal.parameters())
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (n,), generator=generator) for n in _LENGTHS]
    together, again = (run_trunk(trunk, _padded(rows, shift, vocabulary).to(weight.device)) for shift in (0, 1))
    forward_error = filler_error = head_error = head_tolerance = 0.0
    for i, row in enumerate(rows):
        tokens = row.to(weight.device)
        alone = run_trunk(trunk, tokens[None])[0]
        norms = alone.double().norm(dim=-1)
        forward_error = _worst(forward_error, (together[i, : len(row)] - alone).double().norm(dim=-1) / norms)
        filler_error = _worst(filler_error, (together - again)[i, : len(row)].double().norm(dim=-1) / norms)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        own = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        # Scored at the tokens themselves and at the least likely ones, where a wrong scale shows most.
        for targets in (tokens, own.argmin(-1)):
            ours = head(alone, targets).logprobs
            head_error = _worst(head_error, (ours - own.gather(-1, targets[:, None])[:, 0]).double())
        head_tolerance = max(head_tolerance, _head_tolerance(head, alone, logits))
    forward_tolerance = _forward_tolerance(weight.dtype, layers)
    failed = []
    for tried in kinds.fallbacks(weight.device):
        tree_error = _tree_error(trunk, tried, rows[-1].to(weight.device), weight.dtype)
        if tree_error <= forward_tolerance:
            break
        failed.append(tried.style)
    return SelfTest(
        tree_error=tree_error,
        kinds=tried,
        failed=tuple(failed),
        forward_error=forward_error,
        forward_tolerance=forward_tolerance,
        filler_error=filler_error,
        # The same shapes run the same code: equal to the bit, but for experts, whose batches change.
        filler_tolerance=8 * torch.finfo(weight.dtype).eps,
        head_error=head_error,
        head_tolerance=head_tolerance,
    )


def _tree_error(trunk: nn.Module, kinds: MaskKinds, row: Tensor, dtype: torch.dtype) -> float:
    """Relative error of hidden states when the row, its half, and a row that leaves it midway share a tree.

    Infinite when the model cannot be run so.
    """
    middle = len(row) // 2
    rows = [row[:middle], row, torch.cat([row[:middle], row[:middle].flip(0)])]
    order = sorted_rows([r.tolist() for r in rows])
    chosen = [rows[i].cpu() for i in order]
    tree = kinds.padded(build_tree(order, chosen, shared_lengths(chosen)), row.device)
    try:
        mask = kinds.build([tree], len(tree), dtype, row.device)
        positions = tree.depth[None].to(row.device)
        together = run_trunk(trunk, tree.tokens[None].to(row.device), mask=mask, positions=positions)[0]
    except Exception as error:
        # A model without positions or with an attention of its own may refuse the arguments, and what fails in a
        # compiler is none of our business: whatever it was, this way is closed.
        log.info("sharing prefixes as %s: %s: %s", kinds.style, type(error).__name__, error)
        return float("inf")
    worst = 0.0
    for i, tokens in enumerate(rows):
        alone = run_trunk(trunk, tokens[None])[0]
        shared = together[tree.nodes[i].to(row.device)]
        worst = _worst(worst, (shared - alone).double().norm(dim=-1) / alone.double().norm(dim=-1))
    return worst


def _padded(rows: list[Tensor], shift: int, vocabulary: int) -> Tensor:
    """Rows filled on the right with their last token plus `shift`."""
    out = torch.empty(len(rows), max(_LENGTHS), dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)], out[i, len(row) :] = row, (row[-1] + shift) % vocabulary
    return out


def _worst(so_far: float, errors: Tensor) -> float:
    worst = float(errors.abs().max())
    return float("inf") if worst != worst else max(so_far, worst)


def _forward_tolerance(dtype: torch.dtype, layers: int) -> float:
    """Relative rounding error of two evaluations that differ in the order of summation.

    A layer rounds about ten times on the residual path; errors of random sign add up as a root. Half
    an eps each, two evaluations, and a factor 8 for the worst token and for what a layer amplifies.
    """
    return float(8 * torch.finfo(dtype).eps * (10 * max(layers, 1)) ** 0.5)


def _head_tolerance(head: LogprobHead, hidden: Tensor, logits: Tensor) -> float:
    """Twice the error of a logit: a dot product summed in float32 or better, and three roundings."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    linear = head.linear
    norms = linear.weight.double().norm(dim=-1).max() if isinstance(linear, nn.Linear) else torch.ones(())
    product = float(hidden.double().norm(dim=-1).max() * norms) * abs(head.shape.scale)
    largest = float(logits.double().abs().max())
    return 2 * (torch.finfo(wide).eps * 8 * product + 3 * torch.finfo(logits.dtype).eps * largest)
