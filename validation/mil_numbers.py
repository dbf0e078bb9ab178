"""Half precision on float32 arrays: rounding to it, reading it, and sums as a device may make them.

A FLOAT16 value is held as a float32 array whose values float16 can represent. numpy converts
between the two in software, 3 to 10 ns a value; what is here is exact as well and takes 1 to 2 ns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraduct import halves
from loraduct.errors import Refused

MOST = 1 << 30  # elements of one value; more is refused (4 GiB in float32)
_OVERFLOWS = 65520.0  # what rounds to infinity
_BLOCK = 1 << 16  # values at a time, so that scratch stays in the cache
_LANES = 32  # a strict sum adds blocks of this many values


def limited(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape``, unless it is absurd: that is refused before memory is asked for."""
    count = 1
    for size in shape:
        if size < 0:
            raise Refused(None, f"a shape with a negative size, {list(shape)}")
        count *= int(size)
    if count > MOST:
        raise Refused(None, f"a value of {list(shape)} has more than {MOST:,} elements")
    return tuple(int(size) for size in shape)


def rounded(x: Any, *, in_place: bool = False) -> Any:
    """float32 values rounded to float16's, to nearest even; overflow gives infinity.

    Adding and subtracting 1.5 * 2**13 times a value's power of two leaves 11 bits of it, rounded
    as the addition rounds; below 2**-14 the power stays, as float16's subnormals want it.
    A result of zero is positive.
    """
    x = np.ascontiguousarray(x, np.float32)
    if not x.size:
        return x
    if not (x.max() < _OVERFLOWS and x.min() > -_OVERFLOWS):  # NaN fails this too
        return x.astype(np.float16).astype(np.float32)
    out = x if in_place else np.empty_like(x)
    flat, target = x.reshape(-1), out.reshape(-1)
    bits = flat.view(np.uint32)
    scratch = np.empty(min(flat.size, _BLOCK), np.float32)
    for at in range(0, flat.size, _BLOCK):
        piece, end = flat[at : at + _BLOCK], target[at : at + _BLOCK]
        power = scratch[: piece.size]
        np.bitwise_and(bits[at : at + _BLOCK], np.uint32(0x7F800000), out=power.view(np.uint32))
        np.maximum(power, np.float32(2**-14), out=power)
        np.multiply(power, np.float32(1.5 * 2**13), out=power)
        np.add(piece, power, out=end)
        np.subtract(end, power, out=end)
    return out


def widened(half: Any) -> Any:
    """float16 values as float32, infinity and NaN among them."""
    half = np.ascontiguousarray(half, np.float16)
    out = halves.widened(half.view(np.uint16), np.empty(half.shape, np.float32))
    if out.size and not (out.max() < 65536 and out.min() > -65536):
        np.copyto(out, half)
    return out


def narrowed(x: Any) -> Any:
    """float32 values that float16 can represent, as float16: the way back from ``widened``."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty(x.shape, np.float16)
    flat, target = x.reshape(-1), out.reshape(-1).view(np.uint16)
    scaled = np.empty(min(flat.size, _BLOCK), np.float32)
    sign = np.empty(scaled.size, np.uint32)
    for at in range(0, flat.size, _BLOCK):
        piece = flat[at : at + _BLOCK]
        bits, top = scaled.view(np.uint32)[: piece.size], sign[: piece.size]
        np.multiply(piece, np.float32(2.0**-112), out=scaled[: piece.size])
        np.right_shift(bits, 16, out=top)
        np.bitwise_and(top, np.uint32(0x8000), out=top)
        np.right_shift(bits, 13, out=bits)
        np.bitwise_and(bits, np.uint32(0x7FFF), out=bits)
        np.bitwise_or(bits, top, out=bits)
        np.copyto(target[at : at + _BLOCK], bits, casting="unsafe")
    return out


@dataclass(frozen=True)
class Numbers:
    """How an operation computes inside.

    ``strict``: every intermediate in half precision and sums of blocks of 32, the least a device
    may do. Else in float32. ``opset``: the number of the function's opset (8 for CoreML8).
    """

    strict: bool = False
    opset: int = 8

    def round(self, x: Any) -> Any:
        """An intermediate."""
        return rounded(x) if self.strict else x

    def sum(self, x: Any, axes: tuple[int, ...]) -> Any:
        """The sum over ``axes``, which are kept with size 1."""
        if not self.strict or x.dtype != np.float32:
            return np.sum(x, axis=axes, keepdims=True, dtype=x.dtype)
        kept = [1 if i in axes else n for i, n in enumerate(x.shape)]
        rest = [i for i in range(x.ndim) if i not in axes]
        rows = x.transpose(*rest, *axes).reshape(*(x.shape[i] for i in rest), -1)
        short = -rows.shape[-1] % _LANES
        rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, short)])
        blocks = rows.reshape(*rows.shape[:-1], -1, _LANES)
        return _added(_added(blocks)).reshape(kept)

    def mean(self, x: Any, axes: tuple[int, ...]) -> Any:
        """The mean over ``axes``, which are kept with size 1."""
        count = np.float32(np.prod([x.shape[i] for i in axes]))
        return self.round(self.sum(x, axes) / count)


def _added(x: Any) -> Any:
    """The sum over the last axis, one value after the other, rounded after each."""
    total = x[..., 0]
    for i in range(1, x.shape[-1]):
        total = rounded(total + x[..., i])
    return total
