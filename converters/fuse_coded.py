"""Fusing into matrices in few bits (tables, or integers with scales): new codes, or new tables too.

The remedies are those of `converters.fuse_packed`; here

* ``none`` keeps tables and scales: each value of the sum gets the code that is nearest;
* ``rescale`` makes new tables (or scales) of the same width for the sum, where they lessen its error;
* ``compensate`` keeps tables and moves single codes along the inputs that the adapter reads;
* ``bits`` makes new tables of 8 bits for the layers whose update is largest for its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from loraduct.converters import compress_code, palette, palettize, quantize
from loraduct.converters.compress_code import Found, Way
from loraduct.converters.fuse_packed import KEEP, MOVES, directions
from loraduct.converters.fuse_places import Update
from loraduct.converters.fuse_stream import ROWS, Rows, blocks
from loraduct.errors import Refused
from loraduct.formats.coded import Code

_MOST = 65504.0  # the largest float16


def read_blocks(code: Code) -> Iterator[tuple[int, Any]]:
    """(first row, float32 rows) of what a code stands for."""
    import numpy as np

    step = max(1, ROWS // code.codes.shape[1])
    for start in range(0, len(code.codes), step):
        yield (
            start,
            part(code, start, min(start + step, len(code.codes))).values().astype(np.float32),
        )


def part(code: Code, start: int, stop: int) -> Code:
    """Of some rows; each of them a block of its own where there are several along the rows."""
    import numpy as np

    numbers = code.numbers
    if len(numbers) > 1:
        numbers = numbers[np.arange(start, stop) // (len(code.codes) // len(numbers))]
    return replace(code, codes=code.codes[start:stop], numbers=numbers)


def summed(code: Code, updates: Sequence[Update], rows: Rows | None, name: str) -> Iterator[Any]:
    """float32 rows of the matrix with the updates in it, in order. Raises Refused for NaN, and what
    is beyond float16."""
    import numpy as np

    for block in blocks(partial(read_blocks, code), updates, rows):
        if not (np.abs(block) <= _MOST).all():
            what = "becomes NaN or does not fit FLOAT16 with the adapter in it"
            raise Refused(None, what, tensor=name)
        yield block


def moved(
    code: Code, updates: Sequence[Update], rows: Rows | None, name: str, *, compensate: bool
) -> Code:
    """``code`` with the updates in it: other codes, the same tables."""
    import numpy as np

    along = directions(updates) if compensate else None
    codes, at = np.empty_like(code.codes), 0
    for block in summed(code, updates, rows, name):
        stop = at + len(block)
        codes[at:stop] = nearest(part(code, at, stop), block, along)
        at = stop
    return replace(code, codes=codes)


def way_of(code: Code, blocks: Sequence[int | None], *, scaled: bool) -> Way:
    """How a matrix was made that has tables, or scales, in ``blocks`` (of rows, of columns).

    ``scaled``: rows have scales behind their tables. Of blocks along both axes there is none that
    makes them again; those of columns are told.
    """
    (high, wide), (down, across) = code.codes.shape, (n or 1 for n in blocks)
    if code.kind == "int":
        group = wide // across if across > 1 else 0
        return Way("int", code.bits, group, whole=down == across == 1)
    group = wide // across if across > 1 else high // down if down > 1 else 0
    return Way("lut", code.bits, group, scaled, axis=int(across > 1))


def renewed(
    code: Code, updates: Sequence[Update], rows: Rows | None, way: Way, name: str
) -> Found | Code:
    """The matrix with the updates in it, in tables or scales of its own.

    Where ``way`` is that of ``code``: with its tables, where they leave no more error. The base's values
    lie on them, so a small update may find none that are better.
    """
    import numpy as np

    whole = np.concatenate([b.copy() for b in summed(code, updates, rows, name)])
    found: Found
    if way.kind == "int":
        found = quantize.quantize(whole, compress_code.linear(way, "float16"), name=name)
    else:
        found = palettize.palettize(whole, compress_code.tables(way, "float16"), name=name)
    if way.bits != code.bits:
        return found
    old = moved(code, updates, rows, name, compensate=False)
    own = quantize.expand(found) if isinstance(found, quantize.Linear) else palette.expand(found)
    kept, new = (
        float(np.square(values - whole).sum(dtype=np.float64)) for values in (old.values(), own)
    )
    return old if kept <= new else found


def nearest(code: Code, block: Any, along: Any = None) -> Any:
    """uint8 codes (rows, columns) of a float32 block; ``code`` gives tables and where each is used.

    ``along`` (columns, r), orthonormal: then codes are moved, see `_moved`.
    """
    import numpy as np

    tables, order = _tables(code)
    where = np.broadcast_to(code.blocks(), block.shape)
    ranks = (_by_scale if code.kind == "int" else _by_table)(code, tables, block)
    if along is not None:
        ranks = _moved(tables, where, ranks, block, along)
    return order.reshape(-1)[where * tables.shape[-1] + ranks].astype(np.uint8)


def _tables(code: Code) -> tuple[Any, Any]:
    """(row blocks, column blocks, entries): float32 ascending, and the codes they belong to."""
    import numpy as np

    numbers = code.numbers
    if code.kind == "int":
        steps = np.arange(1 << code.bits, dtype=np.float16) - np.float16(1 << (code.bits - 1))
        numbers = numbers[..., None] * steps
    order = np.argsort(numbers, axis=-1, kind="stable")
    return np.take_along_axis(numbers, order, -1).astype(np.float32), order


def _by_table(code: Code, tables: Any, block: Any) -> Any:
    """Ranks of the nearest entries; neighbouring rows of one table are looked up together."""
    import numpy as np

    middles = (tables[..., 1:] + tables[..., :-1]) / 2
    ranks = np.empty(block.shape, np.int32)
    (high, wide), (down, across) = block.shape, tables.shape[:2]
    starts = [0]
    if down > 1:
        starts = [i for i in range(high) if i == 0 or (tables[i] != tables[i - 1]).any()]
    for i, stop in zip(starts, [*starts[1:], high], strict=True):
        for j in range(across):
            columns = slice(j * (wide // across), (j + 1) * (wide // across))
            mid = middles[i if down > 1 else 0, j]
            ranks[i:stop, columns] = np.searchsorted(mid, block[i:stop, columns])
    return ranks


def _by_scale(code: Code, tables: Any, block: Any) -> Any:
    import numpy as np

    scale = code.numbers.astype(np.float32).reshape(-1)[np.broadcast_to(code.blocks(), block.shape)]
    half = 1 << (code.bits - 1)
    size = np.where(scale == 0, np.float32(1), np.abs(scale))
    ranks = np.rint(block / size) + np.where(scale < 0, half - 1, half)
    return np.clip(ranks, 0, tables.shape[-1] - 1).astype(np.int32)


def _moved(tables: Any, where: Any, ranks: Any, block: Any, along: Any) -> Any:
    """Ranks moved one entry up or down while that lessens ||E V||^2 + KEEP ||E||^2, row by row.

    E is the error (rows, columns), V the basis ``along``. The best move of each row is made at once; a
    row is done when none helps.
    """
    import numpy as np

    count, entries = tables.shape[-1], tables.reshape(-1)
    base = where * count

    def gaps(at: Any, rank: Any, now: Any) -> tuple[Any, Any]:
        """How far the entries above and below are; 0: there is none."""
        up = entries[at + np.minimum(rank + 1, count - 1)] - now
        return up, entries[at + np.maximum(rank - 1, 0)] - now

    value = entries[base + ranks]
    error = value - block
    lean = error @ along
    up, down = gaps(base, ranks, value)
    weight = np.einsum("ij,ij->i", along, along) + np.float32(KEEP)
    alive = np.arange(len(block))
    for _ in range(MOVES):
        pull = lean[alive] @ along.T
        pull += np.float32(KEEP) * error[alive]
        pull *= 2
        gains = [-(d[alive] * (pull + d[alive] * weight)) for d in (up, down)]
        best = [g.argmax(axis=1) for g in gains]
        each = np.arange(len(alive))
        tops = [g[each, b] for g, b in zip(gains, best, strict=True)]
        upward = tops[0] >= tops[1]
        good = np.where(upward, *tops) > 0
        at, upward, alive = np.where(upward, *best)[good], upward[good], alive[good]
        if not len(alive):
            break
        move = np.where(upward, up[alive, at], down[alive, at])
        ranks[alive, at] += np.where(upward, 1, -1)
        error[alive, at] += move
        lean[alive] += move[:, None] * along[at]
        now = entries[base[alive, at] + ranks[alive, at]]
        up[alive, at], down[alive, at] = gaps(base[alive, at], ranks[alive, at], now)
    return ranks
