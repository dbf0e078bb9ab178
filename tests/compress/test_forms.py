"""Every form of compressed constant that we write, against coremltools' own decompression of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loraduct.converters import coreml
from loraduct.converters import quantize as linear
from loraduct.converters.compress_code import Way, unfit
from loraduct.converters.compress_expand import decompress
from loraduct.converters.compress_package import compress
from loraduct.converters.compress_plan import Plan, fixed
from loraduct.converters.compress_report import Report
from loraduct.converters.compress_sites import ADAPTER, BASE, Weight, form_of, weights
from loraduct.converters.compress_wanted import Wanted
from loraduct.converters.compress_write import write
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats.coreml import package as packages
from loraduct.formats.coreml import record

pytest.importorskip("peft")
pytest.importorskip("coremltools")

import families
import mil_build as build

ct = build.ct

TABLES = [
    Way("lut", bits, group, scaled, lut, vector, axis)
    for bits, group, scaled, lut, vector, axis in itertools.product(
        (1, 2, 3, 4, 6, 8), (0, 2, 16), (False, True), ("kmeans", "uniform"), (1, 2), (0, 1)
    )
    if not (vector == 2 and (scaled or lut != "kmeans"))
]
INTEGERS = [
    Way("int", bits, group, symmetric=symmetric, whole=whole)
    for bits, group, symmetric, whole in itertools.product(
        (4, 8), (0, 16), (True, False), (False, True)
    )
    if not (whole and group)
]
OLD = [
    *(Way("lut", bits, lut=lut) for bits in (1, 2, 4, 6, 8) for lut in ("kmeans", "uniform")),
    *(w for w in INTEGERS if w.bits == 8 and not w.group),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base for iOS18 and for iOS17."""
    room = tmp_path_factory.mktemp("forms")
    base = base_folder.read(families.saved("llama", room / "base")[1])
    coreml.build(base, room / "new.mlpackage", coreml.Options(context=16))
    old = coreml.Options(target="iOS17", stateless=True, context=16, shapes=(9,))
    coreml.build(base, room / "old.mlpackage", old)
    return room


def written(source: Path, output: Path, ways: list[Way]) -> tuple[Report, dict[str, Way]]:
    """The package with the ways dealt out to its tensors in turn."""
    package = packages.read(source)
    form, found = form_of(package), record.find(package)
    held = weights(package, found, Wanted(include="(_proj|embed).*weight"))
    plan = Plan()
    chosen = [w for w in held if w.reason is None]
    for i, weight in enumerate(chosen):
        way = ways[i % len(ways)]
        assert unfit(weight, way, form) is None
        plan.ways[weight.offset] = way
    report = Report(source, output)
    write(package, found, held, plan, form, report)
    return report, {w.name: plan.ways[w.offset] for w in chosen}


