"""Compressed constants, bit for bit as coremltools decompresses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mil_build as build
import numpy as np
import pytest

from loraduct.errors import Refused
from loraduct.formats.coreml import package as packages
from loraduct.formats.coreml.program import immediate_value
from loraduct.validation import mil

ct, mb, types = build.ct, build.mb, build.types
RNG = np.random.default_rng(5)


def small(name: str, *shape: int) -> np.ndarray:
    """Values of one of MIL's types under 8 bits."""
    kind = getattr(types, name)
    signed = name.startswith("int")
    bits = int(name.removeprefix("u").removeprefix("int"))
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    return RNG.integers(low, high, shape).astype(types.nptype_from_builtin(kind))


def halves(*shape: int) -> np.ndarray:
    """float16 values, subnormal ones among them."""
    return (RNG.standard_normal(shape) * 10.0 ** RNG.integers(-6, 2, shape)).astype(np.float16)


MASK = RNG.integers(0, 2, (6, 8))
COUNT = int(MASK.sum())
DENSE_16 = np.packbits(MASK.reshape(-1).astype(np.uint8), bitorder="little")


def sparse(name: str) -> dict[str, Any]:
    """Indices of a type where MASK is set."""
    mask = MASK.astype(types.nptype_from_builtin(types.uint1))
    return {"indices_mask": mask, "indices_nonzero_data": small(name, COUNT)}


