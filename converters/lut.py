"""Tables of scalar entries for one tensor: clustered, rounded, and every number given its nearest entry."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from loraduct.converters import kmeans
from loraduct.converters.coded import Coded, Weights, chunks, coded
from loraduct.converters.palette import BITS, Options, Palette
from loraduct.errors import Refused

BLOCK = 48  # groups at once
THREADS = min(4, os.cpu_count() or 1)
Rows = list[tuple[Any, Any]]  # (sorted values, their weights)


# --- tables of one row of values: (points, entries) -> (rows, entries) float64 ---


def _kmeans(points: kmeans.Points, k: int, quick: bool) -> Any:
    return kmeans.centroids(points, kmeans.cluster(points, k, quick=quick)[0])


def _uniform(points: kmeans.Points, k: int, quick: bool) -> Any:
    import numpy as np

    low, high = points.values[points.start], points.values[points.start + points.count - 1]
    return low[:, None] + (high - low)[:, None] * (np.arange(k) / (k - 1))


def _unique(points: kmeans.Points, k: int, quick: bool) -> Any:
    import numpy as np

    at = np.minimum(np.arange(k), points.count[:, None] - 1)
    return points.values[at + points.start[:, None]]


TABLES: dict[str, Callable[[kmeans.Points, int, bool], Any]] = {
    "kmeans": _kmeans,
    "uniform": _uniform,
    "unique": _unique,
}


def flat(
    weight: Any, options: Options, along: list[Any] | None, threads: int, name: str | None
) -> Palette:
    """Scalar entries, no scale. ``along``: what errors count, one vector per axis, multiplied."""
    import numpy as np

    shape, axis = tuple(weight.shape), options.axis % weight.ndim
    moved = np.moveaxis(weight, axis, 0)
    weights = None if along is None else Weights.of_axes(along, axis)
    code = coded(moved, bf16=options.bf16, weights=weights, name=name)
    size = code.flat.size
    group = options.group or shape[axis]
    parts = list(chunks(size, group * (size // shape[axis])))
    bits = options.bits or 0
    if options.mode == "unique":
        bits = bits_for(code, parts, options.bits, name)
    solve = _Solver(code, options, 1 << bits, weights, name)
    indices = np.empty(size, np.uint8)
    if len(parts) == 1:
        lut, error = solve.whole(indices)
    else:
        blocks = [parts[at : at + BLOCK] for at in range(0, len(parts), BLOCK)]
        done = list(threaded(lambda block: solve.groups(block, indices), blocks, threads))
        lut, error = np.concatenate([table for table, _ in done]), sum(e for _, e in done)
    back = np.ascontiguousarray(np.moveaxis(indices.reshape(moved.shape), 0, axis))
    norm = _squared(code.values, code.counts)
    return Palette(back, lut[:, :, None], bits, shape, group, axis, None, float(error), norm)


def together(
    tensors: list[tuple[str, Any]], options: Options, threads: int
) -> Iterator[tuple[str, Palette]]:
    """``flat`` of several tensors with one table each, by k-means of all of them at once.

    Alone, each step of the search is over before numpy has been called; and histograms and searches
    keep Python's lock, so only the assignments are left to ``threads``.
    """
    import numpy as np

    entries = 1 << (options.bits or 0)
    codes = [coded(weight, bf16=options.bf16, name=name) for name, weight in tensors]
    tables = _kmeans(kmeans.points([(c.values, c.counts) for c in codes]), entries, False)

    def one(at: int) -> tuple[str, Palette]:
        (name, weight), indices = tensors[at], np.empty(codes[at].flat.size, np.uint8)
        lut, error = _Solver(codes[at], options, entries, None, name).whole(indices, tables[at])
        shape = tuple(weight.shape)
        norm = _squared(codes[at].values, codes[at].counts)
        return name, Palette(
            indices.reshape(shape), lut[:, :, None], options.bits or 0, shape, shape[0],
            error=error, norm=norm,
        )  # fmt: skip

    yield from threaded(one, range(len(tensors)), threads)


@dataclass(frozen=True)
class _Solver:
    """Tables and indices of parts of one tensor."""

    code: Coded
    options: Options
    entries: int
    weights: Weights | None
    name: str | None

    def tables(self, rows: Rows, quick: bool) -> Any:
        """Rounded tables (rows, entries) in the dtype they are stored in, ascending."""
        make = TABLES[self.options.mode]
        return self.stored(make(kmeans.points(rows), self.entries, quick), rows)

    def stored(self, tables: Any, rows: Rows) -> Any:
        """``tables`` of ``rows``, rounded.

        Entries that rounding made equal: the values are closer than the tables' dtype can tell, so the
        values it can tell are clustered instead. Never so where both are 16-bit of one kind.
        """
        import numpy as np

        lut = rounded(tables, self.options.lut, self.name)
        filled = np.minimum([len(values) for values, _ in rows], self.entries)
        for row in np.flatnonzero((np.diff(lut) > 0).sum(1) < filled - 1):
            seen, at = np.unique(
                rounded(rows[row][0], self.options.lut, self.name), return_inverse=True
            )
            fewer = kmeans.points([(seen, np.bincount(at, weights=rows[row][1]))])
            again = TABLES[self.options.mode](fewer, self.entries, False)[0]
            lut[row] = rounded(again, self.options.lut, self.name)
        return lut

    def whole(self, indices: Any, table: Any = None) -> tuple[Any, float]:
        """One table (1, entries) for all, or the one given; writes ``indices``."""
        import numpy as np

        code = self.code
        rows = [(code.values, code.counts)]
        lut = (
            self.tables(rows, self.options.quick)
            if table is None
            else self.stored(table[None], rows)
        )
        entry = _nearest_sorted(code.values, lut[0])
        of_code = entry if code.position is None else entry[code.position]
        source = code.flat if code.position is not None else code.codes
        if code.binned:
            return lut, self._one_by_one(slice(0, code.flat.size), lut[0], indices)
        for part in chunks(code.flat.size, 1 << 15):
            np.take(of_code, source[part], out=indices[part], mode="clip")
        gap = code.values - lut[0].astype(np.float64)[entry]
        return lut, _squared(gap, code.counts)

    def groups(self, parts: list[slice], indices: Any) -> tuple[Any, float]:
        """A table for each part (parts, entries); writes their ``indices``."""
        import numpy as np

        code, rows, places = self.code, [], []
        for part in parts:
            at = code.at(part)
            weights = None if self.weights is None else self.weights.of(part)
            counts = np.bincount(at, weights=weights, minlength=len(code.values))
            found = np.flatnonzero(counts > 0)  # of bools it is far quicker
            rows.append((code.values[found], counts[found]))
            places.append((at, found))
        lut, error = self.tables(rows, True), 0.0
        entry = np.zeros(len(code.values), np.uint8)
        for part, table, (values, counts), (at, found) in zip(
            parts, lut, rows, places, strict=True
        ):
            if code.binned:
                error += self._one_by_one(part, table, indices)
                continue
            entry[found] = _nearest_sorted(values, table)
            np.take(entry, at, out=indices[part], mode="clip")
            gap = values - table.astype(np.float64)[entry[found]]
            error += _squared(gap, counts)
        return lut, error

    def _one_by_one(self, part: slice, table: Any, indices: Any) -> float:
        """Writes the indices of numbers that differ within a bin; returns their error."""
        import numpy as np

        wide = table.astype(np.float64)
        error = 0.0
        for inner in chunks(part.stop - part.start):
            inner = slice(part.start + inner.start, part.start + inner.stop)
            numbers = self.code.numbers(inner)
            indices[inner] = nearest(numbers, wide)
            gap = numbers - wide[indices[inner]]
            error += _squared(gap, 1.0 if self.weights is None else self.weights.of(inner))
        return error


def _squared(gap: Any, counts: Any) -> float:
    """The sum of counts * gap^2; a dot product would wake BLAS's threads, which costs more."""
    return float((gap * gap * counts).sum())


