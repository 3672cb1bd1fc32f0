"""The routing loop: two sessions, the small model's at every token, the large one's where it is asked.

When any row asks, the large model reads what all live rows have written since, in one forward, so that the rows of a
batch stay together; only rows that asked take its token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.r2r.asking import Asking, ByEntropy, ByRouter, ByWindow
from tokenloom.decode.r2r.training import load_router
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.session import Session, open_session
from tokenloom.methods.decoding.r2r import Router


@decoder("r2r", kind="loop")
class R2R(Loop):
    """The model writes, `large` (a model with the same tokenizer) is asked where `router` says so.

    Without a router it is asked where the model's entropy is above `entropy` nats; or, with `window` tokens, from where
    its uncertainty reaches `uncertainty` (unless its entropy is below `certain`) until the mean over the window is
    below it again. `carry`: that first token counts in the window. A router may be given by its file; `threshold` is
    then the file's, else 0.5, where none is given. After a call, `last_run.counts` has the share of tokens that the
    large model wrote, `usage`.
    """

    def __init__(
        self, large: Any, router: Router | str | None = None, *, threshold: float | None = None, entropy: float = 0.45,
        window: int = 0, uncertainty: float = 2.275, certain: float = 0.02, carry: bool = True,
    ) -> None:  # fmt: skip
        """Raises ValueError for a negative window, or for one beside a router."""
        if window < 0 or (window and router is not None):
            raise ValueError(
                f"r2r: window is the tokens of a rolling window, 0 for none, and takes the place of a router; got "
                f"{window}" + (" and a router" if router is not None else "")
            )
        self.large, self.router = large, router
        self.threshold, self.entropy = threshold, entropy
        self.window, self.uncertainty, self.certain, self.carry = window, uncertainty, certain, carry

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        generated: list[list[int]] = [[] for _ in range(len(run))]
        live = list(range(len(run)))
        asked = written = 0
        asking = self._asking(run)
        options: dict[str, Any] = {"output_hidden_states": True} if asking.reads_states else {}
        with run.session(**options) as small, ExitStack() as stack:
            reader = _Reader(self.large, stack)
            scores = small.start()
            while True:
                news = [generated[r] for r in live]
                chosen = run.choose(live, news, scores)
                routed = asking.asks(small, scores, chosen)
                if bool(routed.any()):
                    answers = reader.read([[*run.prompts[r], *generated[r]] for r in live])
                    _check_vocabularies(scores.shape[-1], answers.shape[-1])
                    at = routed.nonzero()[:, 0].tolist()
                    better = run.choose([live[i] for i in at], [news[i] for i in at], answers[at])
                    for i, token in zip(at, better, strict=True):
                        chosen[i] = token
                asked += int(routed.sum())
                written += len(live)
                run.counts |= {"usage": asked / written, "large_forwards": float(reader.forwards)}
                running = run.append(live, generated, chosen)
                if not running:
                    return generated
                if len(running) < len(live):
                    small.branch(running)
                    reader.branch(running)
                    asking.branch(running)
                live = [live[i] for i in running]
                scores = small.step(torch.tensor([chosen[i] for i in running]))

    def _asking(self, run: Run) -> Asking:
        """What decides, once it is known that it goes with the models."""
        small, large = (getattr(model, "get_output_embeddings", lambda: None)() for model in (run.model, self.large))
        if small is not None and large is not None:
            _check_vocabularies(small.weight.shape[0], large.weight.shape[0])
        if self.router is None:
            if self.window:
                return ByWindow(len(run), self.window, self.uncertainty, self.certain, self.carry)
            return ByEntropy(self.entropy)
        embeddings = run.model.get_input_embeddings().weight
        router, threshold = self.router, 0.5
        if isinstance(router, str):
            router, threshold = load_router(router, embeddings)
        _check_router(router, embeddings)
        return ByRouter(router, threshold if self.threshold is None else self.threshold)


class _Reader:
    """The large model, which reads what it has not read when it is asked, and nothing before it is asked at all."""

    def __init__(self, model: Any, stack: ExitStack) -> None:
        self._model, self._stack = model, stack
        self._session: Session | None = None
        self.forwards = 0

    def read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Scores [B, V] of what follows each text; all have grown since they were read last."""
        self.forwards += 1
        if self._session is None:
            self._session = self._stack.enter_context(open_session(self._model, texts))
            scores = self._session.start()
        else:
            rows = self._session.rows
            scores = self._session.extend([list(t[len(row) :]) for t, row in zip(texts, rows, strict=True)])
        assert [list(t) for t in texts] == self._session.rows, "the large model missed tokens"
        return scores

    def branch(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        if self._session is not None:
            self._session.branch(rows)


def _check_vocabularies(small: int, large: int) -> None:
    if small != large:
        raise ValueError(
            f"r2r: the models score {small} and {large} tokens; they need the same tokenizer, and heads of the same "
            "width"
        )


def _check_router(router: Router, embeddings: Tensor) -> None:
    known, own = router.embeddings.weight.shape, embeddings.shape
    if known != own:
        raise ValueError(
            f"r2r: the router is for a small model of {known[0]} tokens and hidden size {known[1]}, and this one has "
            f"{own[0]} and {own[1]}; fit a router to it"
        )
    if router.shape["top"] > own[0]:
        raise ValueError(f"r2r: the router reads {router.shape['top']} logits, and the model has {own[0]}; fit another")
