"""DiffAdapt in generate: strategies by class, the baseline as a special case, budgets kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.decode.tokenizers_at_hand import byte_level
from tests.tiny_models import tiny_llama
from tokenloom import decode
from tokenloom.decode.diffadapt import DiffAdapt, Strategy, fit, mean_entropies
from tokenloom.decode.hidden_states import states
from tokenloom.decode.probe import Probe
from tokenloom.draw import RandomDraw

TOKENIZER = byte_level()
MODEL = tiny_llama(vocab=len(TOKENIZER))
GIVEN = TOKENIZER(["12", "the answer is", "name"], return_tensors="pt", padding=True, padding_side="left")
PROMPTS = [ids[mask.bool()].tolist() for ids, mask in zip(GIVEN.input_ids, GIVEN.attention_mask, strict=True)]
NORMAL = Strategy("", 1.0, 1.0)
# Classes 0, 1, 2 for the three prompts.
PROBE = Probe.fit(states(MODEL, PROMPTS), torch.arange(3), classes=3, l2=1e-3)


def generated(loop: object, *, sample: bool, limit: int = 8) -> torch.Tensor:
    return MODEL.generate(
        GIVEN.input_ids,
        attention_mask=GIVEN.attention_mask,
        do_sample=sample,
        max_new_tokens=limit,
        eos_token_id=None,
        custom_generate=loop,
    )


def test_all_normal_is_the_baseline() -> None:
    loop = DiffAdapt(PROBE, TOKENIZER, (NORMAL, NORMAL, NORMAL))
    assert loop.classes(MODEL, PROMPTS) == [0, 1, 2]
    assert torch.equal(generated(loop, sample=False), generated(decode.loop("plain"), sample=False))
    always = Probe(16, classes=3)
    with torch.no_grad():
        always.net[-1].bias[1] = 9.0
    loops = [DiffAdapt(always, TOKENIZER, (Strategy("x", 0.1, 0.1), NORMAL, Strategy("y"))), decode.loop("plain")]
    for loop in loops:
        loop.draw = RandomDraw(torch.Generator().manual_seed(1))
    assert torch.equal(generated(loops[0], sample=True), generated(loops[1], sample=True))


def test_top_p_cuts_the_law_at_the_strategys_temperature() -> None:
    loop = DiffAdapt(PROBE, TOKENIZER, [Strategy("", 3.0, 1.0)] * 3)
    seen: list[torch.Tensor] = []

    def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return scores

    loop.draw = RandomDraw(torch.Generator().manual_seed(0))
    given = {"attention_mask": GIVEN.attention_mask, "do_sample": True, "max_new_tokens": 1, "top_k": 0}
    MODEL.generate(GIVEN.input_ids, custom_generate=loop, logits_processor=[watch], **given)
    logits = MODEL(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert torch.allclose(seen[0][0], logits / 3, atol=1e-5)


def test_suffix_temperature_and_budget() -> None:
    easy = Strategy(" be brief", 1e-4, 0.4)
    loop = DiffAdapt(PROBE, TOKENIZER, (easy, NORMAL, Strategy("", 1.0, 0.01)), tail=1)
    found = generated(loop, sample=True, limit=8)[:, GIVEN.input_ids.shape[1] :]
    assert loop.last_run is not None
    assert [loop.last_run.counts[c] for c in ("easy", "normal", "hard")] == [1, 1, 1]
    prompt = [*PROMPTS[0][:-1], *TOKENIZER.encode(" be brief", add_special_tokens=False), PROMPTS[0][-1]]
    # Nearly no temperature: greedy, 0.4 * 8 tokens, behind the longer prompt.
    ids = torch.tensor([prompt])
    alone = MODEL.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3, eos_token_id=None
    )
    assert found[0, :3].tolist() == alone[0, len(prompt) :].tolist()
    assert found[0, 3:].tolist() == [2] * 5  # padding
    assert found[2, 1:].tolist() == [2] * 7  # one token at least


def test_a_probe_from_a_proxy_run(tmp_path: Path) -> None:
    accuracy, entropy = torch.tensor([1.0, 0.6, 0.0]), torch.tensor([0.9, 0.5, 0.5])
    probe = fit(MODEL, PROMPTS, accuracy, entropy)
    probe.save(tmp_path / "probe")
    assert DiffAdapt(tmp_path / "probe", TOKENIZER).classes(MODEL, PROMPTS) == [0, 1, 2]


def test_entropies_are_the_models() -> None:
    completions = [[5, 6], [7], [8, 9, 10]]
    found = mean_entropies(MODEL, PROMPTS, completions)
    with torch.no_grad():
        logits = MODEL(torch.tensor([[*PROMPTS[2], *completions[2]]])).logits[0, len(PROMPTS[2]) - 1 : -1]
    assert float(found[2]) == pytest.approx(
        float(torch.distributions.Categorical(logits=logits).entropy().mean()), 1e-4
    )
    with pytest.raises(ValueError, match="at least one token"):
        mean_entropies(MODEL, PROMPTS[:1], [[]])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="three strategies"):
        DiffAdapt(PROBE, TOKENIZER, (NORMAL,))
    with pytest.raises(ValueError, match="share"):
        DiffAdapt(PROBE, TOKENIZER, (NORMAL, NORMAL, Strategy("", 1.0, 1.5)))
    with pytest.raises(ValueError, match="tail >= 0"):
        DiffAdapt(PROBE, TOKENIZER, tail=-1)
