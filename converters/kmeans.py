"""k-means on a line: the best tables of 2 to 256 entries for many sets of numbers at once.

On a line the best clusters are intervals (Wu, 1991), so the problem is where k - 1 boundaries lie in
the sorted values. With prefix sums of weights W and of weight times value S, a cluster from i to j
takes (S_j - S_i)^2 / (W_j - W_i) off the sum of squares; dynamic programming over the boundaries
maximises the sum of that. Few values are solved over all positions, exactly. Otherwise each boundary
has candidates around where it stands, in steps of a part of the clusters it passes through, and the
programme finds the joint optimum over them; from wide steps to narrow ones, each until little is
gained. With steps of whole clusters' parts a cluster can vanish at one place and another be split at a
second, all between them moving on by one, which single boundaries never do. Neighbours that move move
about alike, so of the places of the one before only a band is tried for each place of a boundary.

All rows (groups of a tensor, or tensors) are solved together, so numpy's loops are long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

Schedule = tuple[tuple[int, int, int, float], ...]
EXACT = 96  # so many distinct values or fewer: all positions are candidates
# Rounds: (parts that clusters are cut into, 0 for single values; candidates on each side of a boundary;
# the band, how many steps more or less the one before it may have moved; the share of the error that a
# round must take off to be followed by another), for up to so many clusters. On SmolLM2's 211 matrices
# CAREFUL is within 1e-5 of the exact optimum at 2 to 4 bits, and within 3e-4 at 6 and 8; QUICK, in a
# fraction of the time, within 5e-4 and 4e-3.
CAREFUL = {
    8: ((4, 16, 8, 1e-3), (32, 64, 32, 1e-4), (256, 32, 16, 1e-5), (0, 16, 8, 1e-6)),
    32: ((4, 16, 16, 1e-2), (32, 48, 48, 1e-4), (128, 32, 32, 1e-6), (0, 16, 16, 1e-6)),
    256: ((4, 16, 16, 1e-3), (32, 32, 32, 1e-4), (256, 32, 32, 1e-5)),
}
QUICK = {
    4: CAREFUL[8],
    8: ((4, 16, 4, 1e-3), (32, 32, 8, 1e-4), (256, 16, 8, 1e-4)),
    16: ((4, 16, 4, 1e-3), (16, 16, 6, 1e-4), (128, 16, 8, 1e-4)),
    256: ((4, 16, 4, 1e-3), (16, 16, 8, 1e-3), (64, 8, 4, 1e-3)),
}
FEW, WIDE = 8, 64  # so few clusters start from the joint optimum over so many places
ROUNDS = 40  # at most, per stride: a bound that real weights don't reach
BLOCK = {False: 8, True: 48}  # rows at once, by ``quick``: their tables of gains stay in the cache


@dataclass(frozen=True)
class Points:
    """Rows of sorted distinct values.

    Row r has ``count[r]`` values from ``values[start[r]]`` on, and its prefix sums (one more, the
    first 0) from ``weight[start[r] + r]`` on: ``weight``, ``moment`` (weight * value). ``square``
    (rows,) is each row's sum of weight * value^2. float64.
    """

    values: Any
    start: Any
    count: Any
    weight: Any
    moment: Any
    square: Any

    @property
    def first(self) -> Any:
        """Where each row's prefix sums begin."""
        import numpy as np

        return self.start + np.arange(len(self.start))


def points(rows: Iterable[tuple[Any, Any]]) -> Points:
    """Points from pairs (sorted distinct values, their weights > 0), one pair per row.

    Sums are taken row by row: an outlier in one costs the others no digits.
    """
    import numpy as np

    pairs = [
        (np.asarray(values, np.float64), np.asarray(weights, np.float64))
        for values, weights in rows
    ]
    count = np.array([len(values) for values, _ in pairs], np.int64)
    start = np.cumsum(count) - count
    weight, moment = (np.zeros(int(count.sum()) + len(pairs)) for _ in range(2))
    square = np.zeros(len(pairs))
    for row, (values, weights) in enumerate(pairs):
        at = int(start[row]) + row + 1
        mass = weights * values
        np.cumsum(weights, out=weight[at : at + len(values)])
        np.cumsum(mass, out=moment[at : at + len(values)])
        square[row] = np.einsum("i,i->", mass, values)  # `@` would wake BLAS's threads
    flat = np.concatenate([values for values, _ in pairs]) if pairs else np.zeros(0)
    return Points(flat, start, count, weight, moment, square)


