"""BAT as a logits processor: it draws the token itself, and programs are solved by SciPy's HiGHS.

The rule is in `methods.decoding.basis_aware_truncation`.

Letters: B rows, c directions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.draw import Draw, RandomDraw
from tokenloom.methods.decoding.basis_aware_truncation import Program, basis_aware_truncation

# Far below the probabilities in question; HiGHS takes no smaller one.
_TOLERANCE = 1e-9


@decoder("basis-aware-truncation", kind="shaper")
class BasisAwareTruncation(LogitsProcessor):
    """Draws a token and keeps it alone, for `generate(do_sample=True)`; applies to scores as the model gives them.

    `constraints` is how many main directions of the unembedding matrix stand for all, `variables` how many unknowns a
    program may have before tokens are fused (0: any number, which takes seconds for each program of a real vocabulary).
    `draw` may be replaced. As it draws, it must not shape the laws that drafts are verified with.
    """

    def __init__(
        self,
        model: Any,
        *,
        constraints: int = 20,
        variables: int = 1000,
        base: Literal["eta", "epsilon", "top-p"] = "eta",
        epsilon: float = 1e-3,
        p: float = 0.95,
        most: int = 10,
        nonneg: bool = True,
    ) -> None:
        """See the class.

        Raises:
            ValueError: when SciPy is missing, or for parameters that cannot be.
        """
        _optimize()
        self._options: dict[str, Any] = {"base": base, "epsilon": epsilon, "p": p, "most": most, "nonneg": nonneg}
        basis_aware_truncation(
            torch.ones(1), torch.zeros(1, 0), feasible, RandomDraw(torch.Generator()), **self._options
        )
        self.basis = main_directions(model.get_output_embeddings().weight, constraints)
        fuse = 0 < variables < len(self.basis)
        self.groups = clusters(self.basis, max(1, variables // 2)) if fuse else None
        self.draw: Draw = RandomDraw()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after ids [B, T], -inf for all tokens but one of each row."""
        laws = wide(scores).softmax(-1).cpu()
        chosen = [
            basis_aware_truncation(law, self.basis, feasible, self.draw, self.groups, **self._options) for law in laws
        ]
        at = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, at, scores.gather(1, at))


def main_directions(unembedding: Tensor, count: int) -> Tensor:
    """`unembedding` [V, D] along its `count` main right singular directions, [V, c], float64 on the CPU."""
    matrix = unembedding.detach().to("cpu", torch.float64)
    # Eigenvectors of the small Gram matrix, in ascending order.
    directions: Tensor = torch.linalg.eigh(matrix.T @ matrix).eigenvectors
    return matrix @ directions[:, max(0, directions.shape[1] - count) :]


def clusters(rows: Tensor, count: int, *, rounds: int = 10, seed: int = 0) -> Tensor:
    """Labels [V] below `count` by k-means over `rows` [V, c]; the same for the same seed."""
    start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    centers, rows = rows[start].float(), rows.float()
    labels = torch.zeros(len(rows), dtype=torch.int64)
    for _ in range(rounds):
        # Squared distances up to what is the same for all centers.
        labels = (rows @ centers.T - centers.square().sum(-1) / 2).argmax(-1)
        sums = torch.zeros_like(centers).index_add(0, labels, rows)
        counts = torch.bincount(labels, minlength=len(centers))[:, None]
        centers = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
    return labels


def feasible(program: Program) -> bool:
    """Whether HiGHS finds a solution of the program."""
    matrix = program.matrix.numpy()
    found = _optimize().linprog(
        torch.zeros(matrix.shape[1]).numpy(),
        A_eq=matrix,
        b_eq=program.target.numpy(),
        bounds=(program.lower, program.upper),
        method="highs",
        options={"primal_feasibility_tolerance": _TOLERANCE},
    )
    return bool(found.status == 0)


def _optimize() -> Any:
    try:
        return importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise ValueError("basis-aware-truncation solves linear programs with SciPy: pip install scipy") from error
