"""RAD in generate: rewards do not depend on what was cached, limits, other tokenizers, and training."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

from tests.decode.tokenizers_at_hand import byte_level, sentencepiece
from tests.tiny_models import TINY, tiny_llama
from tokenloom import decode
from tokenloom.decode.auxiliary import Headed
from tokenloom.decode.rad import Rad, fit, reward_model
from tokenloom.methods.decoding.rad import best_tokens, cumulative_mse

TOKENIZER = byte_level()
V = len(TOKENIZER)
MODEL = tiny_llama(vocab=V)
GIVEN = TOKENIZER(["12", "the answer is", "name"], return_tensors="pt", padding=True, padding_side="left")
PROMPTS = [ids[mask.bool()].tolist() for ids, mask in zip(GIVEN.input_ids, GIVEN.attention_mask, strict=True)]


def judge(name: str = "llama", seed: int = 5, vocab: int = V) -> Headed:
    """A reward model with opinions, between 0 and 1 mostly."""
    model = reward_model(TINY[name](vocab=vocab, seed=seed))
    with torch.no_grad():
        model.head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        model.head.bias.fill_(0.5)
    return model.eval()


def uncached(model: Headed, ids: list[int]) -> float:
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, -1, 0])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_cached_rewards_are_those_of_whole_texts(name: str) -> None:
    model = judge(name)
    shaper = Rad(model, TOKENIZER, k=3)
    prefixes = [list(p) for p in PROMPTS]
    g = torch.Generator().manual_seed(0)
    for step in range(4):
        candidates = torch.randint(3, V, (len(prefixes), 3), generator=g)
        found = shaper.rewards(prefixes, candidates)
        expected = [
            [uncached(model, [*p, t]) for t in row] for p, row in zip(prefixes, candidates.tolist(), strict=True)
        ]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        prefixes = [[*p, int(row[step % 3])] for p, row in zip(prefixes, candidates, strict=True)]
        if step == 1:
            prefixes = [prefixes[2], prefixes[0], prefixes[0][:-1]]  # reordered and taken back


def test_special_tokens_get_the_reward_of_the_text_before() -> None:
    model = judge()
    found = Rad(model, TOKENIZER).rewards(PROMPTS, torch.tensor([[1, 7], [8, 0], [2, 9]]))
    assert found[0, 0].item() == pytest.approx(uncached(model, PROMPTS[0]), abs=1e-5)
    assert found[1, 1].item() == pytest.approx(uncached(model, PROMPTS[1]), abs=1e-5)
    assert found[0, 1].item() == pytest.approx(uncached(model, [*PROMPTS[0], 7]), abs=1e-5)


def generated(*processors: object, **settings: object) -> torch.Tensor:
    return MODEL.generate(
        GIVEN.input_ids,
        attention_mask=GIVEN.attention_mask,
        max_new_tokens=6,
        logits_processor=LogitsProcessorList(processors),
        **{"do_sample": False, **settings},
    )


def test_one_candidate_is_greedy_and_beams_may_be_reordered() -> None:
    greedy = generated()
    assert torch.equal(generated(decode.shaper("rad", tokenizer=TOKENIZER, reward=judge(), k=1)), greedy)
    assert torch.equal(generated(Rad(judge(), TOKENIZER, beta=0.0)), greedy)
    steered = generated(Rad(judge(), TOKENIZER, beta=100.0))
    assert not torch.equal(steered, greedy)
    cached, fresh = Rad(judge(), TOKENIZER, k=5, beta=5.0), Rad(judge(), TOKENIZER, k=5, beta=5.0)

    def forgetful(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fresh.aux.reset()
        return fresh(input_ids, scores)

    assert torch.equal(generated(cached, num_beams=3), generated(forgetful, num_beams=3))


def test_the_shaper_is_the_rule_on_its_rewards() -> None:
    model = judge()
    shaper = Rad(model, TOKENIZER, k=4, beta=3.0, inverse=True)
    scores = torch.randn(3, V, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    before = scores.clone()
    shaped = shaper(GIVEN.input_ids, scores)
    assert shaped.dtype == torch.bfloat16
    assert torch.equal(scores, before)
    candidates = best_tokens(scores.float(), 4)
    for row, prompt in enumerate(PROMPTS):
        for token in range(V):
            if token in candidates[row].tolist():
                text = prompt if token in TOKENIZER.all_special_ids else [*prompt, token]
                raised = float(scores[row, token]) + 3.0 * (1 - min(max(uncached(model, text), 0.0), 1.0))
                assert float(shaped[row, token]) == pytest.approx(raised, rel=1e-2)
            else:
                assert float(shaped[row, token]) == -torch.inf


def test_other_tokenizers_read_the_text_anew() -> None:
    own = Rad(judge(), TOKENIZER)
    plain = [[t for t in p if t > 2] for p in PROMPTS]
    same = Rad(judge(), TOKENIZER, TOKENIZER)
    tokens = torch.tensor([TOKENIZER.encode("zq"), TOKENIZER.encode("kj"), TOKENIZER.encode("xw")])[:, :2]
    torch.testing.assert_close(same.rewards(plain, tokens), own.rewards(plain, tokens), rtol=1e-4, atol=1e-5)
    other = sentencepiece()
    model = judge(vocab=len(other))
    found = Rad(model, TOKENIZER, other).rewards(PROMPTS, torch.tensor([[70, 71], [72, 1], [73, 74]]))
    for row, prompt, candidates in zip(found, PROMPTS, [[70, 71], [72, 1], [73, 74]], strict=True):
        for reward, token in zip(row.tolist(), candidates, strict=True):
            text = TOKENIZER.decode([*prompt, token], skip_special_tokens=True)
            assert reward == pytest.approx(uncached(model, other(text)["input_ids"]), abs=1e-5)
    silent = Rad(model, TOKENIZER, other).rewards([[0]], torch.tensor([[1, 2]]))
    assert bool((silent == silent[0, 0]).all())


@pytest.mark.parametrize("head_only", [False, True])
def test_training_lowers_the_loss(head_only: bool) -> None:
    model = reward_model(tiny_llama(vocab=V, seed=7))
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, V, (int(n),), generator=g).tolist() for n in torch.randint(1, 7, (24,), generator=g)]
    labels = [float(t[0] % 2) for t in texts]
    trunk = [p.clone() for p in model.trunk.parameters()]
    fit(model, texts, labels, head_only=head_only, epochs=20, batch=8, learning_rate=1e-2)
    kept = all(torch.equal(a, b) for a, b in zip(trunk, model.trunk.parameters(), strict=True))
    assert kept == head_only
    total = 0.0
    for text, label in zip(texts, labels, strict=True):
        with torch.no_grad():
            rewards = model(input_ids=torch.tensor([text])).logits[..., 0]
        total += float(cumulative_mse(rewards, torch.tensor([label]), torch.ones(1, len(text), dtype=torch.bool)))
    assert total / len(texts) < (0.2 if head_only else 0.1)  # 0.5 for the untrained model


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="k >= 1"):
        Rad(judge(), TOKENIZER, k=0)
    with pytest.raises(ValueError, match="one output per token"):
        Rad(MODEL, TOKENIZER).rewards(PROMPTS, torch.tensor([[5], [5], [5]]))
    with pytest.raises(ValueError, match=r"label in \[0, 1\]"):
        fit(judge(), [[5]], [2.0])
