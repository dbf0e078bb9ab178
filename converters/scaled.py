"""Tables with a scale per channel of axis 0: channels of different size share one table better."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loraduct.converters.coded import typed
from loraduct.converters.lut import flat, nearest
from loraduct.converters.palette import Options, Palette, expand


def palettize(
    weight: Any, options: Options, along: list[Any] | None, threads: int, name: str | None
) -> Palette:
    """Channels are divided by their largest number and clustered, with errors counting scale^2.

    Then each scale is fitted to the entries chosen, sum(w q) / sum(q q), and entries are chosen again.
    Scales are rounded to the tables' dtype before they are used.
    """
    import numpy as np

    wide = typed(weight, bf16=options.bf16, name=name).astype(np.float64)
    along = along or [np.ones(n) for n in wide.shape]
    rest = tuple(range(1, wide.ndim))
    scale = _stored(np.abs(wide).max(rest, keepdims=True), options.lut, np.ones(1))
    inner = replace(options, bf16=False)
    weights = [along[0] * scale.reshape(-1) ** 2, *along[1:]]
    first = flat((wide / scale).astype(np.float32), inner, weights, threads, name)
    dense = expand(first).astype(np.float64)
    # numbers of one channel: the weight of its own axis cancels out
    column = np.ones(1)
    for vector in along[1:]:
        column = np.multiply.outer(column, vector)
    top = (wide * dense * column).sum(rest, keepdims=True)
    bottom = (dense * dense * column).sum(rest, keepdims=True)
    fitted = np.divide(top, bottom, out=scale.copy(), where=(bottom > 0) & (top > 0))
    scale = _stored(fitted, options.lut, scale)
    again = replace(first, indices=_nearest(wide / scale, first))
    gap = wide - scale * expand(again).astype(np.float64)
    rows = along[0].reshape((-1,) + (1,) * len(rest))
    return replace(
        again, scale=scale.astype(options.lut), error=float((gap * gap * column * rows).sum())
    )


def _stored(scale: Any, kind: str, otherwise: Any) -> Any:
    """Scales as they are stored (float64 again); ``otherwise`` where that would be 0 or Inf."""
    import numpy as np

    with np.errstate(over="ignore"):
        stored = scale.astype(kind).astype(np.float64)
    return np.where((stored > 0) & np.isfinite(stored), stored, otherwise)


def _nearest(wide: Any, palette: Palette) -> Any:
    import numpy as np

    p = palette
    moved = np.moveaxis(wide, p.axis, 0)
    out = np.empty(moved.shape, np.uint8)
    for at, table in enumerate(p.lut[:, :, 0].astype(np.float64)):
        part = slice(at * p.group, (at + 1) * p.group)
        out[part] = nearest(moved[part], table)
    return np.ascontiguousarray(np.moveaxis(out, 0, p.axis))
