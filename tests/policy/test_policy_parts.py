"""LoRA, reference, value head, chunk signals, saving, fall-backs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from full_logits import full_logits_signals, ragged_rollouts
from tiny_models import TINY, tiny_gpt2, tiny_llama, tiny_qwen2
from tokenloom.catalog import parts
from tokenloom.kernels import linear_logprobs
from tokenloom.policy import ModelConfig, Policy
from tokenloom.signals import CHUNK_SIGNALS, chunk_signal

TOLERANCE = 256 * torch.finfo(torch.float32).eps


def small(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"chunk_rows": 3, "token_budget": 24, **settings})


def train_a_little(policy: Policy, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable_parameters()], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        signals = policy.signals(ragged_rollouts(), ["logprobs"], grad=True)
        assert signals.logprobs is not None
        policy.backward(-signals.logprobs.sum())
        optimizer.step()


def logprobs(policy: Policy, name: str = "logprobs") -> Tensor:
    return policy.signals(ragged_rollouts(), [name]).named()[name]


# -- LoRA and reference ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_lora_trains_adapters_only_and_the_base_is_the_reference(name: str) -> None:
    model = TINY[name]()
    plain = logprobs(Policy(TINY[name](), config=small()))
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    policy = Policy(model, config=small(lora={"rank": 2}))
    names = [n for n, _ in policy.trainable_parameters()]
    assert names
    assert all("lora_" in n for n in names)
    torch.testing.assert_close(logprobs(policy), plain, rtol=0, atol=TOLERANCE)
    train_a_little(policy)
    assert float((logprobs(policy) - plain).abs().max()) > 0.1
    torch.testing.assert_close(logprobs(policy, "ref_logprobs"), plain, rtol=0, atol=TOLERANCE)
    # Asking for the reference leaves the adapters on and training.
    assert [n for n, _ in policy.trainable_parameters()] == names
    assert policy.reference._copy is None
    base = dict(policy.causal.named_parameters())
    for n, before in frozen.items():
        now = (
            base[n]
            if n in base
            else base[n.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")]
        )
        assert torch.equal(now, before)


def test_lora_gradients_with_the_reference_in_the_same_call() -> None:
    policy = Policy(tiny_llama(), config=small(lora={"rank": 2}, gradient_checkpointing=True))
    train_a_little(policy)
    alone = policy.signals(ragged_rollouts(), ["logprobs"], grad=True)
    both = policy.signals(ragged_rollouts(), ["logprobs", "ref_logprobs"], grad=True)
    parameters = [p for _, p in policy.trainable_parameters()]
    assert alone.logprobs is not None
    assert both.logprobs is not None
    for a, b in zip(
        torch.autograd.grad(alone.logprobs.sum(), parameters),
        torch.autograd.grad(both.logprobs.sum(), parameters),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_lora_adapters_depend_on_the_seed_only() -> None:
    torch.manual_seed(5)
    first = Policy(tiny_llama(), config=small(lora={}), seed=1).state_dict()
    torch.manual_seed(6)
    again = Policy(tiny_llama(), config=small(lora={}), seed=1).state_dict()
    other = Policy(tiny_llama(), config=small(lora={}), seed=2).state_dict()
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize(
    ("targets", "message"), [(["q_prj"], "q_prj"), (["q_proj", "lm_head"], "includes the output head")]
)
def test_lora_targets_that_do_not_fit(targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(tiny_llama(), config=small(lora={"target_modules": targets}))


def test_the_reference_stays_where_it_was() -> None:
    policy = Policy(tiny_llama(), config=small())
    before = logprobs(policy)
    policy.prepare(["ref_logprobs"])
    train_a_little(policy)
    assert float((logprobs(policy) - before).abs().max()) > 0.1
    torch.testing.assert_close(logprobs(policy, "ref_logprobs"), before, rtol=0, atol=0)


@pytest.mark.parametrize("chunk_rows", [0, 3])
def test_the_reference_takes_tiles_like_the_policy(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noted(*args: Any, chunk: int, **kwargs: Any) -> Any:
        asked.append(chunk)
        return linear_logprobs(*args, chunk=chunk, **kwargs)

    policy = Policy(tiny_llama(), config=small(chunk_rows=chunk_rows))
    monkeypatch.setattr("tokenloom.policy.head.linear_logprobs", noted)
    logprobs(policy, "ref_logprobs")
    # A chosen size (0) stays one: Triton's kernels choose their own.
    assert set(asked) == {chunk_rows}
    assert policy.reference.head().chunk_rows == policy.head.chunk_rows


def test_a_late_reference_is_read_from_disk_or_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    policy = Policy.load(tmp_path, small(), device="cpu")
    before = logprobs(policy)
    train_a_little(policy)
    torch.testing.assert_close(logprobs(policy, "ref_logprobs"), before, rtol=0, atol=0)
    homeless = Policy(tiny_llama(), config=small())
    train_a_little(homeless)
    with pytest.raises(ValueError, match=r"policy\.prepare\(\['ref_logprobs'\]\) before training"):
        logprobs(homeless, "ref_logprobs")


# -- value head ------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [True, False])
def test_values_and_their_gradients(detach: bool) -> None:
    policy = Policy(tiny_llama(), config=small(value_head={"detach": detach}))
    assert policy.value_head is not None
    rollouts = ragged_rollouts()
    assert policy.signals(rollouts, ["values"]).named()["values"].eq(0).all()
    with torch.no_grad():
        policy.value_head.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    head = policy.value_head
    wanted = full_logits_signals(policy.causal, rollouts, lambda h: head(h[None])[0])["values"]
    signals = policy.signals(rollouts, ["values", "old_values"], grad=True)
    values = signals.named()["values"]
    torch.testing.assert_close(values, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(signals.named()["old_values"], values.detach())
    trained = dict(policy.trainable_parameters())
    (wanted**2).sum().backward()
    slow = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    for p in trained.values():
        p.grad = None
    policy.backward((values**2).sum())
    moved = {n for n, p in trained.items() if p.grad is not None}
    assert "value_head.linear.weight" in moved
    assert any(n.startswith("model.") for n in moved) is not detach
    for n in moved:
        torch.testing.assert_close(trained[n].grad, slow[n], rtol=4 * TOLERANCE, atol=16 * TOLERANCE)


# -- chunk signals ---------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[None]:
    parts()  # the methods' own signals must be there before and after
    before = dict(CHUNK_SIGNALS)

    @chunk_signal("full_kl", "logits", "ref_logits")
    def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
        law, ref = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
        return (law.exp() * (law - ref)).sum(-1)

    @chunk_signal("top_three", "logits", "targets", "hidden")
    def top_three(logits: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
        assert len(targets) == len(hidden) <= 3
        return logits.topk(3).values - logits.gather(-1, targets[:, None])

    @chunk_signal("unreduced", "logits")
    def unreduced(logits: Tensor) -> Tensor:
        return logits.sum()

    yield
    CHUNK_SIGNALS.clear()
    CHUNK_SIGNALS.update(before)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize("name", ["gemma2", "llama", "phi"])
def test_a_full_kl_to_the_reference(name: str, lora: Any) -> None:
    model = TINY[name]()
    untrained = TINY[name]()
    policy = Policy(model, config=small(lora=lora))
    policy.prepare(["full_kl"])
    train_a_little(policy)
    rollouts = ragged_rollouts()
    signals = policy.signals(rollouts, ["full_kl", "top_three", "logprobs"], grad=True)
    assert set(signals.named()) == {"full_kl", "top_three", "logprobs"}
    kl, top = signals.extras["full_kl"], signals.extras["top_three"]
    assert top.shape == (*rollouts.tokens.shape, 3)
    wanted = torch.zeros(rollouts.tokens.shape)
    for i, t in rollouts.mask.nonzero().tolist():
        ids = torch.cat([rollouts.prompt_tokens[i], rollouts.response(i)])[None]
        at = len(rollouts.prompt_tokens[i]) + t - 1
        law = torch.log_softmax(policy.model(ids).logits[0, at] / 0.7, -1)
        ref = torch.log_softmax(untrained(ids).logits[0, at] / 0.7, -1)
        wanted[i, t] = (law.exp() * (law - ref)).sum()
    torch.testing.assert_close(kl, wanted, rtol=8 * TOLERANCE, atol=8 * TOLERANCE)
    assert kl[rollouts.mask].gt(0).all()
    parameters = [p for _, p in policy.trainable_parameters()]
    ours = torch.autograd.grad(kl.sum(), parameters)
    theirs = torch.autograd.grad(wanted.sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * TOLERANCE, atol=8 * TOLERANCE * float(b.abs().max().clamp(min=1)))


@pytest.mark.usefixtures("registered")
def test_a_chunk_signal_that_does_not_reduce_per_token() -> None:
    with pytest.raises(ValueError, match="'unreduced' returned shape"):
        Policy(tiny_llama(), config=small()).signals(ragged_rollouts(), ["unreduced"])


# -- saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gpt2])
def test_the_saved_folder_is_an_ordinary_model(
    build: Callable[[], Any], lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    policy = Policy(build(), config=small(lora=lora, value_head={}))
    train_a_little(policy)
    assert policy.value_head is not None
    with torch.no_grad():
        policy.value_head.linear.weight.fill_(0.5)
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    wanted = logprobs(policy)
    policy.save(tmp_path / "m")
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    assert (tmp_path / "m" / "generation_config.json").is_file()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logprobs(Policy(model, config=small())), wanted, rtol=0, atol=16 * TOLERANCE)
    assert model.config.tie_word_embeddings == policy.causal.config.tie_word_embeddings
    again = Policy.load(tmp_path / "m", small(value_head={}), device="cpu")
    assert again.value_head is not None
    assert torch.equal(again.value_head.linear.weight, policy.value_head.linear.weight)


def test_the_adapter_alone(tmp_path: Path) -> None:
    from peft import PeftModel

    policy = Policy(tiny_llama(), config=small(lora={"rank": 2}))
    train_a_little(policy)
    policy.save(tmp_path, adapter_only=True)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded(ids).logits, policy.model(ids).logits, rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="a LoRA adapter only"):
        Policy.load(tmp_path)
    with pytest.raises(ValueError, match="trains all weights"):
        Policy(tiny_llama(), config=small()).save(tmp_path, adapter_only=True)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_state_round_trip(lora: dict[str, Any] | None) -> None:
    config = small(lora=lora, value_head={})
    policy = Policy(tiny_llama(), config=config)
    start = {n: x.clone() for n, x in policy.state_dict().items()}
    train_a_little(policy)
    moved = logprobs(policy)
    other = Policy(tiny_llama(), config=config)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(logprobs(other), moved)
    other.load_state_dict(start)
    assert not torch.equal(logprobs(other), moved)
    with pytest.raises(ValueError, match="lacks"):
        other.load_state_dict({})
    wrong = {n: torch.zeros(1) for n in start}
    with pytest.raises(ValueError, match="expected"):
        other.load_state_dict(wrong)


# -- fall-backs ------------------------------------------------------------------------------


class Surprising(LlamaForCausalLM):
    """Multiplies its logits by a number that its config does not name."""

    def forward(self, input_ids: Tensor, **rest: Any) -> CausalLMOutputWithPast:
        output = super().forward(input_ids, **rest)
        output.logits = output.logits * 1.5
        return output


class LooksAhead(LlamaModel):
    """Adds the mean over all positions, padding included."""

    def forward(self, *args: Any, **rest: Any) -> BaseModelOutputWithPast:
        output = super().forward(*args, **rest)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_unknown_head_falls_back_to_the_models_own(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = Surprising(tiny_llama().config).eval()
    model.load_state_dict(tiny_llama().state_dict())
    policy = Policy(model.to(dtype), config=small())
    assert not policy.head.fused
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "differ from the model's own" in caplog.text
    if dtype == torch.float32:
        wanted = full_logits_signals(model, ragged_rollouts())
        signals = policy.signals(ragged_rollouts(), ["logprobs", "entropies"], grad=True)
        for name, x in signals.named().items():
            torch.testing.assert_close(x, wanted[name], rtol=TOLERANCE, atol=TOLERANCE)
        weight = model.lm_head.weight
        (ours,) = torch.autograd.grad(signals.named()["logprobs"].sum(), weight)
        (theirs,) = torch.autograd.grad(wanted["logprobs"].sum(), weight)
        torch.testing.assert_close(ours, theirs, rtol=8 * TOLERANCE, atol=8 * TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_padding_disturbs_gets_rows_of_equal_length(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama().to(dtype)
    model.model.__class__ = LooksAhead
    policy = Policy(model, config=small(token_budget=1000))
    assert policy.head.fused
    assert "right padding changes the hidden states" in caplog.text
    shapes = []
    policy.trunk.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rollouts = ragged_rollouts()
    policy.signals(rollouts.rows([0, 1, 0, 3]), ["logprobs"])
    assert shapes == [(1, 17), (2, 9), (1, 4)]


class GlancesAhead(LlamaModel):
    """Adds a fraction of the last position that in bfloat16 could pass for rounding, were it not padding."""

    def forward(self, *args: Any, **rest: Any) -> BaseModelOutputWithPast:
        output = super().forward(*args, **rest)
        output.last_hidden_state = output.last_hidden_state + 0.12 * output.last_hidden_state[:, -1:]
        return output


def test_a_leak_as_small_as_rounding_shows_when_the_padding_token_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama().bfloat16()
    model.model.__class__ = GlancesAhead
    Policy(model, config=small())
    (record,) = [r for r in caplog.records if "right padding changes" in r.getMessage()]
    assert isinstance(record.args, tuple)
    _, forward_error, forward_tolerance, filler_error, filler_tolerance = record.args
    assert forward_error <= forward_tolerance  # type: ignore[operator]  # log arguments are untyped
    assert filler_error > filler_tolerance  # type: ignore[operator]  # log arguments are untyped


def test_a_good_model_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for build in TINY.values():
        Policy(build(), config=small())
        Policy(build().bfloat16(), config=small())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_model_without_a_trunk_is_refused() -> None:
    model = tiny_llama()
    model.base_model_prefix = ""
    with pytest.raises(ValueError, match="no trunk separate from its head"):
        Policy(model)
