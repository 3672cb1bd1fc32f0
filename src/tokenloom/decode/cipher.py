"""CIPHER on models: a loop that speaks in embeddings, and a debate of agents that read each other's.

    model.generate(..., custom_generate=decode.loop("cipher", temperature=0.3))
    result = debate([Agent(model, 0.2), Agent(model, 0.8)], question, tokenizer)

The loop's ids are the read-out; what was said is its `said`, one [T, D] per row. The rules are in
`methods.decoding.cipher`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.embedded import embed, embedding_session, embedding_table, law_at, without_warpers
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.methods.decoding.cipher import expected_embedding, nearest
from tokenloom.rollout.cache import new_cache
from tokenloom.rollout.forward import ModelCall, base_model


@decoder("cipher", kind="loop")
class Cipher(Loop):
    """Expected embeddings as inputs; the ids are those of the nearest tokens. `temperature` 0 is greedy decoding.

    Nothing is drawn: temperature and cuts of the generation config have no part in it, other processors do.
    """

    said: list[Tensor]

    unmasked = "feeds the model mixtures of tokens"

    def __init__(self, *, temperature: float = 0.3) -> None:
        if temperature < 0:
            raise ValueError(f"cipher: temperature must be 0 or more, got {temperature}")
        self.temperature = temperature

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        plain = replace(run, processors=without_warpers(run.processors))
        table = _Table(run.model)
        generated: list[list[int]] = [[] for _ in range(len(run))]
        said: list[list[Tensor]] = [[] for _ in range(len(run))]
        live = list(range(len(run)))
        with run.session() as opened:
            session = embedding_session(opened, "cipher")
            scores = session.start()
            while True:
                law = law_at(plain.shaped(live, [generated[r] for r in live], scores), self.temperature)
                inputs = table.said(law)
                tokens = table.read(law, inputs)
                running = run.append(live, generated, tokens.tolist())
                for row, mixed in zip(live, inputs, strict=True):
                    said[row].append(mixed)
                if not running:
                    self.said = [torch.stack(row) for row in said]
                    return generated
                if len(running) < len(live):
                    session.branch(running)
                live = [live[i] for i in running]
                scores = session.step_embeddings(inputs[running], tokens[running])


@dataclass(frozen=True)
class Agent:
    """A model and the temperature at which it speaks."""

    model: Any
    temperature: float


@dataclass(frozen=True)
class Wording:
    """The texts around what was said, in their order."""

    others: str = "\n\nThese are the solutions of other agents:\n"
    own: str = "\n\nThis is your own previous solution:\n"
    instruction: str = "\n\nTaking these into account, give your solution and your answer.\n"


@dataclass(frozen=True)
class Debate:
    """What came of a debate: `answers[r][a]` is the read-out of agent a in round r as ids, `answer` the final text."""

    answers: list[list[list[int]]]
    answer: str
    speaker: int


Piece = Sequence[int] | Tensor


def debate(
    agents: Sequence[Agent],
    question: str,
    tokenizer: Any,
    *,
    rounds: int = 3,
    max_tokens: int = 400,
    wording: Wording | None = None,
) -> Debate:
    """Let agents answer, read what the others said as embeddings, and answer again; the calmest one's answer counts.

    Raises:
        ValueError: for no agents or rounds, or models with different vocabularies.
    """
    tables = [_Table(a.model) for a in agents]
    if not agents or rounds < 1 or max_tokens < 1:
        raise ValueError("cipher: a debate needs at least one agent, one round and one token")
    if len({len(t.rows) for t in tables}) > 1:
        raise ValueError(
            "cipher: agents read each other's laws over one vocabulary, but theirs have "
            f"{[len(t.rows) for t in tables]} tokens; take models with the same tokenizer"
        )
    words = wording or Wording()
    start = tokenizer.encode(question)
    others, own, instruction = (
        tokenizer.encode(text, add_special_tokens=False) for text in (words.others, words.own, words.instruction)
    )
    eos = tokenizer.eos_token_id
    laws: list[Tensor] = []
    answers: list[list[list[int]]] = []
    for number in range(rounds):
        said, texts = [], []
        for a, agent in enumerate(agents):
            prompt: list[Piece] = [start]
            if number:
                heard = [tables[a].said(law) for i, law in enumerate(laws) if i != a]
                prompt += [others, *heard, own, tables[a].said(laws[a]), instruction]
            law, text = _speak(agent, _embedded(agent.model, prompt), tables[a], eos, max_tokens)
            said.append(law)
            texts.append(text)
        laws = said
        answers.append(texts)
    speaker = min(range(len(agents)), key=lambda i: agents[i].temperature)
    return Debate(answers, tokenizer.decode(answers[-1][speaker], skip_special_tokens=True), speaker)


def _embedded(model: Any, pieces: Sequence[Piece]) -> Tensor:
    """Input embeddings [P, D] of ids and embeddings, one behind the other."""
    device = next(base_model(model).parameters()).device
    with torch.no_grad():
        return torch.cat(
            [p if isinstance(p, Tensor) else embed(model, torch.tensor(list(p), device=device)) for p in pieces]
        )


def _speak(agent: Agent, prompt: Tensor, table: _Table, eos: int | None, limit: int) -> tuple[Tensor, list[int]]:
    """The laws [T, V] of an answer to a prompt of embeddings, and the ids that they read as; without the end token."""
    call, cache = ModelCall(agent.model), new_cache(base_model(agent.model).config)
    laws: list[Tensor] = []
    ids: list[int] = []
    inputs, done = prompt, 0
    with torch.no_grad():
        while len(ids) < limit:
            positions = torch.arange(done, done + len(inputs), device=inputs.device)[None]
            scores = call(None, None, positions, cache, last=1, embeddings=inputs[None])[:, 0]
            done += len(inputs)
            law = law_at(scores, agent.temperature)
            inputs = table.said(law)
            token = int(table.read(law, inputs))
            if token == eos:
                break
            laws.append(law[0])
            ids.append(token)
    return torch.stack(laws) if laws else table.rows.new_zeros(0, len(table.rows)), ids


class _Table:
    """A model's input embeddings, as what is said is made of them and read by them."""

    def __init__(self, model: Any) -> None:
        table = embedding_table(model)
        self._dtype = table.dtype
        self.rows = table.to(torch.promote_types(table.dtype, torch.float32))
        self._directions = torch.nn.functional.normalize(self.rows, dim=-1)

    def said(self, law: Tensor) -> Tensor:
        """Expected embeddings [N, D] of laws [N, V], in the model's format."""
        return expected_embedding(law, self.rows).to(self._dtype)

    def read(self, law: Tensor, said: Tensor) -> Tensor:
        """Ids [N]; of a certain law its token, even if another one's embedding has the same direction."""
        top, ids = law.max(-1)
        return torch.where(top == 1, ids, nearest(said, self._directions))
