"""Draft trees drawn from a table, and the law of one speculative round, for exact tests of verifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenloom.decode.drafters.base import Drawing, drawn, filled
from tokenloom.decode.drafters.shapes import Shape
from tokenloom.decode.table import TableLM, completed
from tokenloom.draw import Draw, law_of
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree, Verdict

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
CHAIN = Shape([ROOT, 0], [0, 0])
TWO = Shape([ROOT, ROOT], [0, 1])
TWO_BY_TWO = Shape([ROOT, 0, 0, ROOT, 3, 3], [0, 0, 1, 1, 0, 1])
TWO_CHAINS = Shape([ROOT, 0, ROOT, 2], [0, 0, 1, 0])
Rule = Callable[[DraftTree, Tensor, Draw], Verdict]


def draft(table: TableLM, prompt: Sequence[int], shape: Shape, drawing: Drawing, draw: Draw) -> DraftTree:
    def followers(path: list[int], count: int) -> tuple[list[int], Tensor]:
        law = table.probs((*prompt, *path))
        return drawn(law, count, drawing, draw), law

    return filled(shape, followers)


def laws(table: TableLM, prompt: Sequence[int], tree: DraftTree) -> Tensor:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent != ROOT else ()), token))
    return torch.stack([table.probs((*prompt, *path)) for path in [(), *paths]])


def assert_lossless(rule: Rule, shape: Shape, drawing: Drawing, *, vocab: int = 3, seed: int = 0) -> float:
    """One round has the target's law to 1e-9; gives the mean number of tokens."""
    target, source, prompt = TableLM.random(vocab, seed), TableLM.random(vocab, seed + 100), (0, 1)

    def program(draw: Draw) -> tuple[int, ...]:
        tree = draft(source, prompt, shape, drawing, draw)
        path, bonus = rule(tree, laws(target, prompt, tree), draw)
        return (*(tree.tokens[node] for node in path), bonus)

    law = law_of(program)
    length = 1 + max(shape.depths)
    found = completed(law, target, prompt, length)
    wanted = target.string_law(prompt, length)
    assert max(abs(found.get(s, 0.0) - wanted[s]) for s in wanted) < 1e-9
    assert abs(sum(found.values()) - 1) < 1e-9
    return sum(mass * len(s) for s, mass in law.items())


def outcome_at_a_node(rule: Rule, count: int, drawing: Drawing, p: Tensor = P, q: Tensor = Q) -> tuple[Tensor, float]:
    """The law of the token at a node with `count` drafts, and the probability that one of them is accepted."""

    def program(draw: Draw) -> tuple[int, bool]:
        tree = DraftTree(tokens := drawn(q, count, drawing, draw), [ROOT] * len(tokens), {ROOT: q})
        path, bonus = rule(tree, torch.stack([p] * (1 + len(tokens))), draw)
        return (tree.tokens[path[0]], True) if path else (bonus, False)

    token = torch.zeros_like(p)
    accepted = 0.0
    for (value, hit), mass in law_of(program).items():
        token[value] += mass
        accepted += mass * hit
    return token, accepted
