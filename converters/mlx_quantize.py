"""MLX's packed weights: w = scale * q + bias for groups along the last axis, and its 4- and 8-bit floats.

The rules are those of mlx 0.32.4's ``mx.quantize`` and ``mx.dequantize`` (mode affine), whose bits the
tests compare: the edge of the larger magnitude is hit exactly, the quotient is taken with the scale
and bias in float32, and both are stored in the weight's dtype. ``optimal`` keeps the format and
searches scale and bias for the least squared error of what will be read back, weighted by input
channel where ``importance`` says what errors count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraduct.converters.coded import typed
from loraduct.converters.lut import threaded
from loraduct.converters.palettize import per_axis
from loraduct.errors import Refused
from loraduct.packing import packed, unpacked

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
MODES = ("mlx", "optimal")
_LEAST = 1e-7  # of scales
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # parts of the range that the search starts from
_FITS = 4  # regressions from each
_ROWS = 1 << 16  # numbers at once: they stay in the cache


@dataclass(frozen=True)
class Packed:
    """``weight`` uint32 (..., in * bits / 32), ``scales`` and ``biases`` (..., in / group) in the
    dtype of the tensor (bfloat16 is ml_dtypes')."""

    weight: Any
    scales: Any
    biases: Any
    bits: int
    group: int


def quantize(
    weight: Any,
    bits: int = 4,
    group: int = 64,
    *,
    mode: str = "mlx",
    bf16: bool = False,
    importance: Any = None,
    threads: int = 1,
    name: str | None = None,
) -> Packed:
    """A tensor (..., in) of float16, bfloat16 or float32 (uint16 codes as ``bf16`` says), packed.

    ``importance`` (in,): what squared errors count in the search of mode optimal.
    Raises Refused for NaN, Inf, other widths and groups, and where ``group`` doesn't divide in.
    """
    import numpy as np

    _check(weight, bits, group, mode, name)
    stored = typed(weight, bf16=bf16, name=name)
    groups = stored.reshape(-1, group)
    codes = np.empty(groups.shape, np.uint8)
    scales, biases = (np.empty(len(groups), stored.dtype) for _ in range(2))
    along = per_axis((1, weight.shape[-1]), importance, name)
    counts = None if along is None else along[1].reshape(-1, group)  # of groups, again for each row
    step = max(1, _ROWS // group)

    def work(at: int) -> None:
        part = slice(at, at + step)
        wide = groups[part].astype(np.float32)
        if not np.isfinite(wide).all():
            raise Refused(None, "holds NaN or Inf; nothing was compressed", tensor=name)
        scale, bias = _edges(wide, bits)
        codes[part] = _codes(wide, scale, bias, bits)
        scales[part], biases[part] = scale.astype(stored.dtype), bias.astype(stored.dtype)
        if mode == "optimal":
            each = None
            if counts is not None:
                each = counts[np.arange(at, at + len(wide)) % len(counts)]
            _search(wide, bits, codes[part], scales[part], biases[part], each)

    for _ in threaded(work, range(0, len(groups), step), threads):
        pass
    rows = weight.shape[:-1]
    return Packed(
        packed(codes, bits).view("<u4").reshape(*rows, -1),
        scales.reshape(*rows, -1),
        biases.reshape(*rows, -1),
        bits,
        group,
    )


def dequantize(weight: Packed) -> Any:
    """The tensor that ``mx.dequantize`` gives, in the dtype of the scales: product, then sum, each
    rounded."""
    import numpy as np

    p = weight
    codes = unpacked(np.ascontiguousarray(p.weight).view(np.uint8), p.bits, p.scales.size * p.group)
    dense = _read_back(codes.reshape(-1, p.group), p.scales.reshape(-1), p.biases.reshape(-1))
    return dense.reshape(*p.scales.shape[:-1], -1)


def _read_back(codes: Any, scales: Any, biases: Any) -> Any:
    import numpy as np

    kind = scales.dtype
    product = (codes.astype(np.float32) * scales.astype(np.float32)[:, None]).astype(kind)
    return (product.astype(np.float32) + biases.astype(np.float32)[:, None]).astype(kind)


def _edges(wide: Any, bits: int) -> tuple[Any, Any]:
    """MLX's scale and bias (groups,), float32."""
    import numpy as np

    low, high = wide.min(1), wide.max(1)
    from_low = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / np.float32((1 << bits) - 1), np.float32(_LEAST))
    scale = np.where(from_low, scale, -scale)
    edge = np.where(from_low, low, high)
    steps = np.rint(edge / scale)
    whole = steps != 0
    scale = np.where(whole, edge / np.where(whole, steps, 1), scale)
    return scale.astype(np.float32), np.where(whole, edge, 0).astype(np.float32)


def _codes(wide: Any, scale: Any, bias: Any, bits: int) -> Any:
    """The nearest codes, float32."""
    import numpy as np

    q = wide - bias[:, None]
    q /= scale[:, None]
    np.rint(q, out=q)
    return np.clip(q, 0, (1 << bits) - 1, out=q)


def _search(wide: Any, bits: int, codes: Any, scales: Any, biases: Any, counts: Any) -> None:
    """Replace codes, scales and biases in place, group by group, wherever the error gets less.

    ``counts``: what each square counts, as ``wide``; None: all the same. The search leaves out how
    products and sums are rounded when they are read back; what it found is then compared with that.
    """
    import numpy as np

    kind = scales.dtype
    if counts is not None:  # of a group alone: what counts is how channels compare
        counts = (counts / counts.max(1, keepdims=True)).astype(np.float32)
    best = codes.astype(np.float32)
    least = np.full(len(wide), np.inf, np.float32)
    s, b = scales.copy(), biases.copy()
    low, high = wide.min(1), wide.max(1)
    for part in _SHRINK:
        scale = (high - low) * np.float32(part / ((1 << bits) - 1))
        bias = low + (high - low) * np.float32((1 - part) / 2)
        for _ in range(_FITS):
            with np.errstate(over="ignore"):
                stored = scale.astype(kind), bias.astype(kind)
            step, zero = (x.astype(np.float32) for x in stored)
            q = _codes(wide, np.where(step == 0, np.float32(1), step), zero, bits)
            gap = q * step[:, None]
            gap += zero[:, None]
            gap -= wide
            now = _total(gap, counts)
            better = np.flatnonzero(now < least)  # never where something is Inf or NaN
            least[better] = now[better]
            best[better], s[better], b[better] = q[better], stored[0][better], stored[1][better]
            scale, bias = _regression(wide, q, scale, counts)

    def error(codes: Any, scales: Any, biases: Any) -> Any:
        return _total(_read_back(codes, scales, biases).astype(np.float32) - wide, counts)

    better = error(best, s, b) < error(codes, scales, biases)
    codes[better], scales[better], biases[better] = best[better], s[better], b[better]


def _total(gap: Any, counts: Any) -> Any:
    """The sums of squares (groups,)."""
    import numpy as np

    return np.einsum("ij,ij->i", gap, gap if counts is None else gap * counts)


def _regression(wide: Any, codes: Any, scale: Any, counts: Any) -> tuple[Any, Any]:
    """The scale and bias that fit codes best; the scale stays where all codes are one."""
    import numpy as np

    if counts is not None:
        return _weighted(wide, codes, scale, counts)
    centre, mean = codes.mean(1), wide.mean(1)
    q = codes - centre[:, None]
    spread = np.einsum("ij,ij->i", q, q)
    fitted = np.divide(np.einsum("ij,ij->i", q, wide), spread, out=scale.copy(), where=spread > 0)
    return fitted, mean - fitted * centre


def _weighted(wide: Any, q: Any, scale: Any, counts: Any) -> tuple[Any, Any]:
    """`_regression` of squares that count; sums in float64, for they may count very differently."""
    import numpy as np

    share = counts / counts.sum(1, keepdims=True, dtype=np.float64)
    centre, mean = (np.einsum("ij,ij->i", share, x)[:, None] for x in (q, wide))
    q, gap = q - centre, wide - mean
    heavy = share * q
    spread = np.einsum("ij,ij->i", heavy, q)
    top = np.einsum("ij,ij->i", heavy, gap)
    fitted = np.divide(top, spread, out=scale.astype(np.float64), where=spread > 1e-12)
    return fitted.astype(np.float32), (mean[:, 0] - fitted * centre[:, 0]).astype(np.float32)


def _check(weight: Any, bits: int, group: int, mode: str, name: str | None) -> None:
    """Raises Refused for what MLX has no form of."""
    if bits not in BITS or group not in GROUPS or mode not in MODES:
        raise Refused(
            None,
            f"{bits} bits in groups of {group}, {mode}: MLX packs {', '.join(map(str, BITS))} bits in"
            f" groups of {', '.join(map(str, GROUPS))}; one of {', '.join(MODES)}",
            tensor=name,
        )
    if weight.ndim < 2 or not weight.size or weight.shape[-1] % group:
        raise Refused(
            None,
            f"of shape {list(weight.shape)} can't be packed: MLX packs matrices whose last axis"
            f" groups of {group} divide",
            tensor=name,
        )
