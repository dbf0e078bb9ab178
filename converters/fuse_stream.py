"""Fusing weight by weight, some rows at a time: float32 throughout, one rounding to what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

from loraduct.adapter import LowRank
from loraduct.converters.fuse_places import Placed, Update
from loraduct.errors import Refused
from loraduct.formats.model_folder import Stored
from loraduct.halves import narrowed, widened
from loraduct.tensor import FLOATS, Tensor, as_float32, from_float, is_finite

Read = Callable[[], Iterator[tuple[int, Any]]]  # (first row, float32 rows) of a weight, in order
Rows = tuple[Sequence[int], Tensor]  # rows and what stands there instead
ROWS = 1 << 19  # numbers of a weight held at once


def fused_tensor(name: str, base: Tensor, places: Placed, dtype: str) -> Stored:
    """What is written for the parameter ``name``, whose weight in the base is ``base``."""
    base = places.replaced.get(name, base)
    if name in places.replaced and name not in places.added:
        return Stored(dtype, base.shape, base.to(dtype).chunks)
    pieces = _pieces if name in places.updates or name in places.rows else _moved
    return Stored(dtype, base.shape, partial(pieces, name, base, places, dtype))


def _moved(name: str, base: Tensor, places: Placed, dtype: str) -> Iterator[Any]:
    import numpy as np

    total = base.read().copy()
    for change, factor in places.added[name]:
        total += np.float32(factor) * change.read().reshape(total.shape)
    yield rounded(total, dtype, name, base)


def _pieces(name: str, base: Tensor, places: Placed, dtype: str) -> Iterator[Any]:
    if base.stored_dtype not in FLOATS:
        what = f"is stored as {base.stored_dtype}: only F32, F16 and BF16 weights can be fused into"
        raise Refused(base.path, what, tensor=name)
    updates, rows = places.updates.get(name, []), places.rows.get(name)
    conv = any(u.layout == "conv" for u, _ in updates)
    for block in blocks(partial(read_blocks, base, conv=conv), updates, rows):
        yield rounded(block, dtype, name, base)


def put_rows(block: Any, start: int, rows: Rows) -> None:
    """Trained rows in the place of the block's own."""
    indices, values = rows
    for i, at in enumerate(indices):
        if start <= at < start + len(block):
            block[at - start] = as_float32(values.rows(i, i + 1), values.dtype)[0]


def rounded(block: Any, dtype: str, name: str, base: Tensor) -> Any:
    """float32 as raw storage of ``dtype``. Raises Refused beyond its range, and for NaN."""
    raw = narrowed(block) if dtype == "F16" else from_float(block, dtype)
    if not is_finite(raw, dtype):
        what = f"becomes NaN or does not fit {dtype} with the adapter in it"
        way = "give the adapter a smaller weight, or fuse into an unpacked folder with --dtype bf16 or f32"
        raise Refused(base.path, f"{what}; {way}", tensor=name)
    return raw


def blocks(read: Read, updates: Sequence[Update], rows: Rows | None = None) -> Iterator[Any]:
    """float32 (rows, columns) of the weight that ``read`` gives, with the updates in it, in order.

    A weight of more than two axes is seen as a matrix of all rows (experts), or of one row for each
    output (convolutions). Each block holds until the next.
    """
    dora = any(u.magnitude is not None for u, _ in updates)
    steps = [_step(read, u, w) for u, w in updates]
    for start, block in read():
        before = block.copy() if dora else block
        for step in steps:
            delta, factor = step(start, before)
            block += delta
            if factor is not None:
                block *= factor
        if rows is not None:
            put_rows(block, start, rows)
        yield block


def _step(read: Read, u: LowRank, weight: float) -> Callable[[int, Any], tuple[Any, Any]]:
    """(first row, rows of the base) -> what is added to them, and by what the sum is multiplied."""
    if u.magnitude is not None:
        return lengthened(read, u)
    delta = rows_of(u, weight)
    return lambda start, block: (delta(start, len(block)), None)


def read_blocks(base: Tensor, *, conv: bool = False) -> Iterator[tuple[int, Any]]:
    """(first row, float32 rows) of a stored weight; the buffer is used again.

    Rows are those of the last axis; of a convolution (``conv``) all that makes one output.
    """
    import numpy as np

    width = prod(base.shape[1:]) if conv or len(base.shape) < 2 else base.shape[-1]
    height = prod(base.shape) // width
    step = max(1, ROWS // width)
    held = np.empty((min(step, height), width), np.float32)
    matrix = len(base.shape) == 2
    for start in range(0, height, step):
        stop = min(start + step, height)
        span = (start, stop) if matrix else (start * width, stop * width)
        raw = base.rows(*span).reshape(stop - start, width)
        block = held[: stop - start]
        if base.dtype == "F16":
            widened(raw, block)
        elif base.dtype == "BF16":
            np.left_shift(raw, np.uint32(16), out=block.view(np.uint32), dtype=np.uint32)
        else:
            block[:] = raw
        yield start, block


def rows_of(u: LowRank, weight: float = 1.0) -> Callable[[int, int], Any]:
    """(first row, count) -> those rows of dW = weight * scale * b @ a, float32, as `blocks` has them."""
    import numpy as np

    scale = np.float32(u.scale * weight)
    a, b = u.a.read(), scale * u.b.read()
    if u.layout == "experts":
        return partial(_rows_of_experts, a, b)
    if u.layout == "conv":
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    left, right = (a.T, b.T) if u.layout == "embedding" else (b, a)
    return lambda start, count: left[start : start + count] @ right


def _rows_of_experts(a: Any, b: Any, start: int, count: int) -> Any:
    import numpy as np

    height, stop = b.shape[1], start + count
    parts = []
    for e in range(start // height, -(-stop // height)):
        first, last = max(start - e * height, 0), min(stop - e * height, height)
        parts.append(b[e, first:last] @ a[e])
    return np.concatenate(parts)


def lengthened(read: Read, u: LowRank) -> Callable[[int, Any], tuple[Any, Any]]:
    """DoRA: (first row, rows of the base W) -> those rows of dW, and of m / ||W + dW||.

    Lengths are of rows; of an embedding, and of weights stored (in, out), of columns: that takes a
    pass over the weight before the first row is known.
    """
    import numpy as np

    assert u.magnitude is not None
    magnitude, delta = u.magnitude.read().reshape(-1), rows_of(u)
    if u.layout == "embedding":
        squares = np.zeros(len(magnitude))
        for start, block in read():
            moved = block + delta(start, len(block))
            squares += np.einsum("ij,ij->j", moved, moved, dtype=np.float64)
        factor = (magnitude / np.sqrt(squares)).astype(np.float32)
        return lambda start, block: (delta(start, len(block)), factor)

    def rows(start: int, block: Any) -> tuple[Any, Any]:
        change = delta(start, len(block))
        moved = block + change
        length = np.sqrt(np.einsum("ij,ij->i", moved, moved, dtype=np.float64))
        return change, (magnitude[start : start + len(block)] / length).astype(np.float32)[:, None]

    return rows
