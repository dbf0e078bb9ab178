"""k-means on a line against exact optima: brute force, and coremltools' own exact k-means."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraduct.converters import kmeans

kmeans1d = pytest.importorskip("coremltools._deps.kmeans1d")


def error_of(values: Any, weights: Any, bounds: Any) -> float:
    total = 0.0
    for a, b in itertools.pairwise(bounds):
        if b > a:
            mean = np.average(values[a:b], weights=weights[a:b])
            total += float((weights[a:b] * (values[a:b] - mean) ** 2).sum())
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=9, unique=True),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_small_cases_are_exact(numbers: list[int], bits: int, chance: Any) -> None:
    values = np.sort(np.array(numbers, np.float64)) / 7
    weights = np.array([chance.choice([0.1, 1.0, 5.0]) for _ in values])
    k = 1 << bits
    bounds, error = kmeans.cluster(kmeans.points([(values, weights)]), k)
    inner = itertools.combinations(range(1, len(values)), min(k, len(values)) - 1)
    best = min(error_of(values, weights, (0, *cut, len(values))) for cut in inner)
    assert error_of(values, weights, bounds[0]) == pytest.approx(best, abs=1e-9)
    assert error[0] == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("shape", ["normal", "heavy", "uniform", "two", "steps"])
@pytest.mark.parametrize(
    ("k", "limit", "quick_limit"), [(4, 1.00001, 1.0005), (16, 1.0002, 1.005), (64, 1.001, 1.01)]
)
def test_larger_cases_are_as_good_as_exact(
    shape: str, k: int, limit: float, quick_limit: float
) -> None:
    chance = np.random.default_rng(k)
    numbers = {
        "normal": chance.standard_normal(20_000),
        "heavy": chance.standard_t(2.5, 20_000),
        "uniform": chance.random(20_000),
        "two": chance.standard_normal(20_000) * 0.1 + chance.integers(0, 2, 20_000),
        "steps": chance.integers(0, 300, 20_000) / 7,
    }[shape].astype(np.float16)
    values, counts = np.unique(numbers, return_counts=True)
    wide = values.astype(np.float64)
    found = kmeans1d.cluster(wide, k, weights=counts)
    exact = float((counts * (wide - np.array(found.centroids)[found.clusters]) ** 2).sum())
    points = kmeans.points([(wide, counts)])
    for quick, most in ((False, limit), (True, quick_limit)):
        bounds, error = kmeans.cluster(points, k, quick=quick)
        assert exact * (1 - 1e-9) <= error[0] <= exact * most
        assert error_of(wide, counts, bounds[0]) == pytest.approx(float(error[0]), rel=1e-6)


def test_rows_are_independent() -> None:
    chance = np.random.default_rng(1)
    rows = []
    for n in (1, 3, 17, 60, 400, 3000):
        values = np.unique(chance.standard_normal(n) * 10.0 ** chance.integers(-4, 4))
        rows.append((values, chance.integers(1, 9, len(values)).astype(float)))
    together, errors = kmeans.cluster(kmeans.points(rows), 16)
    for row, bounds, error in zip(rows, together, errors, strict=True):
        alone, least = kmeans.cluster(kmeans.points([row]), 16)
        np.testing.assert_array_equal(alone[0], bounds)
        # the sums of a row begin at zero, wherever it stands
        assert error == pytest.approx(float(least[0]), rel=1e-12)


def test_centroids_of_empty_clusters_repeat_the_last() -> None:
    points = kmeans.points([(np.array([1.0, 2.0, 5.0]), np.array([1.0, 3.0, 1.0]))])
    bounds, error = kmeans.cluster(points, 8)
    assert kmeans.centroids(points, bounds)[0].tolist() == [1, 2, 5, 5, 5, 5, 5, 5]
    assert error[0] == 0
