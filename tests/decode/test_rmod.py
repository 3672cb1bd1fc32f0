"""RMOD as a loop: its exact laws in special cases, values from hidden states, and their training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decode.table_runs import Strings, close, loop_law
from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.rmod import Rmod, ValueHeads, examples, fit
from tokenloom.decode.run import Run
from tokenloom.decode.segment_search import Hypothesis
from tokenloom.decode.table import TableLM
from tokenloom.draw import RandomDraw
from tokenloom.methods.decoding.best_of_n import best_of_n_law
from tokenloom.methods.decoding.rmod import best_block, robust_weights

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = (IDS != 2).long()


def first(prompt_ids: list[int], ids: list[int]) -> float:
    return float(sum(3**i * t for i, t in enumerate(ids)))


def second(prompt_ids: list[int], ids: list[int]) -> float:
    return 1.5 * ids.count(0) - 0.1 * len(ids)


def test_one_candidate_is_plain_sampling() -> None:
    table = TableLM.random(3, seed=1)
    close(loop_law(lambda: Rmod([first, second], candidates=1, block=2), table, limit=3, eos=[2]),
          table.string_law([0], 3, eos=2))  # fmt: skip


def test_one_objective_and_one_block_is_best_of_n() -> None:
    table = TableLM.random(3, seed=2)
    law = table.string_law([0], 2)
    p = torch.tensor(list(law.values()), dtype=torch.float64)
    expected = best_of_n_law(p, torch.tensor([first([0], list(y)) for y in law]), n=2)
    found = loop_law(lambda: Rmod(first, candidates=2, block=9), table, limit=2)
    close(found, dict(zip(law, expected.tolist(), strict=True)))


@pytest.mark.parametrize("choose", ["best", "sample"])
def test_the_law_of_robust_blocks(choose: Any) -> None:
    table, lam = TableLM.random(2, seed=3), 1.5
    expected: Strings = {(): 1.0}
    for _ in range(2):  # blocks of one token
        longer: Strings = {}
        for y, mass in expected.items():
            p = table.probs((0, *y)).tolist()
            for tokens in itertools.product(range(2), repeat=3):
                blocks = [[*y, t] for t in tokens]
                values = torch.tensor([[f([0], b) for f in (first, second)] for b in blocks], dtype=torch.float64)
                weights = robust_weights(values, lam=lam)
                shares = (lam * values @ weights).softmax(0)
                if choose == "best":
                    shares = torch.eye(3)[best_block(values, weights)]
                drawn = mass * p[tokens[0]] * p[tokens[1]] * p[tokens[2]]
                for t, share in zip(tokens, shares.tolist(), strict=True):
                    longer[(*y, t)] = longer.get((*y, t), 0.0) + drawn * share
        expected = longer
    make = lambda: Rmod([first, second], candidates=3, block=1, lam=lam, choose=choose)  # noqa: E731
    close(loop_law(make, table, limit=2), expected)


def test_heads_read_the_state_at_the_last_token_of_every_candidate() -> None:
    model, heads = tiny_llama(vocab=12), ValueHeads(16, 2)

    class Checked(Rmod):
        checked, ended = 0, 0

        def _values(self, run: Run, candidates: list[Hypothesis]) -> torch.Tensor:
            values = super()._values(run, candidates)
            for h, found in zip(candidates, values, strict=True):
                ids = torch.tensor([[*run.prompts[h.row], *h.tokens]])
                with torch.no_grad():
                    state = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
                    torch.testing.assert_close(found, heads(state), rtol=1e-4, atol=1e-4)
                self.checked += 1
                self.ended += h.tokens[-1] == 1
            return values

    loop = Checked(heads, candidates=4, block=3)
    loop.draw = RandomDraw(torch.Generator().manual_seed(0))
    ids = IDS.clamp(max=11)
    out = model.generate(ids, attention_mask=MASK, do_sample=True, max_new_tokens=8, custom_generate=loop)
    assert out.shape[1] <= 13
    assert loop.checked >= 24
    assert loop.ended > 0


def test_training_finds_what_hidden_states_tell(tmp_path: Path) -> None:
    model = tiny_llama()
    g = torch.Generator().manual_seed(0)
    prompts = [[5, 9], [7], [3, 3, 4]] * 20
    responses = [torch.randint(3, 64, (int(n),), generator=g).tolist() for n in torch.randint(1, 6, (60,), generator=g)]
    hidden, _, mask = examples(model, prompts, responses, torch.zeros(60, 2))
    assert hidden.shape == (60, 5, 16)
    assert mask.sum(1).tolist() == [len(r) for r in responses]
    whole = torch.tensor([[*prompts[7], *responses[7]]])
    with torch.no_grad():
        states = model(input_ids=whole, output_hidden_states=True).hidden_states[-1][0, len(prompts[7]) :]
    torch.testing.assert_close(hidden[7, : len(responses[7])], states, rtol=1e-4, atol=1e-4)

    # Rewards that the last state alone gives: on responses of one token the heads can be exact.
    truth = ValueHeads(16, 2)
    singles = [r[:1] for r in responses]
    states, _, ones = examples(model, prompts, singles, torch.zeros(60, 2))
    rewards = truth(states[:, 0]).detach()
    losses: list[float] = []
    heads = fit(
        states, rewards, ones, steps=1500, lr=0.03, weight_decay=0.0, progress=lambda i, loss: losses.append(loss)
    )
    assert len(losses) == 1500
    assert losses[-1] < 1e-3 * losses[0]
    again = fit(states, rewards, ones, steps=1500, lr=0.03, weight_decay=0.0)
    assert torch.equal(heads.linear.weight, again.linear.weight)
    heads.save(tmp_path / "heads.safetensors")
    loaded = ValueHeads.load(tmp_path / "heads.safetensors")
    assert torch.equal(loaded(states), heads(states))
    aimed = fit(hidden, torch.ones(60, 2), mask, target="td", steps=300, weight_decay=0.0)
    assert (aimed(hidden)[mask] - 1).abs().mean() < 0.3


def test_mistakes_are_named() -> None:
    for settings, match in (
        ({"candidates": 0}, "at least 1"), ({"block": 0}, "at least 1"), ({"choose": "all"}, "one of best, sample"),
        ({"lam": -1.0}, "above 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            decode.loop("rmod", values=first, **settings)
    with pytest.raises(ValueError, match="at least one objective"):
        decode.loop("rmod", values=[])
    with pytest.raises(ValueError, match="needs a response"):
        examples(tiny_llama(), [[1]], [[]], [[1.0]])
