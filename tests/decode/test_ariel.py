"""AriEL with models: texts come back from their codes; uniform codes give the model's law."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.ariel import encode
from tokenloom.decode.run import Run
from tokenloom.decode.table import TableLM

OPTIONS = {"do_sample": False, "eos_token_id": 1, "pad_token_id": 2}


@pytest.mark.parametrize("name", sorted(TINY)[:4])
def test_texts_come_back(name: str) -> None:
    model = TINY[name]()
    prompt = [5, 8, 3]
    generator = torch.Generator().manual_seed(0)
    texts = [[*torch.randint(3, 60, (n,), generator=generator).tolist(), 1] for n in (40, 7)]
    codes = [encode(model, prompt, text, axes=4) for text in texts]
    ids = torch.tensor([prompt, prompt])
    out = model.generate(ids, custom_generate=decode.loop("ariel", codes=codes), max_new_tokens=60, **OPTIONS)
    assert out[0, 3:].tolist() == texts[0]
    assert out[1, 3 : 3 + 8].tolist() == texts[1]
    short = model.generate(ids[:1], custom_generate=decode.loop("ariel", codes=[codes[1].floats()]), max_new_tokens=8,
                           **OPTIONS)  # fmt: skip
    assert short[0, 3:].tolist() == texts[1], "a short text fits into floats"


def test_volume_is_the_probability_and_a_grid_of_codes_gives_the_law() -> None:
    model = TableLM.random(3, seed=4)
    law = model.string_law((0,), 2)
    for string, mass in law.items():
        assert float(encode(model, [0], string, axes=2).volume) == pytest.approx(mass, abs=1e-12)
    counts: dict[tuple[int, ...], int] = {}
    n = 40
    for i in range(n):
        for j in range(n):
            run = Run(model, torch.tensor([[0]]), [[0]], 2, frozenset(), 2, False)
            string = tuple(decode.loop("ariel", codes=[[(i + 0.5) / n, (j + 0.5) / n]]).rows(run)[0])
            counts[string] = counts.get(string, 0) + 1
    for string, mass in law.items():
        assert counts.get(string, 0) / n**2 == pytest.approx(mass, abs=4 / n)
    assert math.isclose(sum(law.values()), 1.0)


def test_bad_input() -> None:
    model = tiny_llama()
    ids = torch.tensor([[2, 3], [2, 4]])
    with pytest.raises(ValueError, match="1 codes for 2 rows"):
        model.generate(ids, custom_generate=decode.loop("ariel", codes=[[0.5]]), max_new_tokens=2, **OPTIONS)
    with pytest.raises(ValueError, match="at least one number"):
        decode.loop("ariel", codes=[[]])
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        model.generate(ids[:1], custom_generate=decode.loop("ariel", codes=[[1.5]]), max_new_tokens=2, **OPTIONS)
    with pytest.raises(ValueError, match="do_sample=False"):
        model.generate(ids[:1], custom_generate=decode.loop("ariel", codes=[[0.5]]), max_new_tokens=2,
                       **(OPTIONS | {"do_sample": True, "temperature": 0.7}))  # fmt: skip
