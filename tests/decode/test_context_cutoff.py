"""Context cutoff in generate: chunks read as one, nothing is read twice, gauges find the heads that tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.context_gauge import Gauge, Sample, SelfPrompt, fit, fit_outputs, prefixes
from tokenloom.decode.hidden_states import head_outputs

PROMPT = [5, 9, 4, *range(20, 43), 7, 8]
SPAN = (3, 26)  # 23 tokens of context between a question of 3 and a suffix of 2


def never(outputs: torch.Tensor) -> torch.Tensor:
    return torch.ones(1)


def generated(
    model: torch.nn.Module, prompts: list[list[int]], loop: object = None, **settings: object
) -> torch.Tensor:
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    given = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 2, **settings}
    return model.generate(ids, attention_mask=mask, custom_generate=loop, **given)[:, width:]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2"])
def test_an_unreachable_threshold_is_full_context(name: str) -> None:
    model = TINY[name]()
    loop = decode.loop("context-cutoff", gauge=never, spans=[SPAN, (1, 8)], threshold=1.5)
    prompts = [PROMPT, [6, *range(30, 37), 9]]
    assert torch.equal(generated(model, prompts, loop), generated(model, prompts))
    assert loop.read == [23, 7]
    assert loop.last_run.counts["context_read"] == 1


@pytest.mark.parametrize("stop", [1, 3, 9])
def test_a_cut_context_is_as_if_it_had_been_shorter(stop: int) -> None:
    model = tiny_llama()
    seen: list[torch.Tensor] = []

    def gauge(outputs: torch.Tensor) -> torch.Tensor:
        seen.append(outputs)
        return torch.tensor([float(len(seen) == stop)])

    read: list[int] = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda module, given, output: read.append(given[0].shape[1])
    )
    loop = decode.loop("context-cutoff", gauge=gauge, spans=[SPAN], threshold=0.5)
    found = generated(model, [PROMPT], loop)
    handle.remove()
    end = sum([3, 3, 3, 2, 2, 2, 2, 2, 2, 2][:stop])
    assert loop.read == [end]
    cut = [*PROMPT[: 3 + end], *PROMPT[26:]]
    assert torch.equal(found, generated(model, [cut]))
    # Each token was read once: the question and the first chunk, the chunks, the suffix, and single tokens.
    assert sum(read) == len(cut) + 5
    assert len(seen) == stop
    assert seen[0].shape == (1, 2, 2, 8)


def test_heads_see_the_same_in_chunks_and_at_once() -> None:
    model = tiny_llama()
    seen: list[torch.Tensor] = []

    def gauge(outputs: torch.Tensor) -> torch.Tensor:
        seen.append(outputs[0].clone())
        return torch.zeros(1)

    generated(model, [PROMPT], decode.loop("context-cutoff", gauge=gauge, spans=[SPAN], threshold=0.5))
    outputs, labels, owners = prefixes(model, [Sample(PROMPT[:3], PROMPT[3:26], 12)])
    torch.testing.assert_close(torch.stack(seen), outputs[:-1], rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [False] * 4 + [True] * 6  # ends 3, 6, 9, 11, 13, ...
    assert owners == [0] * 10
    with torch.no_grad(), head_outputs(model) as last:
        model(torch.tensor([PROMPT[:6]]))
        torch.testing.assert_close(last()[0, -1], outputs[0], rtol=1e-4, atol=1e-5)


def features(n: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs [n, 2, 3, 4] of which only head (1, 2) tells."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2 == 0
    outputs = torch.randn(n, 2, 3, 4, generator=g)
    outputs[:, 1, 2] += torch.where(labels, 2.0, -2.0)[:, None]
    outputs[7, 1, 2] = 1e6  # an outlier, to be clipped
    return outputs, labels, torch.arange(n) % 10 < 3


def test_the_telling_head_is_found_and_files_keep_it(tmp_path: Path) -> None:
    outputs, labels, test = features()
    gauge = fit_outputs(outputs, labels, test, heads=2)
    assert gauge.heads[0] == (1, 2)
    assert len(gauge.heads) == 2
    right = (gauge(outputs[test]) >= gauge.threshold) == labels[test]
    assert float(right.float().mean()) > 0.9
    gauge.save(tmp_path / "gauge")
    again = Gauge.load(tmp_path / "gauge")
    assert again.heads == gauge.heads
    assert again.threshold == gauge.threshold
    assert torch.equal(again(outputs), gauge(outputs))
    loop = decode.loop("context-cutoff", gauge=str(tmp_path / "gauge"), spans=[SPAN])
    assert loop.threshold == gauge.threshold


def test_a_gauge_from_samples_runs_in_generate() -> None:
    model = tiny_llama()
    g = torch.Generator().manual_seed(0)
    samples = [
        Sample([5], torch.randint(20, 60, (12,), generator=g).tolist(), int(torch.randint(2, 11, (), generator=g)))
        for _ in range(8)
    ]
    gauge = fit(model, samples, chunks=4, heads=2)
    loop = decode.loop("context-cutoff", gauge=gauge, spans=[SPAN])
    generated(model, [PROMPT], loop)
    assert 3 <= loop.read[0] <= 23


def test_the_model_may_be_asked_itself() -> None:
    model = tiny_llama()
    ask, yes, no = [44, 45], [50, 51], [52]

    def confidence(end: int) -> float:
        with torch.no_grad():
            law = model(torch.tensor([[*PROMPT[: 3 + end], *ask]])).logits[0, -1].softmax(-1)
        return float(law[yes].sum() / (law[yes].sum() + law[no].sum()))

    ends = [3, 6, 9, 11, 13, 15, 17, 19, 21, 23]
    told = [confidence(end) for end in ends]
    best = max(told[:-1])
    loop = decode.loop("context-cutoff", gauge=SelfPrompt(ask, yes, no), spans=[SPAN], threshold=best - 1e-4)
    found = generated(model, [PROMPT], loop)
    end = ends[next(i for i, p in enumerate(told) if p >= best - 1e-4)]
    assert loop.read == [end]
    # What was asked leaves no trace.
    assert torch.equal(found, generated(model, [[*PROMPT[: 3 + end], *PROMPT[26:]]]))


def test_mistakes_are_named() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="2 spans for 1 prompts"):
        generated(model, [PROMPT], decode.loop("context-cutoff", gauge=never, spans=[SPAN] * 2, threshold=0.5))
    with pytest.raises(ValueError, match="not inside the prompt"):
        generated(model, [PROMPT], decode.loop("context-cutoff", gauge=never, spans=[(3, 99)], threshold=0.5))
    with pytest.raises(ValueError, match="no threshold of its own"):
        decode.loop("context-cutoff", gauge=never, spans=[SPAN])
    outputs, labels, test = features()
    with pytest.raises(ValueError, match="sufficient and insufficient"):
        fit_outputs(outputs, torch.ones_like(labels), test)
