"""Programs that are broken or mean harm: one line that names the operation, never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mil_build as build
import numpy as np
import pytest

from loraduct.errors import LoraductError, Refused
from loraduct.formats.coreml import package as packages
from loraduct.formats.coreml.program import const, immediate_value, operation, tensor_type
from loraduct.formats.coreml.schema import new
from loraduct.validation import mil

mb, types = build.mb, build.types
HALF, FULL = np.float16, np.float32


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

    made = packages.read(build.one(tmp_path, body, x=((4, 8), types.fp16)))
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
