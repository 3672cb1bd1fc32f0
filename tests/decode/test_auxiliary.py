"""`Aux`: whatever was asked before, its scores are the model's own of the same prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from tests.tiny_models import TINY, tiny_gpt2, tiny_llama
from tokenloom.decode.auxiliary import Aux, Headed, aligned
from tokenloom.decode.table import TableLM

# Sums of 16 to 64 terms of size up to 10 in another order, float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def direct(model: Any, prefixes: Sequence[Sequence[int]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([list(p)])).logits[0, -1] for p in prefixes])


def check(aux: Aux, prefixes: Sequence[Sequence[int]]) -> None:
    torch.testing.assert_close(aux.scores(prefixes), direct(aux.model, prefixes), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_any_order_of_prefixes_gives_the_models_scores(name: str) -> None:
    aux = Aux(TINY[name]())
    a, b, c = [5, 9, 4, 7], [5, 8], [3, 3, 6]
    check(aux, [a, b, c])
    check(aux, [[*a, 10], [*b, 11], [*c, 12]])
    check(aux, [[*c, 12, 4], [*a, 10, 5], [*a, 10, 6]])  # beams reordered, one given up
    check(aux, [[*c, 12, 4], [*a, 10]])  # backtracking, a row gone
    check(aux, [[5, 9, 4], [5, 9, 20, 21, 22]])  # inside what was read, and off it
    check(aux, [[*b, 13], [*b, 13], a])  # twice the same
    check(aux, [[40, 41]])  # nothing shared
    check(aux, [[40, 41, 42, 43, 44]])


def test_random_walks_of_a_hostile_caller() -> None:
    aux, g = Aux(tiny_llama()), torch.Generator().manual_seed(0)
    pool = [[5, 9, 4]]

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    for _ in range(25):
        asked = []
        for _row in range(pick(1, 4)):
            prefix = pool[pick(0, len(pool))]
            asked.append([*prefix[: pick(1, len(prefix) + 1)], *(pick(3, 64) for _ in range(pick(0, 3)))])
        check(aux, asked)
        pool = (pool + asked)[-6:]


def test_only_new_tokens_are_read() -> None:
    model = tiny_llama()
    widths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    aux = Aux(model)
    aux.scores([[5, 9, 4, 7], [5, 8]])
    aux.scores([[5, 9, 4, 7], [5, 8]])
    aux.scores([[5, 8], [5, 9, 4, 7]])
    aux.scores([[5, 8, 3], [5, 9, 4, 7, 6]])
    aux.scores([[5, 8, 3, 4]] * 3)
    assert widths == [8, 2, 1]


def test_padding_on_the_left_is_not_read() -> None:
    aux = Aux(tiny_llama())
    ids = torch.tensor([[2, 2, 5, 9], [7, 8, 3, 2], [2, 2, 2, 2]])
    assert aux.unpadded(ids) == [[5, 9], [7, 8, 3, 2], [2]]
    torch.testing.assert_close(aux.next(ids), direct(aux.model, [[5, 9], [7, 8, 3, 2], [2]]), **CLOSE)
    assert Aux(tiny_llama(), pad=-1).unpadded(ids) == ids.tolist()
    assert Aux(tiny_llama(), pad=5).unpadded(torch.tensor([[5, 5, 9]])) == [[9]]
    aux.learn_padding(torch.tensor([[2, 2, 5], [7, 8, 3]]), torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert aux.unpadded(ids) == [[2, 5, 9], [7, 8, 3, 2], [2]]


@pytest.mark.parametrize("beams", [1, 3])
def test_under_generate_it_is_a_second_forward(beams: int) -> None:
    main, other = tiny_llama(seed=1), tiny_gpt2(seed=2)

    class Direct(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            rows = [[t for i, t in enumerate(r) if any(x != 2 for x in r[: i + 1])] for r in input_ids.tolist()]
            return scores + direct(other, rows)

    class Cached(LogitsProcessor):
        def __init__(self) -> None:
            self.aux = Aux(other, pad=2)

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores + self.aux.next(input_ids)

    ids = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6]])
    given = {"attention_mask": (ids != 2).long(), "do_sample": False, "max_new_tokens": 8, "num_beams": beams}
    found = [main.generate(ids, logits_processor=[p], **given) for p in (Direct(), Cached())]
    assert torch.equal(*found)


def test_candidates_are_scored_without_being_kept() -> None:
    aux = Aux(tiny_llama())
    prefixes, tokens = [[5, 9, 4], [5, 9, 4], [8]], torch.tensor([[3, 4], [5, 6], [7, 9]])
    found = aux.candidates(prefixes, tokens)
    for i, prefix in enumerate(prefixes):
        torch.testing.assert_close(found[i], direct(aux.model, [[*prefix, int(t)] for t in tokens[i]]), **CLOSE)
    check(aux, [[5, 9, 4, 6], [8, 7]])


def test_heads_read_the_hidden_state() -> None:
    model = tiny_llama()
    head = nn.Linear(16, 1)
    aux = Aux(Headed(model, head), pad=2)
    prefixes = [[5, 9, 4], [8, 3]]
    with torch.no_grad():
        hidden = [model.model(input_ids=torch.tensor([p])).last_hidden_state[0, -1] for p in prefixes]
        expected = torch.stack([head(h) for h in hidden])
    torch.testing.assert_close(aux.scores(prefixes), expected, **CLOSE)
    assert aux.candidates(prefixes, torch.tensor([[4], [5]])).shape == (2, 1, 1)
    assert aux.scores([[5, 9, 4, 6]]).requires_grad is False


def test_tables_serve_too() -> None:
    table = TableLM.random(4)
    aux = Aux(table)
    found = aux.next(torch.tensor([[0, 1], [2, 3]]))
    assert torch.equal(found, torch.stack([table.probs([0, 1]), table.probs([2, 3])]).log())


def test_flags_are_put_back_and_weights_may_change_after_a_reset() -> None:
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    aux = Aux(model)
    before = aux.scores([[5, 9]])
    assert model.training
    assert not model.model.layers[0].training
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-1)
    aux.reset()
    check(aux, [[5, 9]])
    assert not torch.equal(aux.scores([[5, 9]]), before)


def test_what_cannot_be_is_refused() -> None:
    aux = Aux(tiny_llama(max_position_embeddings=4))
    with pytest.raises(ValueError, match="at least one token"):
        aux.scores([[]])
    with pytest.raises(ValueError, match="made for 4 tokens and the text has 5"):
        aux.scores([[3] * 5])
    aux.scores([[3] * 4])
    with pytest.raises(ValueError, match="the text has 5"):
        aux.candidates([[3] * 4], torch.tensor([[3]]))
    with pytest.raises(ValueError, match="the text has 5"):
        aux.scores([[3] * 5])


def test_vocabularies_of_one_tokenizer_may_be_padded() -> None:
    scores = torch.arange(200.0)[None]
    assert aligned(scores, 199).shape == (1, 199)
    assert aligned(scores, 201)[0, -1] == -torch.inf
    with pytest.raises(ValueError, match="vocabulary of 200 tokens and the decoded one of 300"):
        aligned(scores, 300)
