"""Speculative decoding without a draft model: tokens a second on reasoning that repeats itself, batches of 1 and 8.

Every prompt is a worked exercise in steps and a further one of the same kind; each turn has numbers and names of its
own, the same for all sides, so nothing has been answered before. Tables of followers and of n-grams stay from turn to
turn, as the papers have it. No token ends a response: every row writes exactly `new_tokens`. One call over other
prompts warms up.

"plain" is Tokenloom's own loop of one token a forward. transformers' prompt look-up takes one row only; beside the
batch stands its ordinary `generate`. The draft model, of ours and of transformers' assisted generation, is the student
that `python -m bench.student` distills; what it is worth on held-out prompts stands beside it. bf16 means float32
weights under autocast for Tokenloom and bfloat16 weights for transformers, as in `bench.rollout`.

`accepted` is the number of drafted tokens accepted in a row's forward, `nodes` that of those drafted.
"""

from __future__ import annotations

import json
import random
import time
from contextlib import nullcontext
from typing import Any

from bench.child import Turns
from bench.harness import PEAK, Metric, Row, Side, Table, Target, main
from bench.inputs import SMOLLM2, STUDENT, STUDENT_INSTALL, model_folder

NEW_TOKENS = 256
_WARM_TOKENS = 64
_RUNS = 3
_TEMPERATURE = 0.6

_NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
)
_THINGS = ["apples", "books", "coins", "pencils", "stamps", "marbles", "cards", "shells"]


def exercise(draw: random.Random, solved: bool) -> str:
    """One exercise, with its solution in steps or without."""
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    a, b, c = (draw.randint(11, 60) for _ in range(3))
    text = (
        f"Question: {name} has {a} {thing}. {name} buys {b} more {thing} and then buys {c} more {thing}. "
        f"How many {thing} does {name} have?\nAnswer: Step 1: "
    )
    if solved:
        text += (
            f"{name} starts with {a} {thing}.\nStep 2: {name} buys {b} more {thing}, so {name} has {a} + {b} = {a + b} "
            f"{thing}.\nStep 3: {name} buys {c} more {thing}, so {name} has {a + b} + {c} = {a + b + c} {thing}.\n"
            f"The answer is {a + b + c}.\n\n"
        )
    return text


def prompts(turn: int, count: int, same: bool) -> list[str]:
    """`count` prompts of a turn, all of them one if `same`."""
    draw = random.Random(turn)
    made = [exercise(draw, True) + exercise(draw, False) for _ in range(1 if same else count)]
    return made * (count if same else 1)


def tokenloom(turns: Turns, *, loop: str, precision: str, draft: str = "", **settings: Any) -> None:
    """A loop of Tokenloom by name, with a draft model if the folder of one is given."""
    import torch

    from tokenloom import decode

    made = decode.loop(loop, **({"draft": _loaded(draft, "float32")} if draft else {}))

    def generate(model: Any, **given: Any) -> Any:
        casts = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
        with casts:
            return model.generate(custom_generate=made, **given)

    def counted(rows: int) -> dict[str, float]:
        counts = made.last_run.counts if made.last_run else {}
        if not counts.get("forwards"):
            return {}
        # A forward over B rows; rows end together here.
        reads = counts["forwards"] * rows
        return {"accepted": counts["accepted"] / reads, "nodes": counts["drafted"] / reads}

    _measure(turns, generate, counted, dtype="float32", **settings)


def transformers(turns: Turns, *, how: str, precision: str, draft: str = "", **settings: Any) -> None:
    """`generate` of transformers: "plain", "look-up" or "assisted"."""
    import torch

    dtype = "bfloat16" if precision == "bf16" else "float32"
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 10} if how == "look-up" else {}
    if how == "assisted":
        options["assistant_model"] = _loaded(draft, dtype)

    def generate(model: Any, **given: Any) -> Any:
        with torch.no_grad():
            return model.generate(**options, **given)

    _measure(turns, generate, lambda rows: {}, dtype=dtype, **settings)


def _loaded(folder: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def _measure(
    turns: Turns,
    generate: Any,
    counted: Any,
    *,
    dtype: str,
    model: str,
    rows: int,
    same: bool,
    sample: bool,
    new_tokens: int,
) -> None:
    from transformers import AutoTokenizer, set_seed

    causal = _loaded(model, dtype)
    causal.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    draws = {"do_sample": True, "temperature": _TEMPERATURE, "top_k": 0, "top_p": 1.0} if sample else {}
    settings = draws or {"do_sample": False}

    def once(turn: int, tokens: int) -> tuple[float, int]:
        given = tokenizer(prompts(turn, rows, same), return_tensors="pt", padding=True)
        set_seed(turn)
        started = time.perf_counter()
        out = generate(causal, **given, **settings, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)
        return time.perf_counter() - started, (out.shape[1] - given["input_ids"].shape[1]) * rows

    once(1_000, min(_WARM_TOKENS, new_tokens))
    for number, _ in enumerate(turns):
        seconds, tokens = once(number, new_tokens)
        turns.report(seconds=seconds, tokens=tokens, tokens_per_second=tokens / seconds, **counted(rows))


def rows(quick: bool) -> list[Row]:
    """Greedy text of 1 and 8 different prompts, and sampled text of 1 and of 8 trajectories of the same."""
    model, new_tokens = ("random-1024", 8) if quick else (SMOLLM2, NEW_TOKENS)
    made = []
    for sample, count in ((False, 1), (False, 8), (True, 1), (True, 8)):
        shared = {
            "model": str(model_folder(model)),
            "rows": count,
            "same": sample,
            "sample": sample,
            "new_tokens": new_tokens,
            "precision": "bf16",
        }
        ours, theirs = "bench.speculative:tokenloom", "bench.speculative:transformers"
        made_by = {"requires": ("transformers",), "install": STUDENT_INSTALL, "needs": STUDENT, "about": _worth()}
        drafted = {**shared, "draft": str(STUDENT)}
        sides = [
            Side("Token Recycling", ours, {**shared, "loop": "token-recycling"}),
            Side("STAND", ours, {**shared, "loop": "stand"}),
            Side("draft model", ours, {**drafted, "loop": "speculative-sampling"}, **made_by),
            Side("plain", ours, {**shared, "loop": "plain"}),
            Side("transformers, plain", theirs, {**shared, "how": "plain"}, ("transformers",)),
        ]
        if count == 1:
            sides += [
                Side("transformers, look-up", theirs, {**shared, "how": "look-up"}, ("transformers",)),
                Side("transformers, assisted", theirs, {**drafted, "how": "assisted"}, **made_by),
            ]
        label = f"{count} {'row' if count == 1 else 'rows'}, {'sampled' if sample else 'greedy'}"
        target = Target("tokens_per_second", "plain", at_least=1.8 if count == 1 and not sample else 1.0)
        made.append(Row(label, tuple(sides), runs=_RUNS, targets=(target,)))
    return made


def _worth() -> str:
    """What the student is worth on held-out prompts."""
    path = STUDENT / "quality.json"
    if not path.is_file():
        return ""
    quality = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"{len(quality['layers'])} layers; on held-out prompts KL {quality['kl']:.2f} nats, "
        f"{quality['acceptance']:.0%} of drafts accepted at temperature 1"
    )


TABLE = Table(
    "speculative",
    "Speculative decoding",
    rows,
    (
        Metric("tokens_per_second", "speed", "tokens/s", better="higher"),
        Metric("accepted", "accepted", "tokens a forward", better="higher", compare=False),
        Metric("nodes", "drafted", "tokens a forward", compare=False),
        PEAK,
    ),
)

if __name__ == "__main__":
    main(TABLE)
