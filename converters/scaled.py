"""Tables with a scale per channel of axis 0: channels of different size share one table better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from loraduct.converters.coded import finite, typed
from loraduct.converters.lut import flat, nearest
from loraduct.converters.palette import Options, Palette

_NUMBERS = 1 << 18  # at once


def palettize(
    weight: Any, options: Options, along: list[Any] | None, threads: int, name: str | None
) -> Palette:
    """Channels are divided by their largest number and clustered, with errors counting scale^2.

    Then each scale is fitted to the entries chosen, sum(w q) / sum(q q), and entries are chosen again.
    Scales are rounded to the tables' dtype before they are used. Quotients are at most 1 and are
    clustered in float16, whose steps are narrow against any cluster; entries are chosen for the exact
    ones.
    """
    import numpy as np

    stored = typed(weight, bf16=options.bf16, name=name)
    along = along or [np.ones(n) for n in stored.shape]
    rest, column = tuple(range(1, stored.ndim)), np.ones(1)
    for vector in along[1:]:
        column = np.multiply.outer(column, vector)
    top = np.concatenate([np.abs(part).max(rest, keepdims=True) for _, part in _blocks(stored)])
    finite(top, name)
    scale = _stored(top, options.lut, np.ones(1))
    quotients = np.empty(stored.shape, np.float16)
    for at, part in _blocks(stored):
        quotients[at] = part / scale[at]
    weights = [along[0] * scale.reshape(-1) ** 2, *along[1:]]
    found = flat(quotients, replace(options, bf16=False), weights, threads, name)
    del quotients
    indices, error, norm = found.indices, 0.0, 0.0
    for at, part in _blocks(stored):
        # numbers of one channel: the weight of its own axis cancels out
        dense = _dense(found, at).astype(np.float64)
        above = (part * dense * column).sum(rest, keepdims=True)
        below = (dense * dense * column).sum(rest, keepdims=True)
        fitted = np.divide(above, below, out=scale[at].copy(), where=(below > 0) & (above > 0))
        scale[at] = _stored(fitted, options.lut, scale[at])
        indices[at] = _nearest(part / scale[at], found, at.start)
        gap = part - scale[at].astype(options.lut) * _dense(found, at)  # as it is read back
        rows = along[0][at].reshape((-1,) + (1,) * len(rest))
        error += float((gap * gap * column * rows).sum())
        norm += float((part * part * column * rows).sum())
    return replace(found, scale=scale.astype(options.lut), error=error, norm=norm)


def _blocks(stored: Any) -> Iterator[tuple[slice, Any]]:
    """(rows, their numbers in float64), some at a time."""
    import numpy as np

    step = max(1, _NUMBERS * len(stored) // stored.size)
    for begin in range(0, len(stored), step):
        at = slice(begin, min(begin + step, len(stored)))
        yield at, stored[at].astype(np.float64)


def _stored(scale: Any, kind: str, otherwise: Any) -> Any:
    """Scales as they are stored (float64 again); ``otherwise`` where that would be 0 or Inf."""
    import numpy as np

    with np.errstate(over="ignore"):
        stored = scale.astype(kind).astype(np.float64)
    return np.where((stored > 0) & np.isfinite(stored), stored, otherwise)


def _tables(palette: Palette, begin: int, length: int) -> Iterator[tuple[Any, Any]]:
    """(table, where it serves) of ``length`` rows from ``begin`` on."""
    p = palette
    for at, table in enumerate(p.lut[:, :, 0]):
        first, last = at * p.group, (at + 1) * p.group
        if p.axis:
            yield table, (slice(None),) * p.axis + (slice(first, last),)
        elif last > begin and first < begin + length:
            yield table, (slice(max(first - begin, 0), last - begin),)


def _dense(palette: Palette, at: slice) -> Any:
    """What the tables give for some rows, unscaled."""
    import numpy as np

    part = palette.indices[at]
    out = np.empty(part.shape, palette.lut.dtype)
    for table, where in _tables(palette, at.start, len(part)):
        out[where] = table[part[where]]
    return out


def _nearest(wide: Any, palette: Palette, begin: int) -> Any:
    import numpy as np

    out = np.empty(wide.shape, np.uint8)
    for table, where in _tables(palette, begin, len(wide)):
        out[where] = nearest(wide[where], table.astype(np.float64))
    return out
