"""Runs of whole functions: precision, ranges, states, functions, inputs, hostile programs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from loraduct.errors import LoraductError, Refused
from loraduct.formats.coreml import package as packages
from loraduct.formats.coreml.program import const, immediate_value, operation, tensor_type
from loraduct.formats.coreml.schema import new
from loraduct.validation import mil, mil_numbers
from loraduct.validation.mil_numbers import Numbers, rounded, widened


def _load(name: str) -> ModuleType:
    """A helper beside this file; pytest's importlib mode can't import it by name."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load("mil_build")
mb, types, ct = build.mb, build.types, build.ct
HALF, FULL = np.float16, np.float32


def package(path: Path, body: Callable[..., Any], **inputs: Any) -> packages.Package:
    """A package whose main function is ``body``; inputs: (shape, type)."""

    def make() -> Any:
        given = {n: mb.placeholder(s, dtype=t) for n, (s, t) in inputs.items()}
        with build.Function(given, opset_version=ct.target.iOS18) as made:
            out = body(**made.inputs)
            made.set_outputs(out if isinstance(out, list) else [out])
        program = build.Program()
        program.add_function("main", made)
        return program

    return packages.read(build.save(build.quietly(make), path / "made.mlpackage"))


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


# -- states and functions ----------------------------------------------------------------------------


def counter(tmp_path: Path) -> packages.Package:
    """``state += x`` in two functions: by coremltools' update (write, then read), and by reading."""

    def body(name: str) -> Any:
        given = {
            "x": mb.placeholder((2, 3), dtype=types.fp16),
            "total": mb.state_tensor_placeholder((2, 3), types.fp16),
        }
        with build.Function(given, opset_version=ct.target.iOS18) as made:
            held = mb.read_state(input=made.inputs["total"])
            if name == "look":
                made.set_outputs([mb.identity(x=held, name="out")])
                return made
            added = mb.add(x=held, y=made.inputs["x"])
            out = mb.coreml_update_state(state=made.inputs["total"], value=added)
            made.set_outputs([mb.identity(x=out, name="out")])
        return made

    def make() -> Any:
        program = build.Program()
        for name in ("count", "look"):
            program.add_function(name, body(name))
        program.default_function_name = "count"
        return program

    def describe(description: Any) -> None:
        description.defaultFunctionName = "count"

    return packages.read(build.save(build.quietly(make), tmp_path / "c.mlpackage", describe))


def test_states_are_kept_between_calls_and_shared_by_functions(tmp_path: Path) -> None:
    made = counter(tmp_path)
    assert "write_state" in mil.ops_of(made)["count"]
    weights = mil.Weights(made)
    count, look = (mil.load(made, f, weights) for f in (None, "look"))
    assert count.program.function == "count"
    state = count.new_state()
    assert {n: (s.dtype, s.shape) for n, s in state.items()} == {"total": (HALF, (2, 3))}
    x = {"x": np.arange(6, dtype=HALF).reshape(2, 3)}
    for n in (1, 2, 3):
        np.testing.assert_array_equal(count.run(x, state)["out"], n * x["x"])
    np.testing.assert_array_equal(look.run(x, state)["out"], 3 * x["x"])
    assert state["total"].dtype == HALF
    assert not mil.new_state(made)["total"].any()


def test_the_update_of_a_state_as_one_operation(tmp_path: Path) -> None:
    made = counter(tmp_path)
    block = made.functions["count"].block_specializations["CoreML8"]
    at = next(i for i, op in enumerate(block.operations) if op.type == "write_state")
    write, read = block.operations[at], block.operations[at + 1]
    assert read.type == "read_state"
    one = operation(
        "coreml_update_state",
        "one",
        {"state": "total", "value": write.inputs["data"].arguments[0].name},
        [(read.outputs[0].name, read.outputs[0].type)],
    )
    block.operations[at].CopyFrom(one)
    del block.operations[at + 1]
    state, x = mil.new_state(made), {"x": np.ones((2, 3), HALF)}
    mil.run(made, "count", x, state)
    assert (mil.run(made, "count", x, state)["out"] == 2).all()
    assert (state["total"] == 2).all()


