"""Which code runs a call: Triton kernels on CUDA where they can, the chunked PyTorch form everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenloom.kernels.chunked import Chunked
from tokenloom.kernels.logit_form import LogitForm

log = logging.getLogger(__name__)


class Call(NamedTuple):
    """What `linear_logprobs` was asked for besides its tensors.

    `offset` is the first id of this process's vocabulary rows, `vocabulary` the size of the whole.
    """

    form: LogitForm
    need_entropy: bool
    top_k: int
    chunk: int
    group: Any
    offset: int
    vocabulary: int


def engine(call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Chunked:
    """The logits of `hidden` [M, D] over `weight` [V, D], ready to be summed up and differentiated."""
    kind: type[Chunked] = Chunked
    plain = call.top_k == 0 and call.group is None and call.chunk == 0
    if hidden.device.type == "cuda" and plain and call.form.product != torch.float64 and triton_works():
        from tokenloom.kernels.triton_logprobs import TritonLogits

        kind = TritonLogits
    return kind(hidden, weight, bias, call.form, chunk=call.chunk)


@functools.cache
def triton_works() -> bool:
    """Whether Triton is installed and can build a kernel here; says once if it is installed and cannot."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from tokenloom.kernels.triton_logprobs import probe

        probe()
    except Exception as error:  # Triton calls a C compiler and a driver: anything can fail in there
        log.warning(
            "Triton is installed but cannot build kernels (%s: %s); log-probs use the slower PyTorch form. "
            "A C compiler is what is missing most often.",
            type(error).__name__,
            error,
        )
        return False
    return True
