"""Tables and indices against coremltools' own palettization and decompression."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loraduct.converters.coded import typed
from loraduct.converters.palette import BITS, Options, expand, ios16, ios18
from loraduct.converters.palettize import palettize, palettize_all
from loraduct.errors import Refused

pytest.importorskip("coremltools")
from coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops import (
    constexpr_lut_to_dense as ios16_op,
)
from coremltools.models.neural_network import quantization_utils
from coremltools.optimize import _utils as ct_utils
from coremltools.optimize.coreml._quantization_passes import palettize_weights


def weight(*shape: int, seed: int = 0, kind: str = "float16", heavy: float = 4.0) -> Any:
    numbers = np.random.default_rng(seed).standard_t(heavy, shape) * 0.05
    return numbers.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)


def squared(weight: Any, dense: Any, importance: Any = 1.0) -> float:
    gap = weight.astype(np.float64) - dense.astype(np.float64)
    return float((gap * gap * importance).sum())


def of_coremltools(w: Any, bits: int, axis: int, group: int, mode: str, vector: int = 1) -> Any:
    found = palettize_weights.grouped_channelwise_compress(
        w, mode.upper(), bits, axis, group, None, vector
    )
    return ct_utils.lut_to_dense(*found)


def of_exact(w: Any, bits: int, axis: int, group: int) -> Any:
    """What coremltools gives when it is made to solve every group exactly (by itself it does so for
    float16 groups of 10,000 values and more, and is worse than this elsewhere)."""
    moved = np.moveaxis(w, axis, 0)
    dense = np.empty(moved.shape, np.float16)
    step = group or len(moved)
    for at in range(0, len(moved), step):
        part = moved[at : at + step]
        lut, chosen = quantization_utils._get_kmeans_lookup_table_and_weight(bits, part, True)
        dense[at : at + step] = lut.astype(np.float16)[chosen].reshape(part.shape)
    return np.moveaxis(dense, 0, axis)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize(("axis", "group"), [(0, 0), (0, 16), (1, 16)])
def test_error_is_no_larger_than_coremltools(bits: int, kind: str, axis: int, group: int) -> None:
    w = weight(64, 192, kind=kind)
    found = palettize(w, Options(bits, group=group, axis=axis))
    ours = squared(w, expand(found))
    limit = (1.0005 if bits <= 4 else 1.01) if group else (1.00001 if bits <= 4 else 1.001)
    assert ours <= limit * squared(w, of_exact(w, bits, axis, group))
    assert found.error == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("options", [
    Options(1), Options(3, group=5), Options(4, group=7, axis=1), Options(6), Options(2, group=1),
    Options(4, scaled=True), Options(3, group=10, scaled=True), Options(4, mode="uniform"),
    Options(4, vector=2), Options(3, vector=2, axis=1, group=14), Options(8, lut="float32"),
], ids=str)  # fmt: skip
def test_reads_back_as_coremltools_does(kind: str, options: Options) -> None:
    w = weight(40, 70, seed=3, kind=kind)
    found = palettize(w, options, threads=2)
    dense = expand(found)
    assert dense.shape == w.shape
    assert str(dense.dtype) == options.lut
    args = {key: value for key, (_, value) in ios18(found).items()}
    scale = args.pop("scale", None)
    theirs = ct_utils.lut_to_dense(**args)
    np.testing.assert_array_equal(dense, theirs if scale is None else theirs * scale)
    # every number has the nearest of its table's entries, as stored
    if options.vector == 1:
        p, wide = found, w.astype(np.float64) / (1.0 if scale is None else scale.astype(float))
        moved, near = np.moveaxis(wide, p.axis, 0), np.moveaxis(p.indices, p.axis, 0)
        for at, table in enumerate(p.lut[:, :, 0].astype(np.float64)):
            part = slice(at * p.group, (at + 1) * p.group)
            gaps = np.abs(moved[part][..., None] - table)
            chosen = np.take_along_axis(gaps, near[part][..., None].astype(int), -1)[..., 0]
            np.testing.assert_array_equal(chosen, gaps.min(-1))


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_ios16_reads_back(bits: int) -> None:
    w = weight(33, 5, 3)
    found = palettize(w, Options(bits))
    args = {key: value for key, (_, value) in ios16(found).items()}
    np.testing.assert_array_equal(ios16_op.decompress(**args), expand(found))


@pytest.mark.parametrize(("options", "what"), [
    (Options(3), "3 bits"), (Options(4, group=8), "more than one table"),
    (Options(4, vector=2), "several numbers"), (Options(4, scaled=True), "scales"),
])  # fmt: skip
def test_ios16_refuses_what_it_lacks(options: Options, what: str) -> None:
    with pytest.raises(Refused, match=f"w: has .*{what}.* needs iOS18"):
        ios16(palettize(weight(16, 64), options), "w")


def test_threads_change_nothing() -> None:
    w = weight(400, 60)
    one, two = (palettize(w, Options(4, group=2), threads=n) for n in (1, 2))
    np.testing.assert_array_equal(one.indices, two.indices)
    np.testing.assert_array_equal(one.lut, two.lut)


@pytest.mark.parametrize("options", [Options(4), Options(8), Options(3, group=4), Options(4, bf16=True)],
                         ids=str)  # fmt: skip
def test_many_at_once_are_as_each_alone(options: Options) -> None:
    kinds = ["float16", "float32", "bfloat16"] * 4
    tensors = [(f"w{i}", weight(4 * i + 4, 50, seed=i, kind=k)) for i, k in enumerate(kinds)]
    if options.bf16:
        tensors = [(name, w.view(np.uint16)) for name, w in tensors if w.dtype.name == "bfloat16"]
    found = list(palettize_all(tensors, options, threads=2))
    assert [name for name, _ in found] == [name for name, _ in tensors]
    for (_, w), (_, many) in zip(tensors, found, strict=True):
        alone = palettize(w, options)
        np.testing.assert_array_equal(many.indices, alone.indices)
        np.testing.assert_array_equal(many.lut, alone.lut)
        assert (many.error, many.group, many.shape) == (alone.error, alone.group, alone.shape)
    w = np.full((4, 4), 0xFFFF, np.uint16)  # NaN in both
    with pytest.raises(Refused, match=r"^bad: holds NaN"):
        list(palettize_all([*tensors, ("bad", w)], options))


def test_a_shorter_last_group_is_asked_for_and_not_for_core_ml() -> None:
    w = weight(40, 70)
    with pytest.raises(Refused, match="w: has 40 channels on axis 0, which groups of 16 don't"):
        palettize(w, Options(4, group=16), name="w")
    found = palettize(w, Options(4, group=16, ragged=True))
    assert found.lut.shape == (3, 16, 1)
    tail = palettize(np.ascontiguousarray(w[32:]), Options(4))
    assert squared(w[32:], expand(found)[32:]) <= squared(w[32:], expand(tail)) * 1.01
    with pytest.raises(Refused, match="no shorter last group"):
        ios18(found, "w")


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_importance_lowers_the_weighted_error(group: int, kind: str) -> None:
    w, importance = weight(64, 80, kind=kind), np.geomspace(1e-3, 10, 80)
    importance[::9] = 0
    plain = palettize(w, Options(3, group=group))
    asked = palettize(w, Options(3, group=group), importance=importance)
    loss = squared(w, expand(asked), importance)
    assert loss < 0.9 * squared(w, expand(plain), importance)
    assert asked.error == pytest.approx(loss, rel=1e-5)


def test_scales_help_channels_of_different_size() -> None:
    w = (weight(64, 128, kind="float32") * np.geomspace(0.01, 1, 64)[:, None]).astype(np.float16)
    plain, with_scale = (palettize(w, Options(4, scaled=s)) for s in (False, True))
    relative = [
        (((w - expand(p)).astype(float) ** 2).sum(1) / (w.astype(float) ** 2).sum(1)).mean()
        for p in (plain, with_scale)
    ]
    assert relative[1] < 0.5 * relative[0]
    assert with_scale.error <= plain.error
    assert with_scale.error == pytest.approx(squared(w, expand(with_scale)), rel=1e-9)
    assert with_scale.norm == pytest.approx((w.astype(float) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("axis", [0, 1])
def test_vectors_do_as_well_as_the_best_of_many_starts(axis: int) -> None:
    w = weight(64, 128)
    ours = squared(w, expand(palettize(w, Options(4, vector=2, axis=axis))))
    pairs = np.moveaxis(w.astype(np.float64), axis, 0)
    pairs = np.stack((pairs[::2], pairs[1::2]), -1).reshape(-1, 2)
    chance, errors = np.random.default_rng(0), []
    for _ in range(10):
        entries = pairs[chance.choice(len(pairs), 16, replace=False)]
        for _ in range(60):
            gaps = ((pairs[:, None] - entries) ** 2).sum(2)
            near = gaps.argmin(1)
            entries = np.array([pairs[near == i].mean(0) for i in range(16)])
        errors.append(gaps.min(1).sum())
    assert ours <= np.median(errors) * 1.01


def test_uniform_is_coremltools() -> None:
    w = weight(50, 60)
    ours = squared(w, expand(palettize(w, Options(4, mode="uniform"))))
    assert ours <= squared(w, of_coremltools(w, 4, 0, 0, "uniform")) * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["kmeans", "unique"])
def test_few_values_are_exact(kind: str, mode: str) -> None:
    w = (np.random.default_rng(0).integers(-5, 6, (300, 400)) / 8).astype(
        ml_dtypes.bfloat16 if kind == "bfloat16" else kind
    )
    bits = 4 if mode == "kmeans" else None
    found = palettize(w, Options(bits, mode=mode))
    assert found.bits == 4
    assert found.error == 0
    np.testing.assert_array_equal(expand(found).astype(np.float64), w.astype(np.float64))


def test_unique_refuses_too_many_values() -> None:
    with pytest.raises(
        Refused, match=r"w: has \d+ distinct values, mode unique holds 16 in 4 bits"
    ):
        palettize(weight(64, 64), Options(4, mode="unique"), name="w")


def test_values_that_float16_can_not_tell_apart() -> None:
    """Clusters that round to one entry: the spare entries go where they help."""
    w = (1 + np.random.default_rng(0).random((100, 100)) * 0.01).astype(np.float32)
    found = palettize(w, Options(6))
    best = np.abs(w - w.astype(np.float16).astype(np.float32))  # every float16 near it is an entry
    assert len(np.unique(found.lut)) == len(np.unique(w.astype(np.float16)))
    np.testing.assert_array_equal(np.abs(w - expand(found).astype(np.float32)), best)


@pytest.mark.parametrize(("numbers", "what"), [
    ([[np.nan, 1]], "holds NaN"), ([[np.inf, 1]], "holds Inf"), ([[-np.inf, 1]], "holds Inf"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("options", [Options(4), Options(4, vector=2, axis=1), Options(4, scaled=True)],
                         ids=str)  # fmt: skip
def test_nan_and_inf_are_refused(numbers: Any, what: str, kind: str, options: Options) -> None:
    w = np.array(numbers).astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    with pytest.raises(Refused, match=f"w: {what}|w: holds NaN or Inf"):
        palettize(w, options, name="w")


@pytest.mark.parametrize(("w", "options", "what"), [
    (np.float16(3).reshape(()), Options(4), "is a scalar"),
    (np.zeros((0, 4), np.float16), Options(4), "holds no values"),
    (np.zeros((4, 4), np.int8), Options(4), "is int8"),
    (np.zeros((4, 4), np.float64), Options(4), "is float64"),
    (np.zeros((4, 4), np.float16), Options(5), "5 bits: tables have 1, 2, 3, 4, 6, 8"),
    (np.zeros((4, 4), np.float16), Options(4, axis=2), "no axis 2"),
    (np.zeros((4, 4), np.float16), Options(4, vector=3), "entries of 3 numbers don't divide"),
    (np.full((4, 4), 1e5, np.float32), Options(4), "float16 end before that"),
])  # fmt: skip
def test_refusals(w: Any, options: Options, what: str) -> None:
    with pytest.raises(Refused, match=f"^w: .*{what}"):
        palettize(w, options, name="w")


@pytest.mark.parametrize("w", [
    np.zeros((30, 30), np.float16), np.full((30, 30), -0.1, np.float16),
    np.full((1, 1), 2.0, np.float32), np.float16([[6e-8, -6e-8, 0, 1e-7]]),
    np.array([[-0.0, 0.0, 1.0, 1.0]], np.float16),
], ids=["zeros", "constant", "one", "denormal", "-0"])  # fmt: skip
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_and_odd_values(w: Any, bits: int) -> None:
    found = palettize(w, Options(bits))
    np.testing.assert_array_equal(expand(found).astype(w.dtype), w)


def test_outliers_keep_their_entries() -> None:
    w = weight(100, 100)
    w[3, 4], w[7, 7] = 60_000, -60_000
    dense = expand(palettize(w, Options(4)))
    assert dense[3, 4] == w[3, 4]
    assert dense[7, 7] == w[7, 7]
    rest = np.abs(w) < 100
    calm = squared(w[rest], dense[rest])
    alone = squared(w[rest], expand(palettize(w[rest], Options(3))))
    assert calm < alone  # 14 entries are left for the rest, more than 8


def test_large_float32_is_cut_into_bins() -> None:
    w = weight(300, 400, kind="float32", heavy=3)
    assert len(np.unique(w)) > 1 << 16
    found = palettize(w, Options(4))
    half = palettize(w.astype(np.float16), Options(4))
    assert found.error <= squared(w, expand(half)) * 1.0001
    assert found.error == pytest.approx(squared(w, expand(found)), rel=1e-9)


def test_codes_are_read_as_they_are_meant() -> None:
    w = weight(20, 30, kind="bfloat16")
    codes = palettize(w.view(np.uint16), Options(4, bf16=True))
    np.testing.assert_array_equal(expand(codes), expand(palettize(w, Options(4))))
    np.testing.assert_array_equal(typed(w.view(np.uint16), bf16=True, name=None), w)