def nearest(numbers: Any, table: Any) -> Any:
    """Which entry of an ascending table is nearest to each number. float64 in, uint8 out."""
    import numpy as np

    return np.searchsorted((table[1:] + table[:-1]) / 2, numbers).astype(np.uint8)


def _nearest_sorted(values: Any, table: Any) -> Any:
    """The same for sorted values: each entry has a run of them."""
    import numpy as np

    wide = table.astype(np.float64)
    ends = np.searchsorted(values, (wide[1:] + wide[:-1]) / 2)
    runs = np.diff(ends, prepend=0, append=len(values))
    return np.repeat(np.arange(len(wide), dtype=np.uint8), runs)


def rounded(tables: Any, lut: str, name: str | None) -> Any:
    """Entries in the dtype they are stored in. Raises Refused where that can't hold them."""
    import numpy as np

    with np.errstate(over="ignore"):
        stored = tables.astype(lut)
    if not np.isfinite(stored).all():
        largest = float(np.abs(tables).max())
        raise Refused(
            None, f"holds values of {largest:.4g}: tables of {lut} end before that", tensor=name
        )
    return stored


def bits_for(code: Coded, parts: list[slice], bits: int | None, name: str | None) -> int:
    """The least bits that tell all values of each part apart; ``bits`` if they do.

    Raises Refused if a part has more values.
    """
    import numpy as np

    count = len(code.values)
    if len(parts) > 1:
        count = max(int(np.count_nonzero(np.bincount(code.at(part)))) for part in parts)
    limit = bits or BITS[-1]
    if code.binned or count > 1 << limit:
        much = "far more than" if code.binned else str(count)
        raise Refused(
            None, f"has {much} {'256' if code.binned else 'distinct'} values, mode unique holds"
            f" {1 << limit} in {limit} bits", tensor=name
        )  # fmt: skip
    return bits or next(b for b in BITS if count <= 1 << b)


def threaded(work: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    """``work`` of each item, in order; numpy lets the threads run beside each other."""
    if threads <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, items)
