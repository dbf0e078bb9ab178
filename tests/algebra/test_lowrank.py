"""Algebra on factors against the dense product, by numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraduct.converters import lowrank

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))


def pair(out: int, inner: int, r: int, seed: int, *, dull: bool = False) -> tuple[Any, Any]:
    """Random factors; ``dull``: of rank one only, and of very different sizes."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(r, inner)), rng.normal(size=(out, r))
    if dull:
        a[:] = a[:1] * np.logspace(0, -9, r)[:, None]
    return a, b


@given(SHAPES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_svd_is_the_dense_one(shape: tuple[int, int, int, int], dull: bool) -> None:
    a, b = pair(*shape, dull=dull)
    dense = b @ a
    left, values, right = lowrank.svd(a, b)
    scale = max(float(np.abs(dense).max()), 1.0)
    assert np.allclose(left * values[: left.shape[1]] @ right, dense, atol=1e-9 * scale)
    exact = np.linalg.svd(dense, compute_uv=False)
    assert np.allclose(values, exact[: len(values)], atol=1e-9 * scale)
    assert np.allclose(lowrank.values_of(a, b), exact[: len(values)], atol=1e-9 * scale)


@given(SHAPES, st.integers(1, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_truncation_loses_what_eckart_and_young_say(
    shape: tuple[int, int, int, int], rank: int, dull: bool
) -> None:
    a, b = pair(*shape, dull=dull)
    (a2, b2), said, _ = lowrank.truncated(a, b, rank)
    dense = b @ a
    best = float((np.linalg.svd(dense, compute_uv=False)[rank:] ** 2).sum() ** 0.5)
    found = float(np.linalg.norm(dense - b2 @ a2))
    size = float(np.linalg.norm(dense))
    assert a2.shape[0] <= rank
    assert found == pytest.approx(best, rel=1e-6, abs=1e-9 * size)
    assert said == pytest.approx(best, rel=1e-6, abs=1e-9 * size)


@given(SHAPES, st.integers(0, 1000), st.integers(1, 9), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_sums_norms_and_inner_products(
    shape: tuple[int, int, int, int], seed: int, r: int, weight: float
) -> None:
    out, inner, *_ = shape
    one, two = pair(*shape), pair(out, inner, r, seed)
    d1, d2 = one[1] @ one[0], two[1] @ two[0]
    a, b = lowrank.added([one, two], [1.0, weight])
    assert np.allclose(b @ a, d1 + weight * d2, atol=1e-10)
    assert lowrank.norm(*one) == pytest.approx(np.linalg.norm(d1), rel=1e-10)
    assert lowrank.inner(one, two) == pytest.approx(float(np.vdot(d1, d2)), rel=1e-8, abs=1e-8)


@given(st.integers(2, 30), st.integers(1, 6), st.integers(1, 6), st.integers(0, 500))
@settings(max_examples=40, deadline=None)
def test_principal_angles_by_another_way(n: int, p: int, q: int, seed: int) -> None:
    """Of two projections: P Q P has the squared cosines for eigenvalues."""
    rng = np.random.default_rng(seed)
    x, y = (np.linalg.qr(rng.normal(size=(n, min(k, n))))[0] for k in (p, q))
    angles = lowrank.principal_angles(x, y)
    product = x @ x.T @ y @ y.T @ x @ x.T
    squares = np.sort(np.linalg.eigvalsh((product + product.T) / 2))[::-1][: len(angles)]
    assert len(angles) == min(x.shape[1], y.shape[1])
    assert np.allclose(np.cos(angles) ** 2, np.clip(squares, 0, 1), atol=1e-9)


def test_small_angles_keep_their_digits() -> None:
    tiny = 1e-9
    x = np.array([[1.0], [0.0]])
    y = np.array([[np.cos(tiny)], [np.sin(tiny)]])
    assert lowrank.principal_angles(x, y)[0] == pytest.approx(tiny, rel=1e-6)


def test_experts_are_handled_one_by_one() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 5, 30)), rng.normal(size=(3, 40, 5))
    (a2, b2), said, _ = lowrank.truncated(a, b, 2)
    each = [lowrank.truncated(a[e], b[e], 2) for e in range(3)]
    for e, ((a1, b1), *_) in enumerate(each):
        assert np.allclose(b2[e] @ a2[e], b1 @ a1)
    assert said == pytest.approx(sum(s**2 for _, s, _ in each) ** 0.5)


def test_ill_conditioned_factors_do_not_go_by_their_gram_matrix() -> None:
    """Two columns that differ by 1e-10: the Gram matrix holds nothing of the difference."""
    rng = np.random.default_rng(2)
    column = rng.normal(size=(200, 1))
    b = np.hstack([column, column + 1e-10 * rng.normal(size=(200, 1))])
    a = rng.normal(size=(2, 150))
    a[1] = -a[0] + 1e-3 * rng.normal(size=150)
    dense = b @ a
    left, values, right = lowrank.svd(a, b)
    assert np.linalg.norm(left * values @ right - dense) < 1e-12 * np.linalg.norm(
        b
    ) * np.linalg.norm(a)
    assert np.allclose(left.T @ left, np.eye(2), atol=1e-12)


def test_nothing_has_no_norm_and_no_space() -> None:
    a, b = np.zeros((3, 9)), np.ones((7, 3))
    (a2, b2), said, _ = lowrank.truncated(a, b, 2)
    assert not (b2 @ a2).any()
    assert said == 0
    assert lowrank.spaces(a, b)[0].shape == (7, 0)
