"""Algebra on the factors of low-rank updates, never on the dense product.

A pair is (a, b) with a (..., r, in) and b (..., out, r) in float64, and stands for b @ a; the axes
in front are of experts. b = Q R with orthonormal Q, likewise a.T = P S: then b @ a = Q (R S.T) P.T,
and the singular values of the small core R S.T are those of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loraduct.adapter import Dense, LowRank

Pair = tuple[Any, Any]
Choice = Callable[[Any], int]  # singular values (..., k) -> how many are kept
Widen = Callable[[Any], Any]  # (k, n) -> Q @ that
CONDITION = 1e-6  # smallest over largest eigenvalue down to which a Gram matrix is trusted
OVERSAMPLING, POWER = 12, 3  # of the randomised range finder (Halko, Martinsson, Tropp, 2011)
TINY = 1e-10  # of the largest singular value: what counts as none


@dataclass(frozen=True)
class Blocks:
    """A matrix given by blocks of its rows: ``blocks()`` yields (start, stop, rows) again and again."""

    shape: tuple[int, int]
    blocks: Callable[[], Iterator[tuple[int, int, Any]]]


def factors(update: LowRank, *, finite: bool = True) -> Pair:
    """(a (r, in), scale * b (out, r)) in float64, with a first axis of experts where there are any.

    A convolution's kernel counts among its inputs. ``finite``: NaN and Inf are refused.
    """
    import numpy as np

    a = update.a.read(finite=finite).astype(np.float64)
    b = update.b.read(finite=finite).astype(np.float64) * update.scale
    if update.layout == "conv":
        return a.reshape(update.rank, -1), b.reshape(-1, update.rank)
    return a, b


def singular_values(update: LowRank) -> Any:
    """Singular values of scale * b @ a, largest first: QR of both factors, SVD of the small core.

    Of experts: (experts, r).
    """

    return values_of(*factors(update, finite=False))


def values_of(a: Any, b: Any) -> Any:
    """Singular values (..., k) of b @ a, largest first, k = min(r, out, in): always by QR."""
    import numpy as np

    left: Any = np.linalg.qr(b, mode="r")
    right: Any = np.linalg.qr(a.swapaxes(-1, -2), mode="r")
    return np.linalg.svd(left @ right.swapaxes(-1, -2), compute_uv=False)


def added(pairs: Sequence[Pair], weights: Sequence[float] | None = None) -> Pair:
    """The pair of the weighted sum of products, exactly: factors side by side, weights in b."""
    import numpy as np

    weights = [1.0] * len(pairs) if weights is None else weights
    a = np.concatenate([p[0] for p in pairs], axis=-2)
    b = np.concatenate([w * p[1] for p, w in zip(pairs, weights, strict=True)], axis=-1)
    return a, b


def svd(a: Any, b: Any, choose: Choice = lambda values: values.shape[-1]) -> Any:
    """(left (..., out, k), all singular values, right (..., k, in)) of b @ a.

    ``choose`` says by the singular values how many triplets k are made.
    """
    u, values, vt, wide_b, wide_a = _core(a, b)
    k = choose(values)
    right = wide_a(vt[..., :k, :].swapaxes(-1, -2)).swapaxes(-1, -2)
    return wide_b(u[..., :k]), values, right


def cut(a: Any, b: Any, choose: Choice) -> tuple[Pair, Any]:
    """The best pair of the rank that ``choose`` picks by the singular values, and all of these.

    Cut at k, the products of singular triplets are the best approximation of that rank (Eckart and
    Young). Half of the size is on either side.
    """
    import numpy as np

    u, values, vt, wide_b, wide_a = _core(a, b)
    k = choose(values)
    root = np.sqrt(values[..., None, :k])
    halved = vt[..., :k, :].swapaxes(-1, -2) * root
    return (wide_a(halved).swapaxes(-1, -2), wide_b(u[..., :k] * root)), values


def _core(a: Any, b: Any) -> tuple[Any, Any, Any, Widen, Widen]:
    """SVD u, values, vt of R S.T, and how to multiply by Q and by P."""
    import numpy as np

    small_b, wide_b = _split(b)
    small_a, wide_a = _split(a.swapaxes(-1, -2))
    u, values, vt = np.linalg.svd(small_b @ small_a.swapaxes(-1, -2), full_matrices=False)
    return u, values, vt, wide_b, wide_a


def _split(x: Any) -> tuple[Any, Widen]:
    """R (k, r) and how to multiply by Q (n, k), for x (n, r) = Q R with orthonormal Q.

    By the Gram matrix x.T x = V D V.T, with R = sqrt(D) V.T and Q = x V / sqrt(D), where it is well
    conditioned: several times faster than QR, but it squares the condition number.
    """
    import numpy as np

    if x.shape[-2] > 2 * x.shape[-1]:
        values, vectors = np.linalg.eigh(x.swapaxes(-1, -2) @ x)
        if (values[..., 0] > CONDITION * values[..., -1]).all():
            root = np.sqrt(values)
            turned = vectors / root[..., None, :]
            return root[..., :, None] * vectors.swapaxes(-1, -2), lambda u: x @ (turned @ u)
    q, r = np.linalg.qr(x)
    return r, lambda u: q @ u


def balanced(left: Any, values: Any, right: Any) -> Pair:
    """The pair of left * values @ right, with half of the size on either side."""
    import numpy as np

    root = np.sqrt(values[..., : left.shape[-1]])
    return root[..., :, None] * right, left * root[..., None, :]


def truncated(
    a: Any, b: Any, rank: int | None = None, energy: float | None = None
) -> tuple[Pair, float, float]:
    """The best pair of that rank, or of the rank that keeps this share of the squared norm.

    With ||b @ a - that||, which is the root of the sum of what was cut, squared, and ||b @ a||. Of
    experts (experts, k, n) the one rank that does for all of them together.
    """

    def choose(values: Any) -> int:
        most: int = min(rank or values.shape[-1], values.shape[-1])
        if energy is None:
            return most
        squares = values.reshape(-1, values.shape[-1]) ** 2
        return min(most, rank_for(squares.sum(0), energy))

    pair, values = cut(a, b, choose)
    return pair, lost(values, pair[0].shape[-2]), float((values**2).sum() ** 0.5)


def rank_for(squares: Any, energy: float, total: float | None = None) -> int:
    """The smallest rank that keeps this share of the squared norm; at least 1.

    ``squares`` of the singular values, largest first; ``total``: of all, where these are the leading
    ones. One more than there are where these don't keep so much.
    """
    import numpy as np

    kept = np.cumsum(squares)
    whole = kept[-1] if total is None else total
    return int(np.searchsorted(kept, energy * whole * (1 - 1e-12))) + 1 if whole else 1


def leading(matrix: Blocks, rank: int) -> tuple[Any, Any, Any]:
    """Leading singular triplets: exact where the rank is near the full one, else by a random range.

    The range may be found in float32; the values are of Q.T M in float64 with orthonormal Q, so
    that what the factors lack is ||M||^2 - sum(values^2) whatever the range.
    """
    import numpy as np

    rows, columns = matrix.shape
    if 2 * (rank + OVERSAMPLING) >= min(rows, columns):
        whole = np.concatenate([m.astype(np.float64) for _, _, m in matrix.blocks()])
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    start = np.random.default_rng(0).standard_normal((columns, rank + OVERSAMPLING), np.float32)
    basis = np.linalg.qr(_times(matrix, start))[0]
    for _ in range(POWER):
        basis = np.linalg.qr(_times(matrix, np.linalg.qr(_turned_times(matrix, basis))[0]))[0]
    basis = np.linalg.qr(basis.astype(np.float64))[0]
    left, values, right = np.linalg.svd(_turned_times(matrix, basis).T, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]


def _times(matrix: Blocks, x: Any) -> Any:
    """M @ x for x (columns, k), in the dtype of x."""
    import numpy as np

    return np.concatenate([m.astype(x.dtype, copy=False) @ x for _, _, m in matrix.blocks()])


def _turned_times(matrix: Blocks, x: Any) -> Any:
    """M.T @ x for x (rows, k), in the dtype of x."""
    import numpy as np

    total = np.zeros((matrix.shape[1], x.shape[1]), x.dtype)
    for i, j, m in matrix.blocks():
        total += m.astype(x.dtype, copy=False).T @ x[i:j]
    return total


def lost(values: Any, rank: int) -> float:
    """Frobenius norm of what is beyond the first ``rank`` singular values (..., k)."""
    return float((values[..., rank:] ** 2).sum() ** 0.5)


def norm(a: Any, b: Any) -> float:
    """Frobenius norm of b @ a."""
    return float((values_of(a, b) ** 2).sum() ** 0.5)


def inner(one: Pair, two: Pair) -> float:
    """<b1 @ a1, b2 @ a2> = sum((b1.T b2) * (a1 a2.T))."""
    (a1, b1), (a2, b2) = one, two
    return float(((b1.swapaxes(-1, -2) @ b2) * (a1 @ a2.swapaxes(-1, -2))).sum())


def spaces(a: Any, b: Any) -> tuple[Any, Any, Any]:
    """Orthonormal bases of the column space (out, k) and the row space (in, k) of b @ a, and its
    k singular values that are not nothing. Of one matrix: no axis of experts.
    """
    left, values, right = svd(a, b)
    k = int((values > TINY * values.max(initial=0.0)).sum())
    return left[:, :k], right[:k].T, values[:k]


def principal_angles(x: Any, y: Any) -> Any:
    """Angles (min(p, q),) in radians, smallest first, between the spaces of x (n, p) and y (n, q).

    Both with orthonormal columns. The cosines are the singular values of x.T y; of small angles the
    sines are taken, which rounding leaves intact (Björck and Golub, 1973).
    """
    import numpy as np

    if x.shape[1] < y.shape[1]:
        x, y = y, x
    product = x.T @ y
    cosines = np.clip(np.linalg.svd(product, compute_uv=False), 0.0, 1.0)
    sines = np.clip(np.linalg.svd(y - x @ product, compute_uv=False)[::-1], 0.0, 1.0)
    return np.where(cosines**2 < 0.5, np.arccos(cosines), np.arcsin(sines[: len(cosines)]))


def dense_singular_values(update: Dense) -> Any:
    """Singular values of an update of full rank, largest first."""
    import numpy as np

    return np.linalg.svd(update.delta.read(), compute_uv=False).astype(np.float64)


def effective_rank(values: Any) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007)."""
    import numpy as np

    total = float(values.sum())
    if not total:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))
