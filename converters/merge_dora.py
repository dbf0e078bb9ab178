"""A weighted sum of DoRA and LoRA updates is DoRA again, exactly, of the ranks together.

DoRA changes W by D = m (W + V) / n - W with V = s B A and n = ||W + V||, row by row; with c = m / n
that is (c - 1) W + c V. So sum_i w_i D_i = g W + L with g = sum w_i (c_i - 1), a number a row, and
L = sum w_i c_i V_i of low rank (a LoRA has c = 1). Then W + g W + L = (1 + g) (W + L / (1 + g)),
which is DoRA with the update L / (1 + g) and the magnitudes (1 + g) ||W + L / (1 + g)|| (negative
where the weights turn a row around), wherever 1 + g is not 0. The n_i take the base's weights:
without them nothing of this can be had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraduct.adapter import Adapter, LowRank
from loraduct.computed import given
from loraduct.converters import lowrank
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.tensor import FLOATS, Tensor, as_float32

if TYPE_CHECKING:
    from loraduct.converters.merge import Settings

Part = tuple[LowRank, float]
NOTHING = 1e-6  # of 1 + g: below, dividing by it leaves no digits
_ROWS = 1 << 20  # values of the base's weight held at once


def check(
    adapters: Sequence[Adapter], parts: Mapping[str, Sequence[Part]], base: Base | None
) -> None:
    """Refuse what has no such form, by name."""
    dora = next(a for a in adapters if any(u.magnitude is not None for u in a.low_rank.values()))
    if base is None or not base.has_weights:
        what = "is DoRA: its sum with others is DoRA again, which takes the base's weights; give --base BASE"
        raise Refused(dora.path, what)
    for name, found in parts.items():
        for u, _ in found:
            if u.layout != "linear" or u.bias is not None:
                kind = "lora_bias" if u.bias is not None else f"a {u.layout} weight"
                what = f"is {kind}, which can't be merged with DoRA; leave it out with convert --exclude"
                raise Refused(u.a.path, what, tensor=name)
        weight_of(base, name, found[0][0])


def weight_of(base: Base | None, module: str, u: LowRank) -> Tensor:
    """The base's own weight, in plain numbers."""
    weight = base.weight_of(f"{module}.weight") if base and base.has_weights else None
    if weight is None or weight.stored_dtype not in FLOATS or weight.shape != u.shape:
        where = base.path if base else u.a.path
        what = "has no plain weight for this module, which DoRA needs; give --base BASE, unpacked"
        raise Refused(where, what, tensor=module)
    return weight


def growth(weight: Tensor, u: LowRank) -> Any:
    """c (out,) = m / ||W + s B A||, row by row; ones of a plain LoRA."""
    import numpy as np

    if u.magnitude is None:
        return np.ones(u.shape[0])
    a, b = lowrank.factors(u)
    lengths = rows_of(weight, lambda w, i, j: np.linalg.norm(w + b[i:j] @ a, axis=1))
    return u.magnitude.read().astype(np.float64).reshape(-1) / lengths


def rows_of(weight: Tensor, say: Callable[[Any, int, int], Any]) -> Any:
    """``say`` of every block of rows in float64, one behind the other."""
    import numpy as np

    count, width = weight.shape
    step = max(1, _ROWS // width)
    found = []
    for i in range(0, count, step):
        j = min(i + step, count)
        rows = as_float32(weight.rows(i, j), weight.dtype).astype(np.float64)
        found.append(say(rows, i, j))
    return np.concatenate(found)


def merged(
    name: str, parts: Sequence[Part], settings: Settings, base: Base | None
) -> tuple[LowRank, float]:
    """One module. ``residual`` is of L, cut to a rank if one was given: g W is carried exactly."""
    import numpy as np

    weight = weight_of(base, name, parts[0][0])
    grown = [growth(weight, u) for u, _ in parts]
    g = sum(w * (c - 1) for (_, w), c in zip(parts, grown, strict=True))
    if (np.abs(1 + g) < NOTHING).any():
        what = "the weights leave nothing of some rows of the base, which no magnitude can say"
        raise Refused(parts[0][0].a.path, what, tensor=name)
    pairs = [
        (a, c[:, None] * b)
        for (a, b), c in zip((lowrank.factors(u) for u, _ in parts), grown, strict=True)
    ]
    a, b = lowrank.added(pairs, [w for _, w in parts])
    residual = 0.0
    if settings.rank is not None or settings.energy is not None:
        (a, b), gone, total = lowrank.truncated(a, b, settings.rank, settings.energy)
        residual = gone / total if total else 0.0
    lengths = rows_of(
        weight, lambda w, i, j: np.linalg.norm((1 + g[i:j, None]) * w + b[i:j] @ a, axis=1)
    )
    values = {"a": a, "b": b / (1 + g)[:, None], "m": np.sign(1 + g) * lengths}
    stored = [t for u, _ in parts for t in u.tensors]

    def held(side: str) -> Tensor:
        value = values[side].astype(np.float32)
        return given(f"{name}.{side}", stored, value.shape, lambda: value)

    update = LowRank(held("a"), held("b"), 1.0)
    return replace(update, magnitude=held("m")), residual
