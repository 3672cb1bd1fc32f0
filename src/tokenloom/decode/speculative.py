"""Speculative decoding: a drafter guesses a tree of tokens behind each row, the model reads all of it in one pass, and
a verifier accepts a path, so that the law of the text is the model's own.

A round: drafts behind the last token of each row, one forward over that token and its drafts, the longest path that
the verifier accepts, and one more token. Rows accept paths of different lengths. Every node's scores go through the
processors with its own prefix. As many nodes are drafted as pay (`tokenloom.decode.cost`): none when none do.

`Speculative(drafter, verifier)` takes any of both; `speculative_pairs` holds the published ones. Counted in
`last_run.counts`: forwards, tokens, drafted and accepted nodes, rounds with drafts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.draft_sizes import MOST, Sizes
from tokenloom.decode.drafters.base import EMPTY, Ask, Drafter, Drawing, Round, likeliest
from tokenloom.decode.drafters.shapes import Chances
from tokenloom.decode.registry import build, decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.decode.session import ROOT, Session
from tokenloom.decode.verifiers import Verifier
from tokenloom.methods.decoding.draft_tree import DraftTree
from tokenloom.methods.decoding.speculative_sampling import greedy


@decoder("speculative", kind="loop")
class Speculative(Loop):
    """Any drafter with any verifier that takes its drafts, by name or as `build("drafter", ...)` makes them.

    Without a verifier: recursive rejection where the drafter can say what it draws from, else prompt-lookup's.
    `nodes` fixes the size of the trees; by default it follows the measured cost.

    Raises:
        ValueError: for a pair that does not fit.
    """

    def __init__(self, drafter: Any, verifier: Any = None, *, nodes: int | None = None) -> None:
        self.drafter: Drafter = build("drafter", drafter) if isinstance(drafter, str) else drafter
        if verifier is None:
            verifier = "recursive-rejection" if getattr(self.drafter, "draws", False) else "prompt-lookup"
        self.verifier: Verifier = build("verifier", verifier) if isinstance(verifier, str) else verifier
        if not isinstance(self.drafter, Drafter) or not isinstance(self.verifier, Verifier):
            raise ValueError(
                f'speculative takes a drafter and a verifier, by name or from decode.build("drafter", name) and '
                f'decode.build("verifier", name); got {drafter!r} and {verifier!r}'
            )
        if self.verifier.drawing != "given" and not self.drafter.draws:
            raise ValueError(
                f"verifier {self.verifier.slug!r} needs the law that drafts were drawn from, and drafter "
                f"{self.drafter.slug!r} looks them up; use verifier 'prompt-lookup' with it"
            )
        if nodes is not None and nodes < 0:
            raise ValueError(f"speculative: nodes is the size of the drafts, 0 or more; got {nodes}")
        own, allowed = self.drafter.branching, self.verifier.branching
        self._branching = min(own[0], allowed[0]), min(own[1], allowed[1])
        self._nodes = nodes
        self._chances = self._new_chances()
        self._pauses: dict[int, int] = {}

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        run.counts |= dict.fromkeys(("forwards", "tokens", "drafted", "accepted", "rounds"), 0)
        # A draft model may be the same model: its session, opened later, has to be closed first.
        with run.session() as session, self.drafter.open(run):
            return _Batch(run, session, self.drafter, self.verifier, self._sizes(run, session)).decoded()

    def _sizes(self, run: Run, session: Session) -> Sizes:
        fixed = self.drafter.fixed
        if fixed is not None and self._nodes is not None:
            fixed = fixed.first(self._nodes)
        return Sizes(run, session, self.drafter, self._chances, fixed, self._nodes, self._pauses)

    def _new_chances(self) -> Chances:
        d = self.drafter
        return Chances(d.guess, keys=d.keys, branching=self._branching, depth=d.depth, nodes=self._nodes or MOST)


@dataclass
class _Nodes:
    """The laws behind a row's text (0) and each node i of its tree (i + 1), made when asked for.

    A node is seen by the processors once, with its own prefix, and only if the verifier comes there.
    """

    run: Run
    row: int
    generated: list[int]
    tree: DraftTree
    scores: Tensor
    """[n, V]: behind the text, then behind what was read."""
    places: Sequence[int]
    """Where each node of the tree was read."""
    shaped: dict[int, Tensor] = field(default_factory=dict)

    def after(self, node: int) -> Tensor:
        """Scores [V] behind `node` after all processors."""
        if node not in self.shaped:
            path: list[int] = []
            at = node
            while at != ROOT:
                path.append(self.tree.tokens[at])
                at = self.tree.parents[at]
            scores = self.scores[0 if node == ROOT else self.places[node]]
            self.shaped[node] = self.run.shaped([self.row], [self.generated + path[::-1]], scores[None])[0]
        return self.shaped[node]

    def __getitem__(self, i: int, /) -> Tensor:
        return self.after(i - 1).softmax(-1)


class _Best:
    """The most probable token behind each node, looked for when asked."""

    def __init__(self, nodes: _Nodes) -> None:
        self._nodes = nodes

    def __getitem__(self, i: int, /) -> int:
        return int(self._nodes.after(i - 1).argmax())


class _Batch:
    """The rows that still run: their texts, and one round after another."""

    def __init__(self, run: Run, session: Session, drafter: Drafter, verifier: Verifier, sizes: Sizes) -> None:
        self.run, self.session, self.drafter, self.verifier, self.sizes = run, session, drafter, verifier, sizes
        self.generated: list[list[int]] = [[] for _ in range(len(run))]
        self.texts = [list(prompt) for prompt in run.prompts]
        self.live = list(range(len(run)))
        self.drawing: Drawing = verifier.drawing if run.sample else "given"

    def decoded(self) -> list[list[int]]:
        """The new ids of each row."""
        scores = self._counted(self.session.start())[:, None]
        self._finish(self._chosen(scores), scores)
        while self.live:
            if self.sizes.rests():
                self._step()
                continue
            started = time.perf_counter()
            asks = self._asks()
            if asks is None:
                roots = torch.tensor([self.texts[row][-1] for row in self.live])
                scores = self._counted(self.session.step(roots))[:, None]
                self._finish(self._chosen(scores), scores, 0, started)
                continue
            trees = self.drafter.draft(asks)
            read = [_distinct(tree) for tree in trees]
            probes = [self.drafter.probes(ask, tree) for ask, tree in zip(asks, trees, strict=True)]
            scores, nodes = self._tried(read, probes)
            rounds = self._verified(trees, [places for _, _, places in read], scores)
            self.session.accept([done.at for done in rounds])
            self._finish(rounds, scores, nodes, started)
        return self.generated

    def _step(self) -> None:
        """A round without drafts, from which nobody learns."""
        run = self.run
        scores = self._counted(self.session.step(torch.tensor([self.texts[row][-1] for row in self.live])))
        chosen = run.choose(self.live, [self.generated[row] for row in self.live], scores)
        for row, token in zip(self.live, chosen, strict=True):
            self.texts[row].append(token)
        run.counts["tokens"] += len(chosen)
        self._go_on(run.append(self.live, self.generated, chosen))

    def _asks(self) -> list[Ask] | None:
        """What the drafter is asked for; None when no row is to have drafts."""
        keys = [self.drafter.key(row, self.texts[row]) for row in self.live]
        # One token more comes with every path.
        rooms = [self.run.limit - len(self.generated[row]) - 1 for row in self.live]
        limits = self.sizes.limits
        grown = [
            None if key is None else self.drafter.grown(self.texts[row], self.drawing, limits)
            for row, key in zip(self.live, keys, strict=True)
        ]
        shapes = self.sizes.shapes(keys, grown, rooms)
        if not any(len(shape) for shape in shapes):
            return None
        return [
            Ask(row, self.texts[row], shape, self.drawing, self.run.draw)
            for row, shape in zip(self.live, shapes, strict=True)
        ]

    def _tried(self, read: Sequence[_Distinct], probes: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, int]:
        """Scores [B, n, V] behind the last token of each row and all that is read behind it, and for how many nodes."""
        n = 1 + max(len(tokens) + len(extra) for (tokens, _, _), (extra, _) in zip(read, probes, strict=True))
        ids, above = [], []
        for row, (tokens, parents, places), (extra, hang) in zip(self.live, read, probes, strict=True):
            root = self.texts[row][-1]
            fill = n - 1 - len(tokens) - len(extra)
            ids.append([root, *tokens, *extra, *[root] * fill])
            hanging = [_place(parent, places, len(tokens)) for parent in hang]
            above.append([ROOT, *(parent + 1 for parent in parents), *hanging, *[ROOT] * fill])
        counts = [1 + len(tokens) + len(extra) for (tokens, _, _), (extra, _) in zip(read, probes, strict=True)]
        scores = self._counted(self.session.try_nodes(torch.tensor(ids), torch.tensor(above), counts))
        return scores, (sum(counts) if self.session.ragged else n * len(counts)) - len(counts)

    def _counted(self, scores: Tensor) -> Tensor:
        self.run.counts["forwards"] += 1
        if self.drafter.forbidden:
            scores[..., list(self.drafter.forbidden)] = -torch.inf
        return scores

    def _chosen(self, scores: Tensor) -> list[Round]:
        """One token for each row, as `Run.choose` does it."""
        run = self.run
        generated = [self.generated[row] for row in self.live]
        if run.processors:
            shaped = run.shaped(self.live, generated, scores[:, 0])
            if run.sample:
                chosen = [run.draw.categorical(law) for law in shaped.softmax(-1)]
            else:
                chosen = [int(token) for token in shaped.argmax(-1)]
            held: list[list[Tensor] | None] = [[row] for row in shaped]
        else:
            chosen, held = run.choose(self.live, generated, scores[:, 0]), [None] * len(self.live)
        return [
            Round(row, self.texts[row], EMPTY, [], token, [0], own)
            for row, token, own in zip(self.live, chosen, held, strict=True)
        ]

    def _verified(self, trees: Sequence[DraftTree], places: Sequence[Sequence[int]], scores: Tensor) -> list[Round]:
        """What is accepted of each tree, whose nodes were read at `places`."""
        run = self.run
        if not run.sample and not run.processors:
            best = likeliest(scores.flatten(0, 1)).view(scores.shape[:2]).tolist()
            rounds = []
            for row, tree, at, tokens in zip(self.live, trees, places, best, strict=True):
                path, bonus = greedy(tree, [tokens[0], *(tokens[place] for place in at)])
                rounds.append(Round(row, self.texts[row], tree, path, bonus, [0, *(at[node] for node in path)], None))
            return rounds
        rounds = []
        for row, tree, at, read in zip(self.live, trees, places, scores, strict=True):
            nodes = _Nodes(run, row, self.generated[row], tree, read, at)
            path, bonus = self.verifier.rule(tree, nodes, run.draw) if run.sample else greedy(tree, _Best(nodes))
            shaped = [nodes.after(node) for node in (ROOT, *path)] if run.processors else None
            rounds.append(Round(row, self.texts[row], tree, path, bonus, [0, *(at[node] for node in path)], shaped))
        return rounds

    def _finish(self, rounds: Sequence[Round], scores: Tensor, nodes: int = 0, started: float | None = None) -> None:
        """Learn from the round, write its tokens down, and let rows go that have ended."""
        run = self.run
        if not (self.drafter.misses and self.sizes.resting):
            self.drafter.learn(rounds, scores)
        running: list[int] = []
        for place, done in enumerate(rounds):
            new = [*(done.tree.tokens[node] for node in done.path), done.bonus]
            kept, stopped = run.until_stop(done.row, self.generated[done.row], new)
            self.generated[done.row] += kept
            self.texts[done.row] += kept
            run.stream(done.row, kept)
            run.counts["tokens"] += len(kept)
            run.counts["drafted"] += len(done.tree)
            run.counts["accepted"] += min(len(done.path), len(kept))
            if not stopped:
                running.append(place)
        run.counts["rounds"] += any(len(done.tree) for done in rounds)
        if started is not None:
            self.sizes.note(rounds, nodes, time.perf_counter() - started)
        self._go_on(running)

    def _go_on(self, running: Sequence[int]) -> None:
        """With the live rows at these places."""
        if len(running) < len(self.live):
            self.live = [self.live[place] for place in running]
            if running:
                self.session.branch(running)
                self.drafter.keep(running)


_Distinct = tuple[list[int], list[int], list[int]]


def _distinct(tree: DraftTree) -> _Distinct:
    """Tokens and parents of the different prefixes of a tree, and which of them, from 1 on, each node stands for."""
    if len(tree) < 2:
        return list(tree.tokens), list(tree.parents), [1] * len(tree)
    seen: dict[tuple[int, int], int] = {}
    tokens, parents, places = list[int](), list[int](), list[int]()
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        above = ROOT if parent == ROOT else places[parent] - 1
        if (above, token) not in seen:
            seen[above, token] = len(tokens)
            tokens.append(token)
            parents.append(above)
        places.append(seen[above, token] + 1)
    return tokens, parents, places


def _place(parent: int, places: Sequence[int], distinct: int) -> int:
    """Where a probe's parent is read: a node of the tree, or a probe before it, behind all `distinct` nodes."""
    if parent == ROOT:
        return 0
    return places[parent] if parent < len(places) else 1 + distinct + parent - len(places)
