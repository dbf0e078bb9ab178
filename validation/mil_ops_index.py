"""Gathering and scattering.

From CoreML7 (iOS17) on a negative index is out of bounds; before, it counts from the end. What an
index out of bounds yields is undefined unless ``validate_indices`` asks for an error: both are
refused here, because no two runtimes need agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from loraduct.validation.mil_numbers import Numbers, limited
from loraduct.validation.mil_operation import Op, axis_of

_NEGATIVE_UNTIL = 6  # the last opset in which a negative index is one
_MODES: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "max": np.maximum, "min": np.minimum,
}  # fmt: skip


def _within(indices: Any, size: Any, numbers: Numbers) -> Any:
    """Indices from 0 to ``size`` - 1. Raises IndexError."""
    indices = np.asarray(indices).astype(np.int64)
    size = np.asarray(size)
    if numbers.opset <= _NEGATIVE_UNTIL:
        indices = np.where(indices < 0, indices + size, indices)
    wrong = (indices < 0) | (indices >= size)
    if wrong.any():
        sizes = np.broadcast_to(size, indices.shape)[wrong]
        raise IndexError(f"index {indices[wrong][0]} is out of bounds (0 to {sizes[0] - 1})")
    return indices


def gather(
    x: Any,
    indices: Any,
    axis: Any = 0,
    batch_dims: Any = 0,
    validate_indices: Any = False,
    *,
    numbers: Numbers,
) -> Any:
    """x (D), indices (N): D[:axis] + N[batch_dims:] + D[axis + 1:]."""
    at, batch = axis_of(axis, x.ndim), int(batch_dims)
    found = _within(indices, x.shape[at], numbers)
    limited([*x.shape[:at], *found.shape[batch:], *x.shape[at + 1 :]])
    if not batch:
        return np.take(x, found, axis=at)
    if x.shape[:batch] != found.shape[:batch] or batch > at:
        raise ValueError(f"{batch} batch axes of {list(x.shape)} and {list(found.shape)}")
    rows = x.reshape(-1, *x.shape[batch:])
    places = found.reshape(rows.shape[0], *found.shape[batch:])
    taken = [np.take(r, p, axis=at - batch) for r, p in zip(rows, places, strict=True)]
    return np.stack(taken).reshape(*x.shape[:batch], *taken[0].shape)


def gather_along_axis(
    x: Any, indices: Any, axis: Any = 0, validate_indices: Any = False, *, numbers: Numbers
) -> Any:
    """Shaped like ``indices``, which replace the place along ``axis`` alone."""
    at = axis_of(axis, x.ndim)
    return np.take_along_axis(x, _within(indices, x.shape[at], numbers), at)


def _places(indices: Any, shape: tuple[int, ...], batch: int, numbers: Numbers) -> tuple[Any, ...]:
    """numpy's index for places whose coordinates lie along the last axis of ``indices``."""
    depth = indices.shape[-1]
    if batch + depth > len(shape):
        raise ValueError(f"{depth} coordinates in a value with {len(shape)} axes")
    found = _within(indices, np.asarray(shape[batch : batch + depth]), numbers)
    own = [
        np.arange(shape[i]).reshape([-1 if j == i else 1 for j in range(found.ndim - 1)])
        for i in range(batch)
    ]
    return (*own, *(found[..., i] for i in range(depth)))


def gather_nd(
    x: Any, indices: Any, batch_dims: Any = 0, validate_indices: Any = False, *, numbers: Numbers
) -> Any:
    """The slices of ``x`` at coordinates along the last axis of ``indices``."""
    batch = int(batch_dims)
    limited([*indices.shape[:-1], *x.shape[batch + indices.shape[-1] :]])
    return x[_places(indices, x.shape, batch, numbers)]


def _put(data: Any, index: tuple[Any, ...], updates: Any, mode: str) -> Any:
    """A copy of ``data`` with ``updates`` at ``index``, one after the other."""
    out = data.astype(np.float32) if data.dtype == np.float16 else data.copy()
    if out[index].shape != np.shape(updates):
        raise ValueError(
            f"updates of shape {list(np.shape(updates))}, expected {list(out[index].shape)}"
        )
    if mode == "update":
        out[index] = updates
    else:
        _MODES[mode].at(out, index, updates)  # type: ignore[attr-defined]
    return out


def scatter(
    data: Any,
    indices: Any,
    updates: Any,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: Any = False,
    *,
    numbers: Numbers,
) -> Any:
    """``updates`` put at, or combined with, the places ``indices`` (a vector) along ``axis``."""
    at = axis_of(axis, data.ndim)
    found = _within(indices, data.shape[at], numbers)
    return _put(data, (*(slice(None),) * at, found), updates, mode)


def scatter_along_axis(
    data: Any,
    indices: Any,
    updates: Any,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: Any = False,
    *,
    numbers: Numbers,
) -> Any:
    """The way back from gather_along_axis."""
    at = axis_of(axis, data.ndim)
    grid = list(np.ix_(*(np.arange(n) for n in indices.shape)))
    grid[at] = _within(indices, data.shape[at], numbers)
    return _put(data, tuple(np.broadcast_arrays(*grid)), updates, mode)


def scatter_nd(
    data: Any,
    indices: Any,
    updates: Any,
    mode: str = "add",
    validate_indices: Any = False,
    *,
    numbers: Numbers,
) -> Any:
    """The way back from gather_nd."""
    return _put(data, _places(indices, data.shape, 0, numbers), updates, mode)


OPS: dict[str, Op] = {
    "gather": Op(gather, moves=True),
    "gather_along_axis": Op(gather_along_axis, moves=True),
    "gather_nd": Op(gather_nd, moves=True),
    "scatter": Op(scatter, "data", same=("data", "updates")),
    "scatter_along_axis": Op(scatter_along_axis, "data", same=("data", "updates")),
    "scatter_nd": Op(scatter_nd, "data", same=("data", "updates")),
}
