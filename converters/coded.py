"""A tensor as at most 65,536 sorted values and, for each number in it, which of them it is.

float16 and bfloat16 have no more values than that. float32 with more distinct values is cut into bins
that are narrow against any cluster (float16 after centring and scaling, 11 bits); a bin stands for the
mean of what fell into it. Numbers are assigned to table entries one by one even then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loraduct.errors import Refused

CHUNK = 1 << 18  # numbers at once: histograms count in 8-byte integers
_CODES = 1 << 16
_FEW = 4096  # so few bins may mean few distinct values, which are then taken as they are
_TOP = 6e4  # below float16's largest, 65504


@dataclass(frozen=True)
class Coded:
    """``flat`` (size,): uint16 codes of 16-bit floats, or float32. ``values`` (m,): sorted, float64.

    ``position`` turns codes into positions in ``values``; without it ``codes`` holds the positions.
    ``counts`` (m,): how often each value occurs, or the sum of the weights it occurs with.
    ``binned``: the values are means, the numbers themselves differ.
    """

    flat: Any
    values: Any
    counts: Any
    position: Any = None
    codes: Any = None
    binned: bool = False

    def at(self, part: slice) -> Any:
        """Positions in ``values`` of ``flat[part]``, intp."""
        import numpy as np

        if self.position is not None:
            return self.position[self.flat[part]]
        return self.codes[part].astype(np.intp)

    def numbers(self, part: slice) -> Any:
        """``flat[part]`` as float64."""
        import numpy as np

        return self.flat[part].astype(np.float64) if self.binned else self.values[self.at(part)]


@dataclass(frozen=True)
class Weights:
    """What squared errors count, for a tensor seen as (rows, columns): row[i] * column[j]."""

    row: Any
    column: Any

    @classmethod
    def of_axes(cls, along: list[Any], axis: int) -> Weights:
        """Of one vector per axis, multiplied; ``axis`` becomes the rows."""
        import numpy as np

        column = np.ones(1)
        for vector in along[:axis] + along[axis + 1 :]:
            column = np.multiply.outer(column, vector).reshape(-1)
        return cls(along[axis], column)

    def of(self, part: slice) -> Any:
        """The weights of ``flat[part]``, float64."""
        import numpy as np

        width = len(self.column)
        first, last = part.start // width, -(-part.stop // width)
        whole = np.multiply.outer(self.row[first:last], self.column).reshape(-1)
        return whole[part.start - first * width : part.stop - first * width]


def chunks(size: int, step: int = CHUNK) -> Iterator[slice]:
    """Slices of ``step`` that cover ``size``."""
    return (slice(at, min(at + step, size)) for at in range(0, size, step))


def raw(weight: Any, *, bf16: bool, name: str | None) -> Any:
    """The numbers of a tensor as one row: uint16 codes of 16-bit floats, or float32.

    bfloat16 comes as uint16 with ``bf16``, or as ml_dtypes' bfloat16. Raises Refused for other dtypes.
    """
    import numpy as np

    kind = str(weight.dtype)
    flat = np.ascontiguousarray(weight).reshape(-1)
    if kind in ("float16", "bfloat16", "uint16"):
        return flat.view(np.uint16)
    if kind == "float32" and not bf16:
        return flat
    raise Refused(None, f"is {kind}; float16, bfloat16 or float32 can be compressed", tensor=name)


def code_values(bf16: bool) -> Any:
    """What each of the 65,536 codes stands for, float64."""
    import numpy as np

    codes = np.arange(_CODES, dtype=np.uint16)
    wide = (codes.astype(np.uint32) << 16).view(np.float32) if bf16 else codes.view(np.float16)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return wide.astype(np.float64)


def coded(
    weight: Any, *, bf16: bool = False, weights: Weights | None = None, name: str | None = None
) -> Coded:
    """The tensor in codes. Raises Refused for NaN and Inf, other dtypes, and no values at all."""
    import numpy as np

    flat = raw(weight, bf16=bf16, name=name)
    if not flat.size:
        raise Refused(None, f"of shape {list(weight.shape)} holds no values", tensor=name)
    if flat.dtype == np.uint16:
        return _of_halves(flat, bf16 or str(weight.dtype) == "bfloat16", weights, name)
    return _of_floats(flat, weights, name)


def _counted(of: Any, size: int, count: int, weights: Weights | None) -> Any:
    """The histogram of codes ``of(slice)``."""
    import numpy as np

    total = np.zeros(count)
    for part in chunks(size):
        total += np.bincount(
            of(part), weights=None if weights is None else weights.of(part), minlength=count
        )
    return total


def _of_halves(flat: Any, bf16: bool, weights: Weights | None, name: str | None) -> Coded:
    import numpy as np

    counts = _counted(lambda part: flat[part], flat.size, _CODES, weights)
    values = code_values(bf16)
    counts[0] += counts[0x8000]  # -0.0
    counts[0x8000] = 0
    found = np.flatnonzero(counts > 0)  # of bools it is far quicker
    finite(values[found], name)
    found = found[np.argsort(values[found])]
    position = np.zeros(_CODES, np.intp)
    position[found] = np.arange(len(found))
    position[0x8000] = position[0]
    return Coded(flat, values[found], counts[found], position=position)


def _of_floats(flat: Any, weights: Weights | None, name: str | None) -> Coded:
    import numpy as np

    low, high = flat.min(), flat.max()  # NaN spreads
    finite(np.array([low, high]), name)
    if flat.size > _CODES:
        codes, values = _bins(flat, float(low), float(high))
        if len(values) > _FEW:
            counts = _counted(lambda part: codes[part], flat.size, len(values), weights)
            return Coded(flat, values, counts, codes=codes, binned=True)
    values, codes = np.unique(flat, return_inverse=True)
    if len(values) > _CODES:
        codes, values = _bins(flat, float(low), float(high))
        counts = _counted(lambda part: codes[part], flat.size, len(values), weights)
        return Coded(flat, values, counts, codes=codes, binned=True)
    codes = codes.reshape(-1).astype(np.uint16)
    counts = _counted(lambda part: codes[part], flat.size, len(values), weights)
    return Coded(flat, values.astype(np.float64), counts, codes=codes)


def _bins(flat: Any, low: float, high: float) -> tuple[Any, Any]:
    """(codes (size,) uint16, means of the bins), in order; every bin holds something."""
    import numpy as np

    mean = float(flat.mean(dtype=np.float64))
    factor = _TOP / (max(high - mean, mean - low) or 1.0)
    keys = np.empty(flat.size, np.uint16)
    count, mass = np.zeros(_CODES), np.zeros(_CODES)
    for part in chunks(flat.size):
        numbers = flat[part].astype(np.float64)
        keys[part] = ((numbers - mean) * factor).astype(np.float16).view(np.uint16)
        count += np.bincount(keys[part], minlength=_CODES)
        mass += np.bincount(keys[part], weights=numbers, minlength=_CODES)
    found = np.flatnonzero(count)
    values = mass[found] / count[found]
    order = np.argsort(values, kind="stable")
    position = np.zeros(_CODES, np.uint16)
    position[found[order]] = np.arange(len(found))
    for part in chunks(flat.size):
        keys[part] = position[keys[part]]
    return keys, values[order]


def finite(values: Any, name: str | None) -> None:
    """Raises Refused for NaN and Inf."""
    import numpy as np

    if not np.isfinite(values).all():
        what = "NaN" if np.isnan(values).any() else "Inf"
        raise Refused(None, f"holds {what}; nothing was compressed", tensor=name)


def typed(weight: Any, *, bf16: bool, name: str | None) -> Any:
    """The tensor in a float dtype of numpy or ml_dtypes. Raises Refused for others."""
    import ml_dtypes
    import numpy as np

    kind = str(weight.dtype)
    if kind == "uint16":
        return np.ascontiguousarray(weight).view(ml_dtypes.bfloat16 if bf16 else np.float16)
    if kind in ("float16", "bfloat16", "float32"):
        return np.ascontiguousarray(weight)
    raise Refused(None, f"is {kind}; float16, bfloat16 or float32 can be compressed", tensor=name)
