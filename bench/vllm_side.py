"""vLLM's offline engine on the CPU as a side of a row; runs under the interpreter of `bench.setup_vllm`.

Responses have exactly `new_tokens` tokens at temperature 1; prefixes are shared, as vLLM does by default, but not from
one turn to the next: after an update their keys and values would be stale.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from bench.child import Turns

CALL = "bench.vllm_side:measure"
ENVIRONMENT = {
    # The engine in this process, so that its memory counts and it gets both cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def measure(
    turns: Turns,
    *,
    model: str,
    prompts: str,
    copies: int,
    new_tokens: int,
    dtype: str = "bfloat16",
    max_model_len: int = 2048,
    **settings: Any,
) -> None:
    """`copies` responses to each prompt of the JSON file `prompts` (lists of token ids), all at once.

    `model` is a folder, `settings` are of `vllm.LLM`. One call warms up.
    """
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams, TokensPrompt

    ids = json.loads(Path(prompts).read_text(encoding="utf-8"))
    wanted = [TokensPrompt(prompt_token_ids=prompt) for prompt in ids for _ in range(copies)]
    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=len(wanted),
        disable_log_stats=True,
        **settings,
    )
    sampling = SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    engine.generate(wanted, sampling, use_tqdm=False)
    for _ in turns:
        engine.reset_prefix_cache()
        started = time.perf_counter()
        outputs = engine.generate(wanted, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
        turns.report(seconds=seconds, tokens=tokens, tokens_per_second=tokens / seconds)