def cluster(points: Points, k: int, *, quick: bool = False) -> tuple[Any, Any]:
    """Boundaries (rows, k + 1), positions from 0 to the row's count, and the errors (rows,).

    A row with no more distinct values than entries has error 0 and empty clusters at its end.
    """
    import numpy as np

    bounds = np.minimum(np.arange(k + 1), points.count[:, None])
    error = np.zeros(len(points.count))
    full = np.flatnonzero(points.count > k)
    small = points.count[full] <= EXACT
    known = QUICK if quick else CAREFUL
    schedule = known[min(most for most in known if k <= most)]
    refined = partial(_refined, schedule=schedule)
    for rows, solve in ((full[small], _exact), (full[~small], refined)):
        order = rows[np.argsort(points.count[rows], kind="stable")]
        for at in range(0, len(order), BLOCK[quick]):
            block = order[at : at + BLOCK[quick]]
            bounds[block], error[block] = solve(points, block, k)
    return bounds, error


def centroids(points: Points, bounds: Any) -> Any:
    """Means of the clusters (rows, k); an empty one repeats the row's last mean (0 if there is none)."""
    import numpy as np

    at = bounds + points.first[:, None]
    weight, moment = np.diff(points.weight[at]), np.diff(points.moment[at])
    filled = np.maximum((bounds[:, 1:] > bounds[:, :-1]).sum(1) - 1, 0)
    means = np.divide(moment, weight, out=np.zeros_like(moment), where=weight > 0)
    last = np.take_along_axis(means, filled[:, None], 1)
    return np.where(bounds[:, 1:] > bounds[:, :-1], means, last)


def _exact(points: Points, rows: Any, k: int) -> tuple[Any, Any]:
    """Every position is a candidate of every boundary: the optimum."""
    import numpy as np

    count = points.count[rows]
    every = np.arange(1, int(count.max()))
    candidates = np.minimum(every[None, :], count[:, None] - 1)
    candidates = np.broadcast_to(candidates[:, None, :], (len(rows), k - 1, len(every)))
    return _best(points, rows, candidates, -len(every), -1)


def _refined(points: Points, rows: Any, k: int, *, schedule: Schedule) -> tuple[Any, Any]:
    """From density^(1/3) to joint moves of all boundaries, coarse to fine."""
    import numpy as np

    bounds, error = _first(points, rows, k), np.full(len(rows), np.inf)
    low = np.arange(1, k)  # every cluster keeps at least one value
    high = points.count[rows][:, None] - np.arange(k - 1, 0, -1)
    for parts, reach, band, enough in schedule:
        active = np.arange(len(rows))
        for _ in range(ROUNDS):
            moved = _candidates(bounds[active], parts, reach)
            moved = np.clip(moved, low[:, None], high[active][:, :, None])
            found, total = _best(points, rows[active], moved, -band, band)
            gained = error[active] - total
            better = gained > 0
            bounds[active[better]] = found[better]
            error[active[better]] = total[better]
            active = active[gained > enough * np.maximum(total, 0)]
            if not len(active):
                break
    return bounds, error


def _first(points: Points, rows: Any, k: int) -> Any:
    """Boundaries to start from: by density, or the best of WIDE such places where clusters are few.

    Few clusters can be far from the optimum and yet in a local one: an outlier has a cluster of its own
    there, or has none.
    """
    import numpy as np

    if k > FEW:
        return _spread(points, rows, k)
    places = np.minimum(_spread(points, rows, WIDE)[:, 1:-1], points.count[rows][:, None] - 1)
    every = np.broadcast_to(places[:, None, :], (len(rows), k - 1, places.shape[1]))
    return _best(points, rows, every, -places.shape[1], -1)[0]


def _candidates(bounds: Any, parts: int, reach: int) -> Any:
    """Where each inner boundary may go (rows, k - 1, T): clusters cut into ``parts``, or by values."""
    import numpy as np

    inner, steps = bounds.shape[1] - 2, np.arange(-reach, reach + 1)
    if not parts:
        return bounds[:, 1:-1, None] + steps
    cuts = bounds[:, :-1, None] + np.diff(bounds)[:, :, None] * np.arange(parts) // parts
    cuts = np.concatenate((cuts.reshape(len(bounds), -1), bounds[:, -1:]), 1)
    at = np.arange(1, inner + 1)[:, None] * parts + steps
    return cuts[:, np.clip(at, 0, cuts.shape[1] - 1)]


