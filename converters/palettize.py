"""Lookup tables: a tensor as indices of 1 to 8 bits into small tables of values.

One table for the tensor, or one for each group of channels along an axis (``constexpr_lut_to_dense``
of coremltools 9.0, iOS16 and iOS18). Entries are stored rounded, and every number gets the index of
the entry that is nearest to it as stored. Errors are squared, and may be weighted: by input channel,
with the second moment of the activations that will be multiplied with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from loraduct.converters import kmeans
from loraduct.converters.coded import Coded, Weights, chunks, coded
from loraduct.converters.packing import packed
from loraduct.errors import Refused

BITS = (1, 2, 3, 4, 6, 8)  # what Core ML has index types for
IOS16_BITS = (1, 2, 4, 6, 8)
LUTS = ("float16", "float32")
MIL = {"float16": "FLOAT16", "float32": "FLOAT32"}
BLOCK = 48  # groups at once
_FLOOR = 1e-9  # an unused channel counts this share of the mean, not nothing


@dataclass(frozen=True)
class Options:
    """``mode``: kmeans, uniform, unique. ``group``: channels per table along ``axis``, 0 for one table.

    ``ragged``: the last group may be shorter. ``vector``: numbers per entry, along ``axis``.
    ``scaled``: each channel along axis 0 is divided by a scale first. ``lut``: dtype of entries.
    ``bf16``: uint16 holds bfloat16, not float16.
    """

    bits: int | None
    mode: str = "kmeans"
    group: int = 0
    axis: int = 0
    ragged: bool = False
    vector: int = 1
    scaled: bool = False
    lut: str = "float16"
    bf16: bool = False


@dataclass(frozen=True)
class Palette:
    """Indices (uint8, the tensor's shape; along ``axis`` divided by the entries' length) and tables.

    ``lut`` (tables, 2**bits, vector). Table t serves channels t * group to (t + 1) * group - 1 of
    ``axis``. ``scale`` (shape[0], 1, ...) multiplies what the tables give. ``error``: the sum of
    (weighted) squared errors.
    """

    indices: Any
    lut: Any
    bits: int
    shape: tuple[int, ...]
    group: int
    axis: int = 0
    scale: Any = None
    error: float = 0.0

    @property
    def vector(self) -> int:
        """Numbers per entry."""
        return int(self.lut.shape[2])


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


def palettize(
    weight: Any,
    options: Options,
    *,
    importance: Any = None,
    threads: int = 1,
    name: str | None = None,
) -> Palette:
    """The tensor (float16, float32, bfloat16 or uint16 codes; rank 1 or more) as tables and indices.

    ``importance`` (shape[1],): what squared errors count, per input channel. ``threads``: for groups.
    Raises Refused, naming ``name``, for NaN, Inf, empty tensors, scalars, groups that don't divide,
    entries beyond the tables' dtype, and `unique` with too many values.
    """
    shape = tuple(weight.shape)
    check(shape, options, name)
    weights = per_axis(shape, importance, name)
    if options.vector > 1:
        return vectors.palettize(weight, options, weights, name)
    if options.scaled:
        return scaled.palettize(weight, options, weights, threads, name)
    return flat(weight, options, weights, threads, name)


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
    return Palette(back, lut[:, :, None], bits, shape, group, axis, error=float(error))


@dataclass(frozen=True)
class _Solver:
    """Tables and indices of parts of one tensor."""

    code: Coded
    options: Options
    entries: int
    weights: Weights | None
    name: str | None

    def tables(self, rows: list[tuple[Any, Any]], quick: bool) -> Any:
        """Rounded tables (rows, entries) in the dtype they are stored in, ascending."""
        import numpy as np

        make = TABLES[self.options.mode]
        lut = rounded(make(kmeans.points(rows), self.entries, quick), self.options.lut, self.name)
        # Entries that rounding made equal: the values are closer than the tables' dtype can tell, so
        # the values it can tell are clustered instead. Never so where both are 16-bit of one kind.
        filled = np.minimum([len(values) for values, _ in rows], self.entries)
        for row in np.flatnonzero((np.diff(lut) > 0).sum(1) < filled - 1):
            seen, at = np.unique(
                rounded(rows[row][0], self.options.lut, self.name), return_inverse=True
            )
            fewer = kmeans.points([(seen, np.bincount(at, weights=rows[row][1]))])
            lut[row] = rounded(make(fewer, self.entries, quick)[0], self.options.lut, self.name)
        return lut

    def whole(self, indices: Any) -> tuple[Any, float]:
        """One table (1, entries) for all; writes ``indices``."""
        import numpy as np

        code = self.code
        lut = self.tables([(code.values, code.counts)], False)
        entry = _nearest_sorted(code.values, lut[0])
        of_code = entry if code.position is None else entry[code.position]
        source = code.flat if code.position is not None else code.codes
        if code.binned:
            return lut, self._one_by_one(slice(0, code.flat.size), lut[0], indices)
        for part in chunks(code.flat.size, 1 << 15):
            np.take(of_code, source[part], out=indices[part], mode="clip")
        gap = code.values - lut[0].astype(np.float64)[entry]
        return lut, float(code.counts @ (gap * gap))

    def groups(self, parts: list[slice], indices: Any) -> tuple[Any, float]:
        """A table for each part (parts, entries); writes their ``indices``."""
        import numpy as np

        code, rows, places = self.code, [], []
        for part in parts:
            at = code.at(part)
            weights = None if self.weights is None else self.weights.of(part)
            counts = np.bincount(at, weights=weights, minlength=len(code.values))
            found = np.flatnonzero(counts)
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
            error += float(counts @ (gap * gap))
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
            error += float(gap @ gap if self.weights is None else self.weights.of(inner) @ gap**2)
        return error


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
        count = max(np.count_nonzero(np.bincount(code.at(part))) for part in parts)
    limit = bits or BITS[-1]
    if code.binned or count > 1 << limit:
        much = "far more than" if code.binned else str(count)
        raise Refused(
            None, f"has {much} {'256' if code.binned else 'distinct'} values, mode unique holds"
            f" {1 << limit} in {limit} bits", tensor=name
        )  # fmt: skip
    return bits or next(b for b in BITS if count <= 1 << b)


def per_axis(shape: tuple[int, ...], importance: Any, name: str | None) -> list[Any] | None:
    """One vector of weights per axis: ``importance`` for axis 1, ones elsewhere.

    Raises Refused unless it has a number, not negative, for each channel of axis 1.
    """
    import numpy as np

    if importance is None:
        return None
    given = np.asarray(importance, np.float64)
    if len(shape) < 2 or given.shape != (shape[1],):
        raise Refused(
            None, f"has shape {list(shape)}, importance has {list(given.shape)}: one number per"
            " channel of axis 1 is expected", tensor=name
        )  # fmt: skip
    if not np.isfinite(given).all() or (given < 0).any():
        raise Refused(None, "has an importance that is negative, NaN or Inf", tensor=name)
    along = [np.ones(n) for n in shape]
    along[1] = given + _FLOOR * (given.mean() or 1.0)
    return along


def check(shape: tuple[int, ...], options: Options, name: str | None) -> None:
    """Raises Refused for what no table can be made of."""
    wrong = [
        (options.mode not in TABLES, f"--mode {options.mode}: one of {', '.join(TABLES)}"),
        (
            options.bits not in BITS and not (options.mode == "unique" and options.bits is None),
            f"{options.bits} bits: tables have {', '.join(map(str, BITS))}",
        ),
        (options.lut not in LUTS, f"tables of {options.lut}: one of {', '.join(LUTS)}"),
        (not shape, "is a scalar"),
        (0 in shape, f"of shape {list(shape)} holds no values"),
        (options.vector < 1 or options.group < 0, "groups and entries have positive lengths"),
    ]
    for bad, what in wrong:
        if bad:
            raise Refused(None, what, tensor=name)
    if not -len(shape) <= options.axis < len(shape):
        raise Refused(None, f"of shape {list(shape)} has no axis {options.axis}", tensor=name)
    channels = shape[options.axis]
    if options.group and channels % options.group and not options.ragged:
        raise Refused(
            None,
            f"has {channels} channels on axis {options.axis}, which groups of {options.group}"
            " don't divide",
            tensor=name,
        )


def threaded(work: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    """``work`` of each item, in order; numpy lets the threads run beside each other."""
    if threads <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, items)


def expand(palette: Palette) -> Any:
    """The tensor that a palette stands for, in the tables' dtype."""
    import numpy as np

    p = palette
    step = p.vector if p.vector > 1 else 1
    picked = np.moveaxis(p.indices, p.axis, 0)
    out = np.empty((picked.shape[0], *picked.shape[1:], step), p.lut.dtype)
    for table, start in zip(p.lut, range(0, len(picked), p.group // step), strict=True):
        part = slice(start, start + p.group // step)
        np.take(table, picked[part], axis=0, out=out[part], mode="clip")
    out = np.moveaxis(out, -1, 1).reshape(picked.shape[0] * step, *picked.shape[1:])
    dense = np.ascontiguousarray(np.moveaxis(out, 0, p.axis))
    return dense if p.scale is None else p.scale * dense


def ios18(palette: Palette, name: str | None = None) -> dict[str, tuple[str, Any]]:
    """What ``constexpr_lut_to_dense`` of iOS18 takes: argument -> (MIL dtype, values).

    ``indices`` are unpacked, one a byte; ``lut`` is [tables along each axis..., 2**bits, vector].
    With a scale, ``scale`` is for ``constexpr_blockwise_shift_scale`` behind it. Raises Refused for a
    shorter last group, which the operation can't say.
    """
    import numpy as np

    p = palette
    if p.shape[p.axis] % p.group:
        raise Refused(
            None, f"has {p.shape[p.axis]} channels in groups of {p.group}: Core ML has no shorter"
            " last group", tensor=name
        )  # fmt: skip
    tables = [1] * len(p.shape)
    tables[p.axis] = len(p.lut)
    kind = MIL[str(p.lut.dtype)]
    found: dict[str, tuple[str, Any]] = {
        "indices": (f"UINT{p.bits}", p.indices),
        "lut": (kind, p.lut.reshape(*tables, 1 << p.bits, p.vector)),
    }
    if p.vector > 1:
        found["vector_axis"] = ("INT32", np.int32(p.axis))
    if p.scale is not None:
        found["scale"] = (kind, p.scale)
    return found


def ios16(palette: Palette, name: str | None = None) -> dict[str, tuple[str, Any]]:
    """What ``constexpr_lut_to_dense`` of iOS16 takes; ``indices`` are packed bytes.

    Raises Refused for 3 bits, groups, vectors and scales, which iOS18 brought.
    """
    import numpy as np

    p = palette
    newer = {
        f"{p.bits} bits": p.bits not in IOS16_BITS,
        "more than one table": len(p.lut) > 1,
        "entries of several numbers": p.vector > 1,
        "scales": p.scale is not None,
    }
    for what, so in newer.items():
        if so:
            raise Refused(None, f"has {what}, which needs iOS18", tensor=name)
    return {
        "indices": ("UINT8", packed(p.indices, p.bits)),
        "lut": (MIL[str(p.lut.dtype)], p.lut.reshape(-1)),
        "shape": ("UINT32", np.array(p.shape, np.uint32)),
    }


def nbytes(palette: Palette) -> int:
    """Bytes in a file: packed indices, tables, scales."""
    p = palette
    return int(
        -(-p.indices.size * p.bits // 8) + p.lut.nbytes + (0 if p.scale is None else p.scale.nbytes)
    )
