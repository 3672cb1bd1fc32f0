"""FTPO: pairs from the sampler's corrections, their file, training, and what it must leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decode.test_antislop import LETTERS, TABLE, Words
from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.antislop import Correction
from tokenloom.decode.ftpo import Pair, balanced, collect, fit_ftpo, pairs_of, read_pairs, write_pairs
from tokenloom.decode.run import Run
from tokenloom.decode.table import TableLM
from tokenloom.policy import ModelConfig, Policy
from tokenloom.policy.config import LoraSection

PAIRS = [
    Pair([5, 9, 4], 7, [3, 8]),
    Pair([5, 9, 4, 11, 30, 2], 12, [20]),
    Pair([8, 3], 40, [41, 42, 43]),
    Pair([6], 13, [14, 15]),
]


def logits(model: Any, pair: Pair) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([pair.context])).logits[0, -1].double()


def likeliest(model: Any, pairs: list[Pair]) -> list[Pair]:
    """The same contexts, with the model's best token rejected and the next ones chosen."""
    ranked = [logits(model, p).argsort(descending=True).tolist() for p in pairs]
    return [Pair(p.context, r[0], r[1 : 1 + len(p.chosen)]) for p, r in zip(pairs, ranked, strict=True)]


def test_every_rejected_token_makes_a_pair() -> None:
    corrections = [Correction([1, 2], [5, 6], 7, [8]), Correction([3], [5], 9)]
    assert pairs_of(corrections) == [Pair([1, 2], 5, [7, 8]), Pair([1, 2], 6, [7, 8]), Pair([3], 5, [9])]
    assert pairs_of(corrections, least=2) == [Pair([1, 2], 5, [7, 8]), Pair([1, 2], 6, [7, 8])]


def test_alternatives_are_likely_and_complete_nothing_banned() -> None:
    # After "a" was rejected: "b" .2 stands; "c" .15 can stand; "d" is banned too; "e" has below 3% of the best.
    pieces = Words("a ", "b ", "c ", "d ", "e ")
    table = TableLM(5, lambda prefix: (0.4, 0.2, 0.15, 0.245, 0.005))
    loop = decode.loop("antislop", tokenizer=pieces, phrases=["a", "d"])
    run = Run(table, torch.tensor([[0]]), [[0]], limit=1, eos=frozenset(), pad=0, sample=False)
    assert loop.rows(run) == [[1]]
    assert loop.corrections == [Correction([0], [0, 3], 1, [2])]


def test_corrections_outlive_the_history_and_failures_are_none() -> None:
    pieces = Words("a ", "b ", "c ", "d ")
    for history in (1, 2, 256):
        loop = decode.loop("antislop", tokenizer=pieces, phrases=["a"], history=history)
        table = TableLM(4, lambda prefix: (0.5, 0.3, 0.1, 0.1))
        run = Run(table, torch.tensor([[2]]), [[2]], limit=4, eos=frozenset(), pad=0, sample=False)
        assert loop.rows(run) == [[1, 1, 1, 1]]
        assert loop.corrections == [Correction([2, *[1] * n], [0], 1, [2, 3]) for n in range(4)]
    # One retry: the second banned token is allowed, and is no example of what to say.
    loop = decode.loop("antislop", tokenizer=pieces, phrases=["a", "b"], retries=1)
    run = Run(TABLE, torch.tensor([[0]]), [[0]], limit=3, eos=frozenset(), pad=0, sample=False)
    loop.rows(run)
    for c in loop.corrections:
        assert c.chosen in (2, 3)


def test_frequent_rejections_are_thinned_out() -> None:
    counts = {5: 1, 6: 4, 7: 100}
    pairs = [Pair([i + 1], token, [1]) for i, token in enumerate(t for t, c in counts.items() for _ in range(c))]
    for strength, left in ((0.0, 100), (0.5, 20), (0.8, round(100 * 0.04**0.8)), (1.0, 4)):
        found = balanced(pairs, strength=strength)
        assert [sum(p.rejected == t for p in found) for t in counts] == [1, 4, left]
        assert found == sorted(found, key=lambda p: p.context)
        assert balanced(pairs, strength=strength) == found
    assert balanced(pairs, seed=1) != balanced(pairs, seed=2)
    assert balanced([]) == []
    with pytest.raises(ValueError, match="strength"):
        balanced(pairs, strength=1.5)


def test_files_hold_the_pairs(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    write_pairs(PAIRS, file)
    assert read_pairs(file) == PAIRS
    write_pairs(PAIRS, file, LETTERS)
    assert read_pairs(file) == PAIRS
    assert '"chosen_texts": ["d ", "i"]' in file.read_text(encoding="utf-8")
    for line in ("[]", "{}", '{"context": [1], "rejected": 2, "chosen": [2]}', '{"context": [], "rejected": 2}', "x"):
        file.write_text('{"context": [1], "rejected": 2, "chosen": [3]}\n' + line, encoding="utf-8")
        with pytest.raises(ValueError, match="line 2"):
            read_pairs(file)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "gpt2"])