ONE_OP: dict[str, tuple[int, str, dict[str, Any]]] = {
    "affine axis 0": (16, "affine_dequantize", {"quantized_data": small("int8", 6, 8), "axis": 0,
        "zero_point": small("int8", 6), "scale": halves(6)}),
    "affine axis 1, fp32": (16, "affine_dequantize", {"quantized_data": small("uint8", 6, 8),
        "axis": -1, "zero_point": small("uint8", 8), "scale": halves(8).astype(np.float32)}),
    "affine scalar": (16, "affine_dequantize", {"quantized_data": small("uint8", 6, 8), "axis": 0,
        "zero_point": np.uint8(200), "scale": np.float16(0.37)}),
    **{f"old lut of {n} bits": (16, "lut_to_dense", {"lut": halves(1 << n), "shape":
        np.uint32([5, 3]), "indices": small("uint8", -(-15 * n // 8))}) for n in (1, 2, 4, 6, 8)},
    "old sparse": (16, "sparse_to_dense", {"nonzero_data": halves(COUNT), "mask": DENSE_16,
        "shape": np.uint32([6, 8])}),
    "old cast": (16, "cast", {"source_val": halves(6, 8), "output_dtype": "fp32"}),
    "cast": (18, "cast", {"source_val": halves(6, 8), "output_dtype": "fp32"}),
    **{f"blocks of {n}": (18, "blockwise_shift_scale", {"data": small(n, 6, 8),
        "scale": halves(3, 2), "offset": small(n, 3, 2)}) for n in ("int4", "uint4", "int8", "uint8")},
    "blocks without offset": (18, "blockwise_shift_scale", {"data": small("int4", 6, 8),
        "scale": halves(6, 1)}),
    "blocks, float offset": (18, "blockwise_shift_scale", {"data": small("uint8", 6, 8),
        "scale": halves(6, 1), "offset": halves(6, 1)}),
    "blocks of halves": (18, "blockwise_shift_scale", {"data": halves(6, 8), "scale": halves(1, 8),
        "offset": halves(1, 8)}),
    "blocks in float32": (18, "blockwise_shift_scale", {"data": small("int8", 6, 8),
        "scale": halves(3, 8).astype(np.float32)}),
    **{f"lut of {n}": (18, "lut_to_dense", {"indices": small(n, 6, 8),
        "lut": halves(1, 1, 1 << int(n[4:]), 1)}) for n in
       ("uint1", "uint2", "uint3", "uint4", "uint6", "uint8")},
    "lut in groups, axis 0": (18, "lut_to_dense", {"indices": small("uint4", 6, 8),
        "lut": halves(3, 1, 16, 1)}),
    "lut in groups, both axes": (18, "lut_to_dense", {"indices": small("uint2", 6, 8),
        "lut": halves(3, 2, 4, 1)}),
    "lut of vectors, axis 0": (18, "lut_to_dense", {"indices": small("uint2", 6, 8),
        "lut": halves(3, 2, 4, 3), "vector_axis": 0}),
    "lut of vectors, last axis": (18, "lut_to_dense", {"indices": small("uint2", 6, 8),
        "lut": halves(1, 2, 4, 3), "vector_axis": -1}),
    "sparse": (18, "sparse_to_dense", {"nonzero_data": halves(COUNT),
        "mask": MASK.astype(types.nptype_from_builtin(types.uint1))}),
    "sparse lut": (18, "lut_to_sparse", {**sparse("uint4"), "lut": halves(3, 1, 16, 1)}),
    "sparse lut of vectors": (18, "lut_to_sparse", {**sparse("uint2"), "lut": halves(1, 1, 4, 2),
        "vector_axis": 0}),
    "sparse blocks": (18, "sparse_blockwise_shift_scale", {"nonzero_data": small("int8", COUNT),
        "data_mask": MASK.astype(types.nptype_from_builtin(types.uint1)),
        "scale": halves(6, 1), "offset": small("int8", 6, 1)}),
}  # fmt: skip


def weight_of(kind: str, params: dict[str, Any]) -> Any:
    """The dense constant of a form; of the sparse ones through sparse_to_dense."""
    made = getattr(mb, f"constexpr_{kind}")(**params)
    if isinstance(made, (tuple, list)):
        return mb.constexpr_sparse_to_dense(mask=made[0], nonzero_data=made[1])
    return made


def plus_zero(ios: int, make: Any) -> tuple[Any, np.ndarray]:
    """A function that adds an input to a constant, and the constant as coremltools has it."""
    with build.Function({}, opset_version=build.TARGETS[ios]) as scratch:
        weight = make()
        scratch.set_outputs([weight])
        dense = weight.op.materialized_val_inference()
    with build.Function({"x": build.placeholder(dense)}, opset_version=build.TARGETS[ios]) as made:
        made.set_outputs([mb.add(x=made.inputs["x"], y=make(), name="out")])
    return made, dense


@pytest.mark.parametrize("form", ONE_OP)
def test_one_form(form: str, tmp_path: Path) -> None:
    ios, kind, params = ONE_OP[form]
    function, dense = build.quietly(plus_zero, ios, lambda: weight_of(kind, params))
    program = build.Program()
    program.add_function("main", function)
    package = packages.read(build.save(program, tmp_path / "one.mlpackage", ios=ios))
    found = mil.run(package, "main", {"x": np.zeros_like(dense)})["out"]
    assert found.dtype == dense.dtype
    np.testing.assert_array_equal(found, dense)


def test_a_table_that_is_itself_quantised(tmp_path: Path) -> None:
    """coremltools' ``materialized_val_inference`` does not descend here: composed by hand."""
    lut, scale, offset = small("int8", 1, 1, 16, 1), halves(1, 1), small("int8", 1, 1)
    indices = small("uint4", 6, 8)

    def make() -> Any:
        table = mb.constexpr_lut_to_dense(indices=indices, lut=lut)
        return mb.constexpr_blockwise_shift_scale(data=table, scale=scale, offset=offset)

    function, dense = build.quietly(plus_zero, 18, make)
    program = build.Program()
    program.add_function("main", function)
    package = packages.read(build.save(program, tmp_path / "nested.mlpackage"))
    found = mil.run(package, "main", {"x": np.zeros_like(dense)})["out"]
    np.testing.assert_array_equal(found, dense)
    steps = lut.reshape(-1)[indices].astype(np.float32) - np.float32(offset.item())
    np.testing.assert_array_equal(found, (steps * np.float32(scale.item())).astype(np.float16))


# -- packages that coremltools compressed ------------------------------------------------------------


def tiny(ios: int) -> Any:
    """Two layers whose weights coremltools compresses."""
    w = [RNG.standard_normal(s).astype(np.float16) for s in ((64, 48), (48, 64))]

    @mb.program(input_specs=[mb.TensorSpec((1, 48), types.fp16)], opset_version=build.TARGETS[ios])
    def program(x: Any) -> Any:
        h = mb.relu(x=mb.linear(x=x, weight=w[0], name="up"))
        return mb.linear(x=h, weight=w[1], name="down")

    return ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=build.TARGETS[ios],
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY,
    )


def _optimizer() -> Any:
    import coremltools.optimize.coreml as optimizer

    return optimizer


def palette(**options: Any) -> Any:
    """Tables; evenly spaced, because k-means needs scikit-learn."""
    o = _optimizer()
    config = o.OpPalettizerConfig(**{"mode": "uniform", "weight_threshold": 0, **options})
    return lambda m: o.palettize_weights(m, o.OptimizationConfig(global_config=config))


def joint_palette(**options: Any) -> Any:
    """The same on top of another compression."""
    o = _optimizer()
    config = o.OpPalettizerConfig(**{"mode": "uniform", "weight_threshold": 0, **options})
    return lambda m: o.palettize_weights(
        m, o.OptimizationConfig(global_config=config), joint_compression=True
    )


def linear(joint: bool = False, **options: Any) -> Any:
    """Linear quantisation."""
    o = _optimizer()
    config = o.OpLinearQuantizerConfig(**{"weight_threshold": 0, **options})
    return lambda m: o.linear_quantize_weights(
        m, o.OptimizationConfig(global_config=config), joint_compression=joint
    )


def prune() -> Any:
    """Half of the values."""
    o = _optimizer()
    config = o.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0)
    return lambda m: o.prune_weights(m, o.OptimizationConfig(global_config=config))


COMPRESSIONS: dict[str, tuple[int, Any]] = {
    **{f"palette {n}": (18, lambda n=n: [palette(nbits=n, mode="uniform")]) for n in (1, 2, 3, 6)},
    "palette 4, groups": (18, lambda: [palette(nbits=4, granularity="per_grouped_channel",
                                               group_size=16)]),
    "palette 4, scales": (18, lambda: [palette(nbits=4, enable_per_channel_scale=True)]),
    "palette 4, iOS16": (16, lambda: [palette(nbits=4)]),
    **{f"{d} {m}": (18, lambda d=d, m=m: [linear(dtype=d, mode=m)])
       for d in ("int8", "int4") for m in ("linear", "linear_symmetric")},
    "int4 blocks": (18, lambda: [linear(dtype="int4", granularity="per_block", block_size=16)]),
    "uint4 tensor": (18, lambda: [linear(dtype="uint4", granularity="per_tensor")]),
    "int8, iOS16": (16, lambda: [linear(mode="linear")]),
    "pruned": (18, lambda: [prune()]),
    "pruned, iOS16": (16, lambda: [prune()]),
    "pruned, palette": (18, lambda: [prune(), joint_palette(nbits=4)]),
    "pruned, int8": (18, lambda: [prune(), linear(joint=True, dtype="int8")]),
    "palette, quantised table": (18, lambda: [palette(nbits=4), linear(joint=True, dtype="int8",
                                              granularity="per_tensor")]),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases() -> dict[int, Any]:
    """The model before compression, per opset."""
    return {ios: build.quietly(tiny, ios) for ios in (16, 18)}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_what_coremltools_compressed(name: str, bases: dict[int, Any], tmp_path: Path) -> None:
    ios, steps = COMPRESSIONS[name]
    model = bases[ios]
    for step in steps():
        model = build.quietly(step, model)
    build.quietly(model.save, str(tmp_path / "small.mlpackage"))
    dense = build.quietly(_optimizer().decompress_weights, model)
    build.quietly(dense.save, str(tmp_path / "dense.mlpackage"))
    small_, dense_ = (packages.read(tmp_path / f"{n}.mlpackage") for n in ("small", "dense"))
    assert any(op.startswith("constexpr_") for op in mil.ops_of(small_)["main"])
    assert not any(op.startswith("constexpr_") for op in mil.ops_of(dense_)["main"])
    machines = [mil.load(p) for p in (small_, dense_)]
    weights = []
    for machine in machines:
        found = [s.arguments["weight"] for s in machine.program.steps if s.kind == "linear"]
        weights.append([machine.weights.get(w) for w in found])
    assert len(weights[0]) == 2
    for mine, theirs in zip(*weights, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_array_equal(mine, theirs)
    x = halves(1, 48)
    outs = [next(iter(m.run({next(iter(m.program.inputs)): x}).values())) for m in machines]
    np.testing.assert_array_equal(*outs)


def test_weights_that_do_not_fit_give_the_same_result(
    tmp_path: Path, bases: dict[int, Any]
) -> None:
    build.quietly(bases[18].save, str(tmp_path / "base.mlpackage"))
    package = packages.read(tmp_path / "base.mlpackage")
    x = {"x": halves(1, 48)}
    tight = mil.load(package, None, mil.Weights(package, keep=0))
    roomy = mil.load(package)
    for a, b in zip(tight.run(x).values(), roomy.run(x).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {v.dtype.name for v in tight.weights.held.values() if v.size > 99} == {"float16"}
    assert {v.dtype.name for v in roomy.weights.held.values() if v.size > 99} == {"float32"}


BROKEN: dict[str, tuple[str, str, Any, str]] = {
    "a scale that divides nothing": ("blocks without offset", "scale", np.ones((4, 2), np.float16),
                                     "does not divide"),
    "an offset of another shape": ("blocks of int8", "offset", np.ones((6, 1), np.int8), "offset of"),
    "a table too short": ("lut of uint4", "lut", np.ones((1, 1, 4, 1), np.float16), "into a table of"),
    "too few values": ("sparse", "nonzero_data", np.ones(3, np.float16), "places"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_constant_is_refused_by_name(name: str, tmp_path: Path) -> None:
    form, parameter, value, message = BROKEN[name]
    ios, kind, params = ONE_OP[form]
    function, dense = build.quietly(plus_zero, ios, lambda: weight_of(kind, params))
    program = build.Program()
    program.add_function("main", function)
    package = packages.read(build.save(program, tmp_path / "one.mlpackage"))
    block = package.functions["main"].block_specializations["CoreML8"]
    op = next(o for o in block.operations if o.type.startswith("constexpr_"))
    dtype = {"float16": "FLOAT16", "int8": "INT8"}[value.dtype.name]
    op.inputs[parameter].arguments[0].value.CopyFrom(immediate_value(dtype, value))
    with pytest.raises(Refused, match=f"{op.outputs[0].name}: .*{message}"):
        mil.run(package, "main", {"x": np.zeros_like(dense)})
