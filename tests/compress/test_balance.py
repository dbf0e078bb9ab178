"""Factors turned before they are compressed: the same dW, and less of an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loraduct.adapter import LowRank
from loraduct.converters import balance
from loraduct.converters.compress_factors import Pair, best
from loraduct.converters.palette import Options, expand
from loraduct.converters.palettize import palettize
from loraduct.tensor import Tensor


def factors(rank: int = 6, seed: int = 0) -> tuple[Any, Any]:
    chance = np.random.default_rng(seed)
    a, b = chance.standard_normal((rank, 80)), chance.standard_normal((48, rank))
    size = np.geomspace(0.01, 100, rank)
    return a * size[:, None], b / size[chance.permutation(rank)]


def compress(x: Any) -> Any:
    return expand(palettize(x.astype(np.float32), Options(3)))


def pair(a: Any, b: Any) -> Pair:
    """A module with these factors, as they lie in a file of PEFT's."""
    stored = [Tensor(n, "F32", x.shape, data=x.astype(np.float32)) for n, x in (("a", a), ("b", b))]
    return Pair("m", LowRank(*stored, 1.0), ("a", "b"), (0, 1), turnable=True)


@pytest.mark.parametrize("name", balance.FORMS)
@pytest.mark.parametrize("rank", [1, 5, 6])
def test_dw_stays(name: str, rank: int) -> None:
    a, b = factors(rank)
    c, d = balance.FORMS[name](a, b)
    assert c.shape == a.shape
    assert d.shape == b.shape
    np.testing.assert_allclose(d @ c, b @ a, atol=1e-9 * np.abs(b @ a).max())
    assert balance.loss(a, b, c, d) < 1e-7


def test_norms_are_as_they_are_said_to_be() -> None:
    a, b = factors()
    for form in ("balanced", "turned", "mixed"):
        c, d = balance.FORMS[form](a, b)
        np.testing.assert_allclose(np.linalg.norm(c, axis=1), np.linalg.norm(d, axis=0))
    nuclear, spread = np.linalg.svd(b @ a, compute_uv=False).sum(), []
    for form in ("turned", "mixed"):
        c, d = balance.FORMS[form](a, b)
        assert np.linalg.norm(c) * np.linalg.norm(d) == pytest.approx(nuclear)
        spread.append(np.ptp(np.linalg.norm(c, axis=1)))
    assert spread[1] < 0.5 * spread[0]


def test_zeros_stay() -> None:
    a, b = factors()
    for form in balance.FORMS.values():
        c, d = form(a, np.zeros_like(b))
        assert not (d @ c).any()
        assert np.isfinite(c).all()
    assert best(pair(a, np.zeros_like(b)), 3, "lut", 0).loss == 0


def test_best_has_the_least_error() -> None:
    a, b = factors()
    dw, errors = b @ a, {}
    for name, form in balance.FORMS.items():
        c, d = (compress(x).astype(np.float64) for x in form(a, b))
        errors[name] = np.linalg.norm(d @ c - dw) / np.linalg.norm(dw)
    found = best(pair(a, b), 3, "lut", 0)
    c, d = (coded.back.astype(np.float64) for coded in found.coded)
    assert found.loss == pytest.approx(min(errors.values()), rel=1e-4)
    assert found.loss == pytest.approx(np.linalg.norm(d @ c - dw) / np.linalg.norm(dw), rel=1e-4)
    assert errors[found.form] == min(errors.values())
    assert found.loss < 0.8 * errors["plain"]
