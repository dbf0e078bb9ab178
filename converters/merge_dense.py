"""TIES, DARE and magnitude pruning as they are defined: on the entries of dW, not of its factors.

* magnitude: sum_i w_i trim(D_i), where trim keeps the share ``density`` of the largest entries;
* ties (arXiv 2306.01708): trim; elect a sign for every entry, by the sum of what was kept
  ("total") or of its signs ("frequency"); mean of w_i D_i over those that have that sign. A
  negative weight votes for the other sign. For positive weights this is PEFT's ``ties_svd``;
* dare (arXiv 2311.03099): sum_i w_i drop(D_i), where drop keeps an entry with the probability
  ``density`` and divides by it; dare-ties elects among what drop left.

Rows of dW are made from the factors, a block at a time, as often as they are needed, and what comes
out of them has full rank: the leading directions are kept (a randomised range finder; Halko,
Martinsson, Tropp, 2011) and the norm of the rest is measured.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loraduct.adapter import LowRank
from loraduct.converters import lowrank, merge_dora
from loraduct.formats.base import Base
from loraduct.tensor import as_float32

if TYPE_CHECKING:
    from loraduct.converters.merge import Settings

Part = tuple[LowRank, float]
Rows = Callable[[int, int], Any]  # (start, stop) -> rows of dW in float32
BLOCK = 1 << 21  # entries of dW held at once
HELD = 1 << 25  # entries of the merged dW that are held (128 MB), so that they are made once only
FIRST_RANK = 64


def merged(
    name: str, parts: Sequence[Part], settings: Settings, base: Base | None
) -> tuple[lowrank.Pair, float]:
    """(a, b) of the merged update, and the share of its norm that they lack. Of experts, each."""
    import numpy as np

    if parts[0][0].layout != "experts":
        rows = [rows_of(name, u, base) for u, _ in parts]
        matrix = entries(rows, _shape(parts[0][0]), [w for _, w in parts], settings, name, 0)
        a, b, gone, total = reduced(matrix, settings.rank, settings.energy)
        return (a, b), (gone / total) ** 0.5 if total else 0.0
    made = []
    factors = [(u.a.read(), u.b.read() * np.float32(u.scale)) for u, _ in parts]
    count, rank = parts[0][0].shape[0], settings.rank
    for e in range(count):
        rows = [_product(a[e], b[e]) for a, b in factors]
        shape = parts[0][0].shape[1:]
        matrix = entries(rows, (shape[0], shape[1]), [w for _, w in parts], settings, name, e)
        made.append(reduced(matrix, rank, settings.energy))
    top = max(m[0].shape[0] for m in made)  # all experts have one rank: the others are padded
    a = np.stack([np.pad(m[0], ((0, top - m[0].shape[0]), (0, 0))) for m in made])
    b = np.stack([np.pad(m[1], ((0, 0), (0, top - m[1].shape[1]))) for m in made])
    gone, total = (sum(m[i] for m in made) for i in (2, 3))
    return (a, b), (gone / total) ** 0.5 if total else 0.0


def _shape(u: LowRank) -> tuple[int, int]:
    """Of b @ a: an embedding's dW the other way round, a convolution's kernel among its inputs."""
    return u.b.shape[0], math.prod(u.a.shape[1:])


def rows_of(name: str, u: LowRank, base: Base | None) -> Rows:
    """Rows of dW in float32; of DoRA's (c - 1) W + c V, which takes the base's weight."""
    import numpy as np

    a = u.a.read().reshape(u.rank, -1)
    b = u.b.read().reshape(-1, u.rank) * np.float32(u.scale)
    if u.magnitude is None:
        return _product(a, b)
    weight = merge_dora.weight_of(base, name, u)
    c = merge_dora.growth(weight, u).astype(np.float32)[:, None]

    def rows(i: int, j: int) -> Any:
        own = as_float32(weight.rows(i, j), weight.dtype)
        return (c[i:j] - 1) * own + c[i:j] * (b[i:j] @ a)

    return rows


def _product(a: Any, b: Any) -> Rows:
    return lambda i, j: b[i:j] @ a


def entries(
    rows: Sequence[Rows],
    shape: tuple[int, int],
    weights: Sequence[float],
    settings: Settings,
    name: str,
    expert: int,
) -> lowrank.Blocks:
    """The merged dW, block by block. What is dropped hangs on seed, module, adapter and place alone."""
    import numpy as np

    density = settings.density or 1.0
    step = max(1, BLOCK // shape[1])
    spans = [(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]
    dare = settings.method.startswith("dare")
    elect = settings.method.endswith("ties")
    floors = [0.0 if dare else floor(r, spans, density, math.prod(shape)) for r in rows]

    def kept(k: int, i: int, j: int) -> Any:
        values = rows[k](i, j)
        if density >= 1:
            return values
        if not dare:
            values[np.abs(values) < floors[k]] = 0.0
            return values
        key = [settings.seed or 0, zlib.crc32(name.encode()), expert, k, i]
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        mask = draws.random(values.shape, np.float32) < np.float32(density)
        return values * mask / np.float32(density)

    def blocks() -> Iterator[tuple[int, int, Any]]:
        for i, j in spans:
            found = [kept(k, i, j) for k in range(len(rows))]
            yield i, j, (_elected if elect else _sum)(found, weights, settings.sign)

    if math.prod(shape) > HELD:
        return lowrank.Blocks(shape, blocks)
    whole = list(blocks())
    return lowrank.Blocks(shape, lambda: iter(whole))


def _sum(found: Sequence[Any], weights: Sequence[float], sign: str) -> Any:
    import numpy as np

    total = np.float32(weights[0]) * found[0]
    for w, values in zip(weights[1:], found[1:], strict=True):
        total += np.float32(w) * values
    return total


def _elected(found: Sequence[Any], weights: Sequence[float], sign: str) -> Any:
    import numpy as np

    votes = [
        np.sign(w) * (v if sign == "total" else np.sign(v))
        for v, w in zip(found, weights, strict=True)
    ]
    positive = np.sum(votes, axis=0) >= 0
    total = np.zeros(positive.shape, np.float32)
    count = np.zeros(positive.shape, np.float32)
    for v, w in zip(found, weights, strict=True):
        agrees = (v * np.sign(w) > 0) == positive
        agrees &= v != 0
        total += np.where(agrees, np.float32(w) * v, 0)
        count += agrees
    return total / np.maximum(count, 1)


def floor(rows: Rows, spans: Sequence[tuple[int, int]], density: float, size: int) -> float:
    """The size of the smallest entry that is kept: the int(density * size)-th largest, exactly.

    float32 without its sign orders as its bits do: counts of the upper 16, then of the lower 16 of
    those with the upper ones sought.
    """
    import numpy as np

    wanted = int(density * size)
    if density >= 1:
        return 0.0
    if wanted == 0:
        return math.inf

    def count(pick: Callable[[Any], Any]) -> Any:
        total = np.zeros(1 << 16, np.int64)
        for i, j in spans:
            bits = np.abs(rows(i, j)).view(np.uint32).reshape(-1)
            total += np.bincount(pick(bits), minlength=1 << 16)
        return total[::-1].cumsum()[::-1]  # how many are at least this large

    upper = count(lambda bits: bits >> 16)
    high = int(np.nonzero(upper >= wanted)[0][-1])
    left = wanted - int(upper[high + 1] if high + 1 < len(upper) else 0)
    lower = count(lambda bits: bits[bits >> 16 == high] & 0xFFFF)
    low = int(np.nonzero(lower >= left)[0][-1])
    return float(np.array([high << 16 | low], np.uint32).view(np.float32)[0])


def reduced(
    matrix: lowrank.Blocks, rank: int | None, energy: float | None
) -> tuple[Any, Any, float, float]:
    """(a, b, squared norm of what they lack, squared norm of all)."""
    import numpy as np

    most = min(matrix.shape)
    total = sum(float(np.square(m, dtype=np.float64).sum()) for _, _, m in matrix.blocks())
    tried = min(most, rank or FIRST_RANK)
    while True:
        left, values, right = lowrank.leading(matrix, tried)
        kept = np.cumsum(values**2)
        if rank or tried == most or kept[-1] >= (energy or 1.0) * total:
            break
        tried = min(most, 2 * tried)
    k = rank or lowrank.rank_for(values**2, energy or 1.0, total)
    k = max(1, min(k, len(values)))
    a, b = lowrank.balanced(left[:, :k], values[:k], right[:k])
    return a, b, max(total - float(kept[k - 1]), 0.0), total
