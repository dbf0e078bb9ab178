"""Which tensors are compressed to how many bits, so that all fit a size and the least error is made.

Each tensor has choices (width, bytes, error); one is taken of each. On the lower convex hulls of
(bytes, error) the steps that take off most error per byte are taken first: that is optimal for the
sizes it reaches (Lagrange) and gives a bound for all others. What is left of the size is used by
an exact search over the partial plans that the bound doesn't rule out (multiple-choice knapsack); if
there are too many, the greedy plan is kept, with what else fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from loraduct.converters import kmeans, palettize
from loraduct.converters.coded import Weights, coded
from loraduct.converters.palette import Options
from loraduct.errors import Refused

SAMPLE = 1 << 15  # numbers by which groups are compared
STATES = 20_000  # partial plans kept by the exact search, at most


@dataclass(frozen=True)
class Choice:
    """One way to store a tensor: ``width`` (bits, or a name), ``nbytes``, and the ``error`` it makes."""

    width: int | str
    nbytes: int
    error: float


@dataclass(frozen=True)
class Plan:
    """``widths`` by tensor, their bytes and error. ``exact``: no plan of this size has less error.

    ``curve``: (bytes, error) of the plans on the common hull, smallest first.
    """

    widths: dict[str, int | str]
    nbytes: int
    error: float
    exact: bool
    curve: list[tuple[int, float]]


def estimates(
    weight: Any,
    widths: Sequence[int],
    *,
    bf16: bool = False,
    importance: Any = None,
    name: str | None = None,
) -> dict[int, float]:
    """Squared error of the best table per tensor at each width, from the histogram alone.

    ``importance``: see `palettize.palettize`.
    """
    along = palettize.per_axis(tuple(weight.shape), importance, name)
    weights = None if along is None else Weights.of_axes(along, 0)
    code = coded(weight, bf16=bf16, weights=weights, name=name)
    points = kmeans.points([(code.values, code.counts)])
    return {bits: float(kmeans.cluster(points, 1 << bits, quick=True)[1][0]) for bits in widths}


def sampled(
    weight: Any, options: Sequence[Options], *, importance: Any = None, name: str | None = None
) -> list[float]:
    """The squared error of tables for groups of rows, each estimated on evenly spread groups; of one table
    whose rows have scales, which make them alike, on evenly spread rows."""
    import numpy as np

    high, found = len(weight), []
    for one in options:
        group = one.group or (1 if one.scaled else high)
        count = max(1, min(high // group, SAMPLE * high // (weight.size * group)))
        firsts = np.linspace(0, high // group - 1, count).astype(int) * group
        rows = np.concatenate([weight[at : at + group] for at in firsts])
        made = palettize.palettize(rows, replace(one, quick=True), importance=importance, name=name)
        found.append(made.error * high / len(rows))
    return found


def plan(
    tensors: Mapping[str, Sequence[Choice]],
    size: int,
    *,
    importance: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of at most ``size`` bytes with the least error, weighted by ``importance`` (else 1).

    Raises Refused when the smallest plan is larger, saying how large it is.
    """
    weight = importance or {}
    ways = {name: _useful(found, weight.get(name, 1.0)) for name, found in tensors.items()}
    least = sum(way[0].nbytes for way in ways.values())
    if least > size:
        raise Refused(None, f"{size} bytes are asked for; the smallest possible is {least} bytes")
    steps = sorted(
        ((slope, name, at) for name, way in ways.items() for slope, at in _hull(way)),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    taken = dict.fromkeys(ways, 0)
    greedy, nbytes, slope, full = dict(taken), least, 0.0, False
    sizes, gains = [least], list[float]()
    for gain, name, at in steps:
        before, after = ways[name][taken[name]], ways[name][at]
        taken[name] = at
        sizes.append(sizes[-1] + after.nbytes - before.nbytes)
        gains.append(before.error - after.error)
        if not full and sizes[-1] > size:
            full, slope = True, gain
        if not full:
            greedy[name], nbytes = at, sizes[-1]
    # summed from the last plan on, whose error may be 0: differences would leave a rest of it
    errors = list(accumulate(reversed(gains), initial=_error(ways, taken)))
    curve = list(zip(sizes, reversed(errors), strict=True))
    greedy = _filled(ways, greedy, size - nbytes)
    best, exact = (greedy, True) if not full else _exact(ways, size, slope, greedy)
    return Plan(
        {name: ways[name][at].width for name, at in best.items()},
        _bytes(ways, best),
        _error(ways, best),
        exact,
        curve,
    )


def size_of(shapes: Mapping[str, int], bits_per_weight: float) -> int:
    """Bytes for tensors of so many numbers each at ``bits_per_weight`` on average."""
    return int(sum(shapes.values()) * bits_per_weight / 8)


Ways = dict[str, list[Choice]]


def _useful(found: Sequence[Choice], weight: float) -> list[Choice]:
    """Choices by size, each with less error than all smaller ones; errors weighted."""
    ways: list[Choice] = []
    for c in sorted(found, key=lambda c: (c.nbytes, c.error)):
        if not ways or c.error * weight < ways[-1].error:
            ways.append(Choice(c.width, c.nbytes, c.error * weight))
    return ways


def _hull(ways: list[Choice]) -> list[tuple[float, int]]:
    """Steps along the lower convex hull: (error taken off per byte, index of the choice)."""
    steps, at = [], 0
    while at < len(ways) - 1:
        here = ways[at]
        slope, at = max(
            ((here.error - ways[i].error) / (ways[i].nbytes - here.nbytes), i)
            for i in range(at + 1, len(ways))
        )
        steps.append((slope, at))
    return steps


def _bytes(ways: Ways, taken: Mapping[str, int]) -> int:
    return sum(ways[name][at].nbytes for name, at in taken.items())


def _error(ways: Ways, taken: Mapping[str, int]) -> float:
    return sum(ways[name][at].error for name, at in taken.items())


def _filled(ways: Ways, taken: dict[str, int], left: int) -> dict[str, int]:
    """What still fits, the largest gain first."""
    while True:
        fits = [
            (ways[name][at].error - ways[name][i].error, name, i)
            for name, at in taken.items()
            for i in range(at + 1, len(ways[name]))
            if ways[name][i].nbytes - ways[name][at].nbytes <= left
        ]
        if not fits:
            return taken
        _, name, i = max(fits)
        left -= ways[name][i].nbytes - ways[name][taken[name]].nbytes
        taken = taken | {name: i}


def _exact(
    ways: Ways, size: int, slope: float, greedy: dict[str, int]
) -> tuple[dict[str, int], bool]:
    """(the best plan, True), or (``greedy``, False) if more than STATES partial plans were possible.

    A partial plan is dropped when another is no larger and no worse, or when even the bound
    error + slope * (bytes - size) of its best completion is not below the greedy plan's error.
    """
    import numpy as np

    names = sorted(ways, key=lambda name: -max(c.nbytes for c in ways[name]))
    relaxed = [min(c.error + slope * c.nbytes for c in ways[name]) for name in names]
    smallest = [ways[name][0].nbytes for name in names]
    rest_error, rest_bytes = sum(relaxed), sum(smallest)
    target = _error(ways, greedy)
    nbytes, error, trail = np.zeros(1, np.int64), np.zeros(1), []
    for name, relaxation, small in zip(names, relaxed, smallest, strict=True):
        rest_error, rest_bytes = rest_error - relaxation, rest_bytes - small
        cost = np.array([c.nbytes for c in ways[name]])
        loss = np.array([c.error for c in ways[name]])
        all_bytes = np.add.outer(nbytes, cost).reshape(-1)
        all_error = np.add.outer(error, loss).reshape(-1)
        bound = all_error + slope * (all_bytes - size) + rest_error
        alive = np.flatnonzero((bound < target) & (all_bytes + rest_bytes <= size))
        order = alive[np.lexsort((all_error[alive], all_bytes[alive]))]
        lowest = np.minimum.accumulate(all_error[order])
        kept = order[np.flatnonzero(np.diff(lowest, prepend=np.inf) < 0)]
        if not len(kept):
            return greedy, True
        if len(kept) > STATES:
            return greedy, False
        nbytes, error = all_bytes[kept], all_error[kept]
        trail.append((kept // len(cost), kept % len(cost)))
    at, found = int(np.argmin(error)), {}
    for name, (before, choice) in zip(reversed(names), reversed(trail), strict=True):
        found[name] = int(choice[at])
        at = int(before[at])
    best = {name: found[name] for name in ways}
    return (best, True) if _error(ways, best) < target else (greedy, True)
