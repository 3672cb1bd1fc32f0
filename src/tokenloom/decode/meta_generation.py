"""Meta-generation: generators of candidates, combined into larger generators, with a ledger of what they cost.

A generator is any function of a prompt's text and a ledger that gives candidates. Combinators make generators:

    Sampler(model, tokenizer, n=8)          samples of one model
    parallel(g, h, ...)                     the candidates of all
    select(g, rule)                         the one that a rule of candidates names: majority, minimum Bayes risk, ...
    chain(g, h, join=...)                   h reads each of g's candidates
    refine(g, revise=..., rounds=...)       g reads its own last answer again, until one is accepted
    steps(g, score=..., width=...)          step-level search: g's pieces are scored, the best go on

The ledger counts tokens by model and may have a limit of generated tokens, which samplers never pass. Parts that decode
inside `generate` are loops; these here call whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenloom.decode.candidates import Candidate, Extract, encoded, sample
from tokenloom.methods.decoding.meta_generation import minimum_bayes_risk
from tokenloom.methods.decoding.self_consistency import majority


@dataclass(frozen=True)
class Session:
    """What one call of a model read and wrote."""

    model: str
    prompt_tokens: int
    generated_tokens: int


@dataclass
class Ledger:
    """Every session so far. `limit`: the most tokens that may be generated in all."""

    limit: int | None = None
    sessions: list[Session] = field(default_factory=list)

    def record(self, model: str, prompt_tokens: int, generated_tokens: int) -> None:
        """Add a session.

        Raises:
            ValueError: when it passes the limit, or for negative counts.
        """
        if prompt_tokens < 0 or generated_tokens < 0:
            raise ValueError(f"a session has counts >= 0, got {prompt_tokens} and {generated_tokens}")
        left = self.left
        if left is not None and generated_tokens > left:
            raise ValueError(f"{model} generated {generated_tokens} tokens with {left} left of {self.limit}")
        self.sessions.append(Session(model, prompt_tokens, generated_tokens))

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return sum(s.generated_tokens for s in self.sessions)

    @property
    def total(self) -> int:
        """Tokens read and generated so far."""
        return self.generated + sum(s.prompt_tokens for s in self.sessions)

    @property
    def left(self) -> int | None:
        """Tokens that may still be generated; None without a limit."""
        return None if self.limit is None else self.limit - self.generated

    def by_model(self) -> dict[str, Session]:
        """The sums for each model."""
        found: dict[str, Session] = {}
        for s in self.sessions:
            old = found.get(s.model, Session(s.model, 0, 0))
            found[s.model] = Session(
                s.model, old.prompt_tokens + s.prompt_tokens, old.generated_tokens + s.generated_tokens
            )
        return found

    def cost(self, prices: dict[str, tuple[float, float]]) -> float:
        """The sum over models of prompt and generated tokens times their (prompt, generated) prices.

        Raises:
            ValueError: for a model without a price.
        """
        total = 0.0
        for name, s in self.by_model().items():
            if name not in prices:
                raise ValueError(f"there is no price for {name!r}; prices are known for {sorted(prices)}")
            total += s.prompt_tokens * prices[name][0] + s.generated_tokens * prices[name][1]
        return total


Generator = Callable[[str, Ledger], list[Candidate]]
Rule = Callable[[Sequence[Candidate]], int]


class Sampler:
    """A generator: `n` samples of a model; fewer, or none, when the ledger's limit does not allow them.

    Each sample may have `max_new_tokens`, or what the limit leaves to it when shared evenly.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        n: int = 1,
        name: str | None = None,
        answer: Extract | None = None,
        max_new_tokens: int = 256,
        **settings: Any,
    ) -> None:
        """`settings` as `candidates.sample`."""
        self._model, self._tokenizer, self._n, self._answer = model, tokenizer, n, answer
        self.name = name or type(model).__name__
        self._longest, self._settings = max_new_tokens, settings

    def __call__(self, prompt: str, ledger: Ledger) -> list[Candidate]:
        """Candidates, recorded in the ledger; a prompt is read once for all of them."""
        n, longest = self._n, self._longest
        if ledger.left is not None:
            n = min(n, ledger.left)
            longest = min(longest, ledger.left // n) if n > 0 else 0
        if n < 1:
            return []
        ids = encoded(self._tokenizer, prompt)
        found = sample(
            self._model,
            self._tokenizer,
            ids,
            n,
            answer=self._answer,
            max_new_tokens=longest,
            **self._settings,
        )
        ledger.record(self.name, len(ids), sum(len(c.ids) for c in found))
        return found


def parallel(*generators: Generator) -> Generator:
    """The candidates of all `generators`, in order."""

    def generate(prompt: str, ledger: Ledger) -> list[Candidate]:
        return [candidate for g in generators for candidate in g(prompt, ledger)]

    return generate


def select(generator: Generator, rule: Rule) -> Generator:
    """The one candidate of `generator` that `rule` names by its index; none where there are none."""

    def generate(prompt: str, ledger: Ledger) -> list[Candidate]:
        candidates = generator(prompt, ledger)
        return [candidates[rule(candidates)]] if candidates else []

    return generate


def chain(first: Generator, second: Generator, *, join: Callable[[str, str], str] = str.__add__) -> Generator:
    """`second` on what `join(prompt, text)` makes of each candidate of `first`; its candidates are the result."""

    def generate(prompt: str, ledger: Ledger) -> list[Candidate]:
        return [c for link in first(prompt, ledger) for c in second(join(prompt, link.text), ledger)]

    return generate


def refine(
    generator: Generator,
    *,
    revise: Callable[[str, Candidate], str],
    rounds: int = 3,
    accept: Callable[[Candidate], bool] = lambda candidate: False,
) -> Generator:
    """The first candidate of `generator`, revised: the prompt `revise(prompt, last)` is tried `rounds` times at most.

    It ends with a candidate that `accept` takes, else with the last. Raises ValueError for rounds < 0.
    """
    if rounds < 0:
        raise ValueError(f"refinement needs rounds >= 0, got {rounds}")

    def generate(prompt: str, ledger: Ledger) -> list[Candidate]:
        current = generator(prompt, ledger)[:1]
        for _ in range(rounds):
            if not current or accept(current[0]):
                break
            better = generator(revise(prompt, current[0]), ledger)[:1]
            current = better or current
        return current

    return generate


def steps(
    generator: Generator,
    *,
    score: Callable[[str, str], float],
    width: int = 1,
    depth: int = 16,
    done: Callable[[Candidate], bool],
) -> Generator:
    """Step-level search: each of the `width` best texts is continued by `generator` (a sampler of one step).

    `score(prompt, text)` rates a text so far; `done(candidate)` says that a step ended its text. The best `width` texts
    after `depth` steps, or when all are done, come back best first. Raises ValueError for width or depth < 1.
    """
    if width < 1 or depth < 1:
        raise ValueError(f"step-level search needs width and depth >= 1, got {width} and {depth}")

    def generate(prompt: str, ledger: Ledger) -> list[Candidate]:
        beam = [(Candidate([], [], ""), False)]
        for _ in range(depth):
            pool = []
            for text, ended in beam:
                grown = [] if ended else [(_joined(text, c), done(c)) for c in generator(prompt + text.text, ledger)]
                # Nothing came, as when the budget is spent: the text stays as it is.
                pool += grown or [(text, True)]
            beam = sorted(pool, key=lambda pair: -score(prompt, pair[0].text))[:width]
            if all(ended for _, ended in beam):
                break
        return [text for text, _ in beam if text.text or text.ids]

    return generate


def vote(candidates: Sequence[Candidate]) -> int:
    """A rule: the majority of the answers."""
    return majority([c.answer for c in candidates])


def bayes_risk(utility: Callable[[str, str], float]) -> Rule:
    """A rule: minimum Bayes risk, `utility(text, truth)` of every pair of texts."""

    def rule(candidates: Sequence[Candidate]) -> int:
        table = [[utility(a.text, b.text) for b in candidates] for a in candidates]
        return minimum_bayes_risk(torch.tensor(table, dtype=torch.float64))

    return rule


def _joined(text: Candidate, step: Candidate) -> Candidate:
    prompt = text.prompt or step.prompt
    return Candidate(prompt, [*text.ids, *step.ids], text.text + step.text, step.answer)
