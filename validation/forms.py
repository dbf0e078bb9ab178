"""The forms in which a pair of factors may have been compressed: each with the product b a.

As they are; with both norms of each rank made equal; as U S^1/2 and S^1/2 V' of b a = U S V'; and that
with ranks mixed by an orthogonal DCT. Derived here a second time; a singular vector has a sign to choose,
which is taken from what was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_Pair = tuple[Any, Any]


def candidates(a: Any, b: Any, stored_a: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, a (r, in), b (out, r)) in float64, with the ranks of ``stored_a``; 0 where it has more."""
    import numpy as np

    a, b, rank = np.asarray(a, np.float64), np.asarray(b, np.float64), len(stored_a)
    alive = np.flatnonzero(np.abs(a).max(1) * np.abs(b).max(0) > 0)
    live = int(alive[-1]) + 1 if len(alive) else 1  # padding behind them is not stored
    for name, form in _FORMS.items():
        for kept in dict.fromkeys((len(a), live) if name == "plain" else (live,)):
            if kept > rank:
                continue
            one, two = form(a[:kept], b[:, :kept], stored_a[:kept])
            more = rank - len(one)
            yield name, np.pad(one, ((0, more), (0, 0))), np.pad(two, ((0, 0), (0, more)))


def _plain(a: Any, b: Any, stored: Any) -> _Pair:
    return a, b


def _balanced(a: Any, b: Any, stored: Any) -> _Pair:
    import numpy as np

    out, inner = np.sqrt((b**2).sum(0)), np.sqrt((a**2).sum(1))
    used = (out > 0) & (inner > 0)
    factor = np.where(used, np.sqrt(out / np.where(used, inner, 1)), 1)
    return a * factor[:, None], b / factor


def _turned(a: Any, b: Any, stored: Any) -> _Pair:
    one, two = _singular(a, b)
    return _signed(one, two, stored[: len(one)])


def _mixed(a: Any, b: Any, stored: Any) -> _Pair:
    one, two = _singular(a, b)
    mix = _dct(len(one))
    one, two = _signed(one, two, mix @ stored[: len(one)])
    return mix.T @ one, two @ mix


def _singular(a: Any, b: Any) -> _Pair:
    """S^1/2 V' and U S^1/2 of b a = U S V'."""
    import numpy as np

    left, upper_b = np.linalg.qr(b)
    right, upper_a = np.linalg.qr(a.T)
    u, s, v = np.linalg.svd(upper_b @ upper_a.T, full_matrices=False)
    return (v * np.sqrt(s)[:, None]) @ right.T, left @ (u * np.sqrt(s))


def _signed(a: Any, b: Any, stored: Any) -> _Pair:
    """With the signs of the rows that are stored."""
    import numpy as np

    sign = np.where((a * stored).sum(1) < 0, -1.0, 1.0)
    return a * sign[:, None], b * sign


def _dct(n: int) -> Any:
    """The orthogonal DCT-II of n points, frequencies by rows."""
    import numpy as np

    at = np.arange(n)
    waves = np.cos(np.pi / n * np.outer(at, at + 0.5)) * np.sqrt(2 / n)
    waves[0] = np.sqrt(1 / n)
    return waves


_FORMS: dict[str, Callable[[Any, Any, Any], _Pair]] = {
    "plain": _plain,
    "balanced": _balanced,
    "turned": _turned,
    "mixed": _mixed,
}
