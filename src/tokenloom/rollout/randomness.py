"""Uniform numbers that belong to a row, not to a batch.

Every response owns a stream `u_0, u_1, ...` keyed by (seed, prompt ids, copy number), and token t of
the response is drawn with `u_t`. What a row samples therefore depends on nothing that shares the
batch with it: not on which rows have finished, the order of the prompts, the split into waves or
over machines (beyond the rounding of the model's own forward). One shared generator would hand a
row other numbers as soon as a neighbor left the batch.

The streams are SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"): stateless, so that the numbers of all rows and steps are a few vector operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def row_key(seed: int, prompt: Sequence[int], copy: int) -> int:
    """The 64-bit key (signed) of one response's stream."""
    digest = hashlib.blake2b(digest_size=8)
    for number in (seed, copy, *prompt):
        digest.update(int(number).to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little", signed=True)


def base_seed(generator: torch.Generator | None, seed: int | None) -> int:
    """The seed of one call: drawn from `generator`, or else `seed`, or else PyTorch's global random state.

    Drawing advances the generator, so that successive calls differ.
    """
    if generator is None and seed is not None:
        return seed
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(0, 2**62, (), generator=generator, device=device))


def uniform_streams(keys: Sequence[int], steps: int, device: torch.device | str = "cpu") -> Tensor:
    """The first `steps` numbers of the streams with keys `keys`, [B, steps] in [0, 1), on `device`.

    float64 with 53 random bits, float32 on devices without float64 (MPS).
    """
    counter = torch.arange(1, steps + 1)
    bits = _mix(torch.tensor(list(keys), dtype=torch.int64)[:, None] + counter * _GAMMA)
    uniform = _shift_right(bits, 11).double() * 2.0**-53
    return uniform.to(device, torch.float32 if torch.device(device).type == "mps" else torch.float64)


def _shift_right(x: Tensor, places: int) -> Tensor:
    """Logical shift: PyTorch's `>>` on int64 repeats the sign bit."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)
