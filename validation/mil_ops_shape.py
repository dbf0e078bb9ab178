"""Operations that rearrange values: shapes, slices, joins, sorts."""

from __future__ import annotations

from typing import Any

import numpy as np

from loraduct.validation.mil_numbers import limited
from loraduct.validation.mil_operation import Op, axes_of, axis_of, ints, times

_PAD_MODES: dict[str, Any] = {"reflect": "reflect", "replicate": "edge"}


def reshape(x: Any, shape: Any) -> Any:
    """``shape``: 0 takes x's size (aligned at the right, else 1), one -1 takes what is left."""
    wanted = list(ints(shape))
    for i, size in enumerate(wanted):
        if size == 0:
            at = i - len(wanted) + x.ndim
            wanted[i] = x.shape[at] if at >= 0 else 1
    if min(wanted, default=0) < -1 or wanted.count(-1) > 1:
        raise ValueError(f"a shape {wanted}")
    return x.reshape(wanted)


def reshape_like(x: Any, ref_tensors: Any, begins: Any, ends: Any, end_masks: Any) -> Any:
    """The sizes ``begins[i]`` to ``ends[i]`` of every reference, one after the other."""
    wanted: list[int] = []
    for ref, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        wanted += ref.shape[int(begin) : None if masked else int(end)]
    return x.reshape(wanted)


def expand_dims(x: Any, axes: Any) -> Any:
    """New axes of size 1 at the places ``axes`` of the result."""
    return np.expand_dims(x, ints(axes))


def squeeze(x: Any, axes: Any = None) -> Any:
    """Without the axes of size 1, or those named."""
    return np.squeeze(x, None if axes is None else axes_of(axes, x.ndim))


def transpose(x: Any, perm: Any) -> Any:
    """Axes in the order ``perm``."""
    return x.transpose(ints(perm))


def tile(x: Any, reps: Any) -> Any:
    """Repeated ``reps[i]`` times along each axis."""
    counts = ints(reps)
    if len(counts) != x.ndim or min(counts, default=1) < 1:
        raise ValueError(f"reps {list(counts)} for a value with {x.ndim} axes")
    limited([n * r for n, r in zip(x.shape, counts, strict=True)])
    # one broadcast copy: (1, r0, n0', ...) beside numpy's tile, which copies once an axis
    wide = x.reshape([s for n in x.shape for s in (1, n)])
    paired = [s for n, r in zip(x.shape, counts, strict=True) for s in (r, n)]
    return np.broadcast_to(wide, paired).reshape(
        [n * r for n, r in zip(x.shape, counts, strict=True)]
    )


def concat(values: Any, axis: Any, interleave: Any = False) -> Any:
    """Side by side along ``axis``, or in turns."""
    if np.ndim(values[0]) == 0:
        return np.stack(values)
    at = axis_of(axis, values[0].ndim)
    limited([sum(v.size for v in values)])
    if not interleave:
        return np.concatenate(values, at)
    shape = list(values[0].shape)
    shape[at] *= len(values)
    return np.stack(values, at + 1).reshape(shape)


def stack(values: Any, axis: Any) -> Any:
    """Side by side along a new axis."""
    limited([sum(np.size(v) for v in values)])
    return np.stack(values, int(axis))


