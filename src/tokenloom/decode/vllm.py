"""Shapers that keep nothing between requests, as a logits processor of vLLM's V1 engine.

    llm = LLM(model, logits_processors=["tokenloom.decode.vllm:TokenloomProcessor"])
    SamplingParams(extra_args={"tokenloom": {"top-h": {"alpha": 0.4}, "green-list-watermark": {"key": 7}}})

Each request names its shapers and their parameters; they are applied in this order, to logits as the model gives them:
vLLM divides by its own temperature afterwards, so a "temperature" of Tokenloom's comes first where a rule shall see the
law after it. Rules of one law, both watermarks and CyclicReflex are served; what needs a second model is refused. vLLM
calls this interface with its V1 model runner (VLLM_USE_V2_MODEL_RUNNER=0 from 0.32 on) and is imported only when
`TokenloomProcessor` is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenloom.decode.cyclicreflex import CyclicReflex
from tokenloom.decode.registry import build, decoders
from tokenloom.hints import suggest
from tokenloom.parameters import check_parameters

KEY = "tokenloom"
"""Of `SamplingParams.extra_args`."""

RequestProcessor = Callable[[list[int], list[int], Tensor], Tensor]
"""From the ids of the prompt, those generated so far and logits [V], to logits [V]."""


def check(chosen: Any) -> dict[str, dict[str, Any]]:
    """What a request asks for, checked: shapers by name with their parameters.

    Raises:
        ValueError: for something other than names and parameters, or a shaper that vLLM's requests cannot have.
    """
    if not isinstance(chosen, Mapping):
        raise ValueError(f'extra_args[{KEY!r}] maps shapers to parameters, as {{"top-h": {{}}}}; got {chosen!r}')
    known = decoders("shaper")
    served = {slug for slug, d in known.items() if not {n for n, needed in d.inputs.items() if needed} - {"tokenizer"}}
    checked: dict[str, dict[str, Any]] = {}
    for slug, parameters in chosen.items():
        if slug not in known:
            raise ValueError(f"unknown shaper {slug!r}{suggest(slug, served)}")
        if slug not in served:
            needs = " and ".join(n for n, needed in known[slug].inputs.items() if needed)
            raise ValueError(f"shaper {slug!r} needs {needs}, which vLLM's requests cannot hand over; use generate")
        checked[slug] = check_parameters(f"shaper {slug!r}", parameters or {}, known[slug].parameters)
    return checked


def request_processor(chosen: Any, tokenizer: Any = None) -> RequestProcessor:
    """The shapers of a request as one function.

    Raises:
        ValueError: as `check`, or for a shaper that needs the tokenizer when there is none.
    """
    shapers = [build("shaper", slug, {"tokenizer": tokenizer}, **given) for slug, given in check(chosen).items()]

    def process(prompt: list[int], generated: list[int], logits: Tensor) -> Tensor:
        shaped = logits[None]
        whole = torch.tensor([[*prompt, *generated]], dtype=torch.int64, device=logits.device)
        for shaper in shapers:
            # The request says where the prompt ends; the processor of `generate` has to find out.
            if isinstance(shaper, CyclicReflex):
                shaped = shaper.shape(whole[:, len(prompt) :], shaped)
            else:
                shaped = shaper(whole, shaped)
        return shaped[0]

    return process


def _processor_class() -> type:
    adapter: Any = importlib.import_module("vllm.v1.sample.logits_processor").AdapterLogitsProcessor

    class TokenloomProcessor(adapter):  # type: ignore[misc]  # vLLM is not there for the type checker
        """See the module."""

        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            super().__init__(vllm_config, device, is_pin_memory)
            self._tokenizer_name: str = vllm_config.model_config.tokenizer
            self._tokenizer: Any = None

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            """Refuse a request before it is run."""
            check((sampling_params.extra_args or {}).get(KEY, {}))

        def is_argmax_invariant(self) -> bool:
            """Shapers may change the most probable token."""
            return False

        def new_req_logits_processor(self, params: Any) -> RequestProcessor | None:
            """The function of a request that names shapers."""
            chosen = (params.extra_args or {}).get(KEY)
            if not chosen:
                return None
            if self._tokenizer is None and any("tokenizer" in decoders("shaper")[slug].inputs for slug in chosen):
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_name)
            return request_processor(chosen, self._tokenizer)

    return TokenloomProcessor


def __getattr__(name: str) -> Any:
    if name != "TokenloomProcessor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _processor_class()
    return globals()[name]
