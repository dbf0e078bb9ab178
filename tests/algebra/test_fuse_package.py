"""Fusing into Core ML packages, in 16 bits and in few: against stock PEFT, and what coremltools reads."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraduct.converters import coreml, package
from loraduct.converters.compress_package import compress
from loraduct.converters.compress_wanted import Wanted
from loraduct.formats import base as base_folder
from loraduct.formats.coreml import package as packages

pytest.importorskip("peft")
pytest.importorskip("coremltools")

import families
import fusing
import mil_build as build
import stock

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = families.tokens(9)
SMALL = 0.05  # of the weights, about: less than half a step of 4 bits
WAYS = {
    "lut4": {"palettize": 4},
    "groups": {"palettize": 3, "group_size": 16},
    "scaled": {"palettize": 4, "per_channel_scale": True},
    "columns": {"palettize": 4, "group_size": 16, "axis": 1, "per_channel_scale": True},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "blocks": {"quantize": "int4", "group_size": 16},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tied base, packages of it in every form, and adapters: small, large, DoRA, of the head."""
    room = tmp_path_factory.mktemp("world")
    model, folder = families.saved("qwen2", room / "base")
    coreml.build(base_folder.read(folder), room / "plain.mlpackage", coreml.Options(context=48))
    old = coreml.Options(target="iOS17", stateless=True, context=48, shapes=(9,))
    coreml.build(base_folder.read(folder), room / "old.mlpackage", old)
    for name, way in WAYS.items():
        source = room / "plain.mlpackage"
        compress(source, room / f"{name}.mlpackage", Wanted(**way, include="proj_weight|embed"))
    for name, way in {"old lut4": "lut4", "old int8": "int8"}.items():
        wanted = Wanted(**WAYS[way], include="proj_weight|embed")
        compress(room / "old.mlpackage", room / f"{name}.mlpackage", wanted)
    for name, options in {
        "large": {"target_modules": LAYERS},
        "dora": {"target_modules": LAYERS, "use_dora": True},
        "head": {"target_modules": ["lm_head", "q_proj"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]},
        "norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 44]},
        "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
        "biases": {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True},
    }.items():
        model, _ = families.saved("qwen2", room / "again")
        stock.trained(model, room / name, 3, **{"r": 4, "lora_alpha": 6, **options})
    weights = room / "head" / "adapter_model.safetensors"  # PEFT's copies of the base's own weights
    save_file({k: v for k, v in load_file(weights).items() if "lora_" in k}, weights)
    weights = room / "tokens" / "adapter_model.safetensors"  # of the base's own rows others
    save_file({k: -v if "token" in k else v for k, v in load_file(weights).items()}, weights)
    shutil.copytree(room / "large", room / "small")
    file = room / "small" / "adapter_config.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps(given | {"lora_alpha": given["lora_alpha"] * SMALL}))
    return room


def operations(path):
    """The operations of the first function that are in the package, as coremltools reads them."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = build.ct.utils.load_spec(str(path))
    weights = str(path / "Data/com.apple.CoreML/weights")
    program = build.quietly(load, spec, spec.specificationVersion, weights)
    made = next(iter(packages.read(path).functions.values()))
    ours = {o.name for op in made.block_specializations[made.opset].operations for o in op.outputs}
    held = next(iter(program.functions.values())).operations
    return [o for o in held if o.outputs[0].name in ours]  # arguments are constants to coremltools


def constants(path):
    """What coremltools' reader says the constants of the first function stand for."""
    found = {}
    for op in operations(path):
        if op.op_type.startswith("constexpr_"):
            found[op.outputs[0].name] = np.asarray(op.materialized_val_inference())
        elif op.op_type == "const" and isinstance(op.val.val, np.ndarray):
            found[op.outputs[0].name] = op.val.val
    return found