def by_coremltools(path: Path) -> dict[str, np.ndarray]:
    """Every large constant, as coremltools' reader makes it."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.utils.load_spec(str(path))
    program = build.quietly(
        load, spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights")
    )
    found = {}
    for function in program.functions.values():
        for op in function.operations:
            name = op.outputs[0].name
            if op.op_type.startswith("constexpr_"):
                found[name] = np.asarray(op.materialized_val_inference())
            elif op.op_type == "const" and isinstance(op.val.val, np.ndarray):
                found[name] = op.val.val
    return found


def _dealt(ways: list[Way], count: int) -> list[list[Way]]:
    return [ways[at : at + count] for at in range(0, len(ways), count)]


@pytest.mark.parametrize(
    ("source", "ways"),
    [
        *(("new", ways) for ways in _dealt(TABLES, 15)),
        ("new", INTEGERS),
        ("old", OLD),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v[0]}...{len(v)}",
)
def test_coremltools_decompresses_to_the_same_bits(
    world: Path, tmp_path: Path, source: str, ways: list[Way]
) -> None:
    small, dense = tmp_path / "small.mlpackage", tmp_path / "dense.mlpackage"
    report, chosen = written(world / f"{source}.mlpackage", small, ways)
    assert report.checked == len(chosen) >= len(ways)
    decompress(small, dense)
    before, theirs, ours = (
        by_coremltools(p) for p in (world / f"{source}.mlpackage", small, dense)
    )
    errors = {r.name: r for r in report.rows}
    for name, way in chosen.items():
        assert theirs[name].dtype == ours[name].dtype == before[name].dtype, (name, way)
        assert theirs[name].tobytes() == ours[name].tobytes(), (name, way)
        wide = before[name].astype(np.float64)
        gap = ((wide - ours[name]) ** 2).sum()
        norm = (wide**2).sum()
        np.testing.assert_allclose(errors[name].error, gap, rtol=1e-6, atol=1e-12 * norm)
        np.testing.assert_allclose(errors[name].norm, norm, rtol=1e-9)
        assert gap < norm or way.lut == "uniform", (name, way)
    opened = build.quietly(ct.models.MLModel, str(small), skip_model_load=True)
    assert opened.get_spec().specificationVersion >= (9 if source == "new" else 7)


def test_whole_packages_decompress_alike(world: Path, tmp_path: Path) -> None:
    """coremltools' ``decompress_weights`` of a package with every kind of form that it takes."""
    small, dense = tmp_path / "small.mlpackage", tmp_path / "dense.mlpackage"
    written(world / "old.mlpackage", small, OLD)
    decompress(small, dense)
    opened = build.quietly(lambda: ct.models.MLModel(str(small), skip_model_load=True))
    theirs = build.quietly(lambda: ct.optimize.coreml.decompress_weights(opened))
    build.quietly(theirs.save, str(tmp_path / "theirs.mlpackage"))
    one, two = (by_coremltools(p) for p in (dense, tmp_path / "theirs.mlpackage"))
    held = [sorted(v.tobytes() for v in d.values() if v.size >= 2048) for d in (one, two)]
    assert held[0] == held[1]


def test_ranks_above_two_and_unique_values(tmp_path: Path) -> None:
    """A convolution's weight, whose values are few: tables of each mode hold them exactly."""
    mb, types = build.mb, build.types
    kernel = (np.random.default_rng(0).integers(-4, 4, (32, 16, 3, 3)) / 8).astype(np.float16)

    @mb.program(
        input_specs=[mb.TensorSpec((1, 16, 8, 8), types.fp16)], opset_version=ct.target.iOS18
    )
    def program(x: Any) -> Any:
        return mb.conv(x=x, weight=kernel)

    convert = {"convert_to": "mlprogram", "minimum_deployment_target": ct.target.iOS18}
    model = build.quietly(lambda: ct.convert(program, skip_model_load=True, **convert))
    source = tmp_path / "conv.mlpackage"
    build.quietly(model.save, str(source))
    for i, way in enumerate((
        Way("lut", 3, lut="unique"), Way("lut", 3, 4, lut="unique"), Way("lut", 3, 8, axis=1),
        Way("lut", 4), Way("lut", 4, 8, cluster_dim=2), Way("lut", 4, 8, cluster_dim=2, axis=1),
        Way("lut", 4, scaled=True), Way("int", 8), Way("int", 4, 8, symmetric=False),
    )):  # fmt: skip
        package = packages.read(source)
        held = weights(package, None, Wanted())
        plan = fixed(held, {BASE: way, ADAPTER: None}, form_of(package))
        report = Report(source, tmp_path / f"{i}.mlpackage")
        write(package, None, held, plan, form_of(package), report)
        assert report.checked == 1
        outcome = next(r.name for r in report.rows if r.way)
        found = by_coremltools(report.output)[outcome]
        if way.kind == "lut" and not way.scaled and way.cluster_dim == 1:
            assert found.tobytes() == kernel.tobytes()
        decompress(report.output, tmp_path / f"{i}-dense.mlpackage")
        dense = by_coremltools(tmp_path / f"{i}-dense.mlpackage")
        assert found.tobytes() in {v.tobytes() for v in dense.values()}


