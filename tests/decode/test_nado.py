"""NADO in generate: with exact odds, decoding a table follows the conditional law; odds are learned from samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.nado import Nado, fit, odds_model, response_places
from tokenloom.decode.plain import Plain
from tokenloom.decode.run import Run
from tokenloom.decode.table import TableLM, TableSession
from tokenloom.draw import law_of


class Odds(TableLM):
    """The exact head: logits of the oracle's odds behind every next token, for strings of `length` behind a prompt."""

    def __init__(self, model: TableLM, accepts: dict[tuple[int, ...], float], prompt: int, length: int) -> None:
        super().__init__(model.vocab, lambda prefix: [1 / model.vocab] * model.vocab)
        self.model, self.accepts, self.prompt, self.length = model, accepts, prompt, length

    def open_session(self, prompts: Sequence[Sequence[int]]) -> TableSession:
        return _OddsSession(self, prompts)

    def odds(self, prefix: tuple[int, ...]) -> float:
        if len(prefix) == self.prompt + self.length:
            return self.accepts[prefix[self.prompt :]]
        law = self.model.probs(prefix)
        return sum(float(law[v]) * self.odds((*prefix, v)) for v in range(self.vocab))


class _OddsSession(TableSession):
    def _log(self, prefix: tuple[int, ...]) -> Tensor:
        model = self._model
        assert isinstance(model, Odds)
        found = [model.odds((*prefix, v)) for v in range(model.vocab)]
        return torch.tensor(found, dtype=torch.float64).logit().clamp(-40, 40)


def test_ids_that_fill_up_the_vocabulary_are_not_favored() -> None:
    head = odds_model(tiny_llama(vocab=200, seed=3), 200)
    found = Nado(head)(torch.tensor([[5, 9]]), torch.zeros(1, 201))
    assert float(found[0, 200]) < -30
    torch.testing.assert_close(found[0, :200].exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("seed", range(2))
def test_decoding_follows_the_conditional_law(seed: int) -> None:
    model, length = TableLM.random(3, seed), 3
    g = torch.Generator().manual_seed(seed)
    texts = list(itertools.product(range(3), repeat=length))
    accepts = {t: float(torch.rand((), generator=g) < 0.4) for t in texts}
    shaper = Nado(Odds(model, accepts, 1, length))
    run = Run(model, torch.tensor([[2]]), [[2]], length, frozenset(), 0, True, processors=[shaper])

    def program(draw: object) -> tuple[int, ...]:
        run.draw = draw  # type: ignore[assignment]
        return tuple(Plain().rows(run)[0])

    law = model.string_law([2], length)
    total = sum(law[t] * accepts[t] for t in texts)
    found = law_of(program)
    for text in texts:
        assert found.get(text, 0.0) == pytest.approx(law[text] * accepts[text] / total, abs=1e-9)


def test_even_odds_change_nothing() -> None:
    model = tiny_llama()
    ids = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6]])
    given = {"attention_mask": (ids != 2).long(), "do_sample": False, "max_new_tokens": 6}
    shaper = decode.shaper("nado", head=odds_model(tiny_llama(seed=3), 64))
    assert torch.equal(model.generate(ids, logits_processor=[shaper], **given), model.generate(ids, **given))


def test_places_of_completions() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    at, tokens, inside = response_places([2, 2], ids, mask)
    assert at[0].tolist() == [1, 2, 3]
    assert tokens[0].tolist() == [7, 8, 9]
    assert inside.tolist() == [[True, True, True], [True, False, False]]
    assert tokens[1, 0] == 7
    assert at[1, 0] == 1


@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_odds_are_learned_from_samples(consistency: float) -> None:
    # The oracle accepts texts whose first new token is even: R is known at once, and at every later token.
    model, head = tiny_llama(vocab=12), odds_model(tiny_llama(vocab=12, seed=4), 12)
    g = torch.Generator().manual_seed(0)
    # Every prompt with every first token, four times.
    prompts = [[3 + i % 2] for i in range(72)]
    completions = [[3 + i // 2 % 9, *torch.randint(3, 12, (2,), generator=g).tolist()] for i in range(72)]
    labels = [float(c[0] % 2 == 0) for c in completions]
    fit(head, model, prompts, completions, labels, consistency=consistency, epochs=30, batch=16, learning_rate=1e-2)
    with torch.no_grad():
        odds = head(input_ids=torch.tensor([[3], [4]])).logits[:, -1].sigmoid()
    even = torch.arange(3, 12) % 2 == 0
    assert float(odds[:, 3:][:, even].min()) > 0.7
    assert float(odds[:, 3:][:, ~even].max()) < 0.3


def test_weights_choose_what_counts() -> None:
    model, head = tiny_llama(vocab=12), odds_model(tiny_llama(vocab=12, seed=4), 12)
    weights = torch.tensor([1.0, 0.0])
    fit(head, model, [[3], [3]], [[5], [5]], [1.0, 0.0], weights, epochs=30, learning_rate=1e-2)
    with torch.no_grad():
        assert float(head(input_ids=torch.tensor([[3]])).logits[0, -1, 5]) > 1


def test_mistakes_are_named() -> None:
    model = tiny_llama(vocab=12)
    head = odds_model(tiny_llama(vocab=12), 12)
    with pytest.raises(ValueError, match="none of them empty"):
        fit(head, model, [[3]], [[]], [1.0])
    with pytest.raises(ValueError, match=r"label in \[0, 1\]"):
        fit(head, model, [[3]], [[4]], [1.0, 0.0])
    with pytest.raises(ValueError, match="same tokenizer"):
        Nado(head)(torch.tensor([[3]]), torch.zeros(1, 64))
