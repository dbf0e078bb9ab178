"""States that are kept between calls, and packages of several functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mil_build as build
import numpy as np
import pytest

from loraduct.errors import Refused
from loraduct.formats.coreml import package as packages
from loraduct.formats.coreml.program import operation
from loraduct.validation import mil

mb, types, ct = build.mb, build.types, build.ct
HALF, FULL = np.float16, np.float32


def package(path: Path, body: Callable[..., Any], **inputs: Any) -> packages.Package:
    """A package whose main function is ``body``; inputs: (shape, type)."""
    return packages.read(build.one(path, body, **inputs))


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
