"""Two adapters compared module by module, and how much they would disturb each other.

With V the row space of A's dW_A (the inputs that A reacts to), the sum dW_A + dW_B does on V what
A does there plus dW_B V: d(A <- B) = ||dW_B V|| / ||dW_A|| is how much of A's own effect that is, on
A's own inputs. A module's interference is the larger of d(A <- B) and d(B <- A); the overall one
takes the sums of squares over all common modules in numerator and denominator. 0: they never meet;
1: what B adds there is as large as what A does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loraduct.adapter import Adapter, LowRank
from loraduct.converters import lowrank, merge_dense
from loraduct.converters.merge_names import aligned
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.tensor import Tensor
from loraduct.text import printable

ENERGY = 0.999  # of DoRA's squared norm
SAMPLE = 1 << 21  # entries of dW up to which signs are counted exactly


@dataclass(frozen=True)
class Module:
    """``cosine`` of dW_A and dW_B, ``ratio`` = ||dW_B|| / ||dW_A||; angles in degrees, smallest
    first, between the spaces of outputs (columns) and of inputs (rows).

    ``sign_conflict``: share of the entries that both move, in opposite directions; ``sampled``:
    estimated from evenly spread rows. ``on_first`` = d(A <- B), ``on_second`` = d(B <- A).
    """

    module: str
    cosine: float
    ratio: float
    norms: tuple[float, float]
    column_angles: tuple[float, ...]
    row_angles: tuple[float, ...]
    sign_conflict: float
    sampled: bool
    on_first: float
    on_second: float

    @property
    def interference(self) -> float:
        """The larger of both disturbances."""
        return max(self.on_first, self.on_second)


@dataclass(frozen=True)
class Diff:
    """The common modules, and those that only one has."""

    modules: tuple[Module, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    cosine: float
    interference: float
    on_first: float
    on_second: float
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        modules = [asdict(m) | {"interference": m.interference} for m in self.modules]
        return asdict(self) | {"modules": modules}


def diff(first: Adapter, second: Adapter, base: Base | None = None) -> Diff:
    """Compare the updates of two adapters of one base. Raises Refused where there is nothing to."""
    one, two = aligned([first, second], base)
    common = [m for m in one.low_rank if m in two.low_rank]
    if not common:
        raise Refused(second.path, f"has no module in common with {first.path}")
    found, sums = [], [0.0] * 5
    for name in common:
        u, v = one.low_rank[name], two.low_rank[name]
        if (u.shape, u.layout) != (v.shape, v.layout):
            what = f"updates a weight of shape {list(v.shape)}, the other {list(u.shape)}"
            raise Refused(second.weights, f"{what}: made for another base", tensor=name)
        module, parts = _module(name, *(_effective(name, x, base) for x in (u, v)))
        found.append(module)
        sums = [s + p for s, p in zip(sums, parts, strict=True)]
    inner, norm1, norm2, on1, on2 = sums
    disturbed = _root(on1, norm1), _root(on2, norm2)
    return Diff(
        tuple(found),
        tuple(m for m in one.low_rank if m not in two.low_rank),
        tuple(m for m in two.low_rank if m not in one.low_rank),
        _over(inner, math.sqrt(norm1 * norm2)),
        max(disturbed),
        *disturbed,
        _notes((one, two), base),
    )


def _notes(adapters: Sequence[Adapter], base: Base | None) -> tuple[str, ...]:
    """What is compared of DoRA."""
    dora = [a for a in adapters if any(u.magnitude is not None for u in a.low_rank.values())]
    if base is None or not base.has_weights:
        how = "its low-rank part is compared, not what its magnitudes do; --base BASE compares both"
    else:
        how = (
            f"its change of the weights is compared by the directions that hold {ENERGY:.1%} of it"
        )
    return tuple(f"{printable(a.path.name, 80)} is DoRA: {how}" for a in dora)


def _effective(name: str, u: LowRank, base: Base | None) -> LowRank:
    """DoRA's m (W + dW) / ||W + dW|| - W, which has full rank, by its leading directions; LoRA as it is.

    Without a base the low-rank part alone.
    """
    import numpy as np

    if u.magnitude is None or base is None or not base.has_weights:
        return u
    if u.layout != "linear":
        what = f"is DoRA of {u.layout} weights, whose change of the weights is not compared"
        raise Refused(
            u.a.path, f"{what}; leave out --base to compare the low-rank parts", tensor=name
        )
    rows = merge_dense.rows_of(name, u, base)
    (high, wide), step = u.shape, max(1, merge_dense.BLOCK // u.shape[1])

    def blocks() -> Iterator[tuple[int, int, Any]]:
        for i in range(0, high, step):
            j = min(i + step, high)
            yield i, j, rows(i, j)

    a, b, _, _ = merge_dense.reduced(lowrank.Blocks((high, wide), blocks), None, ENERGY)
    parts = [np.ascontiguousarray(x, np.float32) for x in (a, b)]
    a_, b_ = (Tensor(name, "F32", x.shape, data=x) for x in parts)
    return LowRank(a_, b_, 1.0)


def _over(x: float, y: float) -> float:
    return x / y if y else 0.0


def _root(x: float, y: float) -> float:
    return math.sqrt(_over(x, y))


def _module(name: str, first: LowRank, second: LowRank) -> tuple[Module, list[float]]:
    """A module's numbers, and <A, B>, ||A||^2, ||B||^2, ||B V_A||^2, ||A V_B||^2. Experts are added."""
    sums = [0.0] * 5
    angles: tuple[list[float], list[float]] = ([], [])
    opposite = counted = 0
    sampled = False
    for p, q in _pairs(first, second):
        (u1, v1, s1), (u2, v2, s2) = lowrank.spaces(*p), lowrank.spaces(*q)
        parts = [
            lowrank.inner(p, q),
            float((s1**2).sum()),
            float((s2**2).sum()),
            lowrank.norm(q[0] @ v1 @ v1.T, q[1]) ** 2 if v1.size and v2.size else 0.0,
            lowrank.norm(p[0] @ v2 @ v2.T, p[1]) ** 2 if v1.size and v2.size else 0.0,
        ]
        sums = [s + x for s, x in zip(sums, parts, strict=True)]
        if u1.size and u2.size:
            for kept, (x, y) in zip(angles, ((u1, u2), (v1, v2)), strict=True):
                kept += [math.degrees(t) for t in lowrank.principal_angles(x, y)]
        found, all_, part = _signs(p, q)
        opposite, counted, sampled = opposite + found, counted + all_, sampled or part
    inner, norm1, norm2, on1, on2 = sums
    module = Module(
        name,
        _over(inner, math.sqrt(norm1 * norm2)),
        _root(norm2, norm1),
        (math.sqrt(norm1), math.sqrt(norm2)),
        tuple(sorted(angles[0])),
        tuple(sorted(angles[1])),
        _over(opposite, counted),
        sampled,
        _root(on1, norm1),
        _root(on2, norm2),
    )
    return module, sums


def _pairs(first: LowRank, second: LowRank) -> Iterator[tuple[lowrank.Pair, lowrank.Pair]]:
    p, q = lowrank.factors(first), lowrank.factors(second)
    if first.layout != "experts":
        yield p, q
        return
    for a1, b1, a2, b2 in zip(*p, *q, strict=True):
        yield (a1, b1), (a2, b2)


def _signs(first: lowrank.Pair, second: lowrank.Pair) -> tuple[int, int, bool]:
    """Entries with opposite signs, entries that both move, and whether these are a sample of rows."""
    import numpy as np

    (a1, b1), (a2, b2) = first, second
    rows, width = b1.shape[0], a1.shape[1]
    step = max(1, -(-rows * width // SAMPLE))
    product = (b1[::step] @ a1) * (b2[::step] @ a2)
    return int(np.sum(product < 0)), int(np.sum(product != 0)), step > 1
