"""Bits to a budget, against all plans there are."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraduct.converters import bits
from loraduct.converters.bits import Choice, estimates, plan, size_of
from loraduct.converters.palette import Options, expand
from loraduct.converters.palettize import palettize
from loraduct.errors import Refused

CHOICES = st.lists(
    st.tuples(st.integers(1, 30), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4
)


def tensors_of(found: list[list[tuple[int, float]]]) -> dict[str, list[Choice]]:
    return {
        f"t{i}": [Choice(w, nbytes, error) for w, (nbytes, error) in enumerate(ways)]
        for i, ways in enumerate(found)
    }


@settings(max_examples=300, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=5), st.integers(1, 120), st.data())
def test_no_plan_is_better(found: Any, size: int, data: Any) -> None:
    tensors = tensors_of(found)
    weight = {name: data.draw(st.sampled_from([1.0, 0.0, 0.5, 20.0])) for name in tensors}
    plans = [
        (
            sum(c.nbytes for c in one),
            sum(weight[n] * c.error for n, c in zip(tensors, one, strict=True)),
        )
        for one in itertools.product(*tensors.values())
    ]
    fitting = [error for nbytes, error in plans if nbytes <= size]
    if not fitting:
        least = min(nbytes for nbytes, _ in plans)
        with pytest.raises(Refused, match=f"the smallest possible is {least} bytes"):
            plan(tensors, size, importance=weight)
        return
    got = plan(tensors, size, importance=weight)
    chosen = {
        name: next(c for c in tensors[name] if c.width == w) for name, w in got.widths.items()
    }
    assert got.exact
    assert got.nbytes == sum(c.nbytes for c in chosen.values()) <= size
    assert got.error == pytest.approx(sum(weight[n] * c.error for n, c in chosen.items()), abs=1e-9)
    assert got.error == pytest.approx(min(fitting), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=5))
def test_the_curve_is_convex_and_reached(found: Any) -> None:
    tensors = tensors_of(found)
    curve = plan(tensors, 10_000).curve
    assert [b for b, _ in curve] == sorted(b for b, _ in curve)
    slopes = [(e - f) / (c - b) for (b, e), (c, f) in itertools.pairwise(curve)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(slopes))
    for nbytes, error in curve:
        assert plan(tensors, nbytes).error == pytest.approx(error, abs=1e-9)


def test_with_too_many_plans_the_greedy_one_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    tensors = {
        f"t{i}": [Choice(b, int(n * b), e * n * 4.0**-b) for b in (1, 2, 3, 4, 6, 8)]
        for i, (n, e) in enumerate(
            zip(chance.integers(999, 9999, 60), chance.random(60), strict=True)
        )
    }
    size = sum(ways[2].nbytes for ways in tensors.values()) + 12_345
    best = plan(tensors, size)
    monkeypatch.setattr(bits, "STATES", 1)
    greedy = plan(tensors, size)
    assert not greedy.exact
    assert best.error <= greedy.error <= 1.01 * best.error
    same = plan({name: [ways[2]] for name, ways in tensors.items()}, size)
    assert greedy.error < 0.9 * same.error  # than three bits for all


def test_bits_per_weight() -> None:
    assert size_of({"a": 1000, "b": 600}, 3.5) == 700


@pytest.mark.parametrize("width", [2, 4, 6])
def test_estimates_are_the_errors_made(width: int) -> None:
    w = (np.random.default_rng(0).standard_normal((90, 100)) * 0.1).astype(np.float16)
    made = palettize(w, Options(width))
    gap = w.astype(float) - expand(made).astype(float)
    assert estimates(w, [width])[width] == pytest.approx((gap * gap).sum(), rel=0.005)
