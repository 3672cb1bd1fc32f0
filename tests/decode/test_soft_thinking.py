"""Soft Thinking on models: limits to greedy decoding, rows in different modes, cold stops, the recurrence itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.table import TableLM
from tokenloom.draw import RandomDraw
from tokenloom.methods.decoding.soft_thinking import concept, dirichlet_noise, gumbel_noise

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("settings", [{"max_topk": 1}, {"temperature": 0.0}])
def test_one_token_a_mixture_is_greedy_decoding(name: str, settings: dict[str, Any]) -> None:
    model = TINY[name]()
    loop = decode.loop("soft-thinking", end=63, **settings)
    theirs = model.generate(IDS, attention_mask=MASK, **GREEDY)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY), theirs)


def by_hand(model: Any, prompt: list[int], steps: int, end: int, temperature: float = 0.6) -> list[int]:
    """Soft thinking without a cache, whole sequences of embeddings, then greedy."""
    inputs = model.get_input_embeddings()(torch.tensor([prompt]))
    table = model.get_input_embeddings().weight
    scale = inputs.norm() / table[prompt].norm()
    tokens: list[int] = []
    thinking = True
    for _ in range(steps):
        scores = model(inputs_embeds=inputs).logits[0, -1]
        if thinking:
            weights, ids = concept((scores / temperature).softmax(-1)[None])
            token = int(ids[0, 0])
            thinking = token != end
            new = weights[0] @ table[ids[0]] * scale if thinking else table[token] * scale
        else:
            token = int(scores.argmax())
            new = table[token] * scale
        tokens.append(token)
        if token == 1:
            break
        inputs = torch.cat((inputs, new.view(1, 1, -1)), 1)
    return tokens


def ends_apart(model: Any) -> tuple[Any, int] | None:
    """A token that one row says while it thinks, not at once, and another says later or never."""
    soft = model.generate(IDS, attention_mask=MASK, custom_generate=decode.loop("soft-thinking", end=63), **GREEDY)
    rows = soft[:, 5:].tolist()
    found = [t for t in rows[0][2:8] if t > 2 and t not in [*rows[0][:2], *rows[1][:4], *rows[2][:4]]]
    return (model, found[0]) if found else None


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2"])
def test_rows_in_different_modes_equal_the_recurrence_by_hand(name: str) -> None:
    model, end = next(found for seed in range(40) if (found := ends_apart(TINY[name](seed=seed))) is not None)
    loop = decode.loop("soft-thinking", end=end)
    ours = model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY)
    with torch.no_grad():
        for row in range(3):
            expected = by_hand(model, IDS[row][MASK[row].bool()].tolist(), 12, end)
            assert ours[row, 5 : 5 + len(expected)].tolist() == expected
    assert 0 < loop.last_run.counts["soft_steps"] < 3 * 12


def test_mixtures_differ_from_tokens() -> None:
    model = tiny_llama(seed=7)
    soft = model.generate(IDS, attention_mask=MASK, custom_generate=decode.loop("soft-thinking", end=63), **GREEDY)
    assert not torch.equal(soft, model.generate(IDS, attention_mask=MASK, **GREEDY))


def test_cold_stops_end_thinking_and_then_the_row() -> None:
    model = tiny_llama(eos_token_id=None)
    loop = decode.loop("soft-thinking", end=63, threshold=10.0, length=3)
    ours = model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY)
    assert ours.shape == (3, 5 + 6)
    assert ours[:, 5 + 2].tolist() == [63, 63, 63]
    assert loop.last_run.counts == {"soft_steps": 6.0, "cold_stops": 6.0}


def test_greedy_thinking_is_not_stopped_by_the_certainty_of_its_own_law() -> None:
    model = tiny_llama(eos_token_id=None)
    loop = decode.loop("soft-thinking", end=63, temperature=0.0, length=3)
    theirs = model.generate(IDS, attention_mask=MASK, **GREEDY)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY), theirs)
    assert loop.last_run.counts["cold_stops"] == 0
    # What the model itself is certain of stops it as at any temperature.
    loop = decode.loop("soft-thinking", end=63, temperature=0.0, threshold=10.0, length=3)
    ours = model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY)
    assert ours[:, 5 + 2].tolist() == [63, 63, 63]


def test_every_step_adds_one_token_to_the_cache() -> None:
    model = tiny_llama(eos_token_id=None)
    lengths: list[int] = []
    model.register_forward_hook(
        lambda _, args, kwargs, output: lengths.append(kwargs["position_ids"].max().item()), with_kwargs=True
    )
    one = IDS[2:]
    model.generate(one, custom_generate=decode.loop("soft-thinking", end=63), **GREEDY)
    assert lengths == list(range(4, 16))


def test_the_end_is_found_by_its_last_token() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [ord(c) - 96 for c in text]

    assert decode.loop("soft-thinking", tokenizer=Letters(), end="abc").end == 3
    with pytest.raises(ValueError, match="no token"):
        decode.loop("soft-thinking", tokenizer=Letters(), end="")
    with pytest.raises(ValueError, match="tokenizer"):
        decode.loop("soft-thinking")
    for settings, match in (
        ({"max_topk": 0}, "max_topk"),
        ({"temperature": -0.5}, "temperature must be 0 or more"),
        ({"length": 0}, "threshold=0 is what never stops"),
    ):
        with pytest.raises(ValueError, match=match):
            decode.loop("soft-thinking", end=3, **settings)


def test_models_without_embeddings_are_refused() -> None:
    from tokenloom.decode.run import Run

    run = Run(TableLM.random(3), torch.tensor([[0]]), [[0]], limit=2, eos=frozenset(), pad=0, sample=False)
    with pytest.raises(ValueError, match="embeddings"):
        decode.loop("soft-thinking", end=2).rows(run)


class Noise(RandomDraw):
    """Keeps the noise that was drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.Generator().manual_seed(seed))
        self.drawn: list[torch.Tensor] = []

    def gamma(self, shapes: torch.Tensor) -> torch.Tensor:
        self.drawn.append(super().gamma(shapes))
        return self.drawn[-1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{"gumbel": 0.5}, {"dirichlet": 1.0}, {"dirichlet": 1.0, "gumbel": 0.5}])
