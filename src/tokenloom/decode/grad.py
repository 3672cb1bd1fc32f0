"""GRAD as a logits processor, and the graph of token transitions that a model sees in trusted texts.

The formulas are in `methods.decoding.grad`. A graph is kept as safetensors.

Letters: B rows, m edges, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.decode.auxiliary import evaluating
from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.grad import grad, transition_edges


class TransitionGraph:
    """Edges [m, 2], each once, and their weights [m], float64."""

    def __init__(self, edges: Tensor, weights: Tensor) -> None:
        self.edges, which = torch.unique(edges.cpu().long().view(-1, 2), dim=0, return_inverse=True)
        self.weights = torch.zeros(len(self.edges), dtype=torch.float64).index_add(0, which, weights.cpu().double())
        tokens, counts = torch.unique_consecutive(self.edges[:, 0], return_counts=True)
        ends = counts.cumsum(0)
        self._rows = dict(zip(tokens.tolist(), zip((ends - counts).tolist(), ends.tolist(), strict=True), strict=True))

    @classmethod
    def build(
        cls, model: Any, texts: Iterable[Sequence[int]], *, progress: Callable[[int], None] | None = None
    ) -> TransitionGraph:
        """The graph of `texts` (ids), one forward of `model` each; `progress(texts so far)` is called after each."""
        edges, weights = [torch.zeros(0, 2, dtype=torch.int64)], [torch.zeros(0, dtype=torch.float64)]
        device = next(model.parameters()).device
        for number, text in enumerate(texts):
            ids = torch.tensor(list(text), dtype=torch.int64, device=device)
            if len(ids) > 1:
                with evaluating(model):
                    scores = model(input_ids=ids[None]).logits[0]
                found, added = transition_edges(ids, scores)
                edges.append(found.cpu())
                weights.append(added.cpu())
            if progress is not None:
                progress(number + 1)
        return cls(torch.cat(edges), torch.cat(weights))

    def __len__(self) -> int:
        return len(self.edges)

    def __add__(self, other: TransitionGraph) -> TransitionGraph:
        return TransitionGraph(torch.cat((self.edges, other.edges)), torch.cat((self.weights, other.weights)))

    def after(self, tokens: Sequence[int], vocab: int) -> Tensor:
        """Weights [B, V] of the transitions from each token, 0 where there is none.

        Raises:
            ValueError: when the graph names tokens beyond the vocabulary.
        """
        found = torch.zeros(len(tokens), vocab, dtype=torch.float64)
        for row, token in enumerate(tokens):
            first, last = self._rows.get(token, (0, 0))
            ids = self.edges[first:last, 1]
            if len(ids) and int(ids.max()) >= vocab:
                raise ValueError(
                    f"grad: the graph has token {int(ids.max())} and the model {vocab} tokens; build the graph with "
                    "the tokenizer of the model"
                )
            found[row, ids] = self.weights[first:last]
        return found

    def save(self, path: str | Path) -> None:
        """Keep the graph as safetensors."""
        save_file({"edges": self.edges, "weights": self.weights}, path)

    @classmethod
    def load(cls, path: str | Path) -> TransitionGraph:
        """The graph that `save` kept."""
        kept = load_file(path)
        return cls(kept["edges"], kept["weights"])


@decoder("grad", kind="shaper")
class Grad(LogitsProcessor):
    """Favors the transitions of `graph`, a `TransitionGraph` or the path of one that was saved."""

    def __init__(
        self,
        graph: Any,
        *,
        lambda_max: float = 0.5,
        adaptive: bool = True,
        scale: Literal["range", "max"] = "range",
    ) -> None:
        """See the class.

        Raises:
            ValueError: for lambda_max outside [0, 1].
        """
        self.graph: TransitionGraph = TransitionGraph.load(graph) if isinstance(graph, str | Path) else graph
        self._options: dict[str, Any] = {"lambda_max": lambda_max, "adaptive": adaptive, "scale": scale}
        grad(torch.zeros(1, 1), torch.zeros(1, 1), **self._options)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after ids [B, T]."""
        given = wide(scores)
        edges = self.graph.after(input_ids[:, -1].tolist(), scores.shape[-1]).to(given)
        return grad(given, edges, **self._options).to(scores.dtype)
