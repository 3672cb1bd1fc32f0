"""Constrained sampling: AWRS against full token masking and genlm-control's AWRS, on JSON, a pattern, and a table.

JSON and pattern: SmolLM2-135M, particles with resampling at half their number. A constraint call is one token judged;
a mask judges the vocabulary at once, by llguidance. For a Python predicate calls are those of its functions: AWRS and
masks both ask about a wrong beginning once, masks about all others token by token. Table: a model of 4 tokens whose
conditional law can be enumerated; KL is of the true law from the mean of the estimated ones, so that it shows bias, not
spread.

On JSON genlm-control has a short row of its own: its AWRS goes on to a second accepted token, and where the schema
leaves only one it judges all 49,152, on average 2 s a token. It gets an environment of its own, `.venv-genlm` or the
one that TOKENLOOM_GENLM names; rows without it say so:

    python -m venv .venv-genlm && .venv-genlm/bin/python -m pip install genlm-control
"""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.child import Turns
from bench.harness import ROOT, Metric, Row, Side, Table, main

JSON_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PATTERN = "(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, [0-9]{1,2} (March|April|May) [0-9]{4}"
TASKS = {
    "JSON": "A person as a JSON object with name and age:\n",
    "pattern": "The letter was written on ",
}
PARTICLES, LIMIT = 4, 32
SHORT_PARTICLES, SHORT_LIMIT = 2, 8
"""Of the JSON row with genlm-control."""
INSTALL = "see the head of bench/constraints.py"
_END = 3
_TABLE_LENGTH = 4


def genlm_python() -> str:
    """The interpreter that has genlm-control: in `TOKENLOOM_GENLM`, or in `.venv-genlm` of the checkout."""
    folder = os.environ.get("TOKENLOOM_GENLM") or str(ROOT / ".venv-genlm")
    return os.path.join(folder, "Scripts/python.exe" if os.name == "nt" else "bin/python")


def ours(turns: Turns, *, model: str, task: str, mode: str, predicate: bool, limit: int, particles: int) -> None:
    """Tokenloom's loop "awrs"; `mode` as there, "lcd" for locally constrained decoding of as many rows."""
    import regex
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tokenloom import decode
    from tokenloom.decode.constraints import JsonSchemaConstraint, PredicateConstraint, RegexConstraint

    causal: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    constraint: Any
    asked = 0
    pattern = regex.compile(PATTERN)

    def judge(text: str, partial: bool = False) -> bool:
        nonlocal asked
        asked += 1
        return bool(pattern.fullmatch(text, partial=partial))

    if predicate:
        constraint = PredicateConstraint(tokenizer, judge, lambda text: judge(text, partial=True))
    elif task == "JSON":
        constraint = JsonSchemaConstraint(tokenizer, schema=JSON_SCHEMA)
    else:
        constraint = RegexConstraint(tokenizer, pattern=PATTERN)
    ids = tokenizer(TASKS[task], return_tensors="pt")["input_ids"]
    given = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": tokenizer.eos_token_id}
    if mode == "lcd":
        loop = decode.loop("locally-constrained", constraint=constraint)
        ids = ids.repeat(particles, 1)
    else:
        loop = decode.loop("awrs", constraint=constraint, mode=mode, particles=particles)
    causal.generate(ids, max_new_tokens=2, custom_generate=loop, **given)
    for number, _ in enumerate(turns):
        torch.manual_seed(number)
        asked = 0
        started = time.perf_counter()
        causal.generate(ids, max_new_tokens=limit, custom_generate=loop, **given)
        seconds = time.perf_counter() - started
        if mode == "lcd":
            turns.report(seconds=seconds)
            continue
        counts = loop.last_run.counts
        _report(
            turns,
            seconds,
            counts["tokens"],
            asked if predicate else counts["constraint_calls"],
            masks_per_token=counts["masks"] / counts["tokens"],
        )


def genlm(turns: Turns, *, model: str, task: str, limit: int, particles: int) -> None:
    """genlm-control's AWRS and SMC, with its own model, JSON schema and automaton."""
    import asyncio

    from genlm.control import AWRS, BoolFSA, JsonSchema, PromptedLLM

    llm = PromptedLLM.from_name(model, backend="hf")
    llm.set_prompt_from_str(TASKS[task])
    potential = JsonSchema(JSON_SCHEMA) if task == "JSON" else BoolFSA.from_regex(PATTERN)
    condition = potential.coerce(llm, f=b"".join)
    sampler = AWRS(llm, condition)
    calls = 0
    judge = sampler._accept

    async def counted(context: Any, token: Any, verbosity: int = 0) -> bool:
        nonlocal calls
        calls += 1
        return bool(await judge(context, token, verbosity))

    sampler._accept = counted

    async def once(tokens: int) -> Any:
        return await sampler.smc(n_particles=particles, ess_threshold=0.5, max_tokens=tokens)

    with asyncio.Runner() as runner:
        runner.run(once(2))
        for _ in turns:
            calls = 0
            started = time.perf_counter()
            found = runner.run(once(limit))
            _report(turns, time.perf_counter() - started, sum(len(c) for c in found.contexts), calls)


