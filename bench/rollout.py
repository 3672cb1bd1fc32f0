"""Rollouts: tokens a second, Tokenloom against transformers.generate and vLLM on the CPU.

All sides: the same weights and prompts, temperature 1, no truncation, no token ends a response, so that each samples
exactly `new_tokens` tokens a row. bf16 means float32 weights under autocast for Tokenloom, as in training (the weights
are cast in every call, and the casts dropped with it), and bfloat16 weights for the others. One call warms up; vLLM
compiles at start-up.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from bench.child import Turns
from bench.harness import PEAK, Metric, Row, Side, Table, Target, main
from bench.inputs import SMOLLM2, model_folder, prompt_file
from bench.setup_vllm import INSTALL, PACKAGE, python
from bench.vllm_side import CALL, ENVIRONMENT

PROMPT_TOKENS, NEW_TOKENS = 60, 128
DRAFT = 4
"""Longest draft, where drafts are tried."""
_WARM_TOKENS = 8


def tokenloom(
    turns: Turns, *, model: str, prompts: str, copies: int, new_tokens: int, precision: str, **settings: Any
) -> None:
    """`rollout.generate` on a policy; `settings` are its own."""
    from tokenloom.batch import Sampling
    from tokenloom.policy import Policy
    from tokenloom.policy.config import ModelConfig
    from tokenloom.rollout import generate

    policy = Policy.load(config=ModelConfig(name=model, autocast="bf16" if precision == "bf16" else "none"))
    policy.eos_ids = frozenset()
    ids = json.loads(Path(prompts).read_text(encoding="utf-8"))
    generate(policy, ids, Sampling(max_tokens=_WARM_TOKENS, seed=0), copies=copies, **settings)
    for number, _ in enumerate(turns):
        started = time.perf_counter()
        out = generate(policy, ids, Sampling(max_tokens=new_tokens, seed=number), copies=copies, **settings)
        _report(turns, time.perf_counter() - started, int(out.lengths.sum()))


def transformers(
    turns: Turns, *, model: str, prompts: str, copies: int, new_tokens: int, precision: str, attention: str
) -> None:
    """`generate` of the model that Tokenloom's policy holds; `attention` is transformers' implementation of it."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    causal: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=attention).eval()
    causal.generation_config.eos_token_id = None
    ids = torch.tensor(json.loads(Path(prompts).read_text(encoding="utf-8")))
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "num_return_sequences": copies,
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    with torch.no_grad():
        causal.generate(**given, max_new_tokens=_WARM_TOKENS)
        for number, _ in enumerate(turns):
            set_seed(number)
            started = time.perf_counter()
            out = causal.generate(**given, max_new_tokens=new_tokens)
            _report(turns, time.perf_counter() - started, (out.shape[1] - ids.shape[1]) * len(out))


def _report(turns: Turns, seconds: float, tokens: int) -> None:
    turns.report(seconds=seconds, tokens=tokens, tokens_per_second=tokens / seconds)


def rows(quick: bool) -> list[Row]:
    """Batches of 1, 8 and 32 different prompts in bf16 and float32, and 4 prompts with 8 responses each."""
    model, new_tokens = ("random-1024", 8) if quick else (SMOLLM2, NEW_TOKENS)
    made = []
    for precision, count, copies in [("bf16", 1, 1), ("bf16", 8, 1), ("bf16", 32, 1), ("bf16", 4, 8), ("fp32", 32, 1)]:
        shared = {
            "model": str(model_folder(model)),
            "prompts": str(prompt_file(model, count, PROMPT_TOKENS)),
            "copies": copies,
            "new_tokens": new_tokens,
        }
        ours = {**shared, "precision": precision}
        dtype = "bfloat16" if precision == "bf16" else "float32"
        sides: tuple[Side, ...] = (
            Side("Tokenloom", "bench.rollout:tokenloom", ours, ("tokenloom",)),
            Side("transformers", "bench.rollout:transformers", {**ours, "attention": "sdpa"}, ("transformers",)),
            Side("vLLM", CALL, {**shared, "dtype": dtype}, (PACKAGE,), INSTALL, python(), ENVIRONMENT),
        )
        if count * copies == 1:
            drafts = {**ours, "speculate": DRAFT}
            sides += (Side("Tokenloom with drafts", "bench.rollout:tokenloom", drafts, ("tokenloom",)),)
        label = f"{count * copies} rows" if copies == 1 else f"{count} prompts × {copies} responses"
        made.append(Row(f"{label}, {precision}", sides, targets=_targets(count, copies)))
    return made


def _targets(count: int, copies: int) -> tuple[Target, ...]:
    if count * copies == 32:
        return (
            Target("tokens_per_second", "transformers", at_least=1.7),
            Target("tokens_per_second", "vLLM", at_least=1.3),
        )
    return (Target("tokens_per_second", "transformers", at_least=2.0),) if count == 1 else ()


TABLE = Table("rollout", "Rollouts", rows, (Metric("tokens_per_second", "speed", "tokens/s", better="higher"), PEAK))

if __name__ == "__main__":
    main(TABLE)
