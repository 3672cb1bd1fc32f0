"""`generate` against transformers' own generation, and its promises on counting, stopping and randomness."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Mamba2Config, MambaConfig, RecurrentGemmaConfig, RwkvConfig

from rollout.stand_in import StandIn, count_calls, full_logprobs, small_tokenizer
from tiny_models import TINY, build, tiny_gpt2, tiny_llama, tiny_mistral
from tokenloom.batch import Rollouts, Sampling
from tokenloom.rollout import generate


def prompts_of(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (n,), generator=generator) for n in lengths]


def policy_of(name: str = "llama", **settings: object) -> StandIn:
    return StandIn(TINY[name](), **settings)  # type: ignore[arg-type]  # keywords of StandIn


def responses(rollouts: Rollouts) -> list[list[int]]:
    return [rollouts.response(i).tolist() for i in range(len(rollouts))]


@pytest.mark.parametrize("name", TINY)
def test_greedy_equals_transformers_and_logprobs_equal_a_full_forward(name: str) -> None:
    # Windows are 4 tokens: prompts shorter and longer than a window, padded by up to 8.
    prompts, new = prompts_of(5, 1, 9, 3), 20
    # Tied embeddings make a random GPT-2 repeat one token for ever.
    policy = StandIn(TINY[name](**({"tie_word_embeddings": False} if name == "gpt2" else {})))
    # An end token that does occur, so that rows finish at different steps.
    free = generate(StandIn(policy.model, ends=()), prompts, Sampling(temperature=0, max_tokens=new), copies=1)
    ends = [int(free.tokens[0, 4]), int(free.tokens[2, 9])]
    policy.eos_ids = frozenset(ends)
    ours = generate(policy, prompts, Sampling(temperature=0, max_tokens=new), copies=1)

    width = max(len(p) for p in prompts)
    ids, mask = torch.full((4, width), 2), torch.zeros(4, width, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, 1
    theirs = policy.model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=ends,
        pad_token_id=2,
    )[:, width:]
    assert len(set(ours.lengths.tolist())) > 1
    for i, response in enumerate(responses(ours)):
        assert response == theirs[i, : len(response)].tolist()
        assert set(theirs[i, len(response) :].tolist()) <= {2}
        assert bool(ours.truncated[i]) == (response[-1] not in ends)
        expected = full_logprobs(policy.model, prompts[i], ours.response(i))
        assert torch.allclose(ours.sampler_logprobs[i, : len(response)], expected, atol=1e-5)


def test_float64_logprobs_to_rounding() -> None:
    policy = StandIn(tiny_llama().double())
    prompts = prompts_of(4, 7)
    out = generate(policy, prompts, Sampling(temperature=0.7, top_k=9, max_tokens=12, seed=1), copies=3)
    for i in range(6):
        expected = full_logprobs(policy.model, prompts[i // 3], out.response(i), temperature=0.7)
        # The batch stores float32.
        assert torch.allclose(out.sampler_logprobs[i, : len(expected)].double(), expected, atol=1e-6)


def test_shared_prefill_gives_every_copy_its_own_continuation() -> None:
    policy, prompts = policy_of(), prompts_of(4, 6)
    out = generate(policy, prompts, Sampling(max_tokens=10, seed=0), copies=[3, 5])
    assert out.group_ids.tolist() == [0] * 3 + [1] * 5
    assert len({tuple(r) for r in responses(out)}) == 8
    for i in range(8):
        prompt = prompts[int(out.group_ids[i])]
        assert torch.equal(out.prompt_tokens[i], prompt)
        expected = full_logprobs(policy.model, prompt, out.response(i))
        assert torch.allclose(out.sampler_logprobs[i, : len(expected)], expected, atol=1e-5)


def test_forward_calls_and_batch_sizes() -> None:
    model = tiny_llama()
    calls = count_calls(model)
    prompts = prompts_of(4, 6, 5)
    ends = range(1, 64, 5)  # a fifth of the vocabulary: rows finish all the time
    out = generate(StandIn(model, ends=ends), [*prompts, prompts[0]], Sampling(max_tokens=40, seed=0), copies=8)
    assert calls[0] == (3, 6), "equal prompts must be prefilled once, all prompts together"
    assert len(calls) <= int(out.lengths.max()) + 1
    sizes = [rows for rows, width in calls[1:] if width == 1]
    assert len(sizes) == len(calls) - 1
    assert sizes == sorted(sizes, reverse=True)
    for step, rows in enumerate(sizes):
        running = int((out.lengths > step + 1).sum())
        assert running <= rows <= running / (1 - 1 / 8) + 1, "finished rows must leave the batch"


def test_finished_neighbors_order_and_waves_do_not_change_a_row() -> None:
    model, prompts = tiny_llama().double(), prompts_of(4, 6, 5)
    policy = StandIn(model, ends=range(1, 64, 9))
    sampling = Sampling(max_tokens=30, seed=5)
    whole = responses(generate(policy, prompts, sampling, copies=4))
    for max_rows in (1, 3, 4, 5, 11, 12, 100):
        assert responses(generate(policy, prompts, sampling, copies=4, max_rows=max_rows)) == whole
    backwards = responses(generate(policy, prompts[::-1], sampling, copies=4))
    assert [backwards[i] for g in (2, 1, 0) for i in range(4 * g, 4 * g + 4)] == whole
    alone = responses(generate(policy, prompts[1:2], sampling, copies=2))
    assert alone == whole[4:6]
    endless = responses(generate(StandIn(model, ends=()), prompts, sampling, copies=4))
    assert [long[: len(short)] for long, short in zip(endless, whole, strict=True)] == whole


def test_waves_bound_the_rows() -> None:
    model = tiny_llama()
    calls = count_calls(model)
    generate(StandIn(model, ends=()), prompts_of(3, 4, 5), Sampling(max_tokens=3, seed=0), copies=4, max_rows=5)
    assert max(rows for rows, _ in calls) == 4, "a prompt's copies stay together where they fit"
    calls.clear()
    generate(StandIn(model, ends=()), prompts_of(3), Sampling(max_tokens=3, seed=0), copies=7, max_rows=3)
    assert [c for c in calls if c[1] == 3] == [(1, 3)] * 3
    assert max(rows for rows, _ in calls) == 3


def test_seeds() -> None:
    policy, prompts = policy_of(), prompts_of(4, 6)

    def run(seed: int | None = None, generator: torch.Generator | None = None) -> Rollouts:
        return generate(policy, prompts, Sampling(max_tokens=8, seed=seed), copies=4, generator=generator)

    assert responses(run(1)) == responses(run(1))
    assert responses(run(1)) != responses(run(2))
    generator = torch.Generator().manual_seed(0)
    first, second = run(generator=generator), run(generator=generator)
    assert responses(first) != responses(second)
    again = torch.Generator().manual_seed(0)
    assert responses(run(generator=again)) == responses(first)
    assert responses(run(first.sampling.seed)) == responses(first), "the recorded seed reproduces the call"


def test_the_same_prompt_twice_is_two_groups_with_different_samples() -> None:
    prompt = prompts_of(5)[0]
    out = generate(policy_of(), [prompt, prompt.clone()], Sampling(max_tokens=12, seed=0), copies=3)
    assert out.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert len({tuple(r) for r in responses(out)}) == 6


def test_first_token_frequencies_follow_the_law() -> None:
    model, prompt = tiny_llama(vocab=16), torch.tensor([3, 4])
    out = generate(StandIn(model, ends=()), [prompt], Sampling(max_tokens=1, seed=0), copies=4000)
    found = torch.bincount(out.tokens[:, 0], minlength=16) / 4000
    with torch.no_grad():
        law = model(prompt[None]).logits[0, -1].softmax(-1)
    assert (found - law).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_processed_logprobs_are_those_of_the_cut_law() -> None:
    policy, prompts = StandIn(tiny_llama(), ends=()), prompts_of(4)
    sampling = Sampling(max_tokens=6, seed=0, top_k=2, processed=True)
    cut = generate(policy, prompts, sampling, copies=8)
    whole = generate(policy, prompts, Sampling(max_tokens=6, seed=0, top_k=2), copies=8)
    assert torch.equal(cut.tokens, whole.tokens)
    assert (cut.sampler_logprobs > whole.sampler_logprobs).all()
    prefix = torch.cat([prompts[0], cut.tokens[0, :1]])
    with torch.no_grad():
        top = policy.model(prefix[None]).logits[0, -1].topk(2)
    expected = top.values.log_softmax(-1)[top.indices == cut.tokens[0, 1]]
    assert torch.allclose(cut.sampler_logprobs[0, 1:2], expected, atol=1e-5)


def test_shape_logits() -> None:
    policy, prompts = StandIn(tiny_llama(), ends=()), prompts_of(4, 6)
    steps = []

    def only_token_of_step(logits: Tensor, step: int) -> Tensor:
        assert logits.dtype == torch.float32
        steps.append(step)
        keep = logits[:, 10 + step].clone()
        logits.fill_(-torch.inf)  # in place is allowed
        logits[:, 10 + step] = keep
        return logits

    sampling = Sampling(max_tokens=3, seed=0)
    out = generate(policy, prompts, sampling, copies=2, shape_logits=only_token_of_step)
    assert out.tokens.tolist() == [[10, 11, 12]] * 4
    assert steps == [0, 1, 2]
    expected = full_logprobs(policy.model, prompts[1], out.response(3))
    assert torch.allclose(out.sampler_logprobs[3], expected, atol=1e-5), "log-probs of the model's own law"
    processed = Sampling(max_tokens=3, seed=0, processed=True)
    out = generate(policy, prompts, processed, copies=2, shape_logits=only_token_of_step)
    assert torch.allclose(out.sampler_logprobs, torch.zeros(4, 3), atol=1e-6)


def test_stop_strings_end_a_response_and_stay_in_it() -> None:
    tokenizer = small_tokenizer()
    text = tokenizer("so: ST", add_special_tokens=False)["input_ids"]
    planned = [*text, *tokenizer("O", add_special_tokens=False)["input_ids"], 50, 51, 52]

    def plan(logits: Tensor, step: int) -> Tensor:
        return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([planned[step]]), 0.0)

    policy = StandIn(tiny_llama(vocab=300), tokenizer)
    sampling = Sampling(max_tokens=len(planned), stop=("absent", "STO"), seed=0)
    out = generate(policy, prompts_of(3), sampling, copies=2, shape_logits=plan)
    assert responses(out) == [planned[:-3]] * 2
    assert tokenizer.decode(out.response(0)).endswith("STO")
    assert out.truncated.tolist() == [False, False]
    assert bool(out.mask.all())


def test_stop_strings_in_free_samples_equal_a_search_of_the_text() -> None:
    tokenizer = small_tokenizer()
    policy, stop = StandIn(tiny_llama(vocab=300), tokenizer), ("1", "th", "e")
    unstopped = generate(policy, prompts_of(3, 5), Sampling(max_tokens=40, seed=0), copies=10)
    stopped = generate(policy, prompts_of(3, 5), Sampling(max_tokens=40, seed=0, stop=stop), copies=10)
    early = 0
    for long, short, cut in zip(responses(unstopped), responses(stopped), stopped.truncated.tolist(), strict=True):
        lengths = [n for n in range(1, len(long) + 1) if any(s in tokenizer.decode(long[:n]) for s in stop)]
        assert short == long[: lengths[0] if lengths else len(long)]
        assert cut == (not lengths and long[-1] != 1)
        early += bool(lengths)
    assert early > 5


def test_pad_equal_to_end_and_missing_pad() -> None:
    # The end token is a real token wherever it was sampled; padding is known by lengths alone.
    prompts = [torch.tensor([1, 5, 1]), torch.tensor([1, 1, 7, 9, 1, 1])]
    sampling = Sampling(max_tokens=15, seed=0)
    model = tiny_llama()
    out = generate(StandIn(model, ends=range(1, 64, 6), pad=1), prompts, sampling, copies=4)
    assert bool((~out.truncated).any())
    none = generate(StandIn(model, ends=range(1, 64, 6), pad=None), prompts, sampling, copies=4)
    assert responses(out) == responses(none)
    for i, response in enumerate(responses(out)):
        assert int(out.mask[i].sum()) == len(response) == int(out.lengths[i])
        assert [t % 6 == 1 for t in response] == [False] * (len(response) - 1) + [not out.truncated[i]]
        expected = full_logprobs(model, prompts[i // 4], out.response(i))
        assert torch.allclose(out.sampler_logprobs[i, : len(response)], expected, atol=1e-5)


def test_end_token_at_the_limit_is_not_truncation() -> None:
    def always_end(logits: Tensor, _step: int) -> Tensor:
        return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([1]), 0.0)

    for limit in (1, 4):
        sampling = Sampling(max_tokens=limit, seed=0)
        out = generate(policy_of(), prompts_of(2, 3), sampling, copies=2, shape_logits=always_end)
        assert responses(out) == [[1]] * 4, "all rows finish at once"
        assert out.truncated.tolist() == [False] * 4


def test_edges() -> None:
    policy = policy_of()
    empty = generate(policy, [], Sampling(max_tokens=16, seed=0), copies=4)
    assert len(empty) == 0
    assert empty.truncated.shape == (0,)
    assert len(generate(policy, prompts_of(3), Sampling(max_tokens=16, seed=0), copies=0)) == 0
    one = generate(policy, [torch.tensor([5])], Sampling(max_tokens=1, seed=0), copies=1)
    assert one.tokens.shape == (1, 1)
    some = generate(policy, prompts_of(3, 4, 5), Sampling(max_tokens=2, seed=0), copies=[2, 0, 1])
    assert some.group_ids.tolist() == [0, 0, 2]
    assert generate(policy, [[5, 6]], Sampling(max_tokens=2, seed=0), copies=1).prompt_tokens[0].tolist() == [
        5,
        6,
    ]


def test_progress() -> None:
    seen: list[tuple[int, int, int]] = []
    policy = StandIn(tiny_llama(), ends=range(1, 64, 6))
    out = generate(
        policy,
        prompts_of(3, 4),
        Sampling(max_tokens=20, seed=0),
        copies=4,
        max_rows=4,
        progress=lambda *now: seen.append(now),
    )
    assert seen[-1] == (8, 8, int(out.lengths.sum()))
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([torch.tensor([], dtype=torch.int64)], {}, "no tokens"),
        ([torch.tensor([5, 64])], {}, "token id 64.*0 to 63"),
        ([torch.tensor([-1])], {}, "token id -1"),
        ([torch.arange(3, 60)], {"sampling": Sampling(max_tokens=100)}, "128 positions"),
        ([torch.tensor([5])], {"copies": [1, 2]}, "2 numbers for 1 prompts"),
        ([torch.tensor([5])], {"copies": -1}, "-1"),
        ([torch.tensor([5])], {"max_rows": 0}, "max_rows is 0"),
        ([torch.tensor([5])], {"sampling": Sampling(max_tokens=16, stop=("x",))}, "no tokenizer"),
        ([torch.tensor([5])], {"sampling": Sampling(max_tokens=16, temperature=-1.0)}, "temperature"),
    ],
)
def test_mistakes_are_explained(prompts: list[Tensor], options: dict[str, object], words: str) -> None:
    options = {"sampling": Sampling(max_tokens=16), "copies": 1} | options
    with pytest.raises(ValueError, match=words):
        generate(policy_of(), prompts, **options)  # type: ignore[arg-type]  # wrong on purpose


def test_diverged_weights_are_reported() -> None:
    model = tiny_mistral()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="diverged"):
        generate(StandIn(model), prompts_of(3), Sampling(max_tokens=16, seed=0), copies=2)


def test_learned_positions_up_to_the_last() -> None:
    model = tiny_gpt2(n_positions=12)
    out = generate(StandIn(model, ends=()), prompts_of(7), Sampling(max_tokens=5, seed=0), copies=2)
    assert out.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("name", ["rwkv", "recurrent-gemma"])
def test_a_model_whose_state_is_not_in_the_cache_is_refused(name: str) -> None:
    """RWKV ignores a cache, so every step would see its last token only; RecurrentGemma's modules hold a state."""
    rwkv = RwkvConfig(vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    sizes = {"hidden_size": 16, "lru_width": 16, "intermediate_size": 32, "num_attention_heads": 2}
    gemma = RecurrentGemmaConfig(vocab_size=64, num_hidden_layers=3, **sizes)
    with pytest.raises(ValueError, match="does not keep all of its state in the cache"):
        generate(StandIn(build(rwkv if name == "rwkv" else gemma)), prompts_of(4), Sampling(max_tokens=3), copies=2)


@pytest.mark.parametrize("name", ["mamba", "mamba-2"])
def test_state_space_models_with_prompts_of_different_lengths(name: str) -> None:
    mamba = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
    sizes = {"hidden_size": 16, "state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 2}
    model = build(mamba if name == "mamba" else Mamba2Config(vocab_size=64, num_hidden_layers=2, **sizes))
    out = generate(StandIn(model, ends=()), prompts_of(3, 7), Sampling(max_tokens=5, seed=0), copies=2)
    for i in range(4):
        expected = full_logprobs(model, out.prompt_tokens[i], out.response(i))
        assert torch.allclose(out.sampler_logprobs[i], expected, atol=1e-5)
