"""R2R on models: both limits, exact laws on tables, batches, what the router sees, labels, training, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import TINY, tiny_llama, tiny_phi, tiny_qwen3
from tokenloom import decode
from tokenloom.decode.r2r import Labels, Question, Router, fit, judge_by_model, label, load_router, save_router
from tokenloom.decode.run import Run
from tokenloom.decode.table import TableLM
from tokenloom.draw import law_of
from tokenloom.methods.decoding.r2r_windows import uncertainty as aleatoric

IDS = torch.tensor([[2, 2, 5, 9, 4], [2, 8, 3, 11, 6], [7, 7, 7, 9, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"attention_mask": MASK, "do_sample": False, "max_new_tokens": 12}


def router_for(model: Any, seed: int = 0, top: int = 10) -> Router:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Router(model.get_input_embeddings().weight, top=top, width=16, blocks=2)


@pytest.mark.parametrize("name", sorted(TINY))
def test_thresholds_beyond_the_ends_are_one_model_alone(name: str) -> None:
    small, large = TINY[name](seed=1), tiny_llama(seed=2)
    router = router_for(small)
    loop = decode.loop("r2r", large=large, router=router, threshold=1.5)
    assert torch.equal(small.generate(IDS, custom_generate=loop, **GREEDY), small.generate(IDS, **GREEDY))
    assert loop.last_run.counts == {"usage": 0.0, "large_forwards": 0.0}
    loop = decode.loop("r2r", large=large, router=router, threshold=0.0)
    assert torch.equal(small.generate(IDS, custom_generate=loop, **GREEDY), large.generate(IDS, **GREEDY))
    assert loop.last_run.counts["usage"] == 1.0


def test_laws_by_entropy_are_those_of_the_model_that_is_asked() -> None:
    small, large = TableLM.random(3, seed=1), TableLM.random(3, seed=2)
    for entropy in (-1.0, 0.9, 2.0):

        def program(draw: Any, entropy: float = entropy) -> tuple[int, ...]:
            run = Run(small, torch.tensor([[0], [1]]), [[0], [1]], limit=2, eos=frozenset([2]), pad=0, sample=True,
                      draw=draw)  # fmt: skip
            rows = decode.loop("r2r", large=large, entropy=entropy).rows(run)
            return tuple(map(tuple, rows))

        def asked(prefix: tuple[int, ...], entropy: float = entropy) -> TableLM:
            return large if float(torch.special.entr(small.probs(prefix)).sum()) > entropy else small

        mixed = TableLM(3, lambda prefix: asked(prefix).probs(prefix).tolist())
        first, second = (mixed.string_law(p, 2, eos=2) for p in ((0,), (1,)))
        expected = {(a, b): p * q for a, p in first.items() for b, q in second.items()}
        assert law_of(program) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_router_sees_what_a_whole_forward_gives_and_rows_stand_alone(name: str) -> None:
    small, large = TINY[name](seed=3), tiny_qwen3(seed=4)
    router = router_for(small, seed=5).eval()
    loop = decode.loop("r2r", large=large, router=router, threshold=0.5)
    ours = small.generate(IDS, custom_generate=loop, **GREEDY)[:, 5:].tolist()
    asked = written = 0
    with torch.no_grad():
        for row in range(3):
            ids = IDS[row][MASK[row].bool()].tolist()
            for token in ours[row]:
                out = small(input_ids=torch.tensor([ids]), output_hidden_states=True)
                scores = out.logits[0, -1]
                own = int(scores.argmax())
                found = router(out.hidden_states[-1][:, -1], scores.topk(10).values[None], torch.tensor([own]))
                if abs(float(found)) < 1e-4:
                    break
                routed = bool(found >= 0)
                wanted = int(large(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) if routed else own
                assert token == wanted
                asked += routed
                written += 1
                ids.append(token)
                if token == 1:
                    break
    assert loop.last_run.counts["usage"] == pytest.approx(asked / written)


def test_equal_prompts_and_a_usage_between() -> None:
    small, large = tiny_llama(seed=3), tiny_llama(seed=4)
    ids = torch.tensor([[5, 6], [5, 6], [7, 8]])
    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    router = router_for(small, seed=1)
    loop = decode.loop("r2r", large=large, router=router)
    scores = []
    router.register_forward_hook(lambda _, __, output: scores.append(output))
    small.generate(ids, custom_generate=loop, **given)
    loop.threshold = float(torch.sigmoid(torch.cat(scores)).median())
    found = small.generate(ids, custom_generate=loop, **given)
    assert torch.equal(found[0], found[1])
    assert 0 < loop.last_run.counts["usage"] < 1
    assert 0 < loop.last_run.counts["large_forwards"] <= 20


def test_a_router_is_read_from_its_file_with_its_threshold(tmp_path: Path) -> None:
    small, large = tiny_llama(seed=3), tiny_llama(seed=4)
    router = router_for(small, seed=1)
    scores = []
    handle = router.register_forward_hook(lambda _, __, output: scores.append(output))
    small.generate(IDS, custom_generate=decode.loop("r2r", large=large, router=router), **GREEDY)
    handle.remove()
    threshold = float(torch.sigmoid(torch.cat(scores)).median())
    path = str(tmp_path / "router.safetensors")
    save_router(router, path, threshold=threshold)
    expected = small.generate(
        IDS, custom_generate=decode.loop("r2r", large=large, router=router, threshold=threshold), **GREEDY
    )
    loop = decode.loop("r2r", large=large, router=path)
    assert torch.equal(small.generate(IDS, custom_generate=loop, **GREEDY), expected)
    assert 0 < loop.last_run.counts["usage"] < 1
    loop = decode.loop("r2r", large=large, router=path, threshold=2.0)
    assert torch.equal(small.generate(IDS, custom_generate=loop, **GREEDY), small.generate(IDS, **GREEDY))


def test_a_router_of_another_model_is_refused_before_work() -> None:
    for other, top, words in ((tiny_llama(hidden=32), 10, "hidden size 32"), (tiny_llama(), 100, "reads 100 logits")):
        loop = decode.loop("r2r", large=tiny_llama(), router=router_for(other, top=top))
        with pytest.raises(ValueError, match=words):
            tiny_llama().generate(IDS, custom_generate=loop, **GREEDY)


def test_models_with_other_vocabularies_are_refused() -> None:
    # Before a token is written, whether the large one would ever be asked or not.
    loop = decode.loop("r2r", large=tiny_llama(vocab=70), entropy=100.0)
    with pytest.raises(ValueError, match="same tokenizer"):
        tiny_llama().generate(IDS, custom_generate=loop, **GREEDY)
    run = Run(TableLM.random(3), torch.tensor([[0]]), [[0]], limit=2, eos=frozenset(), pad=0, sample=False)
    with pytest.raises(ValueError, match="score 3 and 4 tokens"):
        decode.loop("r2r", large=TableLM.random(4), entropy=-1.0).rows(run)
    with pytest.raises(ValueError, match="needs large"):
        decode.loop("r2r")


class Letters:
    """Token 40 ends sentences; the end token is 1."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join("." if i == 40 else chr(200 + int(i)) for i in ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [3 + ord(c) % 50 for c in text]


