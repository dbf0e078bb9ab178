"""Matrices in few bits: indices into tables, or integers with scales, in equal blocks.

Who stores such a tensor again, or asks how far rounding may have moved it, needs its codes and not only
its values: `code_of` finds them in a lazy tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from loraduct.tensor import Tensor

WIDTHS = {"lut": (1, 2, 3, 4, 6, 8), "int": (4, 8)}


@dataclass(frozen=True)
class Code:
    """``codes``: uint8 (rows, columns). ``numbers``: float16, for each block of rows and columns a
    table, (row blocks, column blocks, 2**bits), with ``kind`` int a scale, (row blocks, column blocks).

    A value is its table's entry; with ``int`` scale * (code - 2**(bits - 1)), rounded to float16.
    """

    kind: str
    bits: int
    codes: Any
    numbers: Any

    @property
    def way(self) -> str:
        """``lut4``, ``int8``."""
        return f"{self.kind}{self.bits}"

    @property
    def T(self) -> Code:
        """Of the transpose."""
        import numpy as np

        return replace(self, codes=self.codes.T, numbers=np.swapaxes(self.numbers, 0, 1))

    def times(self, factor: float) -> Code:
        """Of the values times a number, each rounded once (exactly only if it is a power of two)."""
        import numpy as np

        with np.errstate(over="ignore"):
            scaled = self.numbers.astype(np.float32) * np.float32(factor)
            return replace(self, numbers=scaled.astype(np.float16))

    def values(self) -> Any:
        """What it stands for: float16."""
        import numpy as np

        if self.kind == "lut":
            return self.numbers.reshape(-1)[self.blocks() * (1 << self.bits) + self.codes]
        steps = self.codes.astype(np.float16) - np.float16(1 << (self.bits - 1))
        return self.numbers.reshape(-1)[self.blocks()] * steps

    def blocks(self) -> Any:
        """Of each value the number of its block, to be broadcast to (rows, columns)."""
        import numpy as np

        (high, wide), (down, across) = self.codes.shape, self.numbers.shape[:2]
        rows, columns = np.arange(high) // (high // down), np.arange(wide) // (wide // across)
        return (rows * across)[:, None] + columns


@dataclass(frozen=True)
class Decoded:
    """`Tensor.make` of a matrix in few bits. ``code`` reads it, in the tensor's stored orientation."""

    code: Callable[[], Code]

    def __call__(self) -> Any:
        """The values as raw storage."""
        import numpy as np

        return self.code().values().view(np.uint16)


def code_of(tensor: Tensor) -> Code | None:
    """The code whose values are the tensor's, bit for bit; None where it has none."""
    if not isinstance(tensor.make, Decoded) or tensor.size is not None or tensor.dtype != "F16":
        return None
    code = tensor.make.code()
    code = code.T if tensor.transposed else code
    return _proven(code if tensor.factor == 1 else code.times(tensor.factor), tensor)


def recoded(tensor: Tensor) -> Code | None:
    """One table of a FLOAT16 matrix's values, where they are so few that it saves bytes."""
    import numpy as np

    if len(tensor.shape) != 2 or tensor.dtype != "F16":
        return None
    entries, places = np.unique(tensor.raw(), return_inverse=True)
    bits = next((b for b in WIDTHS["lut"] if len(entries) <= 1 << b), None)
    if bits is None or places.size * bits // 8 + (2 << bits) >= 2 * places.size:
        return None
    table = np.full(1 << bits, entries[-1], np.uint16)
    table[: len(entries)] = entries
    codes = places.astype(np.uint8).reshape(tensor.shape)
    return _proven(Code("lut", bits, codes, table.view(np.float16).reshape(1, 1, -1)), tensor)


def _proven(code: Code, tensor: Tensor) -> Code | None:
    return code if code.values().tobytes() == tensor.raw().tobytes() else None
