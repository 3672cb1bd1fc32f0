"""The watermark in use: written by loop and shaper, found by the key after edits, not by another."""

from __future__ import annotations

import time

import pytest
import torch

from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.distortion_free_watermark import (
    WatermarkKey,
    WatermarkShaper,
    detect,
    generated_tokens,
    random_costs,
)
from tokenloom.draw import RandomDraw

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
OPTIONS = {"attention_mask": MASK, "do_sample": True, "top_k": 0, "temperature": 1.5, "eos_token_id": None}
V = 64


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", ["exp", "its"])
def test_written_text_is_found_even_when_edited(kind: str) -> None:
    loop = decode.loop("distortion-free-watermark", key=5, length=64, kind=kind)
    loop.draw = RandomDraw(_generator())
    ids = tiny_llama().generate(IDS, max_new_tokens=50, custom_generate=loop, **OPTIONS)
    assert len(set(loop.offsets)) == 2
    key, other = WatermarkKey(5, V, length=64, kind=kind), WatermarkKey(6, V, length=64, kind=kind)
    for row in ids.tolist():
        text = generated_tokens(row, 5)
        edited = text[:12] + text[13:30] + [3] + text[30:]
        for edit in (False, True):
            found = detect(text, key, edit=edit, generator=_generator())
            assert found.p_value == 0.01, (kind, edit)
        assert detect(edited, key, generator=_generator()).p_value == 0.01
        assert detect(text, other, generator=_generator()).p_value > 0.02
        middle = detect(text, key, edit=False, block=30, generator=_generator())
        assert middle.p_value == 0.01


def test_p_values_of_other_text_are_valid() -> None:
    values = []
    for seed in range(60):
        text = torch.randint(V, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
        fresh = torch.Generator().manual_seed(1000 + seed)
        values.append(detect(text, WatermarkKey(seed, V, length=16), resamples=19, generator=fresh).p_value)
    for level in (0.1, 0.25, 0.5):
        share = sum(v <= level for v in values) / len(values)
        assert share <= level + 3.9 * (level * (1 - level) / len(values)) ** 0.5


def test_random_keys_are_like_keys() -> None:
    """Equal tokens meet equal values, and the mean cost is that of fresh uniform numbers."""
    text = [3, 9, 3, 9, 1]
    for kind in ("exp", "its"):
        key = WatermarkKey(0, V, length=128, kind=kind)
        fresh = random_costs(text, key, 40, _generator())
        assert torch.equal(fresh[:, 0], fresh[:, 2])
        assert not torch.equal(fresh[:, 0], fresh[:, 1])
        own = key.costs(text)
        assert own.shape == (1, 5, 128)
        assert torch.equal(own[:, 1], own[:, 3])
        expected = -1.0 if kind == "exp" else 1 / 3
        assert float(fresh.mean()) == pytest.approx(expected, abs=0.06)


def test_a_shapers_text_is_found_and_each_row_keeps_its_elements() -> None:
    model = tiny_llama()
    shaper = decode.shaper("distortion-free-watermark", key=5, length=64, temperature=1.5)
    torch.manual_seed(0)
    ids = model.generate(IDS, max_new_tokens=40, logits_processor=[shaper], **(OPTIONS | {"temperature": 1.0}))
    key = WatermarkKey(5, V, length=64)
    for row in ids.tolist():
        assert detect(generated_tokens(row, 5), key, generator=_generator()).p_value == 0.01
    law = torch.full((3, V), 1 / V).log()
    prompts = torch.tensor([[5, 9], [5, 9], [5, 9]])
    first = shaper(prompts, law).argmax(-1)
    assert len(set(first.tolist())) > 1, "equal prompts begin at different elements"
    second = torch.cat((prompts, first[:, None]), 1)
    together = shaper(second, law).argmax(-1).tolist()
    for row in (2, 0):
        apart = shaper(torch.cat((second[row], torch.tensor([together[row]])))[None], law[:1])
        assert int((apart > -torch.inf).sum()) == 1
    start = WatermarkShaper(key=5, length=64)
    start._offsets[(5,)] = [7]
    assert int(start(prompts[:1], law[:1]).argmax()) == int(key.choose(law[:1].exp(), [7 + 2]))
    later = torch.tensor([[5, 9, 4]])
    assert int(start(later, law[:1]).argmax()) == int(key.choose(law[:1].exp(), [7 + 3]))


def test_key_elements_are_finer_than_the_least_masses() -> None:
    element = WatermarkKey(3, V)._element(0)
    assert element.dtype == torch.float64
    assert bool((element != element.float()).any())


@pytest.mark.parametrize("kind", ["exp", "its"])
def test_all_digits_of_a_secret_matter(kind: str) -> None:
    text = list(range(10))
    keys = [WatermarkKey(s, V, length=4, kind=kind) for s in (5, 5 + 2**32, 5 + 2**99, -5, 5)]  # type: ignore[arg-type]
    costs = [key.costs(text) for key in keys]
    assert torch.equal(costs[0], costs[4])
    assert not any(torch.equal(costs[0], other) for other in costs[1:4])


def test_a_shaper_forgets_the_texts_that_went_on() -> None:
    shaper, ids = WatermarkShaper(length=16), IDS
    for _ in range(20):
        chosen = shaper(ids, torch.zeros(2, V)).argmax(-1)
        assert len(shaper._offsets) == 2
        ids = torch.cat((ids, chosen[:, None]), 1)


def test_the_detector_by_name_says_the_same() -> None:
    text = torch.randint(V, (12,), generator=_generator()).tolist()
    found = decode.build("detector", "distortion-free-watermark", {"vocabulary": V}, length=16, resamples=19)(text)
    assert tuple(found) == tuple(vars(detect(text, WatermarkKey(0, V, length=16), resamples=19)).values())


def test_detection_is_fast_enough() -> None:
    text = torch.randint(50_000, (200,), generator=_generator()).tolist()
    key = WatermarkKey(1, 50_000)
    started = time.perf_counter()
    detect(text, key, resamples=10, generator=_generator())
    assert time.perf_counter() - started < 5


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="do_sample"):
        tiny_llama().generate(IDS, attention_mask=MASK, do_sample=False, max_new_tokens=2,
                              custom_generate=decode.loop("distortion-free-watermark"))  # fmt: skip
    with pytest.raises(ValueError, match="vocabulary, 64"):
        detect([64], WatermarkKey(0, V))
    with pytest.raises(ValueError, match="needs tokens"):
        detect([], WatermarkKey(0, V))
    with pytest.raises(ValueError, match="'exp' or 'its'"):
        WatermarkKey(0, V, kind="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resamples = 0"):
        detect([1], WatermarkKey(0, V), resamples=0)
    for build in (decode.shaper, decode.loop):
        with pytest.raises(ValueError, match="at least one element"):
            build("distortion-free-watermark", length=0)
    for temperature in (0.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            WatermarkShaper(temperature=temperature)
    assert generated_tokens([5, 6, 7, 0, 0], 1, pad=0) == [6, 7]
