"""Every rule on a package that has the fault, and on one that hasn't, built by coremltools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mil_build
import numpy as np
import pytest

from loraduct.formats.coreml.package import read
from loraduct.validation.ane_lint import RULES, lint

mb, types = mil_build.mb, mil_build.types

HALF = np.float16


def rules_of(path: Path) -> dict[str, str]:
    """Rule -> detail of the warnings."""
    checks = lint(read(path))
    assert {c.status for c in checks} <= {"warning", "passed"}
    return {c.detail.partition(":")[0]: c.detail for c in checks if c.status == "warning"}


def clean(x: Any) -> Any:
    return mb.linear(x=mb.relu(x=x), weight=np.ones((8, 8), HALF))


def wide(x: Any) -> Any:
    return mb.relu(x=mb.tile(x=x, reps=[1, 16385]))


def deep(x: Any) -> Any:
    return mb.linear(x=x, weight=np.ones((65537, 8), HALF))


def allowed_head(x: Any) -> Any:
    return mb.linear(x=x, weight=np.ones((49152, 8), HALF))


def six_axes(x: Any) -> Any:
    return mb.relu(x=mb.reshape(x=x, shape=[1, 1, 1, 1, 1, 8]))


def float32(x: Any) -> Any:
    return mb.cast(x=mb.exp(x=mb.cast(x=x, dtype="fp32")), dtype="fp16")


def gathered(x: Any) -> Any:
    return mb.add(
        x=x, y=mb.gather(x=np.ones((4, 8), HALF), indices=np.array([1], np.int32), axis=0)
    )


def scattered(x: Any) -> Any:
    return mb.scatter(
        data=x, indices=np.array([0], np.int32), updates=np.ones((1, 8), HALF), axis=0
    )


def product(x: Any) -> Any:
    return mb.reduce_prod(x=x, axes=[1], keep_dims=True)


def branch(x: Any) -> Any:
    whole = mb.reduce_sum(x=x, axes=[0, 1], keep_dims=False)
    return mb.cond(
        pred=mb.greater(x=whole, y=HALF(0)),
        _true_fn=lambda: mb.relu(x=x),
        _false_fn=lambda: mb.exp(x=x),
    )


def rotated(x: Any) -> Any:
    return mb.sin(x=x)


def eight_bits(x: Any) -> Any:
    low = mb.quantize(input=x, scale=HALF(0.1), output_dtype="int8")
    return mb.dequantize(input=low, scale=HALF(0.1))


def _int4(shape: tuple[int, ...]) -> Any:
    return np.ones(shape).astype(types.np_int4_dtype)


def blocks_of_four(x: Any) -> Any:
    w = mb.constexpr_blockwise_shift_scale(data=_int4((8, 8)), scale=np.ones((8, 2), HALF))
    return mb.linear(x=x, weight=w)


def blocks_without_sign(x: Any) -> Any:
    uint4 = types.type_mapping.nptype_from_builtin(types.uint4)
    codes = np.ones((8, 8)).astype(uint4)
    w = mb.constexpr_blockwise_shift_scale(data=codes, scale=np.ones((8, 2), HALF))
    return mb.linear(x=x, weight=w)


def rows_of_four(x: Any) -> Any:
    w = mb.constexpr_blockwise_shift_scale(data=_int4((8, 8)), scale=np.ones((8, 1), HALF))
    return mb.linear(x=x, weight=w)


def _table(shape: tuple[int, ...], bits: int = 4) -> Any:
    codes = np.zeros(shape).astype(types.type_mapping.nptype_from_builtin(types.uint4))
    return mb.constexpr_lut_to_dense(indices=codes, lut=np.ones((1, 1, 2**bits, 1), HALF))


def table(x: Any) -> Any:
    return mb.linear(x=x, weight=_table((8, 8)))


def scaled_table(x: Any) -> Any:
    w = mb.constexpr_blockwise_shift_scale(data=_table((8, 8)), scale=np.ones((8, 1), HALF))
    return mb.linear(x=x, weight=w)


HITS = {
    "size": wide, "axes": six_axes, "float32": float32, "gather": gathered, "no path": scattered,
    "control": branch, "sin, cos": rotated, "8-bit activations": eight_bits,
    "4-bit blocks": blocks_of_four, "scaled tables": scaled_table,
}  # fmt: skip


def build(path: Path, body: Any) -> Path:
    return mil_build.one(path, body, x=((1, 8), types.fp16))


@pytest.mark.parametrize("rule", HITS)
def test_a_fault_is_named_with_its_source(rule: str, tmp_path: Path) -> None:
    found = rules_of(build(tmp_path, HITS[rule]))
    assert set(found) == {rule}
    (source,) = [r.source for r in RULES if r.name == rule]
    assert source in found[rule]


@pytest.mark.parametrize("body", [clean, allowed_head, rows_of_four, table])
def test_what_is_no_fault(body: Any, tmp_path: Path) -> None:
    checks = lint(read(build(tmp_path, body)))
    assert [c.status for c in checks] == ["passed"]
    assert "not a promise" in checks[0].detail


@pytest.mark.parametrize(
    ("body", "rule"), [(deep, "size"), (product, "no path"), (blocks_without_sign, "4-bit blocks")]
)
def test_other_forms(body: Any, rule: str, tmp_path: Path) -> None:
    assert set(rules_of(build(tmp_path, body))) == {rule}


def stateful(path: Path, width: int, weight: Any, *, written: bool = True) -> Path:
    """A function that reads a state, and may write it."""

    def make() -> Any:
        inputs = {
            "x": mb.placeholder((1, width), dtype=types.fp16),
            "s": mb.state_tensor_placeholder((1, width), dtype=types.fp16),
        }
        with mil_build.Function(inputs, opset_version=mil_build.TARGETS[18]) as made:
            sum_ = mb.add(x=made.inputs["x"], y=mb.read_state(input=made.inputs["s"]))
            if written:
                mb.coreml_update_state(state=made.inputs["s"], value=sum_)
            made.set_outputs([mb.linear(x=sum_, weight=weight())])
        program = mil_build.Program()
        program.add_function("main", made)
        return program

    return mil_build.save(mil_build.quietly(make), path / "s.mlpackage")


def test_states(tmp_path: Path) -> None:
    def plain() -> Any:
        return np.ones((4, 64), HALF)

    assert set(rules_of(stateful(tmp_path / "a", 64, plain))) == {"state"}
    assert set(rules_of(stateful(tmp_path / "b", 64, plain, written=False))) == set()
    odd = rules_of(stateful(tmp_path / "c", 70, lambda: np.ones((4, 70), HALF), written=False))
    assert set(odd) == {"state size"}
    tables = rules_of(stateful(tmp_path / "d", 64, lambda: _table((4, 64)), written=False))
    assert set(tables) == {"4-bit tables"}


def described(shapes: Any) -> Any:
    """What a description says of the input."""

    def describe(description: Any) -> None:
        array = description.input.add(name="x").type.multiArrayType
        array.dataType = 65552
        array.shape.extend([1, 8])
        shapes(array)

    return describe


def flexible(array: Any) -> None:
    for low, high in ((1, 4), (8, 8)):
        array.shapeRange.sizeRanges.add(lowerBound=low, upperBound=high)


def enumerated(array: Any) -> None:
    for n in (1, 4):
        array.enumeratedShapes.shapes.add().shape.extend([n, 8])


def narrow(array: Any) -> None:
    for low, high in ((1, 1), (8, 8)):
        array.shapeRange.sizeRanges.add(lowerBound=low, upperBound=high)


@pytest.mark.parametrize(
    ("shapes", "rules"), [(flexible, {"flexible"}), (enumerated, set()), (narrow, set())]
)
def test_flexible_shapes(shapes: Any, rules: set[str], tmp_path: Path) -> None:
    def make() -> Any:
        given = {"x": mb.placeholder((1, 8), dtype=types.fp16)}
        with mil_build.Function(given, opset_version=mil_build.TARGETS[18]) as made:
            made.set_outputs([clean(made.inputs["x"])])
        program = mil_build.Program()
        program.add_function("main", made)
        return program

    path = mil_build.save(mil_build.quietly(make), tmp_path / "f.mlpackage", described(shapes))
    assert set(rules_of(path)) == rules


def test_our_own_packages(package: Path) -> None:
    """A decoder of any length with a cache: known to be open shapes, a written state and lookups."""
    found = rules_of(package)
    assert {"flexible", "state", "gather"} <= set(found)
    assert not {"float32", "axes", "no path", "control", "4-bit blocks"} & set(found)
