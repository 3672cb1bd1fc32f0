"""Plugin: the processor, and training under a frozen base."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import tiny_gpt2, tiny_llama, tiny_qwen2
from tokenloom.decode import shaper
from tokenloom.decode.plugin_reweighting import Example, evaluate, fit
from tokenloom.methods.decoding.plugin_reweighting import plugin_loss


def examples(count: int, seed: int) -> list[Example]:
    """Answers that repeat the last token of the prompt and add 1."""
    g = torch.Generator().manual_seed(seed)
    made: list[Example] = []
    for _ in range(count):
        prompt = torch.randint(10, 20, (int(torch.randint(1, 5, (), generator=g)),), generator=g).tolist()
        made.append((prompt, [prompt[-1], prompt[-1] + 1]))
    return made


def test_training_improves_what_was_not_seen_and_leaves_the_base_alone() -> None:
    base, plugin = tiny_llama(seed=1), tiny_gpt2(seed=2)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    held_out = examples(24, 1)
    start, alone = evaluate(plugin, base, held_out), evaluate(None, base, held_out)
    steps: list[int] = []
    history = fit(plugin, base, examples(48, 0), epochs=6, learning_rate=0.01, batch_size=16,
                  progress=lambda step, _: steps.append(step))  # fmt: skip
    assert steps == list(range(1, 19))
    assert history[-1] < 0.5 * history[0]
    assert evaluate(plugin, base, held_out) < 0.5 * min(start, alone)
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert not plugin.training
    assert all(p.grad is None for p in [*base.parameters(), *plugin.parameters()])

    shaped = [shaper("plugin-reweighting", plugin=plugin)]
    ids = torch.tensor([[2, 12, 15], [11, 13, 18]])
    out = base.generate(
        ids, attention_mask=(ids != 2).long(), do_sample=False, max_new_tokens=2, logits_processor=shaped
    )
    for row, prompt in zip(out[:, 3:].tolist(), ([12, 15], [11, 13, 18]), strict=True):
        for place, token in enumerate(row):
            text = torch.tensor([[*prompt, *row[:place]]])
            with torch.no_grad():
                product = base(input_ids=text).logits[0, -1] + plugin(input_ids=text).logits[0, -1]
            assert token == int(product.argmax())


def test_batches_give_the_loss_of_their_examples() -> None:
    base, plugin, some = tiny_llama(seed=1), tiny_qwen2(seed=2), examples(5, 3)
    losses = []
    for prompt, answer in some:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            scores = [m(input_ids=ids).logits[0, len(prompt) - 1 : -1] for m in (base, plugin)]
        losses.append(plugin_loss(scores[0], scores[1], torch.tensor(answer)))
    for size in (1, 2, 5):
        assert evaluate(plugin, base, some, batch_size=size) == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


def test_seeds_repeat_and_the_global_state_stays() -> None:
    base, state = tiny_llama(seed=1), torch.get_rng_state()
    first, second = (fit(tiny_gpt2(seed=2), base, examples(8, 0), epochs=1, batch_size=2, seed=4) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_is_refused() -> None:
    base, plugin = tiny_llama(), tiny_gpt2()
    with pytest.raises(ValueError, match="one model"):
        fit(base, base, examples(1, 0))
    with pytest.raises(ValueError, match="no examples"):
        fit(plugin, base, [])
    with pytest.raises(ValueError, match="example 1 has an empty"):
        fit(plugin, base, [([1], [2]), ([1], [])])
    with pytest.raises(ValueError, match="same tokenizer"):
        fit(tiny_gpt2(vocab=32), base, examples(1, 0))
