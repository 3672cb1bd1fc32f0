"""Fused numerical kernels: what is too large or too slow when written as plain tensor code."""

from tokenloom.kernels.linear_logprobs import linear_logprobs

__all__ = ["linear_logprobs"]
