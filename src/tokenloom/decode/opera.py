"""OPERA as a loop, for text: beam search with attention-based penalties, and returns to where trust went wrong.

    model.generate(..., custom_generate=decode.loop("opera", beams=5))

A step takes two forwards: one of all beams' candidates as siblings, whose attention is read, and one of the tokens
chosen. Each prompt of a batch is searched by itself. The model is set to eager attention, which alone hands out its
weights, and back. The rules are in `methods.decoding.opera`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.session import ROOT, Session
from tokenloom.methods.decoding.beam_search import best_continuations
from tokenloom.methods.decoding.opera import candidate_scores, over_trust, penalty, return_to
from tokenloom.rollout.forward import base_model


@dataclass(frozen=True)
class _Beam:
    """A response being written, its log-probability, and per token: attention [its context] and the column c*."""

    ids: tuple[int, ...] = ()
    score: float = 0.0
    attention: tuple[Tensor, ...] = ()
    columns: tuple[int, ...] = ()


@dataclass
class _State:
    """The search after so many tokens: what is needed to come back to it."""

    beams: list[_Beam]
    finished: list[tuple[float, tuple[int, ...]]]
    excluded: list[set[int]] = field(default_factory=list)
    """Tokens of each beam that are not to be chosen again."""
    chosen: list[set[int]] = field(default_factory=list)


@decoder("opera", kind="loop")
class Opera(Loop):
    """Beam search with OPERA's penalty and returns. Nothing is drawn.

    `span_start` and `span_end` delimit the tokens of the prompt that the first words should look at (end 0: its end).
    `patience` is r; `length_penalty` is the power of the length that a finished response's score is divided by.
    """

    def __init__(
        self,
        *,
        beams: int = 5,
        candidates: int = 5,
        alpha: float = 1.0,
        scale: float = 50.0,
        patience: int = 15,
        length_penalty: float = 1.0,
        span_start: int = 0,
        span_end: int = 0,
    ) -> None:
        if beams < 1 or candidates < 1 or patience < 1:
            raise ValueError("opera: beams, candidates and patience must be 1 or more")
        if not (alpha >= 0 and scale > 0):
            raise ValueError(f"opera: alpha must be 0 or more and scale above 0, got {alpha} and {scale}")
        self.width, self.candidates, self.alpha, self.scale = beams, candidates, alpha, scale
        self.patience, self.length_penalty = patience, length_penalty
        self.span = slice(span_start, span_end or None)

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        if run.sample:
            raise ValueError("opera is a search and draws nothing; pass do_sample=False (temperature 0)")
        run.counts |= {"returns": 0.0}
        with _eager(run.model):
            found = [self._search(run, number) for number in range(len(run))]
        for row, ids in enumerate(found):
            run.stream(row, ids)
        return found

    def _search(self, run: Run, number: int) -> list[int]:
        start = len(run.prompts[number])
        state = _State([_Beam()], [])
        history: list[_State] = []
        returns: dict[int, int] = {}
        with run.session([number], output_attentions=True) as session:
            scores = session.start()
            while True:
                # Exclusions belong to the tokens before them: a state that is come back to keeps its own.
                state.excluded = state.excluded or [set() for _ in state.beams]
                history.append(state)
                state, parents = self._step(run, number, session, scores, state)
                if not state.beams or self._is_done(state):
                    return self._best(number, state)
                column = return_to(
                    [b.columns for b in state.beams], returns, patience=self.patience, most_returns=self.candidates
                )
                if column is None:
                    session.branch(parents)
                    scores = session.step(torch.tensor([b.ids[-1] for b in state.beams]))
                    continue
                run.counts["returns"] += 1
                returns[column] = returns.get(column, 0) + 1
                state = history[column + 1]
                del history[column + 1 :]
                for excluded, chosen in zip(state.excluded, state.chosen, strict=True):
                    excluded |= chosen
                # The beams of then: their tokens behind the prompt, which all rows share.
                session.branch([0] * len(state.beams))
                session.crop([start] * len(state.beams))
                scores = session.extend([b.ids for b in state.beams])

    def _step(self, run: Run, number: int, session: Session, scores: Tensor, state: _State) -> tuple[_State, list[int]]:
        """The state one token later, and from which row each of its beams comes."""
        beams = state.beams
        shaped = run.shaped([number] * len(beams), [b.ids for b in beams], scores).double()
        for row, excluded in enumerate(state.excluded):
            without = shaped[row].clone()
            without[list(excluded)] = -torch.inf
            # Where the processors leave nothing else, what was excluded may come again.
            if bool((without > -torch.inf).any()):
                shaped[row] = without
        top = best_continuations(shaped, beams=self.candidates)
        attention = self._attention(session, top)
        penalties, columns = self._penalties(run, number, beams, attention)
        laws = candidate_scores(shaped, top, penalties, alpha=self.alpha).log_softmax(-1)
        # Far below the candidates is not low enough for what is forbidden.
        laws = laws.masked_fill(shaped == -torch.inf, -torch.inf)
        totals = (laws + torch.tensor([[b.score] for b in beams], dtype=laws.dtype, device=laws.device)).flatten()
        order = totals.sort(descending=True, stable=True).indices[: 2 * self.width].tolist()
        after = _State([], list(state.finished))
        state.chosen = [set() for _ in beams]
        parents = []
        for rank, place in enumerate(order):
            row, token = divmod(place, laws.shape[-1])
            total = float(totals[place])
            if total == -torch.inf or len(after.beams) == self.width:
                break
            ids = (*beams[row].ids, token)
            state.chosen[row].add(token)
            full = len(ids) >= run.limit and token not in run.eos
            if not full and run.until_stop(number, beams[row].ids, [token])[1]:
                if rank < self.width:
                    after.finished.append(self._normalized(total, ids))
                continue
            at = (top[row] == token).nonzero()
            # A token beside the candidates has no attention; its score is far below theirs.
            seen = attention[row][int(at)] if len(at) else attention[row][0]
            after.beams.append(_Beam(ids, total, (*beams[row].attention, seen), (*beams[row].columns, columns[row])))
            parents.append(row)
        if len(beams[0].ids) + 1 >= run.limit:
            after.finished += [self._normalized(b.score, b.ids) for b in after.beams]
            after.beams = []
        after.finished = sorted(after.finished, key=lambda entry: -entry[0])[: self.width]
        return after, parents

    def _attention(self, session: Session, candidates: Tensor) -> list[Tensor]:
        """For each beam, [C, context + 1]: where each candidate looks, maximum over heads, normalized."""
        count = candidates.shape[1]
        session.try_nodes(candidates, torch.full_like(candidates, ROOT))
        weights = session.output.attentions[-1].double().amax(1)  # type: ignore[attr-defined]  # [B, C, S]
        length = len(session.rows[0])
        own = weights[:, :, length : length + count].diagonal(dim1=1, dim2=2)[..., None]
        rows = torch.cat((weights[:, :, :length], own), -1)
        return list(rows / rows.sum(-1, keepdim=True))

    def _penalties(
        self, run: Run, number: int, beams: Sequence[_Beam], attention: Sequence[Tensor]
    ) -> tuple[Tensor, list[int]]:
        """Penalties [B, C] of the candidates of beams, and the column that most of a beam's candidates trust."""
        start = len(run.prompts[number])
        penalties, columns = [], []
        for beam, rows in zip(beams, attention, strict=True):
            w = len(beam.ids) + 1
            block = torch.zeros(len(rows), w, w, dtype=rows.dtype, device=rows.device)
            for i, earlier in enumerate(beam.attention):
                block[:, i, : i + 1] = earlier[start:]
            block[:, -1] = rows[:, start:]
            log_trust, column = over_trust(block, scale=self.scale)
            penalties.append(penalty(log_trust, rows[:, :start][:, self.span].sum(-1), len(beam.ids)))
            columns.append(int(column.mode().values))
        return torch.stack(penalties), columns

    def _is_done(self, state: _State) -> bool:
        """Whether no beam can still become better than the worst of enough finished responses."""
        if len(state.finished) < self.width:
            return False
        return state.finished[-1][0] >= max(self._normalized(b.score, b.ids)[0] for b in state.beams)

    def _normalized(self, score: float, ids: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        return score / len(ids) ** self.length_penalty, ids

    def _best(self, number: int, state: _State) -> list[int]:
        if not state.finished:
            raise ValueError(f"prompt {number}: the processors leave no token that could follow; loosen one")
        return list(max(state.finished, key=lambda entry: entry[0])[1])


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention that hands out its weights, while the block lasts."""
    causal = base_model(model)
    if not hasattr(causal, "set_attn_implementation"):
        raise ValueError(f"opera reads attention weights, and {type(causal).__name__} has none to hand out")
    kind = causal.config.get_text_config(decoder=True)._attn_implementation
    causal.set_attn_implementation("eager")
    try:
        if causal.config.get_text_config(decoder=True)._attn_implementation != "eager":
            raise ValueError(
                f"opera reads attention weights, which {kind!r} attention does not give, and {type(causal).__name__} "
                "cannot change it; load the model with attn_implementation='eager'"
            )
        yield
    finally:
        causal.set_attn_implementation(kind)
