"""Small random causal language models of many architectures, built from configs in milliseconds.

`tiny_llama(vocab=64)` and its siblings return an evaluated float32 Hugging Face model; the same
seed gives the same weights. `TINY` maps every name to its builder. The weights are scaled up so
that the models have opinions: the default initialization gives nearly uniform predictions, on
which errors of position or scale would hide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)


def build(config: PreTrainedConfig, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """A model with random weights from `config`, in evaluation mode; the global random state stays.

    An architecture without `sdpa` (Gemma-2 and its soft-capped attention) gets `eager`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wanted = None if attention == "sdpa" else attention  # None: sdpa wherever the architecture has it
        model = AutoModelForCausalLM.from_config(config, attn_implementation=wanted)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 1.0 / parameter.shape[-1] ** 0.5)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.3)
    return model.eval()


def _common(vocab: int, hidden: int = 16, **rest: Any) -> dict[str, Any]:
    """Two layers, two heads over one shared key-value head, end token 1, start token 0."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **rest,
    }


def tiny_llama(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    return build(LlamaConfig(**_common(vocab, **rest)), seed, attention)


def tiny_qwen2(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    """Tied embeddings and biased projections."""
    return build(Qwen2Config(**_common(vocab, tie_word_embeddings=True, **rest)), seed, attention)


def tiny_qwen3(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    return build(Qwen3Config(**_common(vocab, **{"head_dim": 8} | rest)), seed, attention)


def tiny_gemma2(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    """Soft-capped logits (final cap 3, so that it bites) and attention, alternating windows of 4."""
    settings = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "final_logit_softcapping": 3.0,
    } | rest
    return build(Gemma2Config(**_common(vocab, **settings)), seed, attention)


def tiny_gemma3(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    """One sliding-window layer of 4 and one full layer."""
    kinds = ["sliding_attention", "full_attention"]
    settings = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": kinds} | rest
    return build(Gemma3TextConfig(**_common(vocab, **settings)), seed, attention)


def tiny_mistral(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    """A sliding window of 4, shorter than any test sequence."""
    return build(MistralConfig(**_common(vocab, sliding_window=4, **rest)), seed, attention)


def tiny_phi(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    """A head with a bias; dropouts on in the config."""
    settings = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3} | rest
    return build(PhiConfig(**_common(vocab, **settings)), seed, attention)


def tiny_cohere(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    """Logits multiplied by 0.25, tied embeddings."""
    return build(CohereConfig(**_common(vocab, logit_scale=0.25, **rest)), seed, attention)


def tiny_granite(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    """Logits divided by 3, attention dropout on in the config."""
    settings = {"logits_scaling": 3.0, "attention_dropout": 0.3, "attention_multiplier": 0.3} | rest
    return build(GraniteConfig(**_common(vocab, **settings)), seed, attention)


def tiny_gpt2(vocab: int = 64, seed: int = 0, attention: str = "sdpa", **rest: Any) -> PreTrainedModel:
    """Learned positions, transposed projections, tied embeddings, dropouts of 0.1 by default."""
    settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128} | rest
    settings |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return build(GPT2Config(vocab_size=vocab, **settings), seed, attention)


TINY: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
    "mistral": tiny_mistral,
    "phi": tiny_phi,
    "cohere": tiny_cohere,
    "granite": tiny_granite,
    "gpt2": tiny_gpt2,
}
