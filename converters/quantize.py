"""Linear quantisation for Core ML: w = scale * (data - offset), in 4 or 8 bits.

One scale for the tensor, for each channel, or for each block of input channels of each output channel
(``constexpr_blockwise_shift_scale`` of iOS18; ``constexpr_affine_dequantize`` of iOS16 where 8 bits
have one scale or one per channel; coremltools 9.0). Scales cover the range, or are searched for the
least squared error: ranges shrunk step by step, each followed by least-squares fits of the scale.
Squared errors may be weighted by input channel, as those of tables are (`palettize`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraduct.converters.coded import Weights, coded, typed
from loraduct.converters.palettize import per_axis
from loraduct.errors import Refused

SCALES = {"float16": "FLOAT16", "float32": "FLOAT32"}
GRANULARITIES = ("tensor", "channel", "block")
_COARSE = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)  # parts of the range
_LOW = (0.16, 0.1, 0.06, 0.04, 0.025, 0.015)  # more, where the largest numbers may count little
_FINE = (1.1, 1.05, 1.025, 1.01, 0.99, 0.975, 0.95, 0.9)  # of the best of them
_FITS = 1  # least-squares fits of the scale, from each
_NUMBERS = 1 << 18  # at once


@dataclass(frozen=True)
class Options:
    """``granularity``: tensor, channel (``axis``), block (``block`` channels of axis 1, per channel
    of axis 0). ``search``: for the least squared error, else the range is covered."""

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    granularity: str = "channel"
    axis: int = 0
    block: int = 32
    search: bool = True
    scale: str = "float16"
    bf16: bool = False


@dataclass(frozen=True)
class Linear:
    """``data`` (int8 or uint8, the tensor's shape); ``scale`` and ``offset`` (or None) have its rank,
    and as many entries along each axis as there are blocks. ``error``: the sum of squared errors of
    what is read back; ``norm``: of squares of the numbers. Both as they count."""

    data: Any
    scale: Any
    offset: Any
    bits: int
    error: float = 0.0
    norm: float = 0.0


def quantize(
    weight: Any, options: Options, *, importance: Any = None, name: str | None = None
) -> Linear:
    """The tensor (float16, float32, bfloat16 or uint16 codes) in integers.

    ``importance`` (shape[1],): what squared errors count, per input channel. Symmetric data have offset
    0 (signed: none is stored) or 2^(bits - 1). Raises Refused, naming ``name``, for NaN, Inf, empty
    tensors, scalars, blocks that don't divide, scales beyond their dtype.
    """
    import numpy as np

    _check(tuple(weight.shape), options, name)
    weights = _weights(tuple(weight.shape), options, importance, name)
    rows, scales_shape, back = _rows(typed(weight, bf16=options.bf16, name=name), options)
    scale, offset = np.empty(len(rows)), np.empty(len(rows))
    if options.granularity == "tensor":
        # a range is searched on the histogram
        code = coded(weight, bf16=options.bf16, weights=weights, name=name)
        counts, parts = code.counts[None], _COARSE if weights is None else (*_COARSE, *_LOW)
        scale[:], offset[:] = _fit(code.values[None], counts, parts, options, name)
    else:
        step = max(1, _NUMBERS // rows.shape[1])
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            wide = rows[part].astype(np.float32)  # ranks the tries; what is stored is in float64
            if not np.isfinite(wide).all():
                raise Refused(None, "holds NaN or Inf; nothing was compressed", tensor=name)
            counts = _counts(weights, at * rows.shape[1], wide)
            parts = _COARSE if counts is None else (*_COARSE, *_LOW)
            scale[part], offset[part] = _fit(wide, counts, parts, options, name)
    shift = 0 if options.signed else 1 << (options.bits - 1)
    kind, store = np.dtype(options.scale), np.int8 if options.signed else np.uint8
    (low, high), data, error, norm = limits(options), np.empty(rows.shape, store), 0.0, 0.0
    step, top = max(1, _NUMBERS // rows.shape[1]), float(np.finfo(kind).max)
    for at in range(0, len(rows), step):
        for inner in range(0, rows.shape[1], _NUMBERS):
            part = slice(at, at + step)
            cell = (part, slice(inner, inner + _NUMBERS))
            wide, s, z = rows[cell].astype(np.float64), scale[part, None], offset[part, None]
            most = np.floor(top / s)  # steps that the dtype still holds
            steps = np.clip(
                np.rint(wide / s), np.maximum(low - z, -most), np.minimum(high - z, most)
            )
            codes = steps + z
            data[cell] = codes + shift
            gap = wide - ((codes - z).astype(kind) * s.astype(kind)).astype(np.float64)
            counts = _counts(weights, at * rows.shape[1] + inner, wide)
            error += _square(gap, counts)
            norm += _square(wide, counts)
    offsets = None
    if not (options.signed and options.symmetric):
        offsets = (offset + shift).astype(store).reshape(scales_shape)
    return Linear(
        np.ascontiguousarray(back(data)),
        scale.astype(kind).reshape(scales_shape),
        offsets,
        options.bits,
        error,
        norm,
    )


def _weights(
    shape: tuple[int, ...], options: Options, importance: Any, name: str | None
) -> Weights | None:
    """What squared errors count, for the tensor in the order of `_rows`."""
    along = per_axis(shape, importance, name)
    axis = options.axis if options.granularity == "channel" else 0
    return None if along is None else Weights.of_axes(along, axis)


def _counts(weights: Weights | None, at: int, cell: Any) -> Any:
    """The same of so many numbers from ``at`` on, in the shape and dtype of ``cell``."""
    if weights is None:
        return None
    return weights.of(slice(at, at + cell.size)).astype(cell.dtype).reshape(cell.shape)


def _square(values: Any, counts: Any) -> float:
    """The sum of squares, as they count."""
    squares = values * values
    return float((squares if counts is None else squares * counts).sum())


def limits(options: Options) -> tuple[int, int]:
    """The least and largest code, before unsigned ones are shifted.

    Symmetric codes that cover the range leave out the least one, so that both ends are hit.
    """
    half = 1 << (options.bits - 1)
    return (1 - half if options.symmetric and not options.search else -half), half - 1


def _rows(stored: Any, options: Options) -> tuple[Any, tuple[int, ...], Any]:
    """(numbers that share a scale as rows (groups, n), the scales' shape, the way back)."""
    import numpy as np

    shape, ones = stored.shape, (1,) * stored.ndim
    if options.granularity == "tensor":
        return stored.reshape(1, -1), ones, lambda data: data.reshape(shape)
    if options.granularity == "channel":
        moved = np.moveaxis(stored, options.axis, 0)
        scales = tuple(len(moved) if axis == options.axis else 1 for axis in range(stored.ndim))
        return (
            moved.reshape(len(moved), -1),
            scales,
            lambda data: np.moveaxis(data.reshape(moved.shape), 0, options.axis),
        )
    blocks = shape[1] // options.block
    return (
        stored.reshape(shape[0] * blocks, -1),
        (shape[0], blocks, *ones[2:]),
        lambda data: data.reshape(shape),
    )


def _fit(
    rows: Any, counts: Any, parts: tuple[float, ...], options: Options, name: str | None
) -> tuple[Any, Any]:
    """Scale (as it is stored) and offset of each row (groups, n), float64.

    ``parts`` of the range are tried, then some around the best of them.
    """
    import numpy as np

    low, high = limits(options)
    bottom, top = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    if options.symmetric:
        top = np.maximum(-bottom, top)
        bottom = -top
    span = float(high - low) if not options.symmetric else 2.0 * high

    def start(part: Any) -> tuple[Any, Any]:
        scale = _stored((top - bottom) * part / span, options, name)
        zero = np.zeros(len(rows))
        if not options.symmetric:
            zero = np.clip(np.rint(low - bottom * part / scale), low, high)
        return scale, zero

    best = start(np.ones(len(rows)))
    if not options.search:
        return best
    least = _error(rows, counts, *best, low, high)[0]
    part = np.ones(len(rows))
    for factors in (parts, _FINE):
        centre = part.copy()
        for factor in factors:
            scale, zero = start(centre * factor)
            for fits in range(_FITS + 1):
                error, fitted = _error(rows, counts, scale, zero, low, high)
                better = error < least
                least = np.where(better, error, least)
                best = tuple(
                    np.where(better, a, b) for a, b in zip((scale, zero), best, strict=True)
                )
                part = np.where(better, centre * factor, part)
                if fits < _FITS:
                    scale = _stored(np.where(fitted > 0, fitted, scale), options, name)
    return best


def _error(rows: Any, counts: Any, scale: Any, zero: Any, low: int, high: int) -> tuple[Any, Any]:
    """(squared error of each row, the scale that fits its codes best, or 0)."""
    import numpy as np

    each, zero = scale.astype(rows.dtype)[:, None], zero.astype(rows.dtype)[:, None]
    steps = np.rint(rows / np.where(each > 0, each, 1))
    np.clip(steps, low - zero, high - zero, out=steps)
    weighted = steps if counts is None else steps * counts
    top, bottom = np.einsum("ij,ij->i", weighted, rows), np.einsum("ij,ij->i", weighted, steps)
    gap = rows - steps * each
    error = np.einsum("ij,ij->i", gap, gap if counts is None else gap * counts)
    return error, np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def _stored(scale: Any, options: Options, name: str | None) -> Any:
    """Scales as they are stored: the least there is where that would be 0, 1 where it is 0.

    Raises Refused beyond the dtype.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        stored = scale.astype(options.scale).astype(np.float64)
    if not np.isfinite(stored).all():
        raise Refused(
            None, f"needs a scale of {scale.max():.4g}, beyond {options.scale}", tensor=name
        )
    least = float(np.finfo(options.scale).smallest_subnormal)
    return np.where(stored > 0, stored, np.where(scale > 0, least, 1.0))


def _check(shape: tuple[int, ...], options: Options, name: str | None) -> None:
    if options.bits not in (4, 8):
        raise Refused(None, f"{options.bits} bits: Core ML's integers have 4 or 8", tensor=name)
    if options.granularity not in GRANULARITIES or options.scale not in SCALES:
        given = f"{options.granularity} with scales of {options.scale}"
        known = f"{', '.join(GRANULARITIES)}, scales of {', '.join(SCALES)}"
        raise Refused(None, f"{given}: expected {known}", tensor=name)
    if not shape or 0 in shape:
        raise Refused(None, f"of shape {list(shape)} has nothing to compress", tensor=name)
    if options.granularity == "channel" and not 0 <= options.axis < len(shape):
        raise Refused(None, f"of shape {list(shape)} has no axis {options.axis}", tensor=name)
    if options.granularity == "block" and (
        len(shape) < 2 or options.block < 1 or shape[1] % options.block
    ):
        raise Refused(
            None,
            f"of shape {list(shape)}: blocks of {options.block} don't divide axis 1",
            tensor=name,
        )


def expand(linear: Linear) -> Any:
    """The tensor that is read back, in the scales' dtype, as coremltools' ``decompress`` gives it."""
    import numpy as np

    scale, offset = linear.scale, linear.offset
    for axis, (length, blocks) in enumerate(zip(linear.data.shape, scale.shape, strict=True)):
        if blocks not in (1, length):
            scale = np.repeat(scale, length // blocks, axis)
            offset = None if offset is None else np.repeat(offset, length // blocks, axis)
    data = linear.data.astype(scale.dtype)
    return scale * (data if offset is None else data - offset.astype(scale.dtype))


def ios18(linear: Linear) -> dict[str, tuple[str, Any]]:
    """What ``constexpr_blockwise_shift_scale`` takes: argument -> (MIL dtype, values, unpacked)."""
    kind = f"{'INT' if str(linear.data.dtype) == 'int8' else 'UINT'}{linear.bits}"
    found = {"data": (kind, linear.data), "scale": (SCALES[str(linear.scale.dtype)], linear.scale)}
    if linear.offset is not None:
        found["offset"] = (kind, linear.offset)
    return found


def ios16(linear: Linear, name: str | None = None) -> dict[str, tuple[str, Any]]:
    """What ``constexpr_affine_dequantize`` takes. Raises Refused for 4 bits and for blocks."""
    import numpy as np

    axes = [axis for axis, count in enumerate(linear.scale.shape) if count > 1]
    axis = axes[0] if axes else 0
    if linear.bits != 8:
        raise Refused(None, f"has {linear.bits} bits, which need iOS18", tensor=name)
    if len(axes) > 1 or (axes and linear.scale.shape[axis] != linear.data.shape[axis]):
        raise Refused(None, "has blocks, which need iOS18", tensor=name)
    shape = (-1,) if axes else ()
    offset = np.zeros_like(linear.data, shape=linear.scale.shape)
    if linear.offset is not None:
        offset = linear.offset
    kind = "INT8" if str(linear.data.dtype) == "int8" else "UINT8"
    return {
        "quantized_data": (kind, linear.data),
        "scale": (SCALES[str(linear.scale.dtype)], linear.scale.reshape(shape)),
        "zero_point": (kind, offset.reshape(shape)),
        "axis": ("INT32", np.int32(axis)),
    }
