"""Low-rank factors turned before they are compressed: dW = b a stays, its error after rounding shrinks.

Rounding errors Ea and Eb make dW wrong by b Ea + Eb a. A quantiser with one scale or table for all of
a factor makes errors in proportion to the factor's own size, so the expected square of that is
proportional to |a|^2 |b|^2 (Frobenius norms). Over scales per rank its minimum is (sum_i |a_i| |b_i|)^2,
where both norms of each rank are equal; over all invertible R, b R^-1 and R a, it is the square of
dW's nuclear norm, at a = S^1/2 V' and b = U S^1/2 (dW = U S V').

In trained adapters it is often otherwise: a is close to the uniform numbers it began with, which tables
fit better than the bell that any rotation makes of them, and ranks are alike. So `compress_factors.best`
tries the forms and keeps the one whose dW comes out best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def balanced(a: Any, b: Any) -> tuple[Any, Any]:
    """a (r, in), b (out, r) with |a_i| = |b_i| for each rank i. float64; a rank of zeros stays."""
    import numpy as np

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    left, right = np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1)
    both = (left > 0) & (right > 0)
    factor = np.sqrt(np.divide(left, right, out=np.ones_like(left), where=both))
    factor[~both] = 1
    return a * factor[:, None], b / factor


def turned(a: Any, b: Any) -> tuple[Any, Any]:
    """S^1/2 V' and U S^1/2 from QR of both factors and an SVD of the small core. float64."""
    import numpy as np

    left, core_left = np.linalg.qr(np.asarray(b, np.float64))
    right, core_right = np.linalg.qr(np.asarray(a, np.float64).T)
    u, s, v = np.linalg.svd(core_left @ core_right.T)
    root = np.sqrt(s)
    return (root[:, None] * v) @ right.T, left @ (u * root)


def mixed(a: Any, b: Any) -> tuple[Any, Any]:
    """``turned``, with ranks mixed by an orthogonal matrix (DCT), so that they have much the same norm."""
    import numpy as np

    a, b = turned(a, b)
    rank = len(a)
    n = np.arange(rank)
    mix = np.sqrt(2 / rank) * np.cos(np.pi * (n[None, :] + 0.5) * n[:, None] / rank)
    mix[0] /= np.sqrt(2)
    return mix.T @ a, b @ mix


def plain(a: Any, b: Any) -> tuple[Any, Any]:
    """The factors as they are."""
    return a, b


FORMS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "plain": plain,
    "balanced": balanced,
    "turned": turned,
    "mixed": mixed,
}


def loss(a: Any, b: Any, other_a: Any, other_b: Any) -> float:
    """Relative Frobenius error of other_b @ other_a against b @ a, from the factors' Gram matrices."""
    import numpy as np

    right = np.concatenate((np.asarray(a, np.float64), np.asarray(other_a, np.float64)))
    left = np.concatenate((np.asarray(b, np.float64), -np.asarray(other_b, np.float64)), axis=1)
    products, rank = (left.T @ left) * (right @ right.T), len(a)
    size = float(products[:rank, :rank].sum())
    return float(np.sqrt(max(float(products.sum()), 0.0) / size)) if size else 0.0