def continued(model: Any, ids: list[int], most: int) -> list[int]:
    given = {"attention_mask": torch.ones(1, len(ids)), "do_sample": False, "max_new_tokens": most}
    found: list[int] = model.generate(torch.tensor([ids]), **given)[0, len(ids) :].tolist()
    return found


def test_labels_are_where_the_branches_part_to_the_end_of_the_sentence() -> None:
    small, large = tiny_llama(seed=3), tiny_llama(seed=4)
    asked: list[Question] = []

    def judge(question: Question) -> bool:
        asked.append(question)
        return len(asked) % 2 == 0

    prompts = [[5, 9, 4], [8, 3]]
    found = label(small, large, prompts, Letters(), judge, max_tokens=8, sentence=3, top=10)
    at = 0
    for number, prompt in enumerate(prompts):
        response = continued(large, prompt, 8)
        for i, token in enumerate(response):
            prefix = torch.tensor([prompt + response[:i]])
            with torch.no_grad():
                out = small(input_ids=prefix, output_hidden_states=True)
            scores = out.logits[0, -1]
            torch.testing.assert_close(found.hidden[at], out.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.logits[at], scores.topk(10).values, rtol=1e-4, atol=1e-4)
            own = int(scores.argmax())
            assert found.tokens[at] == own
            assert found.differs[at] == (own != token)
            assert found.prompt[at] == number
            if own != token:
                question = asked[int(found.differs[:at].sum())]
                assert question.text == Letters().decode(prompt + response[:i])
                ending = continued(large, [*prompt, *response[:i], own], 3)
                for text, ids in ((question.large, response[i : i + 4]), (question.small, [own, *ending])):
                    stops = [k + 1 for k, t in enumerate(ids) if t in (40, 1)]
                    assert text == Letters().decode(ids[: stops[0]] if stops else ids)
            else:
                assert found.labels[at] == 0
            at += 1
    assert at == len(found.labels)
    assert len(asked) == int(found.differs.sum()) > 2
    assert int(found.labels.sum()) == len(asked) // 2


def test_dropout_has_no_part_in_labels() -> None:
    small, large = tiny_phi(seed=3), tiny_llama(seed=4)

    def labels() -> Labels:
        return label(small, large, [[5, 9, 4]], Letters(), lambda question: True, max_tokens=5, sentence=3, top=10)

    expected = labels()
    small.train()
    assert torch.equal(labels().hidden, expected.hidden)
    assert small.training


