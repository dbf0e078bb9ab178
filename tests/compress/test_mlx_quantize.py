"""MLX's packed weights, bit for bit against mlx."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loraduct.converters.mlx_quantize import (
    BITS,
    GROUPS,
    dequantize,
    quantize,
)
from loraduct.errors import Refused

mx = pytest.importorskip("mlx.core")
KINDS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def to_mlx(w: Any) -> Any:
    if str(w.dtype) == "bfloat16":
        return mx.array(w.view(np.uint16)).view(mx.bfloat16)
    return mx.array(w)


def same(ours: Any, theirs: Any) -> None:
    words = {2: (np.uint16, mx.uint16), 4: (np.uint32, mx.uint32)}[ours.dtype.itemsize]
    np.testing.assert_array_equal(ours.view(words[0]), np.array(theirs.view(words[1])))


def weights(kind: str) -> list[Any]:
    chance = np.random.default_rng(0)
    odd = chance.standard_normal((6, 256))
    odd[0] = 0
    odd[1] = 0.3
    odd[2] = np.abs(odd[2])
    odd[3] = -np.abs(odd[3]) - 1
    odd[4] *= 1e-6
    odd[5, 7] = 3e4
    real = chance.standard_t(4, (96, 256)) * 0.05
    return [w.astype(KINDS[kind]) for w in (odd, real, chance.random((2, 3, 128)))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_is_mlx_bit_for_bit(kind: str, bits: int, group: int) -> None:
    for w in weights(kind):
        ours = quantize(w, bits, group)
        theirs = mx.quantize(to_mlx(w), group_size=group, bits=bits)
        for mine, other in zip((ours.weight, ours.scales, ours.biases), theirs, strict=True):
            same(mine, other)
        same(dequantize(ours), mx.dequantize(*theirs, group_size=group, bits=bits))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_optimal_is_read_by_mlx_with_less_error(kind: str, bits: int) -> None:
    for w in weights(kind):
        found = {mode: quantize(w, bits, 32, mode=mode) for mode in ("mlx", "optimal")}
        best = found["optimal"]
        dense = mx.dequantize(
            *map(to_mlx, (best.weight, best.scales, best.biases)), group_size=32, bits=bits
        )
        same(dequantize(best), dense)
        wide = w.astype(np.float64).reshape(-1, 32)
        errors = {
            mode: ((dequantize(p).astype(np.float64).reshape(-1, 32) - wide) ** 2).sum(1)
            for mode, p in found.items()
        }
        assert (errors["optimal"] <= errors["mlx"]).all()
        if len(w) == 96:
            assert errors["optimal"].sum() < 0.95 * errors["mlx"].sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_importance_is_in_the_scales_and_mlx_reads_them(kind: str, bits: int) -> None:
    counts = np.random.default_rng(6).gamma(0.3, 9.0, 256)
    counts[32:64] = 0  # a group whose inputs never occur
    for w in weights(kind)[:2]:
        plain = quantize(w, bits, 32, mode="optimal")
        found = quantize(w, bits, 32, mode="optimal", importance=counts)
        dense = mx.dequantize(
            *map(to_mlx, (found.weight, found.scales, found.biases)), group_size=32, bits=bits
        )
        same(dequantize(found), dense)
        errors = [
            ((dequantize(p).astype(np.float64) - w.astype(np.float64)) ** 2 * counts)
            .reshape(-1, 32)
            .sum(1)
            for p in (found, plain, quantize(w, bits, 32))
        ]
        assert (errors[0] <= errors[2] * (1 + 1e-6)).all()
        if len(w) == 96:
            assert errors[0].sum() < 0.9 * errors[1].sum()


def test_codes_are_read_as_they_are_meant() -> None:
    w = weights("bfloat16")[1]
    same(quantize(w.view(np.uint16), bf16=True).scales, to_mlx(quantize(w).scales))


@pytest.mark.parametrize(("w", "bits", "group", "what"), [
    (np.zeros((2, 100), np.float16), 4, 64, "whose last axis groups of 64 divide"),
    (np.zeros(64, np.float16), 4, 64, "MLX packs matrices"),
    (np.zeros((0, 64), np.float16), 4, 64, "can't be packed"),
    (np.zeros((2, 64), np.float16), 7, 64, "MLX packs 2, 3, 4, 5, 6, 8 bits"),
    (np.zeros((2, 64), np.float16), 4, 16, "groups of 32, 64, 128"),
    (np.full((2, 64), np.nan, np.float16), 4, 64, "holds NaN or Inf"),
    (np.zeros((2, 64), np.int32), 4, 64, "is int32"),
])  # fmt: skip
def test_refusals(w: Any, bits: int, group: int, what: str) -> None:
    with pytest.raises(Refused, match=f"^w: .*{what}"):
        quantize(w, bits, group, name="w")