def test_noisy_mixtures_equal_the_recurrence_by_hand(name: str, settings: dict[str, float]) -> None:
    model = TINY[name](seed=7, eos_token_id=None)
    loop = decode.loop("soft-thinking", end=64, **settings)  # an id that no row can say
    loop.draw = draw = Noise(3)
    ours = model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY)[:, 5:]
    noise = iter(draw.drawn)
    table = model.get_input_embeddings().weight
    inputs = [model.get_input_embeddings()(torch.tensor([IDS[r][MASK[r].bool()].tolist()])) for r in range(3)]
    with torch.no_grad():
        for step in range(12):
            drawn = [next(noise) for _ in range(2 * ("dirichlet" in settings) + ("gumbel" in settings))]
            for row in range(3):
                given = [d[row : row + 1] for d in drawn]
                scores = model(inputs_embeds=inputs[row]).logits[:, -1].double()
                weights, ids = concept((scores / 0.6).softmax(-1))
                if "dirichlet" in settings:
                    weights, ids = dirichlet_noise(weights, ids, given.pop(0), given.pop(0), alpha=1.0)
                if "gumbel" in settings:
                    weights, ids = gumbel_noise(weights, ids, given.pop(0), temperature=0.5)
                assert int(ids[0, 0]) == int(ours[row, step])
                new = (weights[0] @ table[ids[0]].double()).float()
                inputs[row] = torch.cat((inputs[row], new.view(1, 1, -1)), 1)
    assert next(noise, None) is None


def test_noise_follows_the_generator_and_leaves_greedy_mixtures_alone() -> None:
    model = tiny_llama(seed=7)
    rows = []
    for seed in (3, 3, 4):
        loop = decode.loop("soft-thinking", end=63, gumbel=0.5, dirichlet=1.0)
        loop.draw = RandomDraw(torch.Generator().manual_seed(seed))
        rows.append(model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY).tolist())
    assert rows[0] == rows[1] != rows[2]
    theirs = model.generate(IDS, attention_mask=MASK, **GREEDY)
    for settings in ({"max_topk": 1}, {"temperature": 0.0}):
        loop = decode.loop("soft-thinking", end=63, gumbel=0.5, dirichlet=1.0, **settings)
        assert torch.equal(model.generate(IDS, attention_mask=MASK, custom_generate=loop, **GREEDY), theirs)
    with pytest.raises(ValueError, match="0 for no noise"):
        decode.loop("soft-thinking", end=63, gumbel=-0.5)