def split(x: Any, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> Any:
    """Into equal parts, or parts of ``split_sizes``."""
    at = axis_of(axis, x.ndim)
    if split_sizes is None:
        return tuple(np.split(x, int(num_splits), at))
    sizes = ints(split_sizes)
    if sum(sizes) != x.shape[at] or min(sizes) < 0:
        raise ValueError(f"parts of {list(sizes)} of an axis of {x.shape[at]}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], at))


def _slices(
    x: Any, begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[Any, ...]:
    """numpy's index for a slice in MIL's words."""
    rank = x.ndim
    begins, ends = list(ints(begin)), list(ints(end))
    strides = [1] * rank if stride is None else list(ints(stride))
    masks: list[Any] = [
        np.zeros(rank, bool) if m is None else np.asarray(m, bool).reshape(-1)
        for m in (begin_mask, end_mask, squeeze_mask)
    ]
    if {len(begins), len(ends), len(strides), *(m.size for m in masks)} != {rank}:
        raise ValueError(f"a slice with other than {rank} axes")
    found: list[Any] = []
    for i in range(rank):
        first = None if masks[0][i] else begins[i]
        if masks[2][i]:
            at = (0 if strides[i] > 0 else -1) if first is None else first
            if not -x.shape[i] <= at < x.shape[i]:
                raise IndexError(f"index {at} of an axis of {x.shape[i]}")
            found.append(at)
        else:
            found.append(slice(first, None if masks[1][i] else ends[i], strides[i]))
    return tuple(found)


def slice_by_index(
    x: Any,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Any:
    """``x[begin:end:stride]`` along every axis; masks leave out a bound, or take one index."""
    return x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_by_size(x: Any, begin: Any, size: Any) -> Any:
    """``size`` values from ``begin`` on along every axis; -1: all that are left."""
    found = []
    for first, count, whole in zip(ints(begin), ints(size), x.shape, strict=True):
        first += whole if first < 0 else 0
        last = whole if count == -1 else first + count
        if not 0 <= first <= last <= whole:
            raise IndexError(f"values {first} to {last} of an axis of {whole}")
        found.append(slice(first, last))
    return x[tuple(found)]


def slice_update(
    x: Any,
    update: Any,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Any:
    """``x`` with ``update`` in place of a slice."""
    index = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return _overwritten(x.copy(), index, update)


def slice_of(arguments: dict[str, Any]) -> Any:
    """The part of ``x`` that a slice_update with these arguments replaces, a view."""
    masks = (arguments.get(m) for m in ("stride", "begin_mask", "end_mask", "squeeze_mask"))
    return arguments["x"][_slices(arguments["x"], arguments["begin"], arguments["end"], *masks)]


def overwrite(arguments: dict[str, Any]) -> Any:
    """slice_update without a copy, for an ``x`` that nothing else needs."""
    part = slice_of(arguments)
    _overwritten(part, ..., arguments["update"])
    return arguments["x"]


def _overwritten(out: Any, index: Any, update: Any) -> Any:
    if out[index].shape != np.shape(update):
        raise ValueError(
            f"an update of shape {list(np.shape(update))} for a slice of {list(out[index].shape)}"
        )
    out[index] = update
    return out


def fill(shape: Any, value: Any = 0.0) -> Any:
    """``value`` in every place."""
    return np.full(limited(ints(shape)), value)


def fill_like(ref_tensor: Any, value: Any = 0.0) -> Any:
    """``value`` in every place of a value shaped like ``ref_tensor``."""
    return np.full(ref_tensor.shape, value)


def range_1d(start: Any, end: Any, step: Any) -> Any:
    """``start``, ``start + step``, ... below ``end``."""
    if not step:
        raise ValueError("a step of 0")
    count = max(0, int(np.ceil((np.float64(end) - np.float64(start)) / np.float64(step))))
    limited([count])
    return (start + step * np.arange(count, dtype=np.asarray(start).dtype)).astype(
        np.asarray(start).dtype
    )


def band_part(x: Any, lower: Any = -1, upper: Any = -1) -> Any:
    """The last two axes' diagonals from -lower to upper, zeros elsewhere; negative: all."""
    below = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])[None, :]
    keep = np.ones(below.shape, bool)
    if int(lower) >= 0:
        keep &= below <= int(lower)
    if int(upper) >= 0:
        keep &= -below <= int(upper)
    return np.where(keep, x, np.zeros((), x.dtype))


def one_hot(
    indices: Any,
    one_hot_vector_size: Any,
    axis: Any = -1,
    on_value: Any = 1,
    off_value: Any = 0,
) -> Any:
    """A new axis with ``on_value`` at the index, ``off_value`` elsewhere."""
    size = int(one_hot_vector_size)
    limited([*indices.shape, size])
    at = axis_of(axis, indices.ndim + 1)
    places = np.arange(size).reshape([-1 if i == at else 1 for i in range(indices.ndim + 1)])
    return np.where(np.expand_dims(indices, at) == places, on_value, off_value)


def pad(x: Any, pad: Any, mode: str = "constant", constant_val: Any = 0.0) -> Any:
    """``pad``: how many values before and after, for each of the last axes."""
    counts = np.asarray(ints(pad)).reshape(-1, 2)
    widths = [(0, 0)] * (x.ndim - len(counts)) + [(int(a), int(b)) for a, b in counts]
    limited([n + a + b for n, (a, b) in zip(x.shape, widths, strict=True)])
    if mode == "constant":
        return np.pad(x, widths, constant_values=np.asarray(constant_val).item())
    return np.pad(x, widths, _PAD_MODES[mode])


def _order(x: Any, axis: int, ascending: bool) -> Any:
    """Indices that sort, equal values in the order in which they stand."""
    if ascending:
        return np.argsort(x, axis=axis, kind="stable")
    turned = np.argsort(np.flip(x, axis), axis=axis, kind="stable")
    return np.flip(x.shape[axis] - 1 - turned, axis)


def argsort(x: Any, axis: Any = -1, ascending: Any = False) -> Any:
    """The indices that sort along ``axis``."""
    return _order(x, axis_of(axis, x.ndim), bool(ascending))


def topk(
    x: Any,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> Any:
    """The ``k`` largest (or smallest) values along ``axis`` and their indices; -1: all."""
    at = axis_of(axis, x.ndim)
    count = x.shape[at] if int(k) == -1 else int(k)
    if not 0 < count <= x.shape[at]:
        raise ValueError(f"k {count} of an axis of {x.shape[at]}")
    indices = np.take(_order(x, at, bool(ascending)), np.arange(count), axis=at)
    values = np.take_along_axis(x, indices, at)
    return (values, indices) if return_indices else values


def reverse(x: Any, axes: Any = None) -> Any:
    """Backwards along ``axes``."""
    return np.flip(x, axes_of(axes, x.ndim))


def flatten2d(x: Any, axis: Any = 1) -> Any:
    """The axes before ``axis`` as one, and those from it on as one."""
    at = int(axis)
    return x.reshape(times(x.shape[:at]), times(x.shape[at:]))


def non_zero(x: Any) -> Any:
    """Indices of the values that are not 0, one a row."""
    return np.argwhere(x)


def sliding_windows(x: Any, axis: Any, size: Any, stride: Any = 1) -> Any:
    """Windows of ``size`` values along ``axis``, which becomes (windows, size)."""
    at = axis_of(axis, x.ndim)
    views = np.lib.stride_tricks.sliding_window_view(x, int(size), at)
    every = views[(slice(None),) * at + (slice(None, None, int(stride)),)]
    return np.moveaxis(every, -1, at + 1)


OPS: dict[str, Op] = {
    **{
        f.__name__: Op(f, moves=True)
        for f in (
            reshape, reshape_like, expand_dims, squeeze, transpose, tile, split, slice_by_index,
            slice_by_size, band_part, pad, reverse, flatten2d, sliding_windows,
        )
    },
    "concat": Op(concat, "values", True),
    "stack": Op(stack, "values", True),
    "slice_update": Op(slice_update, "x", True, ("x", "update")),
    "shape": Op(lambda x: np.array(x.shape, np.int32), "INT32", True),
    "fill": Op(fill, "value", True),
    "fill_like": Op(fill_like, "value", True),
    "range_1d": Op(range_1d, "start", False, ("start", "end", "step")),
    "one_hot": Op(one_hot, "on_value", True, ("on_value", "off_value"), default="INT32"),
    "argsort": Op(argsort, "INT32", True),
    "topk": Op(topk, ("x", "output_indices_dtype"), True, default="INT32"),
    "non_zero": Op(non_zero, "INT32", True),
}  # fmt: skip
