"""How well a smaller model stands in for a larger one, on texts that the larger one sampled.

With p the teacher's law at a place and q the student's, means over the places of held-out samples:

    kl            sum_v p(v) (log p(v) - log q(v)), nats
    agreement     share of places where both have the same most probable token
    acceptance    sum_v min(p(v), q(v)): the chance that speculative sampling accepts one draft of q, at temperature 1
    round_tokens  tokens that a round of K drafts gives: 1 + sum_{k=1..K} E_{y ~ p} prod_{i<k} min(1, q(y_i) / p(y_i))

The last is exact in expectation: the product is the chance of k drafts being accepted, as sum_y prod_i min(p, q)(y_i),
and the texts were drawn from p. Only places with K sampled tokens before the end of the text count there.

Letters: N tokens, D hidden size, V vocabulary, K drafts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.hidden_states import evaluating, padded
from tokenloom.decode.student_samples import Sampled
from tokenloom.policy.head import LogprobHead
from tokenloom.policy.own_logits import run_trunk, trunk_of
from tokenloom.rollout.forward import base_model

QUALITY_FILE = "quality.json"
DRAFTS = 4


@dataclass(frozen=True)
class Quality:
    """See the module; `layers` are those of the teacher that the student keeps."""

    kl: float
    agreement: float
    acceptance: float
    round_tokens: float
    drafts: int
    heldout_tokens: int
    training_tokens: int
    layers: list[int]
    teacher: str = ""

    def save(self, folder: Path) -> None:
        """Write `quality.json`."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / QUALITY_FILE).write_text(text, encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, folder: Path) -> Quality:
        """Read `quality.json`.

        Raises:
            ValueError: when it is of another form.
        """
        path = folder / QUALITY_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} was not written by `tokenloom distill`: {error}") from error

    def line(self) -> str:
        """In one line."""
        return (
            f"KL {self.kl:.3f} nats, same best token {self.agreement:.1%}, acceptance {self.acceptance:.1%}, "
            f"{self.round_tokens:.2f} tokens a round of {self.drafts} drafts ({self.heldout_tokens:,} held-out tokens)"
        )


def measure(
    policy: Any,
    student: Any,
    rows: Sequence[Sampled],
    *,
    drafts: int = DRAFTS,
    batch: int = 8,
    layers: Sequence[int] = (),
    training_tokens: int = 0,
    teacher: str = "",
    report: Callable[[int, int, int], None] | None = None,
) -> Quality:
    """The quality of `student` (a causal LM) for the teacher in `policy` on the teacher's samples `rows`.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError("the quality of a student is measured on samples, and there are none")
    heads = LogprobHead(base_model(policy.model)), LogprobHead(student)
    trunk, found, logs = trunk_of(student), list[Tensor](), list[Tensor]()
    tokens = 0
    with torch.no_grad(), evaluating(student), policy.autocast():
        for begin in range(0, len(rows), batch):
            some = rows[begin : begin + batch]
            ids, mask = padded([[*row.prompt, *row.response] for row in some], policy.device)
            hidden = run_trunk(trunk, ids, mask=mask.long())
            for i, row in enumerate(some):
                own = hidden[i, row.begin : row.begin + len(row.response)]
                compared, log_ratio = _compared(*heads, row.states.to(policy.device), own, row.response)
                found.append(compared)
                logs.append(log_ratio)
                tokens += len(row.response)
            if report is not None:
                report(min(begin + batch, len(rows)), len(rows), tokens)
    kl, agreement, acceptance = torch.cat(found).double().mean(0).tolist()
    return Quality(
        kl=kl, agreement=agreement, acceptance=acceptance, round_tokens=round_tokens(logs, drafts), drafts=drafts,
        heldout_tokens=tokens, training_tokens=training_tokens, layers=list(layers), teacher=teacher,
    )  # fmt: skip


def round_tokens(log_ratios: Sequence[Tensor], drafts: int) -> float:
    """Expected tokens of a round from log q - log p [N] of each sampled text; NaN where every text is too short."""
    chances = []
    for ratios in log_ratios:
        if len(ratios) >= drafts:
            accepted = ratios.double().clamp(max=0).unfold(0, drafts, 1)
            chances.append(accepted.cumsum(-1).exp().sum(-1))
    return 1 + float(torch.cat(chances).mean()) if chances else float("nan")


def _compared(
    teach: LogprobHead, learn: LogprobHead, given: Tensor, own: Tensor, response: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """KL, agreement and acceptance [N, 3] at each token, and log q - log p [N] of the tokens of `response`."""
    tokens = torch.tensor(list(response), device=own.device)
    found, ratios = [], []
    for begin in range(0, len(own), teach.chunk_rows):
        cut = slice(begin, begin + teach.chunk_rows)
        p, q = teach.logits(given[cut]).log_softmax(-1), learn.logits(own[cut]).log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        same = (p.argmax(-1) == q.argmax(-1)).to(kl)
        found.append(torch.stack([kl, same, torch.minimum(p, q).exp().sum(-1)], -1).cpu())
        ratios.append((q - p).gather(1, tokens[cut, None])[:, 0].cpu())
    return torch.cat(found), torch.cat(ratios)
