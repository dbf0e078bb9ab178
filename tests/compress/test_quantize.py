"""Core ML's integers against coremltools' own quantisation and decompression."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loraduct.converters.quantize import Options, expand, ios16, ios18, quantize
from loraduct.errors import Refused

pytest.importorskip("coremltools")
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops import (
    constexpr_affine_dequantize,
)
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (
    constexpr_blockwise_shift_scale,
)
from coremltools.optimize import _utils as ct_utils

ALL = [
    Options(bits, signed, symmetric, granularity, block=16, search=search)
    for bits in (4, 8)
    for signed in (True, False)
    for symmetric in (True, False)
    for granularity in ("tensor", "channel", "block")
    for search in (True, False)
]


def weight(*shape: int, seed: int = 0, kind: str = "float16") -> Any:
    numbers = np.random.default_rng(seed).standard_t(5, shape) * 0.05 + 0.01
    return numbers.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)


def squared(w: Any, dense: Any) -> float:
    gap = w.astype(np.float64) - dense.astype(np.float64)
    return float((gap * gap).sum())


def of_coremltools(w: Any, o: Options) -> Any:
    blocks = {"tensor": [0, 0], "channel": [1, 0], "block": [1, o.block]}[o.granularity]
    found = ct_utils.compute_qparams_by_dtype(
        w.astype(np.float32),
        types.string_to_builtin(f"{'' if o.signed else 'u'}int{o.bits}"),
        "LINEAR_SYMMETRIC" if o.symmetric else "LINEAR",
        blocks,
    )
    return constexpr_blockwise_shift_scale.decompress(*found)


@pytest.mark.parametrize("o", ALL, ids=str)
def test_reads_back_as_coremltools_does_with_less_error(o: Options) -> None:
    w = weight(48, 64)
    found = quantize(w, o)
    dense = expand(found)
    args = {key: value for key, (_, value) in ios18(found).items()}
    theirs = constexpr_blockwise_shift_scale.decompress(
        args["data"], args["scale"], args.get("offset")
    )
    np.testing.assert_array_equal(dense, theirs)
    assert dense.dtype == np.float16
    assert found.error == pytest.approx(squared(w, dense), rel=1e-9)
    # ours rounds its scale to float16 before it is used; theirs is float32
    limit = 1.02 if not o.search else 1 if o.bits == 4 or o.granularity != "tensor" else 1.002
    assert squared(w, dense) <= limit * squared(w, of_coremltools(w, o))
    half = 1 << (o.bits - 1)
    low, high = (-half, half - 1) if o.signed else (0, 2 * half - 1)
    assert low <= found.data.min() <= found.data.max() <= high


@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_searching_helps(kind: str, bits: int, symmetric: bool) -> None:
    w = weight(32, 96, kind=kind)
    errors = [
        quantize(w, Options(bits, symmetric=symmetric, block=32, granularity=g, search=s)).error
        for g in ("tensor", "channel", "block")
        for s in (False, True)
    ]
    plain, searched = errors[::2], errors[1::2]
    assert all(s <= p for s, p in zip(searched, plain, strict=True))
    assert searched[1] < 0.95 * plain[1]
    assert searched == sorted(searched, reverse=True)  # more scales, less error


@pytest.mark.parametrize("bits", [4, 8])
def test_search_is_close_to_every_scale_tried(bits: int) -> None:
    w = weight(3, 200, kind="float32")
    found = quantize(w, Options(bits, scale="float32"))
    high = (1 << (bits - 1)) - 1
    for row, mine in zip(w.astype(np.float64), expand(found).astype(np.float64), strict=True):
        scales = np.linspace(0.1, 1.2, 4000)[:, None] * np.abs(row).max() / high
        tried = ((row - np.clip(np.rint(row / scales), -high - 1, high) * scales) ** 2).sum(1).min()
        assert ((row - mine) ** 2).sum() <= 1.05 * tried


@pytest.mark.parametrize("o", [
    o for o in ALL if o.bits == 8 and o.granularity != "block"
] + [Options(granularity="channel", axis=1)], ids=str)  # fmt: skip
def test_ios16_reads_back(o: Options) -> None:
    found = quantize(weight(48, 64), o)
    args = {key: value for key, (_, value) in ios16(found).items()}
    np.testing.assert_array_equal(constexpr_affine_dequantize.decompress(**args), expand(found))


@pytest.mark.parametrize(("o", "what"), [
    (Options(4), "4 bits"), (Options(granularity="block", block=16), "blocks")
])  # fmt: skip
def test_ios16_refuses_what_it_lacks(o: Options, what: str) -> None:
    with pytest.raises(Refused, match=f"w: has {what}, which need iOS18"):
        ios16(quantize(weight(48, 64), o), "w")


@pytest.mark.parametrize("o", ALL[::3], ids=str)
@pytest.mark.parametrize("fill", [0.0, 0.25, -3.0, 6e-8])
def test_constants(o: Options, fill: float) -> None:
    w = np.full((4, 32), fill, np.float16)
    step = max(abs(fill) / (2 ** (o.bits - 1)), 6e-8)
    assert np.abs(expand(quantize(w, o)) - w).max() <= step
    if fill == 0:
        assert not expand(quantize(w, o)).any()


def test_convolutions_have_blocks_of_input_channels() -> None:
    w = weight(8, 32, 3)
    found = quantize(w, Options(4, granularity="block", block=8))
    assert found.scale.shape == (8, 4, 1)
    theirs = constexpr_blockwise_shift_scale.decompress(found.data, found.scale, None)
    np.testing.assert_array_equal(expand(found), theirs)


@pytest.mark.parametrize(("w", "o", "what"), [
    (np.float16([[np.nan, 1]]), Options(), "holds NaN"),
    (np.float32([[np.inf, 1]]), Options(granularity="tensor"), "holds Inf"),
    (np.zeros((2, 30), np.float16), Options(granularity="block"), "blocks of 32 don't divide axis 1"),
    (np.zeros((2, 30), np.float16), Options(bits=3), "3 bits: Core ML's integers have 4 or 8"),
    (np.zeros((0, 3), np.float16), Options(), "nothing to compress"),
    (np.zeros((), np.float16), Options(), "nothing to compress"),
    (np.zeros((2, 2), np.int32), Options(), "is int32"),
    (np.full((2, 2), 1e9, np.float32), Options(), "beyond float16"),
])  # fmt: skip
def test_refusals(w: Any, o: Options, what: str) -> None:
    with pytest.raises(Refused, match=f"^w: .*{what}"):
        quantize(w, o, name="w")
