"""Fused numerical kernels: what is too large or too slow when written as plain tensor code."""

from tokenloom.kernels.linear_logprobs import LinearLogprobs, TopTokens, linear_logprobs

__all__ = ["LinearLogprobs", "TopTokens", "linear_logprobs"]
