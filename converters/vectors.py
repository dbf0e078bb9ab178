"""Tables whose entries are short vectors of neighbouring numbers along an axis: k-means in a few
dimensions, by Lloyd's rounds on a sample, seeded by D^2 sampling (Arthur and Vassilvitskii, 2007)."""

from __future__ import annotations

from typing import Any

from loraduct.converters.coded import typed
from loraduct.converters.lut import rounded
from loraduct.converters.palette import Options, Palette
from loraduct.errors import Refused

SAMPLE = 1 << 16  # vectors that the entries are made from
TRIES = 3  # seedings; the best goes on
ROUNDS = 60
ENOUGH = 1e-4  # the share of the error that a round must take off
_CHUNK = 1 << 12  # vectors at once: their products with all entries stay in the cache


def palettize(weight: Any, options: Options, along: list[Any] | None, name: str | None) -> Palette:
    """Entries of ``options.vector`` numbers along ``options.axis``, one table per group of channels.

    Weights that differ within a vector count by their mean. Raises Refused where vectors don't divide
    the channels or a group, for scales, and for modes other than kmeans.
    """
    import numpy as np

    axis, size = options.axis % weight.ndim, options.vector
    channels = weight.shape[axis]
    group = options.group or channels
    if channels % size or group % size:
        raise Refused(
            None,
            f"has {channels} channels on axis {axis} in groups of {group}: entries of {size} numbers"
            " don't divide them",
            tensor=name,
        )
    if options.mode != "kmeans" or options.scaled or not options.bits:
        raise Refused(
            None, "entries of several numbers are for kmeans, without scales", tensor=name
        )
    wide = typed(weight, bf16=options.bf16, name=name).astype(np.float64)
    moved = np.moveaxis(wide, axis, 0)
    if not np.isfinite(moved).all():
        raise Refused(None, "holds NaN or Inf; nothing was compressed", tensor=name)
    shape = moved.shape[1:]
    cells = moved.reshape(channels // size, size, -1).transpose(0, 2, 1)  # (rows, rest, size)
    counts = np.ones(cells.shape[:2]) if along is None else _counts(along, axis, size)
    step, entries = group // size, 1 << options.bits
    tables, indices, error = [], np.empty(cells.shape[:2], np.uint8), 0.0
    for at in range(0, len(cells), step):
        vectors, count = cells[at : at + step].reshape(-1, size), counts[at : at + step].reshape(-1)
        table = rounded(entries_of(vectors, count, entries), options.lut, name)
        chosen, gap = assigned(vectors, table.astype(np.float64))
        indices[at : at + step] = chosen.reshape(-1, cells.shape[1])
        error += float(gap @ count)
        tables.append(table)
    back = np.ascontiguousarray(np.moveaxis(indices.reshape(-1, *shape), 0, axis))
    lut = np.stack(tables)
    norm = float(((cells * cells).sum(-1) * counts).sum())
    return Palette(back, lut, options.bits, tuple(weight.shape), group, axis, None, error, norm)


def _counts(along: list[Any], axis: int, size: int) -> Any:
    import numpy as np

    rest = np.ones(1)
    for vector in along[:axis] + along[axis + 1 :]:
        rest = np.multiply.outer(rest, vector).reshape(-1)
    return np.multiply.outer(along[axis].reshape(-1, size).mean(1), rest)


def entries_of(vectors: Any, counts: Any, k: int) -> Any:
    """(k, size) entries for vectors (n, size) that count ``counts`` (n,). The same every time."""
    import numpy as np

    distinct = np.unique(vectors[: 4 * k], axis=0)
    if len(distinct) <= k:  # perhaps there are no more
        distinct = np.unique(vectors, axis=0)
    if len(distinct) <= k:
        return np.concatenate((distinct, np.repeat(distinct[-1:], k - len(distinct), 0)))
    chance = np.random.default_rng(0)
    if len(vectors) > SAMPLE:
        chosen = chance.choice(len(vectors), SAMPLE, replace=False)
        vectors, counts = vectors[chosen], counts[chosen]
    seeds = [_seeds(vectors, counts, k, chance) for _ in range(TRIES)]
    entries = min(seeds, key=lambda seed: float(assigned(vectors, seed)[1] @ counts))
    before = np.inf
    for _ in range(ROUNDS):
        chosen, gap = assigned(vectors, entries)
        error = float(gap @ counts)
        if before - error <= ENOUGH * error:
            break
        before = error
        weight = np.bincount(chosen, weights=counts, minlength=k)
        for axis in range(vectors.shape[1]):
            mass = np.bincount(chosen, weights=counts * vectors[:, axis], minlength=k)
            np.divide(mass, weight, out=entries[:, axis], where=weight > 0)
        idle = np.flatnonzero(weight == 0)  # moved to where the error is largest
        entries[idle] = vectors[np.argsort(-gap * counts, kind="stable")[: len(idle)]]
    return entries


def _seeds(vectors: Any, counts: Any, k: int, chance: Any) -> Any:
    import numpy as np

    few = chance.choice(len(vectors), min(len(vectors), 32 * k), replace=False)
    vectors, counts = vectors[few], counts[few]
    seeds = np.empty((k, vectors.shape[1]))
    gap = np.full(len(vectors), 1.0)
    for at in range(k):
        total = np.cumsum(gap * counts)
        pick = np.searchsorted(total, chance.random() * total[-1]) if total[-1] > 0 else 0
        seeds[at] = vectors[min(pick, len(vectors) - 1)]
        distance = ((vectors - seeds[at]) ** 2).sum(1)
        gap = np.minimum(gap, distance) if at else distance
    return seeds


def assigned(vectors: Any, entries: Any) -> tuple[Any, Any]:
    """(the nearest entry of each vector, uint8; squared distances to them)."""
    import numpy as np

    chosen, gap = np.empty(len(vectors), np.uint8), np.empty(len(vectors))
    half = (entries * entries).sum(1) / 2
    for at in range(0, len(vectors), _CHUNK):
        block = vectors[at : at + _CHUNK]
        nearest = (block @ entries.T - half).argmax(1)
        chosen[at : at + _CHUNK] = nearest
        gap[at : at + _CHUNK] = ((block - entries[nearest]) ** 2).sum(1)
    return chosen, gap
