"""The hot loop of conversion: a matrix from a file, transposed, in pieces that stay in the cache.

Measured on a rank-256 adapter of a 3B model (778 MB): reading rows into memory with 64 bytes
between them keeps power-of-two row lengths from sharing cache sets, and turns 0.8 s of transposing
into 0.2 s; pieces of 256 kB are written from the cache; and buffers are placed half a page off the
file position, because copies between user and kernel crawl when the two addresses are 1 to 31 bytes
apart modulo a page (fast string moves take the slow path).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraduct.files import Source

WHOLE = 8 << 20  # a matrix up to this size is read at once
NARROW = 4096  # bytes of a row below which reading it on its own costs more than copying it
PIECE = 256 << 10  # bytes handed out at once
_GAP = 64  # bytes between rows in memory: one cache line
_STRIP = 64  # rows of the source copied at a time
_PAGE = 4096
_buffers: dict[str, Any] = {}


def _buffer(name: str, size: int, at: int) -> Any:
    """``size`` bytes that are used again next time, half a page off the file position ``at``."""
    import numpy as np

    held = _buffers.get(name)
    if held is None or held.nbytes < size + _PAGE:
        held = _buffers[name] = np.empty(size + _PAGE, np.uint8)
    address = held.__array_interface__["data"][0]
    shift = (at + _PAGE // 2 - address) % _PAGE
    shift -= (address + shift) % 8  # elements stay aligned
    return held[max(shift, 0) : max(shift, 0) + size]


def matrix(
    source: Source,
    offset: int,
    kind: str,
    name: str,
    shape: tuple[int, ...],
    transposed: bool,
    at: int,
) -> Iterator[Any]:
    """The matrix stored at ``offset``, or its transpose, as consecutive pieces of the result.

    ``kind`` is numpy's name of the stored type, ``at`` the position of the result in its file.
    Each piece is a view into a buffer that the next one overwrites.
    """
    import numpy as np

    rows, cols = shape
    width = np.dtype(kind).itemsize
    if not transposed:
        total = rows * cols * width
        for start in range(0, total, PIECE):
            size = min(PIECE, total - start)
            piece = _buffer("out", PIECE, at + start)[:size]
            source.read_into(offset + start, piece, name)
            yield piece.view(kind)
        return
    stride = cols * width + (_GAP if cols * width >= _GAP else 0)
    spread = _buffer("in", rows * stride, offset).reshape(rows, stride)[:, : cols * width]
    if cols * width < NARROW:
        flat = _buffer("flat", rows * cols * width, offset)
        source.read_into(offset, flat, name)
        np.copyto(spread, flat.reshape(rows, -1))
    else:
        source.read_rows(offset, spread, name)
    values = spread.view(kind)
    step = max(1, PIECE // (rows * width))
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        size = (stop - start) * rows * width
        out = _buffer("out", size, at + start * rows * width)
        piece = out.view(kind).reshape(stop - start, rows)
        for first in range(0, rows, _STRIP):
            strip = slice(first, first + _STRIP)
            np.copyto(piece[:, strip], values[strip, start:stop].T)
        yield piece


def turned(matrix: Any) -> Any:
    """The transpose of a matrix in memory, contiguous: strips of a copy with gaps between rows."""
    import numpy as np

    rows, cols = matrix.shape
    spread = np.empty((rows, cols + _GAP // matrix.itemsize), matrix.dtype)[:, :cols]
    np.copyto(spread, matrix)
    out = np.empty((cols, rows), matrix.dtype)
    for first in range(0, rows, 2 * _STRIP):
        strip = slice(first, first + 2 * _STRIP)
        np.copyto(out[:, strip], spread[strip].T)
    return out