def aligned(size):
    """Of a weight file: its blobs are aligned to 64 bytes, and whichever is the last isn't filled up."""
    return -(-size // 64) * 64


def updates(folder):
    """Constant -> dW, float64."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    pairs = fusing.factors(folder)
    return {f"{m.replace('.', '_')}_weight": alpha / 4 * b @ a for m, (a, b) in pairs.items()}


def fused(cli, base, adapter, out, *words):
    done = cli("fuse", *([adapter] if not isinstance(adapter, list) else adapter),
               "--base", base, "-o", out, "--json", *words)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["large", "dora", "head", "norm", "tokens", "bias", "biases"])
def test_as_stock_peft_computes(cli, world, tmp_path, name):
    out = tmp_path / "out.mlpackage"
    said = fused(cli, world / "plain.mlpackage", world / name, out)
    assert said["untied"] == ("lm_head.weight" if name == "head" else None)
    wanted = stock.logits(world / "base", [(world / name, 1.0)], IDS)
    assert families.off(families.run(out, IDS, "fp32"), wanted) < 2e-3
    assert families.off(families.run(world / "plain.mlpackage", IDS, "fp32"), wanted) > 0.02
    build.quietly(build.ct.models.MLModel, str(out), skip_model_load=True)


def test_one_rounding_and_nothing_else_changes(cli, world, tmp_path):
    out = tmp_path / "out.mlpackage"
    fused(cli, world / "plain.mlpackage", [f"{world / 'large'}:0.5"], out)
    before, after, deltas = (
        constants(world / "plain.mlpackage"),
        constants(out),
        updates(world / "large"),
    )
    assert before.keys() == after.keys()
    same = total = 0
    for name, values in before.items():
        if name not in deltas:
            assert values.tobytes() == after[name].tobytes(), name
            continue
        wanted = (values.astype(np.float64) + 0.5 * deltas[name]).astype(np.float32)
        same += int((wanted.astype(np.float16) == after[name]).sum())
        total += wanted.size
        assert np.abs(after[name] - wanted).max() <= np.abs(wanted).max() * 2**-10
    assert same > 0.999 * total  # sums of another order, on the other side of a half


def test_several_adapters_weighted(cli, world, tmp_path):
    out = tmp_path / "out.mlpackage"
    given = [(world / "large", 0.5), (world / "small", -2.0)]
    fused(cli, world / "plain.mlpackage", [f"{p}:{w}" for p, w in given], out)
    wanted = stock.logits(world / "base", given, IDS)
    assert families.off(families.run(out, IDS, "fp32"), wanted) < 2e-3


def nearest(held, before, delta):
    """What moving to the nearest of ``held`` (rows, entries) keeps of an update, dense in float64: its
    share, and how far that may be off, for what lies in the middle of two entries to float32."""
    wanted = before + delta
    share = unsure = 0.0
    for entries, old, new, wish in zip(held, before, wanted, delta, strict=True):
        gaps = np.abs(new[:, None] - entries)
        first, second = np.argsort(gaps, axis=1, kind="stable")[:, :2].T
        columns = np.arange(len(new))
        share += (entries[first] - old) @ wish
        even = gaps[columns, second] - gaps[columns, first] < 1e-5 * np.abs(new).max()
        unsure += (np.abs(entries[second] - entries[first]) * np.abs(wish))[even].sum()
    return share / (delta**2).sum(), unsure / (delta**2).sum()


def _blocks(shape, way):
    """Rows and columns that share a table or scale."""
    high, wide = shape
    rows = {"lut4": high, "old lut4": high, "groups": 16}.get(way, 1)
    columns = 16 if way in ("blocks", "columns") else wide
    for i in range(0, high, rows):
        for j in range(0, wide, columns):
            yield slice(i, i + rows), slice(j, j + columns)


@pytest.mark.parametrize("way", [*WAYS, "old lut4", "old int8"])
def test_codes_are_the_nearest(cli, world, tmp_path, way):
    """Remedy none: no value that the base's blocks hold is nearer; the report is a dense computation."""
    source, out = world / f"{way}.mlpackage", tmp_path / "out.mlpackage"
    said = fused(cli, source, world / "large", out)
    before, after, deltas = constants(source), constants(out), updates(world / "large")
    sums = np.zeros(3)
    told = {m["module"].replace(".", "_"): m for m in said["survival"]["modules"]}
    assert deltas.keys() == told.keys()
    for name, values in before.items():
        if name.endswith("_unscaled"):
            continue
        if name not in deltas:
            assert values.tobytes() == after[name].tobytes(), name
            continue
        wide, delta = values.astype(np.float64), deltas[name]
        wanted = wide + delta
        for part in _blocks(values.shape, way):
            held = np.unique(wide[part])
            gap = np.abs(wanted[part][..., None] - held).min(-1)
            off = np.abs(after[name][part].astype(np.float64) - wanted[part])
            assert (off <= gap + 2e-3 * np.abs(held).max()).all(), name
        moved = after[name].astype(np.float64) - wide
        inner = (moved * delta).sum(), (delta**2).sum(), (moved**2).sum()
        sums += inner
        assert told[name]["share"] == pytest.approx(inner[0] / inner[1], abs=1e-5)
        assert told[name]["cosine"] == pytest.approx(
            inner[0] / np.sqrt(inner[1] * inner[2]), abs=1e-5
        )
        assert told[name]["codes"] == pytest.approx((moved != 0).mean(), abs=1e-9)
    assert said["survival"]["share"] == pytest.approx(sums[0] / sums[1], abs=1e-5)
    assert said["bytes"]["before"] == said["bytes"]["after"]
    sizes = [(p / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size for p in (source, out)]
    assert aligned(sizes[0]) == aligned(sizes[1])
    build.quietly(build.ct.models.MLModel, str(out), skip_model_load=True)


@pytest.mark.parametrize("way", ["lut4", "scaled", "columns", "blocks", "old lut4"])
def test_remedies(cli, world, tmp_path, way):
    """Each keeps the form, costs what is said, and keeps more than rounding."""
    source = world / f"{way}.mlpackage"
    deltas, before = updates(world / "small"), constants(source)
    size, share, effect, left = {}, {}, {}, {}
    for remedy in ("none", "rescale", "compensate", "bits"):
        out = tmp_path / f"{remedy}.mlpackage"
        said = fused(cli, source, world / "small", out, "--remedy", remedy, "--growth", 2)
        after = constants(out)
        assert after.keys() == before.keys()
        size[remedy] = (out / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
        assert said["bytes"]["after"] == pytest.approx(size[remedy], rel=0.2)
        share[remedy], effect[remedy] = said["survival"]["share"], said["effect"]
        left[remedy] = sum(
            ((after[n].astype(np.float64) - before[n] - d) ** 2).sum() for n, d in deltas.items()
        )
        build.quietly(build.ct.models.MLModel, str(out), skip_model_load=True)
    assert {aligned(size[r]) for r in ("none", "rescale", "compensate")} == {aligned(size["none"])}
    assert size["none"] < size["bits"]
    assert left["rescale"] <= left["none"]
    assert left["bits"] < 0.2 * left["none"]
    assert share["bits"] > 0.9
    if way.startswith("old"):  # one function: the adapter can't stand beside the base
        assert not any(effect.values())
        return
    assert effect["compensate"]["cosine"] > effect["none"]["cosine"]
    assert effect["bits"]["cosine"] > 0.95


def test_compared_and_one_recommended(cli, world, tmp_path):
    out = tmp_path / "out.mlpackage"
    said = fused(cli, world / "lut4.mlpackage", world / "small", out, "--remedy", "auto")
    rows = {r["remedy"]: r for r in said["remedies"]}
    assert rows.keys() == {"none", "rescale", "compensate", "bits"}
    assert said["recommended"] in {*rows, "side path"}
    numbers = sum(a.size + b.size for a, b in fusing.factors(world / "small").values())
    assert said["side_path_bytes"] == 2 * numbers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mlpackage"]
    text = cli("fuse", world / "small", "--base", world / "lut4.mlpackage", "--dry-run").stdout
    assert "recommended:" in text
    assert "side path" in text


def test_the_gate_fails_with_3_and_writes_nothing(cli, world, tmp_path):
    given = ("--base", world / "lut4.mlpackage", "-o", tmp_path / "out.mlpackage")
    done = cli("fuse", world / "small", *given, "--min-effect", 0.99)
    assert done.exit_code == 3
    assert "--min-effect 0.99: cosine" in done.stderr
    assert not list(tmp_path.iterdir())
    enough = ("--min-effect", 0.9, "--remedy", "bits", "--growth", 2)
    assert cli("fuse", world / "small", *given, *enough).exit_code == 0


def test_a_compressed_head_is_untied(cli, world, tmp_path):
    source, out = world / "scaled.mlpackage", tmp_path / "out.mlpackage"
    said = fused(cli, source, world / "head", out)
    before, after = constants(source), constants(out)
    embedding = "model_embed_tokens_weight"
    assert before[embedding].tobytes() == after[embedding].tobytes()
    moved = after["lm_head_weight"].astype(np.float64) - before[embedding]
    delta = updates(world / "head")["lm_head_weight"]
    (told,) = [m for m in said["survival"]["modules"] if m["module"] == "lm_head.weight"]
    assert told["share"] == pytest.approx((moved * delta).sum() / (delta**2).sum(), abs=1e-5)
    (scale,) = (o.scale.val for o in operations(source) if o.outputs[0].name == embedding)
    table = np.unique(before[f"{embedding}_unscaled"])
    assert len(table) == 16
    held = np.sort((scale * table).astype(np.float64), axis=1)  # float16, as they are read
    share, unsure = nearest(held, before[embedding].astype(np.float64), delta)
    assert told["share"] == pytest.approx(share, abs=unsure + 1e-5)
    assert unsure < 0.01 * share
    assert said["untied"] == "lm_head.weight"
    build.quietly(build.ct.models.MLModel, str(out), skip_model_load=True)


def test_an_adapter_of_the_package_itself(cli, world, tmp_path):
    """Its functions, made for the base as it was, are left out, and said so."""
    source, out = tmp_path / "x.mlpackage", tmp_path / "out.mlpackage"
    shutil.copytree(world / "plain.mlpackage", source)
    package.add(source, {"one": [package.Member(str(world / "large"))]})
    said = fused(cli, source, f"{source}:one", out)
    assert any("left out: one" in n for n in said["notes"])
    assert list(packages.read(out).functions) == ["base"]
    wanted = stock.logits(world / "base", [(world / "large", 1.0)], IDS)
    assert families.off(families.run(out, IDS, "fp32"), wanted) < 2e-3
    shown = cli("inspect", out)
    assert shown.exit_code == 0, shown.stderr
    done = cli("package", "add", out, f"two={world / 'large'}")
    assert done.exit_code == 1
    assert "no function of the base alone" in done.stderr


def _sparse(op):
    """A table of several numbers an entry, as far as its type says."""
    if "q_proj" in op.outputs[0].name:
        op.type = "constexpr_lut_to_sparse"


def _both_axes(op):
    """Scales of 16 columns of a row as if they were of 8 columns of two rows."""
    rows, columns = op.inputs["scale"].arguments[0].value.type.tensorType.dimensions
    rows.constant.size //= 2
    columns.constant.size *= 2


def _columns_alone(op):
    """Scales of the rows of a square matrix as if they were of its columns."""
    if "q_proj" in op.outputs[0].name:
        rows, columns = op.inputs["scale"].arguments[0].value.type.tensorType.dimensions
        rows.constant.size, columns.constant.size = columns.constant.size, rows.constant.size


def _changed(path, change):
    """A package with other operations for its compressed constants."""
    made = packages.read(path)
    for function in made.functions.values():
        for op in function.block_specializations[function.opset].operations:
            if op.type.startswith("constexpr_"):
                change(op)
    made.spec_path.write_bytes(made.model.SerializeToString())


CHANGED = {
    "sparse": ("lut4", _sparse),
    "axes": ("blocks", _both_axes),
    "columns alone": ("int4", _columns_alone),
}
BAD = {
    "another base": ("lut4", "narrow", (), "made for another base"),
    "dtype": ("plain", "large", ("--dtype", "f32"), "its dtype is kept"),
    "remedy": ("plain", "large", ("--remedy", "bits"), "is not packed"),
    "replaced": ("lut4", "saved", (), "loraduct decompress"),
    "form": ("sparse", "large", (), "loraduct decompress"),
    "columns": ("columns alone", "large", ("--remedy", "rescale"), "can't be made again"),
    "axes": ("axes", "large", ("--remedy", "rescale"), "can't be made again"),
    "weight": ("plain", "dora:0.5", (), "a weight other than 1"),
    "overflow": ("plain", "large:1e9", (), "does not fit"),
    "nan": ("lut4", "large:1e38", (), "does not fit"),
    "there": ("plain", "large", ("there",), "is there"),
    "itself": ("plain", "large", ("itself", "--force"), "is the base"),
    "folder": ("plain", "large", ("folder",), "ends in .mlpackage"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_in_one_line_and_nothing_written(cli, world, tmp_path, case):
    source, adapter, words, what = BAD[case]
    path = (tmp_path if source in CHANGED else world) / f"{source}.mlpackage"
    if source in CHANGED:
        plain, change = CHANGED[source]
        shutil.copytree(world / f"{plain}.mlpackage", path)
        _changed(path, change)
    if adapter == "narrow":
        base = fusing.saved("llama", tmp_path / "other")
        fusing.trained(base, tmp_path / "narrow", target_modules=["q_proj"])
    given = tmp_path / adapter if adapter == "narrow" else world / adapter
    out = tmp_path / "out.mlpackage"
    if words[:1] == ("there",):
        shutil.copytree(path, out)
    target = {"itself": path, "folder": tmp_path / "out"}.get(case, out)
    before = sorted(p for p in tmp_path.rglob("*"))
    flags = [w for w in words if w not in ("there", "itself", "folder")]
    done = cli("fuse", given, "--base", path, "-o", target, *flags)
    assert done.exit_code == 1, done.stdout
    assert what in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(p for p in tmp_path.rglob("*")) == before
