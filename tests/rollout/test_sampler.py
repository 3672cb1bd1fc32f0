"""The drawn token's law is exactly the processed softmax: checked by integrating over the uniform number."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.batch import Sampling
from tokenloom.rollout.randomness import base_seed, row_key, uniform_streams
from tokenloom.rollout.sampler import Sampler, check_sampling, law

PROCESSINGS = [
    Sampling(max_tokens=16),
    Sampling(temperature=0.5),
    Sampling(temperature=3.0, top_k=2),
    Sampling(top_p=0.6),
    Sampling(temperature=0.8, top_k=3, top_p=0.7),
]


def reference_law(logits: Tensor, sampling: Sampling) -> list[float]:
    """By the definition, in Python: sort, cut to k (ties stay), cut to p (the crossing token stays)."""
    scaled = (logits.double() / sampling.temperature).softmax(-1).tolist()
    kept = list(scaled)
    if 0 < sampling.top_k < len(kept):
        least = sorted(kept, reverse=True)[sampling.top_k - 1]
        kept = [p if p >= least else 0.0 for p in kept]
    total, mass, nucleus = sum(kept), 0.0, [0.0] * len(kept)
    for i in sorted(range(len(kept)), key=lambda i: (-kept[i], i)):
        if sampling.top_p < 1 and mass >= sampling.top_p * total:
            break
        nucleus[i] = kept[i]
        mass += kept[i]
    return [p / sum(nucleus) for p in nucleus]


@pytest.mark.parametrize("sampling", PROCESSINGS)
def test_law_is_the_definition(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 3, 5, 300, 600):  # below, between and above the sampler's blocks of 256
        logits = torch.randn(4, vocab, generator=generator, dtype=torch.float64) * 2
        expected = torch.tensor([reference_law(row, sampling) for row in logits], dtype=torch.float64)
        assert torch.allclose(law(logits, sampling), expected, atol=1e-12)


@pytest.mark.parametrize("sampling", PROCESSINGS)
@pytest.mark.parametrize("vocab", [4, 700])
def test_draw_is_the_exact_inverse_of_the_law(sampling: Sampling, vocab: int) -> None:
    # The draw is a step function of u, so it has the law if and only if it steps at the cumulative sums.
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edges = torch.tensor(reference_law(logits[0], sampling), dtype=torch.float64).cumsum(0)
    sampler = Sampler(sampling)
    below = 0.0
    for token, above in enumerate(edges.tolist()):
        if above - below > 1e-9:
            inside = torch.tensor([below + 1e-11, (below + above) / 2, above - 1e-11], dtype=torch.float64)
            drawn, _ = sampler.draw(logits.expand(3, -1), inside.clamp(0, 1 - 1e-16))
            assert drawn.tolist() == [token] * 3
        below = above


def test_float32_law_integrates_to_the_softmax() -> None:
    # 20 000 equally spaced numbers integrate a step function up to one spacing per step.
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(2))
    count = 20_000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn, _ = Sampler(Sampling(temperature=0.7)).draw(logits.expand(count, -1), u)
    found = torch.bincount(drawn, minlength=5) / count
    assert torch.allclose(found, (logits[0] / 0.7).softmax(-1), atol=2 / count + 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-torch.inf, -80.0, -1.0, 0.0, 1.0, 40.0]), min_size=2, max_size=9),
    st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0]),
    st.sampled_from(PROCESSINGS),
)
def test_impossible_tokens_are_never_drawn(row: list[float], u: float, sampling: Sampling) -> None:
    logits = torch.tensor([[*row, 0.5]])
    token, logprob = Sampler(sampling).draw(logits, torch.tensor([u], dtype=torch.float64))
    assert law(logits, sampling)[0, int(token)] > 0
    assert torch.isfinite(logprob).all()


def test_top_p_keeps_the_crossing_token_and_no_more() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    for top_p, kept in [(0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 3)]:
        assert int((law(logits, Sampling(top_p=top_p)) > 0).sum()) == kept, top_p
    assert torch.allclose(law(logits, Sampling(top_p=0.6)), torch.tensor([[0.625, 0.375, 0.0]], dtype=torch.float64))


def test_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]])
    # top-k: all equals of the k-th stay; top-p: the lower ids among equals.
    assert (law(logits, Sampling(top_k=2))[0] > 0).tolist() == [True, True, True, False, True]
    assert (law(torch.zeros(1, 4), Sampling(top_p=0.5))[0] > 0).tolist() == [True, True, False, False]


def test_each_row_is_cut_by_itself() -> None:
    logits = torch.randn(6, 400, generator=torch.Generator().manual_seed(3))
    logits *= torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0, 100.0])[:, None]
    for sampling in PROCESSINGS:
        together = law(logits, sampling)
        for i in range(6):
            assert torch.equal(together[i], law(logits[i : i + 1], sampling)[0])


@pytest.mark.parametrize("processed", [True, False])
@pytest.mark.parametrize("vocab", [7, 513])
def test_logprobs_follow_the_declared_processing(processed: bool, vocab: int) -> None:
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u = torch.rand(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9, processed=processed)
    tokens, logprobs = Sampler(sampling).draw(logits, u)
    whole = law(logits, sampling).log() if processed else (logits / 0.7).log_softmax(-1)
    assert torch.allclose(logprobs, whole.gather(1, tokens[:, None])[:, 0], atol=1e-12)
    # Shaped logits: the law is theirs, the unprocessed log-probs stay the model's.
    shaped = logits + 3 * torch.arange(vocab) / vocab
    tokens, logprobs = Sampler(sampling).draw(shaped, u, unshaped=logits)
    whole = law(shaped, sampling).log() if processed else (logits / 0.7).log_softmax(-1)
    assert torch.allclose(logprobs, whole.gather(1, tokens[:, None])[:, 0], atol=1e-12)


def test_greedy() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, -2000.0]])
    u = torch.tensor([0.99])
    token, logprob = Sampler(Sampling(temperature=0)).draw(logits, u)
    assert token.tolist() == [1]
    assert torch.allclose(logprob, logits.log_softmax(-1)[0, 1:2])
    assert Sampler(Sampling(temperature=0, processed=True)).draw(logits, u)[1].tolist() == [0.0]
    assert law(logits, Sampling(temperature=0)).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_bf16_logits_and_a_shrinking_batch() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(6)).bfloat16()
    sampler = Sampler(Sampling(max_tokens=16))
    u = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    tokens, logprobs = sampler.draw(logits, u)
    assert logprobs.dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs, expected, atol=1e-5)
    again, _ = sampler.draw(logits[2:4], u[2:4])
    assert torch.equal(again, tokens[2:4])


@pytest.mark.parametrize(
    ("sampling", "word"),
    [
        (Sampling(temperature=-1.0), "temperature"),
        (Sampling(temperature=float("nan")), "temperature"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=1.1), "top_p"),
        (Sampling(max_tokens=0), "max_tokens"),
        (Sampling(max_tokens=16, stop=("",)), "stop"),
    ],
)
def test_impossible_parameters_are_named(sampling: Sampling, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        check_sampling(sampling)


def test_streams_are_uniform_and_each_row_has_its_own() -> None:
    keys = [row_key(0, [5, 6], copy) for copy in range(200)]
    table = uniform_streams(keys, 150)
    assert table.min() >= 0
    assert table.max() < 1
    # 30 000 numbers: the mean deviates by 0.0017; chi-square over 100 cells has mean 99, deviation 14.
    assert abs(float(table.mean()) - 0.5) < 0.01
    cells = torch.bincount((table.flatten() * 100).long(), minlength=100).double()
    assert 50 < float(((cells - 300) ** 2 / 300).sum()) < 170
    correlation = torch.corrcoef(table)
    assert float((correlation - torch.eye(200)).abs().max()) < 0.45  # 150 numbers a row: deviation 0.08
    assert torch.equal(uniform_streams(keys[3:5], 71)[:, 70], table[3:5, 70])
    assert len({*keys, row_key(1, [5, 6], 0), row_key(0, [5], 0), row_key(0, [6, 5], 0)}) == 203


def test_splitmix_reference_values() -> None:
    # Published outputs of SplitMix64 for the state 1234567 (top 53 bits are used).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert uniform_streams([1234567], 3)[0].tolist() == [(x >> 11) * 2.0**-53 for x in expected]


def test_base_seed_comes_from_the_generator_then_the_seed_then_the_global_state() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = base_seed(generator, 7), base_seed(generator, 7)
    assert first != second
    assert base_seed(torch.Generator().manual_seed(3), None) == first
    assert base_seed(None, 7) == 7
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [base_seed(None, None) for _ in range(2)]
        torch.manual_seed(0)
        assert [base_seed(None, None) for _ in range(2)] == drawn
    assert drawn[0] != drawn[1]


def test_enumeration_of_two_steps_matches_the_product_law() -> None:
    # All pairs of cells of (u_0, u_1): the drawn pair's probability is the product of the two laws.
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    p = logits.softmax(-1)
    for a, b in itertools.product(range(3), range(3)):
        u = torch.stack([p[0, :a].sum() + p[0, a] / 2, p[1, :b].sum() + p[1, b] / 2])
        tokens, logprobs = Sampler(Sampling(max_tokens=16)).draw(logits, u)
        assert tokens.tolist() == [a, b]
        assert float(logprobs.sum()) == pytest.approx(float((p[0, a] * p[1, b]).log()), abs=1e-12)