def test_a_cache_updated_in_place_changes_nothing_else(tmp_path: Path) -> None:
    """Slices are replaced in place where that is safe; views taken before keep their values."""

    def put(x: Any, row: int, value: Any) -> Any:
        return mb.slice_update(x=x, update=value, begin=[row, 0], end=[row + 1, 3])

    def body(x: Any, u: Any) -> Any:
        a = put(x, 0, u)
        seen = mb.slice_by_index(x=a, begin=[1, 0], end=[2, 3], name="seen")
        whole = mb.reshape(x=a, shape=[12])
        b = put(a, 1, u)
        c = put(b, 2, mb.slice_by_index(x=b, begin=[1, 0], end=[2, 3]))
        d = put(c, 2, mb.mul(x=u, y=FULL(2)))
        return [mb.identity(x=seen), mb.identity(x=whole), mb.identity(x=c), d]

    made = package(tmp_path, body, x=((4, 3), types.fp32), u=((1, 3), types.fp32))
    x, u = np.arange(12, dtype=FULL).reshape(4, 3), np.full((1, 3), 50, FULL)
    seen, whole, c, d = mil.run(made, None, {"x": x, "u": u}).values()
    np.testing.assert_array_equal(x, np.arange(12).reshape(4, 3))
    np.testing.assert_array_equal(seen, x[1:2])
    first = np.concatenate([u, x[1:]])
    np.testing.assert_array_equal(whole, first.reshape(-1))
    np.testing.assert_array_equal(c, np.concatenate([u, u, u, x[3:]]))
    np.testing.assert_array_equal(d, np.concatenate([u, u, 2 * u, x[3:]]))


def test_a_state_updated_in_place_is_written_and_read_as_the_program_says(tmp_path: Path) -> None:
    def body(early: bool) -> Any:
        given = {
            "u": mb.placeholder((1, 3), dtype=types.fp16),
            "cache": mb.state_tensor_placeholder((4, 3), types.fp16),
        }
        with build.Function(given, opset_version=ct.target.iOS18) as made:
            x, cache = mb.read_state(input=made.inputs["cache"]), made.inputs["cache"]
            a = mb.slice_update(x=x, update=made.inputs["u"], begin=[0, 0], end=[1, 3])
            if early:  # the state is read again before it is written
                before = mb.identity(x=mb.read_state(input=cache))
            b = mb.coreml_update_state(state=cache, value=a)
            c = mb.slice_update(x=b, update=made.inputs["u"], begin=[2, 0], end=[3, 3])
            if not early:
                before = mb.identity(x=mb.read_state(input=cache))
            made.set_outputs([before, mb.identity(x=c)])  # c is never written
        return made

    def make() -> Any:
        program = build.Program()
        for name, early in (("early", True), ("late", False)):
            program.add_function(name, body(early))
        program.default_function_name = "early"
        return program

    made = packages.read(build.save(build.quietly(make), tmp_path / "s.mlpackage"))
    start, u = np.arange(12, dtype=HALF).reshape(4, 3), np.full((1, 3), 50, HALF)
    for precision in mil.PRECISIONS:
        for name in ("early", "late"):
            given = start.astype(FULL) if precision == mil.FULL else start.copy()
            state = {"cache": given}
            run = mil.run(made, name, {"u": u}, state, precision=precision)
            before, c = run.values()
            written = np.concatenate([u, start[1:]])
            np.testing.assert_array_equal(given, start)  # the caller's array
            np.testing.assert_array_equal(before, start if name == "early" else written)
            np.testing.assert_array_equal(state["cache"], written)
            np.testing.assert_array_equal(c, np.concatenate([u, start[1:2], u, start[3:]]))


@pytest.mark.parametrize("state", [None, {}, {"other": np.zeros((2, 3), HALF)}])
def test_a_function_with_states_needs_them(tmp_path: Path, state: Any) -> None:
    with pytest.raises(Refused, match="function count has the states total; given: "):
        mil.run(counter(tmp_path), None, {"x": np.ones((2, 3), HALF)}, state)


def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"total: op input .* \[2, 4\]"):
        mil.run(
            counter(tmp_path), None, {"x": np.ones((2, 3), HALF)}, {"total": np.zeros((2, 4), HALF)}
        )


