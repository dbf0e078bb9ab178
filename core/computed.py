"""Tensors computed from others: stacked, split, joined, permuted. Lazy: one is made when written.

Experts are why: PEFT keeps all experts of a layer in two matrices, MLX in two tensors of three
axes, older models one pair a expert. Values are moved, never changed, in raw storage; a whole
tensor is held while it is written, which bounds memory by the largest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from loraduct import stream
from loraduct.errors import Refused
from loraduct.tensor import Tensor

_CHANGED = (
    "values beyond the rank recorded for it are not zero: the file was changed since it was"
    " written; convert it with its metadata key 'loraduct' removed"
)
Move = Callable[..., Any]  # ndarrays of raw storage -> one ndarray


def moved(shape: Sequence[int], inputs: Sequence[Tensor], move: Move) -> Tensor:
    """A tensor of ``shape`` that ``move`` makes from the raw values of ``inputs``, of one dtype."""
    first = inputs[0]
    for other in inputs:
        if other.dtype != first.dtype:
            raise Refused(
                first.path,
                f"has dtype {other.dtype} where {first.name}, with which it is combined, has"
                f" {first.dtype}; cast the adapter to one dtype first (--dtype)",
                tensor=other.name,
            )
    return Tensor(
        first.name,
        first.dtype,
        tuple(shape),
        make=lambda: move(*(t.raw() for t in inputs)),
        inputs=tuple(inputs),
        path=first.path,
    )


def given(
    name: str, inputs: Sequence[Tensor], shape: Sequence[int], make: Callable[[], Any]
) -> Tensor:
    """A float32 tensor that ``make`` computes; ``inputs`` are the stored tensors it is made from."""
    path = inputs[0].path if inputs else None
    return Tensor(name, "F32", tuple(shape), make=make, inputs=tuple(inputs), path=path)


def reshaped(tensor: Tensor, *shape: int, axes: Sequence[int] | None = None) -> Tensor:
    """Seen as ``shape``, then with its axes in another order."""
    new = tuple(shape[i] for i in axes) if axes else shape

    def move(values: Any) -> Any:
        if axes in _CYCLES:  # a matrix transposed: much faster than an array of three axes
            at = _CYCLES[axes]
            rows = math.prod(shape[:at])
            return stream.turned(values.reshape(rows, -1)).reshape(new)
        values = values.reshape(shape)
        return values.transpose(axes) if axes else values

    return moved(new, [tensor], move)


# order of the axes -> how many of them go behind the others
_CYCLES: dict[Sequence[int] | None, int] = {(2, 0, 1): 2, (1, 2, 0): 1}


def part(
    tensor: Tensor, axis: int, start: int, stop: int, step: int = 1, *, only: bool = False
) -> Tensor:
    """A slice along one axis. ``only``: everything else must be zero, or it is refused."""
    before = (slice(None),) * axis
    cut = (*before, slice(start, stop, step))
    size = len(range(start, stop, step))
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])

    def move(values: Any) -> Any:
        rest = (values[(*before, slice(None, start))], values[(*before, slice(stop, None))])
        if only and any(r.any() for r in rest):
            raise Refused(tensor.path, _CHANGED, tensor=tensor.name)
        return values[cut]

    return moved(shape, [tensor], move)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first axis."""

    def move(*values: Any) -> Any:
        import numpy as np

        return np.stack(values)

    return moved((len(tensors), *tensors[0].shape), tensors, move)


def joined(tensors: Sequence[Tensor], axis: int, *, interleaved: bool = False) -> Tensor:
    """Tensors behind one another along an axis, or taking turns along it."""
    size = sum(t.shape[axis] for t in tensors)
    first = tensors[0].shape
    shape = (*first[:axis], size, *first[axis + 1 :])

    def move(*values: Any) -> Any:
        import numpy as np

        return (
            np.stack(values, axis + 1).reshape(shape)
            if interleaved
            else np.concatenate(values, axis)
        )

    return moved(shape, tensors, move)


def resized(tensor: Tensor, axis: int, size: int, *, front: bool = False) -> Tensor:
    """Padded with zeros (``front``: before its values), or cropped of zeros, along one axis."""
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    if shape == tensor.shape:
        return tensor
    if len(shape) == 2 and not front and 0 not in tensor.shape:
        return tensor.resized(*shape)

    def move(values: Any) -> Any:
        import numpy as np

        kept = min(size, tensor.shape[axis])
        cut = (slice(None),) * axis
        if values[(*cut, slice(kept, None))].any():
            raise Refused(tensor.path, _CHANGED, tensor=tensor.name)
        out = np.zeros(shape, values.dtype)
        where = slice(size - kept, size) if front else slice(kept)
        out[(*cut, where)] = values[(*cut, slice(kept))]
        return out

    return moved(shape, [tensor], move)
