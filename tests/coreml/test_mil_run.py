"""Runs of whole functions: precision, ranges, inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_build as build
import numpy as np
import pytest

from loraduct.errors import Refused
from loraduct.formats.coreml import package as packages
from loraduct.validation import mil, mil_numbers
from loraduct.validation.mil_numbers import Numbers, rounded, widened

mb, types, ct = build.mb, build.types, build.ct
HALF, FULL = np.float16, np.float32


def package(path: Path, body: Callable[..., Any], **inputs: Any) -> packages.Package:
    """A package whose main function is ``body``; inputs: (shape, type)."""
    return packages.read(build.one(path, body, **inputs))


# -- numbers -----------------------------------------------------------------------------------------


def test_rounding_is_numpys_for_every_kind_of_value() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(HALF).astype(FULL)
    finite = np.sort(every[np.isfinite(every)])
    ties = (finite[1:] + finite[:-1]) / 2
    around = [np.nextafter(ties, FULL(s), dtype=FULL) for s in (-np.inf, np.inf)]
    wide = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint64).astype(np.uint32)
    for x in (every, ties, *around, wide.view(FULL), np.zeros(0, FULL)):
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(rounded(x), x.astype(HALF).astype(FULL))
            small = x[np.abs(x) < 65520]  # without the few that take the slow way
            np.testing.assert_array_equal(rounded(small), small.astype(HALF).astype(FULL))


def test_rounding_in_place_and_of_views() -> None:
    x = np.random.default_rng(1).standard_normal((5, 1 << 16)).astype(FULL)
    wanted = x.astype(HALF).astype(FULL)
    np.testing.assert_array_equal(rounded(x.T), wanted.T)
    assert not np.array_equal(x, wanted)  # untouched
    rounded(x, in_place=True)
    np.testing.assert_array_equal(x, wanted)


def test_widening_is_numpys() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(HALF)
    np.testing.assert_array_equal(widened(every), every.astype(FULL))
    many = np.tile(every[np.isfinite(every)], 3).reshape(3, -1)
    np.testing.assert_array_equal(widened(many), many.astype(FULL))


def test_narrowing_is_the_way_back() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(HALF)
    number = ~np.isnan(every)
    with np.errstate(invalid="ignore"):  # signalling NaN
        back = mil_numbers.narrowed(every.astype(FULL))
    np.testing.assert_array_equal(back[number].view(np.uint16), every[number].view(np.uint16))
    assert np.isnan(back[~number]).all()
    np.testing.assert_array_equal(mil_numbers.narrowed(np.ones((3, 1 << 15), FULL).T).T, 1)


def test_a_strict_sum_rounds_after_every_addition() -> None:
    x = np.random.default_rng(2).standard_normal((3, 70)).astype(HALF)
    found = Numbers(strict=True).sum(x.astype(FULL), (1,))
    for row, mine in zip(x, found, strict=True):
        blocks = []
        for at in range(0, 70, 32):
            total = HALF(0)
            for value in row[at : at + 32]:
                total = HALF(total + value)
            blocks.append(total)
        assert mine[0] == HALF(HALF(blocks[0] + blocks[1]) + blocks[2])


# -- precision and ranges ----------------------------------------------------------------------------


def naive_norm(x: Any, power: str = "pow") -> Any:
    """RMSNorm as it is written in most models."""
    squares = mb.pow(x=x, y=HALF(2), name="squares") if power == "pow" else mb.square(x=x)
    mean = mb.reduce_mean(x=squares, axes=[-1], keep_dims=True, name="mean")
    return mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=HALF(1e-5), name="root"), name="out")


def test_an_overflow_is_found_and_named(tmp_path: Path) -> None:
    made = package(tmp_path, naive_norm, x=((2, 64), types.fp16))
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(HALF)
    ranges = mil.Ranges()
    mil.run(made, None, {"x": x}, ranges=ranges)
    assert not ranges.warnings
    assert ranges.first is None
    x[1, 3] = 300  # its square is 90000
    out = mil.run(made, None, {"x": x}, ranges=ranges)["out"]
    assert ranges.first == ("main", "pow", "squares")
    assert "squares, op pow: overflow to inf (largest input 300)" in ranges.warnings
    assert len([w for w in ranges.warnings if "inf" in w]) == 1  # what follows is no news
    assert ranges.peaks["squares"] == 90000  # before it was rounded
    assert not out[1].any()  # x / sqrt(inf)
    full = mil.run(made, None, {"x": x}, precision=mil.FULL)["out"]
    assert full.dtype == FULL
    wide = x.astype(FULL)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + FULL(HALF(1e-5)))
    np.testing.assert_allclose(full, wanted, rtol=1e-5)


def test_nearly_an_overflow_is_warned_of(tmp_path: Path) -> None:
    made = package(tmp_path, naive_norm, x=((2, 64), types.fp16))
    ranges = mil.Ranges()
    mil.run(made, None, {"x": np.full((2, 64), 200, HALF)}, ranges=ranges)
    assert ranges.warnings == ["squares, op pow: 40000 is near float16's 65504"]
    assert ranges.first is None


def test_a_mask_of_infinities_is_no_news(tmp_path: Path) -> None:
    mask = np.triu(np.full((4, 4), -np.inf, HALF), 1)
    made = package(
        tmp_path, lambda x: mb.softmax(x=mb.add(x=x, y=mask), axis=-1), x=((4, 4), types.fp16)
    )
    ranges = mil.Ranges()
    mil.run(made, None, {"x": np.ones((4, 4), HALF)}, ranges=ranges)
    assert (ranges.warnings, ranges.first) == ([], None)


def test_nan_of_infinities_is_named(tmp_path: Path) -> None:
    made = package(tmp_path, lambda x: mb.softmax(x=x, axis=-1, name="out"), x=((2, 4), types.fp16))
    ranges = mil.Ranges()
    mil.run(made, None, {"x": np.full((2, 4), -np.inf, HALF)}, ranges=ranges)
    assert ranges.first == ("main", "softmax", "out")
    assert ranges.warnings[0].startswith("out, op softmax: NaN")


def test_strict_sums_overflow_where_wide_ones_do_not(tmp_path: Path) -> None:
    made = package(
        tmp_path,
        lambda x: mb.reduce_mean(x=x, axes=[-1], keep_dims=False, name="out"),
        x=((1, 64), types.fp16),
    )
    x = {"x": np.full((1, 64), 2000, HALF)}  # the sum is 128000, the mean 2000
    assert mil.run(made, None, x)["out"] == 2000
    assert np.isinf(mil.run(made, None, x, precision=mil.STRICT)["out"])
    assert mil.run(made, None, x, precision=mil.FULL)["out"] == 2000


def test_strict_layer_norm_squares_in_half_precision(tmp_path: Path) -> None:
    made = package(
        tmp_path, lambda x: mb.layer_norm(x=x, axes=[-1], name="out"), x=((1, 64), types.fp16)
    )
    x = np.zeros((1, 64), HALF)
    x[0, 0] = 1000
    assert mil.run(made, None, {"x": x})["out"][0, 0] > 7
    assert mil.run(made, None, {"x": x}, precision=mil.STRICT)["out"][0, 0] == 0


def test_strict_spares_what_is_declared_float32(tmp_path: Path) -> None:
    made = package(
        tmp_path, lambda x: mb.reduce_sum(x=x, axes=[-1], name="out"), x=((1, 64), types.fp32)
    )
    x = {"x": np.full((1, 64), 2000, FULL)}
    assert mil.run(made, None, x, precision=mil.STRICT)["out"] == 128000


def test_every_output_is_rounded_once(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        return [mb.mul(x=mb.add(x=x, y=HALF(1 / 3)), y=HALF(1 / 7), name="out")]

    made = package(tmp_path, body, x=((1, 4096), types.fp16))
    x = np.random.default_rng(0).standard_normal((1, 4096)).astype(HALF)
    wanted = (x + HALF(1 / 3)) * HALF(1 / 7)  # numpy rounds after each
    np.testing.assert_array_equal(mil.run(made, None, {"x": x})["out"], wanted)
    full = mil.run(made, None, {"x": x}, precision=mil.FULL)["out"]
    assert np.abs(full - wanted).max() > 0


def test_runs_repeat_bit_for_bit(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((300, 200)).astype(HALF)
    made = package(
        tmp_path, lambda x: mb.linear(x=x, weight=w, name="out"), x=((64, 200), types.fp16)
    )
    x = {"x": np.random.default_rng(1).standard_normal((64, 200)).astype(HALF)}
    machine = mil.load(made)
    first, again, fresh = machine.run(x), machine.run(x), mil.run(made, None, x)
    assert first["out"].tobytes() == again["out"].tobytes() == fresh["out"].tobytes()


def test_inputs_are_not_changed(tmp_path: Path) -> None:
    made = package(tmp_path, lambda x: mb.exp(x=mb.identity(x=x), name="out"), x=((4,), types.fp32))
    x = np.ones(4, FULL) / 3
    mil.run(made, None, {"x": x})
    np.testing.assert_array_equal(x, np.ones(4, FULL) / 3)


# -- inputs ------------------------------------------------------------------------------------------


def test_sizes_that_are_open_come_from_the_inputs(tmp_path: Path) -> None:
    from coremltools.converters.mil.mil import get_new_symbol

    def body(x: Any, y: Any) -> Any:
        return mb.add(x=mb.concat(values=[x, y], axis=0), y=FULL(1), name="out")

    made = package(
        tmp_path, body, x=((get_new_symbol(), 3), types.fp32), y=((get_new_symbol(), 3), types.fp32)
    )
    for n in (1, 4):
        inputs = {"x": np.ones((n, 3), FULL), "y": np.ones((2, 3), FULL)}
        assert mil.run(made, None, inputs)["out"].shape == (n + 2, 3)


@pytest.mark.parametrize(
    ("flexible", "shape", "message"),
    [
        ("range", (5, 3), r"x: has the shape \[5, 3\], allowed: \[1 to 4, 3 to 3\]"),
        ("list", (3, 3), r"x: has the shape \[3, 3\], allowed: \[1, 3\], \[2, 3\]"),
        ("range", (4, 3), None),
        ("list", (2, 3), None),
        ("open", (999, 3), None),
    ],
)
def test_flexible_shapes(
    tmp_path: Path, flexible: str, shape: tuple[int, ...], message: str | None
) -> None:
    from coremltools.converters.mil.mil import get_new_symbol

    made = package(
        tmp_path,
        lambda x: mb.add(x=x, y=FULL(1), name="out"),
        x=((get_new_symbol(), 3), types.fp32),
    )
    feature = made.model.description.input.add(name="x")
    array = feature.type.multiArrayType
    if flexible == "list":
        for n in (1, 2):
            array.enumeratedShapes.shapes.add(shape=[n, 3])
    else:
        high = 4 if flexible == "range" else -1
        for low, top in ((1, high), (3, 3)):
            array.shapeRange.sizeRanges.add(lowerBound=low, upperBound=top)
    inputs = {"x": np.zeros(shape, FULL)}
    if message is None:
        assert (mil.run(made, None, inputs)["out"] == 1).all()
    else:
        with pytest.raises(Refused, match=message):
            mil.run(made, None, inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "function main needs x, n; its inputs are x, n"),
        ({"x": np.zeros(3, FULL), "n": np.zeros(3, np.int32), "z": 1}, "has no input z"),
        ({"x": np.zeros(4, FULL), "n": np.zeros(3, np.int32)}, r"x: .*shape \[4\].*declares \[3\]"),
        ({"x": np.zeros((3, 1), FULL), "n": np.zeros(3, np.int32)}, r"declares \[3\]"),
        (
            {"x": np.zeros(3, FULL), "n": np.zeros(3, FULL)},
            "n: an input of float32, expected INT32",
        ),
        ({"x": np.array(["a"] * 3), "n": np.zeros(3, np.int32)}, "x: an input of <U1"),
        ({"x": np.zeros(3, complex), "n": np.zeros(3, np.int32)}, "x: an input of complex128"),
        ({"x": np.zeros(3, FULL), "n": np.full(3, 2**40)}, "n: an input beyond the range of INT32"),
    ],
)
def test_wrong_inputs_are_refused(tmp_path: Path, inputs: dict[str, Any], message: str) -> None:
    made = package(
        tmp_path, lambda x, n: mb.add(x=x, y=mb.cast(x=n, dtype="fp32")),
        x=((3,), types.fp32), n=((3,), types.int32),
    )  # fmt: skip
    with pytest.raises(Refused, match=message):
        mil.run(made, None, inputs)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    made = package(tmp_path, lambda x: mb.relu(x=x), x=((3,), types.fp32))
    with pytest.raises(Refused, match="precision 'fp8', expected fp16-storage"):
        mil.run(made, None, {"x": np.zeros(3, FULL)}, precision="fp8")


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")
def test_core_ml_itself_is_asked_for_on_a_mac_only(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="Core ML runs on a Mac only"):
        mil.predict(tmp_path, None, {})
