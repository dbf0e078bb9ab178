"""Weights that no table suits, by way of the command: one line that names the tensor, or exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraduct.formats.coreml import package as packages

pytest.importorskip("coremltools")

import mil_build as build

ct, mb, types = build.ct, build.mb, build.types
WAYS = (
    ["--palettize", "4"],
    ["--palettize", "4", "--group-size", "16"],
    ["--palettize", "4", "--per-channel-scale"],
    ["--quantize", "int8"],
    ["--quantize", "int4", "--group-size", "16"],
)
ids = " ".join


def saved(path: Path, *held: np.ndarray) -> Path:
    """A package by coremltools that multiplies its input with the weights, one after the other."""

    @mb.program(
        input_specs=[mb.TensorSpec((1, held[0].shape[1]), types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x: Any) -> Any:
        for i, weight in enumerate(held):
            x = mb.linear(x=x, weight=mb.const(val=weight, name=f"w{i}"))
        return x

    convert = {"convert_to": "mlprogram", "minimum_deployment_target": ct.target.iOS18}
    model = build.quietly(lambda: ct.convert(program, skip_model_load=True, **convert))
    build.quietly(model.save, str(path))
    return path


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def read_back(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The one constant of that shape, by coremltools."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.utils.load_spec(str(path))
    folder = str(path / "Data/com.apple.CoreML/weights")
    program = build.quietly(load, spec, spec.specificationVersion, folder)
    made = [
        np.asarray(op.materialized_val_inference())
        for function in program.functions.values()
        for op in function.operations
        if op.op_type.startswith("constexpr_")
    ]
    return next(v for v in reversed(made) if v.shape == shape)  # behind it, its scale


@pytest.mark.parametrize("way", WAYS, ids=ids)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_inf_are_named(tmp_path: Path, cli: Any, way: list[str], value: float) -> None:
    bad = normal(64, 64)
    bad[37, 11] = value
    source = saved(tmp_path / "x.mlpackage", normal(64, 64), bad)
    before = sorted(tmp_path.iterdir())
    done = cli("compress", source, "-o", tmp_path / "y.mlpackage", *way)
    assert done.exit_code == 1
    text = done.output + (done.stderr if done.stderr_bytes else "")
    assert "w1" in text
    assert "NaN" in text or "Inf" in text
    assert "Traceback" not in text
    assert [p for p in sorted(tmp_path.iterdir()) if not p.name.startswith(".")] == before


@pytest.mark.parametrize("way", WAYS, ids=ids)
@pytest.mark.parametrize("kind", ["zeros", "constant", "three values", "tiny", "large"])
def test_few_values_are_exact_or_nearly(
    tmp_path: Path, cli: Any, way: list[str], kind: str
) -> None:
    values = {
        "zeros": np.zeros((64, 64)),
        "constant": np.full((64, 64), -0.3),
        "three values": np.random.default_rng(1).integers(-1, 2, (64, 64)) * 0.5,
        "tiny": np.random.default_rng(1).integers(-3, 4, (64, 64)) * 2.0**-24,
        "large": np.random.default_rng(1).integers(-1, 2, (64, 64)) * 65504.0,
    }[kind].astype(np.float16)
    source = saved(tmp_path / "x.mlpackage", values)
    done = cli("compress", source, "-o", tmp_path / "y.mlpackage", *way, "--json")
    assert done.exit_code == 0, done.output
    found = read_back(tmp_path / "y.mlpackage", (64, 64))
    if "--palettize" in way and not (kind == "tiny" and "--per-channel-scale" in way):
        np.testing.assert_array_equal(found, values)
    wide = values.astype(np.float64)
    assert np.abs(found - wide).max() <= 0.15 * np.abs(wide).max()
    (row,) = (r for r in json.loads(done.output)["tensors"] if r["way"])
    assert 0 <= row["relative_error"] < 0.15


def test_groups_that_do_not_divide_leave_a_reason(tmp_path: Path, cli: Any) -> None:
    source = saved(tmp_path / "x.mlpackage", normal(64, 60), normal(60, 64))
    out = tmp_path / "y.mlpackage"
    done = cli("compress", source, "-o", out, "--palettize", "4", "--group-size", "16", "--json")
    rows = {r["name"]: r for r in json.loads(done.output)["tensors"] if len(r["shape"]) == 2}
    reasons = sorted(str(r["reason"]) for r in rows.values())
    assert reasons == ["60 channels, no multiple of 16", "None"]
    done = cli("compress", source, "-o", out, "--palettize", "4", "--group-size", "7", "--force")
    assert done.exit_code == 1
    assert "no multiple of 7" in done.output + done.stderr
    assert sum(op.type.startswith("constexpr") for f in packages.read(out).functions.values()
               for op in f.block_specializations["CoreML8"].operations) == 1  # fmt: skip


def test_empty_and_scalar_tensors_are_left_alone() -> None:
    """coremltools can't save an empty constant; our plan is asked itself."""
    from loraduct.converters.compress_code import Way
    from loraduct.converters.compress_plan import fixed
    from loraduct.converters.compress_sites import ADAPTER, BASE, Weight

    held = [Weight(i, f"w{i}", "FLOAT16", s) for i, s in enumerate(((0, 64), (64, 0), ()))]
    held[2].reason = "scalar or vector"  # as `weights` says
    for way in (Way("lut", 4), Way("lut", 4, 16), Way("lut", 4, cluster_dim=2), Way("int", 8)):
        plan = fixed(held, {BASE: way, ADAPTER: None}, "iOS18")
        assert not plan.ways
        assert all(w.reason for w in held)


def test_compressed_already(tmp_path: Path, cli: Any) -> None:
    source = saved(tmp_path / "x.mlpackage", normal(64, 64))
    small = tmp_path / "y.mlpackage"
    assert cli("compress", source, "-o", small, "--palettize", "4").exit_code == 0
    for way in WAYS:
        done = cli("compress", small, "-o", tmp_path / "z.mlpackage", *way)
        assert done.exit_code == 1
        assert "compressed already" in done.output + done.stderr
        assert not (tmp_path / "z.mlpackage").exists()