def test_training_turns_the_final_token_and_little_else(name: str) -> None:
    model = TINY[name](seed=5)
    pairs = likeliest(model, PAIRS)
    kept = [p.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())
            for p in m.parameters()]  # fmt: skip
    start = [logits(model, p) for p in pairs]
    given: dict[str, Any] = {"learning_rate": 1e-2, "epochs": 60, "wins": 2.0}
    found = fit_ftpo(model, pairs, **given)
    assert len(found.losses) == 60
    assert found.losses[-1] < 0.3 * found.losses[0]
    assert found.before.wins == found.before.moved == 0.0
    assert found.after.wins == 1.0
    end = [logits(model, p) for p in pairs]
    before, after = ([float(x.softmax(-1)[p.rejected]) for x, p in zip(xs, pairs, strict=True)] for xs in (start, end))
    assert all(b < a for a, b in zip(before, after, strict=True))
    assert found.before.rejected == pytest.approx(sum(before) / 4, rel=1e-4)
    assert found.after.rejected == pytest.approx(sum(after) / 4, rel=1e-4)
    squares = []
    for x, y, p in zip(start, end, pairs, strict=True):
        rest = torch.ones(64, dtype=torch.bool)
        rest[[p.rejected, *p.chosen]] = False
        squares.append(float((y - x)[rest].square().mean()))
    assert found.after.moved == pytest.approx((sum(squares) / 4) ** 0.5, rel=1e-3)
    # The tether's part of the loss cannot exceed the whole, which has only fallen.
    assert found.after.moved <= (found.losses[0] / 0.4) ** 0.5
    assert all(torch.equal(p, k) for p, k in zip(
        (p for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()), kept,
        strict=True))  # fmt: skip
    loose = fit_ftpo(TINY[name](seed=5), pairs, **given, rest=0.0)
    assert loose.after.moved > 1.5 * found.after.moved


def test_the_first_loss_is_the_formula_at_the_reference() -> None:
    model = tiny_llama(seed=5)
    pairs = likeliest(model, PAIRS)
    gaps = [2.0 - (logits(model, p)[p.chosen] - logits(model, p)[p.rejected]) for p in pairs]
    weights = [(g / 2).clamp(0, 1) for g in gaps]
    expected = sum(float((w * (1 + g.exp()).log()).sum()) for g, w in zip(gaps, weights, strict=True)) / sum(
        float(w.sum()) for w in weights
    )
    found = fit_ftpo(model, pairs, learning_rate=0.0)
    assert found.losses == [pytest.approx(expected, rel=1e-5)]
    assert found.before == found.after


def test_wins_end_training_and_held_out_pairs_are_measured() -> None:
    model = tiny_llama(seed=5)
    pairs = likeliest(model, PAIRS)
    steps: list[int] = []
    found = fit_ftpo(model, pairs[:3], pairs[3:], learning_rate=1e-2, epochs=200, seed=1,
                     progress=lambda done, of, loss: steps.append(of))  # fmt: skip
    assert 8 <= len(found.losses) < 100
    assert steps == [200] * len(found.losses)
    alone = float(logits(tiny_llama(seed=5), pairs[3]).softmax(-1)[pairs[3].rejected])
    assert found.before.rejected == pytest.approx(alone, rel=1e-4)


def test_adapters_alone_are_trained() -> None:
    policy = Policy(tiny_llama(seed=5), config=ModelConfig(lora=LoraSection(rank=4)))
    pairs = likeliest(policy.model, PAIRS)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    found = fit_ftpo(policy.model, pairs, learning_rate=2e-2, epochs=60)
    assert found.after.rejected < 0.5 * found.before.rejected
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters() if n in before)
    with policy.model.disable_adapter():
        for pair in pairs:
            assert int(logits(policy.model, pair).argmax()) == pair.rejected


def test_collected_pairs_train_the_ban_away() -> None:
    policy = Policy(tiny_llama(seed=8, eos_token_id=None))
    prompts = [[5, 9, 4], [8, 3, 11, 6]]
    banned = int(logits(policy.model, Pair(prompts[0], 0, [1])).argmax())
    pattern = LETTERS.pieces[banned].strip()
    loop = decode.loop("antislop", tokenizer=LETTERS, patterns=[pattern])
    told: list[tuple[int, int, int]] = []
    pairs = collect(policy, prompts, loop, copies=3, max_tokens=6, batch=4, least=2, seed=1,
                    progress=lambda *numbers: told.append(numbers))  # fmt: skip
    assert [t[:2] for t in told] == [(4, 6), (6, 6)]
    assert told[-1][2] == len(pairs) > 3
    for pair in pairs:
        assert pattern in LETTERS.decode([pair.rejected])
        assert not any(pattern in LETTERS.decode([c]) for c in pair.chosen)
        assert len(pair.chosen) >= 2
        assert pair.context[: len(prompts[0])] == prompts[0] or pair.context[: len(prompts[1])] == prompts[1]
    assert collect(policy, prompts, loop, copies=3, max_tokens=6, batch=4, least=2, seed=1) == pairs
    found = fit_ftpo(policy.model, pairs, learning_rate=1e-2, epochs=40, batch=4)
    assert found.after.rejected < 0.3 * found.before.rejected


def test_what_cannot_be_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="no pairs"):
        fit_ftpo(model, [])
    with pytest.raises(ValueError, match="id 64"):
        fit_ftpo(model, [Pair([1], 2, [64])])
    for given in (([], 1, [2]), ([1], 1, []), ([1], 1, [1, 2])):
        with pytest.raises(ValueError, match="pair needs"):
            Pair(*given)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        fit_ftpo(model, PAIRS)