def _report(turns: Turns, seconds: float, tokens: float, calls: float, **more: float) -> None:
    turns.report(seconds=seconds, tokens_per_second=tokens / seconds, calls_per_token=calls / tokens, **more)


def table_law(prefix: Sequence[int]) -> list[float]:
    """The law of the token after `prefix`: three symbols and the end, which comes at length 4 at the latest."""
    if len(prefix) >= _TABLE_LENGTH:
        return [0.0, 0.0, 0.0, 1.0]
    draw = random.Random(repr(tuple(prefix)))
    masses = [draw.random() ** 3 + 0.01 for _ in range(_END + 1)]
    return [m / sum(masses) for m in masses]


def fits(prefix: Sequence[int], token: int) -> bool:
    """Strings whose symbols add up to a multiple of 3."""
    whole = sum(prefix) % 3 == 0
    return whole if token == _END else len(prefix) + 1 < _TABLE_LENGTH or (sum(prefix) + token) % 3 == 0


def true_law() -> dict[tuple[int, ...], float]:
    """The law of strings given the constraint."""
    law: dict[tuple[int, ...], float] = {}
    for length in range(_TABLE_LENGTH + 1):
        for string in itertools.product(range(_END), repeat=length):
            if sum(string) % 3 == 0:
                steps = [table_law(string[:n])[t] for n, t in enumerate((*string, _END))]
                law[string] = math.prod(steps)
    total = sum(law.values())
    return {s: m / total for s, m in law.items()}


def kl_from(estimate: dict[tuple[int, ...], float]) -> float:
    """KL of the true law from an estimated one, which gets a thousandth of the true one so that it has its support."""
    total = sum(estimate.values())
    true = true_law()
    return sum(p * math.log(p / (0.999 * estimate.get(s, 0.0) / total + 0.001 * p)) for s, p in true.items())


def table_ours(turns: Turns, *, mode: str, particles: int, repeats: int) -> None:
    """The same loops over the table; "lcd" is locally constrained decoding without weights."""
    import torch

    from tokenloom import decode
    from tokenloom.decode.run import Run
    from tokenloom.decode.table import TableLM
    from tokenloom.draw import RandomDraw

    model = TableLM(_END + 1, lambda prefix: table_law(prefix[1:]))
    accept = type("Fits", (), {"accept": staticmethod(fits)})()
    for number, _ in enumerate(turns):
        draw = RandomDraw(torch.Generator().manual_seed(number))
        run = Run(
            model,
            torch.zeros(1, 1, dtype=torch.int64),
            [[0]],
            _TABLE_LENGTH + 1,
            frozenset([_END]),
            _END,
            True,
            draw=draw,
        )
        mean: dict[tuple[int, ...], float] = {}
        calls = tokens = 0.0
        started = time.perf_counter()
        for _ in range(repeats):
            if mode == "lcd":
                loop = decode.loop("locally-constrained", constraint=accept)
                found = [(tuple(loop.rows(run)[0][:-1]), 1 / particles) for _ in range(particles)]
            else:
                loop = decode.loop("awrs", constraint=accept, mode=mode, particles=particles)
                loop.rows(run)
                found = [(s[:-1], w) for s, w in loop.posteriors[0].law().items()]
                calls, tokens = calls + run.counts["constraint_calls"], tokens + run.counts["tokens"]
            for string, weight in found:
                mean[string] = mean.get(string, 0.0) + weight
        more = {"calls_per_token": calls / tokens} if tokens else {}
        turns.report(seconds=time.perf_counter() - started, kl=kl_from(mean), **more)