@pytest.mark.parametrize(
    ("way", "what"),
    [
        (Way("lut", 4, cluster_dim=3), "1 or 2 numbers"),
        (Way("lut", 4, axis=2), "axis 0 or 1"),
        (Way("lut", 4, scaled=True, cluster_dim=2), "without scales"),
        (Way("lut", 4, lut="unique", cluster_dim=2), "by kmeans"),
        (Way("lut", 4, 3, cluster_dim=2), "groups of 3"),
        (Way("int", 8, 16, whole=True), "leaves no groups"),
    ],
    ids=str,
)
def test_contradictions_are_refused(way: Way, what: str) -> None:
    with pytest.raises(Refused, match=what):
        unfit(Weight(0, "w", "FLOAT16", (64, 64)), way, "iOS18")


@pytest.mark.parametrize(
    "way",
    [Way("lut", 3), Way("lut", 4, 16), Way("lut", 4, 16, axis=1), Way("lut", 4, scaled=True),
     Way("lut", 4, cluster_dim=2), Way("int", 4), Way("int", 8, 16)],
    ids=str,
)  # fmt: skip
def test_what_iOS17_lacks(way: Way) -> None:
    with pytest.raises(Refused, match="need iOS18"):
        unfit(Weight(0, "w", "FLOAT16", (64, 64)), way, "iOS16")


@pytest.mark.parametrize(
    "way",
    [Way("lut", 4, 24), Way("lut", 4, 24, axis=1), Way("int", 4, 24),
     Way("lut", 4, cluster_dim=2), Way("lut", 4, cluster_dim=2, axis=1)],
    ids=str,
)  # fmt: skip
def test_channels_that_do_not_divide_are_named(way: Way) -> None:
    weight = Weight(0, "w", "FLOAT16", (65, 65))
    assert "65 channels, no multiple of" in str(unfit(weight, way, "iOS18"))


def test_names_are_told_apart() -> None:
    ways = {*TABLES, *INTEGERS, *OLD}
    assert len({str(w) for w in ways}) == len(ways)
    assert str(Way("lut", 4, 16)) == "lut4, groups of 16"


def test_offsets_lower_the_error_of_lopsided_channels() -> None:
    w = np.random.default_rng(0).gamma(2.0, 1.0, (32, 64)).astype(np.float16)
    one, two = (linear.quantize(w, linear.Options(4, symmetric=s)).error for s in (True, False))
    assert two < 0.4 * one


def test_a_package_of_odd_shapes_says_what_it_left(world: Path, tmp_path: Path) -> None:
    """Groups that divide some tensors only: those are compressed, the rest named with the reason."""
    report = compress(
        world / "new.mlpackage",
        tmp_path / "a.mlpackage",
        Wanted(palettize=4, group_size=48, include="weight"),
    )
    made = [r for r in report.rows if r.way]
    left = [r for r in report.rows if r.reason and "no multiple of 48" in r.reason]
    assert made
    assert left
    assert all(r.shape[0] % 48 == 0 for r in made)
    assert all(r.shape[0] % 48 for r in left)


def test_float32_packages_have_float32_tables() -> None:
    from loraduct.converters.compress_code import tables
    from loraduct.converters.palette import expand
    from loraduct.converters.palettize import palettize

    w = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    for way in (Way("lut", 4), Way("lut", 4, 4, axis=1), Way("lut", 4, scaled=True)):
        assert expand(palettize(w, tables(way, "float32"))).dtype == np.float32
    half = palettize(w.astype(ml_dtypes.bfloat16), tables(Way("lut", 4), "float16"))
    assert expand(half).dtype == np.float16
