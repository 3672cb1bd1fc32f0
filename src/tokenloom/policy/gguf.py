"""Reading a GGUF file: metadata, and tensors dequantized to float32.

Only what the embedded model needs (versions 2 and 3, little-endian; F32, F16, Q8_0, Q4_0, Q4_1).
Reading here instead of through the `gguf` package saves a dependency and about 30 seconds: that
reader wraps each of 10^5 vocabulary strings in several memory-mapped arrays.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
# GGML type id -> (values per block, bytes per block)
_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34)}


class GgufFile:
    """An open GGUF file; use as a context manager.

    `metadata` maps keys to values (arrays to lists); `names` lists the tensors;
    `tensor(name)` dequantizes one, in the row-major shape PyTorch uses.

    Raises:
        ValueError: when the file is not GGUF, is truncated, or holds a format not listed above.
    """

    def __init__(self, path: str | Path) -> None:
        with Path(path).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header(str(path))
        except struct.error as error:
            self.close()
            raise ValueError(f"{path} ends inside its header: the file is damaged, install it again") from error
        except ValueError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._map.close()

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in file order."""
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, dequantized to float32."""
        shape, kind, offset = self._tensors[name]
        values, size = _BLOCKS[kind]
        count = 1
        for extent in shape:
            count *= extent
        raw = self._map[offset : offset + count // values * size]
        if len(raw) != count // values * size:
            raise ValueError(f"tensor {name!r} reaches beyond the end of the file: it is damaged, install it again")
        blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, size)
        return _dequantize(blocks, kind).reshape(shape)

    def _read_header(self, path: str) -> None:
        self._at = 0
        if self._map[:4] != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (it starts with {bytes(self._map[:4])!r})")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"{path} is GGUF version {version}; versions 2 and 3 are read")
        n_tensors, n_keys = self._scalar("<Q"), self._scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        entries = []
        for _ in range(n_tensors):
            name = self._string()
            extents = [self._scalar("<Q") for _ in range(self._scalar("<I"))]
            kind, offset = self._scalar("<I"), self._scalar("<Q")
            if kind not in _BLOCKS:
                raise ValueError(f"{path}: tensor {name!r} has GGML type {kind}; known are {sorted(_BLOCKS)}")
            # GGUF lists the fastest-varying dimension first.
            entries.append((name, tuple(reversed(extents)), kind, offset))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self._tensors = {name: (shape, kind, start + offset) for name, shape, kind, offset in entries}

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._map, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        raw = self._map[self._at : self._at + length]
        self._at += length
        return raw.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._scalar("<I"), self._scalar("<Q")
            return [self._value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown GGUF value type {kind}")
        return self._scalar(_SCALARS[kind])


def _dequantize(blocks: Tensor, kind: int) -> Tensor:
    """uint8 [n, bytes] -> float32 [n, values]. A block: scale (float16), perhaps a minimum, integers."""
    if kind == 0:
        return blocks.view(torch.float32)
    if kind == 1:
        return blocks.view(torch.float16).float()
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind == 8:
        return scale * blocks[:, 2:].contiguous().view(torch.int8)
    packed = blocks[:, -16:]
    # The low halves of the 16 bytes are the first 16 values, the high halves the last.
    quants = torch.cat([packed & 15, packed >> 4], dim=1).float()
    if kind == 2:
        return scale * (quants - 8.0)
    minimum = blocks[:, 2:4].contiguous().view(torch.float16).float()
    return scale * quants + minimum
