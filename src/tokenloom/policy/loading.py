"""From a name to a model and a tokenizer."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import torch

from tokenloom.policy.builtin import BUILTIN_MODELS, builtin_folder
from tokenloom.policy.config import ModelConfig

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OWN_CODE = {"trust_remote_code": False}
"""Said each time: left out, transformers asks at the terminal, and a "y" runs what a model brings along."""


def resolve(name: str | Path) -> str:
    """A local folder or a Hub name: built-in names become their folder in the cache.

    Raises:
        ValueError: when a local path does not exist or holds no model.
    """
    text = str(name)
    if text.lower() in BUILTIN_MODELS:
        return str(builtin_folder(text.lower()))
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = ""
            if (folder / "adapter_config.json").is_file():
                hint = "; it holds a LoRA adapter only: save the merged model instead (`policy.save(folder)`)"
            raise ValueError(f"{text} is a folder without config.json, so not a Hugging Face model{hint}")
        return str(folder)
    close = difflib.get_close_matches(text.lower(), BUILTIN_MODELS, n=1, cutoff=0.45) if "/" not in text else []
    looks_local = isinstance(name, Path) or text.startswith((".", "~", "/")) or "\\" in text or text.count("/") > 1
    # A bare name may be one of the Hub's oldest models (gpt2), unless it nearly is one of ours.
    if looks_local or close:
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"no model {text!r}: it is no folder, no Hub name (owner/model) and no built-in name "
            f"({', '.join(BUILTIN_MODELS)}){hint}"
        )
    return text


def attention_code(config: ModelConfig, device: torch.device) -> str:
    """`config.attention` with `auto` decided.

    PyTorch's fused attention on CPUs is slow in the bf16 backward of short sequences (S = 60: 74 ms against 18 ms of
    plain products), but on prefix trees of a few hundred nodes it wins, in time and by far in memory.
    """
    if config.attention != "auto":
        return config.attention
    short = not config.share_prefixes and "bf" in config.dtype + config.autocast
    return "eager" if device.type == "cpu" and short else "sdpa"


def load_model(source: str, config: ModelConfig, device: torch.device) -> Any:
    """The causal LM at `source` (see `resolve`), for `device` but still on the CPU, in evaluation mode.

    Raises:
        ValueError: when it cannot be found or is no causal LM that `transformers` knows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = attention_code(config, device)
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype], "attn_implementation": attention, **_OWN_CODE}
    try:
        if AutoConfig.from_pretrained(source, **_OWN_CODE).is_encoder_decoder:
            # transformers would load its decoder alone, which has never worked alone.
            raise ValueError("it is an encoder-decoder; choose a decoder-only model")
        model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    except OSError as error:
        raise ValueError(f"cannot load the model {source!r}: {_first_line(error)}") from error
    except ValueError as error:
        if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise ValueError(f"cannot load {source!r} as a causal language model: {_first_line(error)}") from error
        log.info("%s has no sdpa attention; using eager", source)
        model = AutoModelForCausalLM.from_pretrained(source, **options | {"attn_implementation": "eager"})
    return model.eval()


def load_tokenizer(source: str) -> Any:
    """The tokenizer at `source`, or None, with a warning, where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **_OWN_CODE)
    except (OSError, ValueError) as error:
        log.warning(
            "%s has no tokenizer that loads (%s); prompts must be given as token ids",
            source,
            _first_line(error),
        )
        return None


def pick_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the fastest kind this machine has."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