def _spread(points: Points, rows: Any, k: int) -> Any:
    """First boundaries: equal shares of the integral of density^(1/3) (Panter and Dite, 1951).

    Between neighbouring sample positions with weight w and width d the integral is w^(1/3) d^(2/3).
    """
    import numpy as np

    count = points.count[rows][:, None]
    samples = np.arange(16 * k + 1)
    at = samples * (count - 1) // (16 * k)  # the same position twice: no width, no share
    width = np.diff(points.values[at + points.start[rows][:, None]])
    mass = np.diff(points.weight[at + points.first[rows][:, None]])
    share = np.cbrt(mass * width * width).cumsum(1)
    bounds = np.zeros((len(rows), k + 1), np.int64)
    for row, (total, where) in enumerate(zip(share, at, strict=True)):
        wanted = np.arange(1, k) * (total[-1] / k)
        bounds[row, 1:k] = np.interp(wanted, np.concatenate(([0.0], total)), where) + 1
    bounds[:, k] = count[:, 0]
    ahead = np.arange(k + 1)
    bounds = np.maximum.accumulate(bounds - ahead, 1) + ahead  # strictly increasing ...
    return np.minimum(bounds, count - (k - ahead))  # ... and inside


def _best(points: Points, rows: Any, candidates: Any, low: int, high: int) -> tuple[Any, Any]:
    """The best boundaries among ``candidates`` (rows, k - 1, T), ascending in T, and their errors.

    For candidate t of a boundary those of the one before it are tried from t + ``low`` to t + ``high``.
    """
    import numpy as np

    length, inner, width = candidates.shape
    low, high = max(low, 1 - width), min(high, width - 1)
    count, first, before = points.count[rows], points.first[rows], max(0, -low)
    places = np.ascontiguousarray(candidates.transpose(1, 2, 0))  # (boundaries, T, rows)
    inside = slice(before, before + width)
    # What lies outside T has no weight to gain by and is worth -inf, so windows need no ends.
    weight, moment, best = (
        np.full((inner, before + width + max(0, high), length), fill)
        for fill in (np.inf, 0.0, -np.inf)
    )
    np.take(points.weight, places + first, out=weight[:, inside], mode="clip")
    np.take(points.moment, places + first, out=moment[:, inside], mode="clip")
    here = weight[:, inside], moment[:, inside], best[:, inside]
    there = [_windows(x[:, before + low :], high - low + 1, width) for x in (weight, moment, best)]
    n, d = (np.empty((high - low + 1, width, length)) for _ in range(2))
    # where a place of a boundary may not lie behind one of the boundary before it
    last = np.clip(np.arange(width) + high, 0, width - 1)
    cross = np.any(places[1:] <= places[:-1, last], axis=(1, 2)).tolist()
    with np.errstate(divide="ignore", invalid="ignore"):
        np.divide(here[1][0] ** 2, here[0][0], out=here[2][0])
        for j in range(1, inner):
            np.subtract(here[0][j], there[0][j - 1], out=n)
            np.subtract(here[1][j], there[1][j - 1], out=d)
            np.multiply(d, d, out=d)
            np.divide(d, n, out=d)
            if cross[j - 1]:
                np.copyto(d, -np.inf, where=n <= 0)
            np.add(d, there[2][j - 1], out=d)
            np.maximum.reduce(d, axis=0, out=here[2][j])
        end = first + count
        d = points.moment[end] - here[1][-1]
        d = d * d / (points.weight[end] - here[0][-1]) + here[2][-1]
        every, pick = np.arange(length), d.argmax(0)
        error = points.square[rows] - d[pick, every]
        bounds = np.zeros((length, inner + 2), np.int64)
        bounds[:, -1] = count
        pick += before
        steps = np.arange(low, high + 1)[:, None]
        for j in range(inner - 1, -1, -1):  # the gains again, of what was picked alone
            bounds[:, j + 1] = places[j, pick - before, every]
            if j:
                whence = pick + steps
                n = weight[j, pick, every] - weight[j - 1][whence, every]
                d = moment[j, pick, every] - moment[j - 1][whence, every]
                gain = np.where(n > 0, d * d / n, -np.inf) + best[j - 1][whence, every]
                pick = whence[gain.argmax(0), every]
    return bounds, error


def _windows(x: Any, count: int, width: int) -> Any:
    """(boundaries, count, width, rows): ``x`` (boundaries, ..., rows) from each of ``count`` places on."""
    from numpy.lib.stride_tricks import as_strided

    whole, step, each = x.strides
    return as_strided(x, (len(x), count, width, x.shape[2]), (whole, step, step, each))
