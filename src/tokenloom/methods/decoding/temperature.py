"""Temperature: sharpen or flatten the law of the next token.

scores' = scores / temperature, so that p' is proportional to p ** (1 / temperature)                        [B, V]
Limits: temperature -> 0 is greedy decoding, which is asked for as such and not by a division; infinity is uniform over
the tokens that are possible. Paper: none that owns it; see Ackley, Hinton and Sejnowski 1985. Deviations: none.
Fidelity: code (transformers' `TemperatureLogitsWarper`).
"""

from __future__ import annotations

import math

from torch import Tensor

from tokenloom.catalog import part


@part("temperature", stage="shape", scope="row", paper="Ackley et al. 1985")
def temperature(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Scores [B, V] divided by `temperature` > 0.

    Raises:
        ValueError: for a temperature of 0 or below, or infinity.
    """
    if temperature == math.inf:
        raise ValueError("temperature must be finite, for -inf / inf is no score; 1e6 makes all tokens equal")
    if not temperature > 0:
        raise ValueError(
            f"temperature must be above 0, got {temperature}; greedy decoding is do_sample=False, not temperature 0"
        )
    return scores / temperature