def test_an_unknown_function_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="has no function 'nope'; it has count, look"):
        mil.load(counter(tmp_path), "nope")


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


# -- hostile programs --------------------------------------------------------------------------------


def hostile(tmp_path: Path, operations: list[Any], outputs: list[str]) -> packages.Package:
    """A package of raw operations on one input, ``x``: FLOAT32 [4]."""
    model = new("Model", specificationVersion=9)
    function = model.mlProgram.functions["main"]
    function.opset = "CoreML8"
    function.inputs.add(name="x", type=tensor_type("FLOAT32", [4]))
    block = function.block_specializations["CoreML8"]
    block.operations.extend(operations)
    block.outputs.extend(outputs)
    return packages.read(build.write(model, tmp_path / "hostile.mlpackage"))


def op(kind: str, out: str, shape: Any, dtype: str = "FLOAT32", /, **inputs: Any) -> Any:
    """An operation with one output."""
    return operation(kind, out, inputs, [(out, tensor_type(dtype, shape))])


def ints(name: str, values: list[int]) -> Any:
    """A constant vector of integers."""
    return const(name, immediate_value("INT32", np.int32(values)))


HOSTILE: dict[str, tuple[list[Any], str]] = {
    "unknown operation": ([op("explode", "y", [4], x="x")],
                          "y: op explode in function main: this operation is not known"),
    "cycle": ([op("relu", "y", [4], x="z"), op("relu", "z", [4], x="y")],
              "y: op relu in function main: uses 'z', which is not defined before it"),
    "itself": ([op("relu", "y", [4], x="y")], "uses 'y', which is not defined"),
    "name given twice": ([op("relu", "y", [4], x="x"), op("relu", "y", [4], x="x")],
                         "y: op relu .*a name that was given before"),
    "name of the input": ([op("relu", "x", [4], x="x")], "given before"),
    "no operand": ([op("add", "y", [4], x="x")], "op add in function main: has no y"),
    "unknown parameter": ([op("relu", "y", [4], x="x", alpha="x")], "parameter alpha is not known"),
    "two values for one": ([op("relu", "y", [4], x=["x", "x"])], "2 values for x, expected 1"),
    "no values": ([op("concat", "y", [4], values=[], axis="x")], "has no values"),
    "another shape": ([op("relu", "y", [5], x="x")],
                      r"y: op relu .*yields the shape \[4\], the program declares \[5\]"),
    "another dtype": ([op("relu", "y", [4], "FLOAT16", x="x")], "yields FLOAT32, declares FLOAT16"),
    "two dtypes": ([const("h", immediate_value("FLOAT16", HALF([1]))),
                    op("add", "y", [4], x="x", y="h")],
                   "one dtype is expected, found x FLOAT32, y FLOAT16"),
    "text as an operand": ([const("t", immediate_value("INT32", np.int32(0))),
                            op("cast", "y", [4], x="x", dtype="t")], "op cast"),
    "absurd shape declared": ([op("relu", "y", [1 << 20, 1 << 20], x="x")], "more than"),
    "absurd tile": ([ints("r", [1 << 31 - 1]), op("tile", "y", [None], x="x", reps="r")],
                    "y: op tile .*more than 1,073,741,824 elements"),
    "absurd fill": ([ints("s", [1 << 20] * 9), op("fill", "y", [None] * 9, shape="s")], "more than"),
    "negative fill": ([ints("s", [-3]), op("fill", "y", [None], shape="s")], "negative"),
    "absurd range": ([*(const(n, immediate_value("FLOAT32", FULL(v)))
                        for n, v in (("a", 0), ("b", 1e30), ("c", 1e-9))),
                      op("range_1d", "y", [None], start="a", end="b", step="c")], "op range_1d"),
    "endless range": ([*(const(n, immediate_value("INT32", np.int32(v)))
                         for n, v in (("a", 0), ("b", 9), ("c", 0))),
                       op("range_1d", "y", [None], "INT32", start="a", end="b", step="c")],
                      "a step of 0"),
    "growing add": ([ints("s", [1 << 14, 1]), op("fill", "a", [None, None], shape="s"),
                     ints("t", [1, 1 << 17]), op("fill", "b", [None, None], shape="t"),
                     op("add", "y", [None, None], x="a", y="b")], "y: op add .*more than"),
    "impossible reshape": ([ints("s", [3]), op("reshape", "y", [3], x="x", shape="s")],
                           "y: op reshape in function main: ValueError"),
    "index out of bounds": ([ints("i", [7]), op("gather", "y", [1], x="x", indices="i")],
                            r"index 7 is out of bounds \(0 to 3\)"),
    "negative index": ([ints("i", [-1]), op("gather", "y", [1], x="x", indices="i")],
                       r"index -1 is out of bounds \(0 to 3\)"),
    "axis out of bounds": ([const("a", immediate_value("INT32", np.int32(9))),
                            op("softmax", "y", [4], x="x", axis="a")], "axis 9 of a value with 1"),
    "too many outputs": ([operation("relu", "y", {"x": "x"}, [
        ("y", tensor_type("FLOAT32", [4])), ("z", tensor_type("FLOAT32", [4]))])], "2 are declared"),
    "no output": ([operation("relu", "y", {"x": "x"}, [])], "0 outputs"),
    "constant of another shape": ([operation("const", "y", {}, [("y", tensor_type("INT32", [3]))])],
                                  "expected one output and a value"),
    "state that is none": ([op("read_state", "y", [4], input="x")], "input is no state"),
    "decompressing what runs": ([op("constexpr_cast", "y", [4], source_val="x", output_dtype="x")],
                                "expected constants only"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    operations, message = HOSTILE[name]
    made = hostile(tmp_path, operations, ["y"] if name != "no output" else ["x"])
    with pytest.raises(Refused, match=message) as caught:
        mil.run(made, "main", {"x": np.ones(4, FULL)})
    assert "\n" not in str(caught.value)
    assert str(made.path) in str(caught.value)


def test_nothing_runs_before_all_operations_are_known(tmp_path: Path) -> None:
    operations = [op("relu", "a", [4], x="x"), op("explode", "y", [4], x="a")]
    with pytest.raises(Refused, match="explode"):
        mil.load(hostile(tmp_path, operations, ["y"]))


def test_blocks_within_operations_are_refused(tmp_path: Path) -> None:
    inner = op("relu", "y", [4], x="x")
    inner.blocks.add()
    with pytest.raises(Refused, match="y: op relu"):
        mil.load(hostile(tmp_path, [inner], ["y"]))


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


@pytest.mark.parametrize("output", ["nothing", ""])
def test_an_output_that_is_not_there_is_refused(tmp_path: Path, output: str) -> None:
    with pytest.raises(Refused, match="which is no value"):
        mil.load(hostile(tmp_path, [op("relu", "y", [4], x="x")], [output]))


def test_a_function_without_a_block_is_refused(tmp_path: Path) -> None:
    made = hostile(tmp_path, [op("relu", "y", [4], x="x")], ["y"])
    made.functions["main"].opset = "CoreML7"
    with pytest.raises(Refused, match="no block for its opset 'CoreML7'"):
        mil.load(made)
    with pytest.raises(Refused, match="no block for its opset"):
        mil.ops_of(made)


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Bytes of a specification changed at random: a result, or an error meant for people."""
    w = np.random.default_rng(0).standard_normal((8, 8)).astype(HALF)

    def body(x: Any) -> Any:
        y = mb.linear(x=x, weight=w)
        y = mb.reshape(x=mb.transpose(x=y, perm=[1, 0]), shape=[2, -1, 4])
        return mb.softmax(x=mb.concat(values=[y, y], axis=1), axis=-1)

    made = package(tmp_path, body, x=((4, 8), types.fp16))
    good = made.spec_path.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(good)
        for at in rng.integers(0, len(good), rng.integers(1, 4)):
            damaged[at] = rng.integers(0, 256)
        made.spec_path.write_bytes(damaged)
        try:
            found = packages.read(made.path)
            machine = mil.load(found, next(iter(found.functions)))
            machine.run({"x": np.ones((4, 8), HALF)}, machine.new_state() or None)
        except LoraductError:
            refused += 1
    assert refused > 100