def test_a_model_as_judge_answers_one_or_zero() -> None:
    model = tiny_llama()
    judge = judge_by_model(model, Letters())
    with torch.no_grad():
        model.lm_head.weight.zero_()
        assert not judge(Question("a", "b", "c"))  # a tie is no difference
    assert isinstance(judge_by_model(tiny_llama(seed=2), Letters())(Question("a", "b", "c")), bool)


def separable(n: int = 400, seed: int = 0) -> Labels:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 16, generator=g)
    labels = (hidden[:, 0] > 0.8).float()
    return Labels(
        hidden,
        torch.randn(n, 10, generator=g).sort(descending=True).values,
        torch.randint(64, (n,), generator=g),
        labels,
        labels > 0,
        torch.arange(n) // 10,
    )


def test_training_finds_what_parts_and_a_threshold_with_the_recall(tmp_path: Path) -> None:
    model = tiny_llama()
    router = router_for(model, seed=1)
    embeddings = router.embeddings.weight.clone()
    epochs: list[int] = []
    result = fit(router, separable(), learning_rate=3e-3, batch=64, epochs=30, patience=5, recall=0.9, seed=2,
                 progress=lambda epoch, _: epochs.append(epoch))  # fmt: skip
    assert result.recall >= 0.9
    assert result.usage < 0.5
    assert result.loss == min(result.history) < result.history[0]
    assert epochs == list(range(len(result.history)))
    assert torch.equal(router.embeddings.weight, embeddings)

    again = router_for(model, seed=1)
    assert fit(again, separable(), learning_rate=3e-3, batch=64, epochs=30, patience=5, recall=0.9, seed=2) == result

    file = tmp_path / "router.safetensors"
    save_router(router, file, threshold=result.threshold)
    loaded, threshold = load_router(file, model.get_input_embeddings().weight)
    assert threshold == result.threshold
    data = separable(20, seed=9)
    given = (data.hidden, data.logits, data.tokens)
    assert torch.equal(loaded(*given), router.eval()(*given))
    with pytest.raises(ValueError, match="size 16"):
        load_router(file, torch.zeros(64, 8))


def test_training_stops_without_progress_and_refuses_one_sided_labels() -> None:
    model = tiny_llama()
    result = fit(router_for(model), separable(), separable(seed=1), learning_rate=0.0, epochs=30, patience=3)
    assert len(result.history) == 4
    from dataclasses import replace

    with pytest.raises(ValueError, match="models part"):
        fit(router_for(model), replace(separable(), labels=torch.zeros(400)))


def test_windows_at_their_limits_are_one_model_alone() -> None:
    small, large = tiny_llama(seed=1), tiny_qwen3(seed=2)
    for uncertainty, alone, usage in ((-1.0, large, 1.0), (9.0, small, 0.0)):
        loop = decode.loop("r2r", large=large, window=2, uncertainty=uncertainty)
        ours = small.generate(IDS, custom_generate=loop, **GREEDY)
        assert torch.equal(ours, alone.generate(IDS, **GREEDY))
        assert loop.last_run.counts["usage"] == usage
    with pytest.raises(ValueError, match="place of a router"):
        decode.loop("r2r", large=large, router=router_for(small), window=3)
    with pytest.raises(ValueError, match="-1"):
        decode.loop("r2r", large=large, window=-1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("carry", [True, False])
def test_rolling_windows_follow_each_row_through_the_batch(name: str, carry: bool) -> None:
    small, large = TINY[name](seed=3), tiny_qwen3(seed=4)

    def uncertain(ids: list[int]) -> tuple[float, float, int]:
        scores = small(input_ids=torch.tensor([ids])).logits[0, -1]
        entropy = float(torch.special.entr(scores.softmax(-1)).sum())
        return float(aleatoric(scores[None])[0][0]), entropy, int(scores.argmax())

    with torch.no_grad():
        starts = [uncertain(IDS[row][MASK[row].bool()].tolist()) for row in range(3)]
    threshold = sorted(a for a, _, _ in starts)[1] + 1e-3
    certain = sorted(h for _, h, _ in starts)[0] * 0.5
    loop = decode.loop("r2r", large=large, window=2, uncertainty=threshold, certain=certain, carry=carry)
    given = GREEDY | {"eos_token_id": [1, 40], "max_new_tokens": 16}
    ours = small.generate(IDS, custom_generate=loop, **given)[:, 5:].tolist()
    asked = written = 0
    with torch.no_grad():
        for row in range(3):
            ids, asks, window = IDS[row][MASK[row].bool()].tolist(), True, list[float]()
            for token in ours[row]:
                a, h, own = uncertain(ids)
                if asks:
                    window = [*window, a][-2:]
                    asks = sum(window) / len(window) >= threshold
                elif asks := a >= threshold and h >= certain:
                    window = [a] if carry else []
                window = window if asks else []
                wanted = int(large(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) if asks else own
                assert token == wanted
                asked += asks
                written += 1
                ids.append(token)
                if token in (1, 40):
                    break
    assert 0 < asked < written
    assert loop.last_run.counts["usage"] == pytest.approx(asked / written)