def table_genlm(turns: Turns, *, particles: int, repeats: int) -> None:
    """genlm-control over the same table."""
    import asyncio

    import numpy as np
    from genlm.control import AWRS, EOS, Potential

    class Law(Potential):  # type: ignore[misc]  # of a package that this environment may lack
        """The table."""

        async def prefix(self, context: list[int]) -> float:
            return sum(math.log(table_law(context[:n])[t]) for n, t in enumerate(context))

        async def complete(self, context: list[int]) -> float:
            return await self.prefix(context) + self._log(table_law(context)[_END])

        async def logw_next(self, context: list[int]) -> Any:
            return self.make_lazy_weights(np.array([self._log(p) for p in table_law(context)]))

        @staticmethod
        def _log(p: float) -> float:
            return math.log(p) if p > 0 else -math.inf

    class Fits(Potential):  # type: ignore[misc]  # of a package that this environment may lack
        """The constraint."""

        async def prefix(self, context: list[int]) -> float:
            return 0.0 if all(fits(context[:n], t) for n, t in enumerate(context)) else -math.inf

        async def complete(self, context: list[int]) -> float:
            return 0.0 if fits(context, _END) else -math.inf

    sampler = AWRS(Law([0, 1, 2]), Fits([0, 1, 2]))
    with asyncio.Runner() as runner:
        for _ in turns:
            mean: dict[tuple[int, ...], float] = {}
            started = time.perf_counter()
            for _ in range(repeats):
                found = runner.run(sampler.smc(n_particles=particles, ess_threshold=0.5, max_tokens=_TABLE_LENGTH + 1))
                for context, weight in zip(found.contexts, found.normalized_weights, strict=True):
                    string = tuple(t for t in context if t is not EOS)
                    if weight > 0:
                        mean[string] = mean.get(string, 0.0) + float(weight)
            turns.report(seconds=time.perf_counter() - started, kl=kl_from(mean))


def rows(quick: bool) -> list[Row]:
    """The two tasks and the table."""
    from bench.inputs import SMOLLM2, model_folder  # not at the top: genlm-control's environment has no tokenloom

    limit, particles, repeats = (4, 2, 5) if quick else (LIMIT, PARTICLES, 300)
    folder = str(model_folder(SMOLLM2))
    made = []
    need = ("tokenloom", "llguidance")
    for task in TASKS:
        base = {"model": folder, "task": task, "limit": limit, "particles": particles}
        call = "bench.constraints:ours"
        awrs = Side("Tokenloom AWRS", call, {**base, "mode": "auto", "predicate": False}, need)
        masks = Side("Tokenloom masks", call, {**base, "mode": "mask", "predicate": False}, need)
        lcd = Side("Tokenloom LCD", call, {**base, "mode": "lcd", "predicate": False}, need, about="no weights: biased")
        theirs = Side(
            "genlm-control AWRS", "bench.constraints:genlm", base, ("genlm-control",), INSTALL, genlm_python()
        )
        if task != "JSON":
            made.append(Row(task, (awrs, masks, lcd, theirs), runs=3))
            continue
        made.append(Row(task, (awrs, masks, lcd), runs=3))
        short = {"limit": min(limit, SHORT_LIMIT), "particles": SHORT_PARTICLES}
        sides = (replace(side, settings={**side.settings, **short}) for side in (awrs, masks, theirs))
        label = f"{task}, {short['limit']} tokens × {SHORT_PARTICLES} particles"
        made.append(Row(label, tuple(sides), runs=2))
    base = {"model": folder, "task": "pattern", "limit": min(limit, 8), "particles": particles, "predicate": True}
    predicates = (
        Side("Tokenloom AWRS", "bench.constraints:ours", {**base, "mode": "auto"}, ("tokenloom",)),
        Side("Tokenloom masks", "bench.constraints:ours", {**base, "mode": "mask"}, ("tokenloom",)),
    )
    made.append(Row("pattern as a Python predicate, 8 tokens", predicates, runs=2))
    counts = {"particles": 8, "repeats": repeats}
    tables = [
        Side(f"Tokenloom {name}", "bench.constraints:table_ours", {**counts, "mode": mode}, ("tokenloom",))
        for name, mode in (("AWRS", "auto"), ("masks", "mask"), ("LCD", "lcd"))
    ]
    theirs = Side(
        "genlm-control AWRS", "bench.constraints:table_genlm", counts, ("genlm-control",), INSTALL, genlm_python()
    )
    made.append(Row(f"enumerable table, {repeats} × 8 particles", (*tables, theirs), runs=3))
    return made


METRICS = (
    Metric("seconds", "time", "s"),
    Metric("tokens_per_second", "speed", "tokens/s", better="higher"),
    Metric("calls_per_token", "calls a token", compare=False),
    Metric("masks_per_token", "masks a token", compare=False),
    Metric("kl", "KL to the true law", "nats", compare=False),
)
TABLE = Table("constraints", "Constrained sampling", rows, METRICS)

if __name__ == "__main__":
    main(TABLE)
