"""Compressed packages against coremltools' own reading, the interpreter, and themselves."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraduct.converters import coreml, package
from loraduct.converters.compress_package import compress, decompress
from loraduct.converters.compress_wanted import Wanted, bytes_of
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats.coreml import package as packages

pytest.importorskip("peft")
pytest.importorskip("coremltools")

import adapters
import families
import mil_build as build

ct, mb, types = build.ct, build.mb, build.types
IDS = families.tokens(9)
EVERY = "weight|^[AB]"  # tiny factors are left alone unless they are asked for
WAYS: dict[str, dict[str, Any]] = {
    **{f"{n} bits": {"palettize": n} for n in (1, 3, 4, 8)},
    "groups": {"palettize": 4, "group_size": 16},
    "scaled": {"palettize": 3, "per_channel_scale": True},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "blocks": {"quantize": "int4", "group_size": 16},
    "budget": {"bits_per_weight": 3.0},
    "adapters too": {"palettize": 4, "adapter_bits": 6, "include": EVERY},
}
QUICK = ("3 bits", "scaled", "blocks", "adapters too")  # the others: make heavy
OLD = ("1 bits", "4 bits", "int8")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters, a package of three functions, and one for iOS17."""
    room = tmp_path_factory.mktemp("packages")
    model, folder = families.saved("qwen2", room / "base")
    base = base_folder.read(folder)
    for i, (name, options) in enumerate({"one": {}, "two": {"use_dora": True}}.items()):
        made = adapters.trained(model, adapters.config(["v_proj", "down_proj"], **options), i)
        adapters.save(made, room / name, copies=False)
    coreml.build(base, room / "x.mlpackage", coreml.Options(context=48))
    for name in ("one", "two"):
        package.add(room / "x.mlpackage", {name: [package.Member(str(room / name))]})
    old = coreml.Options(target="iOS17", stateless=True, context=48, shapes=(9,))
    coreml.build(base, room / "old.mlpackage", old)
    return room


@cache
def by_coremltools(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """What coremltools' reader says every constant stands for."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.utils.load_spec(str(path))
    weights = str(path / "Data/com.apple.CoreML/weights")
    program = build.quietly(load, spec, spec.specificationVersion, weights)
    found = {}
    ours = names(path)
    for name, function in program.functions.items():
        for op in function.operations:
            out = op.outputs[0]
            if out.name not in ours[name]:  # an argument, which coremltools makes a constant of
                continue
            if op.op_type.startswith("constexpr_"):
                found[name, out.name] = np.asarray(op.materialized_val_inference())
            elif op.op_type == "const" and isinstance(op.val.val, np.ndarray):
                found[name, out.name] = op.val.val
    return found


def names(path: Path) -> dict[str, set[str]]:
    """Function -> names of its operations' results."""
    made = packages.read(path)
    return {
        n: {o.name for op in f.block_specializations[f.opset].operations for o in op.outputs}
        for n, f in made.functions.items()
    }


def kinds(path: Path) -> dict[str, set[str]]:
    """Function -> kinds of its operations."""
    made = packages.read(path)
    return {
        n: {op.type for op in f.block_specializations[f.opset].operations}
        for n, f in made.functions.items()
    }


def _cases() -> list[Any]:
    rest = [w for w in WAYS if w not in QUICK]
    quick = [*(("x", w) for w in QUICK), ("old", "4 bits")]
    slow = [*(("x", w) for w in rest), *(("old", w) for w in OLD[::2])]
    return [*quick, *(pytest.param(*c, marks=pytest.mark.heavy) for c in slow)]


@pytest.mark.parametrize(("source", "way"), _cases())
def test_coremltools_reads_what_is_meant(
    world: Path, tmp_path: Path, source: str, way: str
) -> None:
    origin = world / f"{source}.mlpackage"
    small, dense = tmp_path / "small.mlpackage", tmp_path / "dense.mlpackage"
    report = compress(origin, small, Wanted(**WAYS[way]))
    assert report.checked == sum(r.way is not None for r in report.rows) >= 15
    decompress(small, dense)
    told, plain, before = (by_coremltools(p) for p in (small, dense, origin))
    inner = {k for k in told if k not in plain}  # tables before they are scaled
    assert all(name.endswith("_unscaled") for _, name in inner)
    assert plain.keys() == before.keys()
    for key, values in plain.items():
        assert values.dtype == told[key].dtype
        assert values.tobytes() == told[key].tobytes(), key
    changed = {n for _, n in plain if any((f, n) in plain and (plain[f, n] != before[f, n]).any()
               for f in kinds(origin))}  # fmt: skip
    meant = {r.name for r in report.rows if r.way is not None}
    if way != "8 bits":
        assert meant <= changed
    assert {n for n in changed if n[0] not in "AB"} <= meant
    for name in kinds(origin):
        options = {} if source == "old" else {"function_name": name}
        build.quietly(ct.models.MLModel, str(small), skip_model_load=True, **options)
        assert any(k.startswith("constexpr_") for k in kinds(small)[name])
        assert not any(k.startswith("constexpr_") for k in kinds(dense)[name])
    # the reported error is the real one
    row = max((r for r in report.rows if r.way is not None), key=lambda r: r.before)
    key = next(k for k in before if k[1] == row.name)
    gap = plain[key].astype(np.float64) - before[key]
    if "int" not in (row.way or ""):
        close = (
            1e-4 if "scaled" in (row.way or "") else 1e-6
        )  # a product is rounded when it is read
        np.testing.assert_allclose(row.error, (gap * gap).sum(), rtol=close, atol=1e-12)
    # an fp16 package of the same values computes the same
    for name in [None] if source == "old" else ["two"]:
        one, two = (_logits(p, name) for p in (small, dense))
        np.testing.assert_array_equal(one, two)


def _logits(path: Path, name: str | None) -> np.ndarray:
    if name is None:
        return np.asarray(families.run(path, IDS))
    return np.asarray(adapters.logits(path, name, IDS))


@pytest.mark.parametrize("way", ["4 bits", "int8", "groups", "scaled"])
def test_decompresses_as_coremltools_does(tmp_path: Path, way: str) -> None:
    rng = np.random.default_rng(3)
    w = [rng.standard_normal(s).astype(np.float16) for s in ((64, 48), (48, 64))]

    @mb.program(input_specs=[mb.TensorSpec((1, 48), types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return mb.linear(x=mb.relu(x=mb.linear(x=x, weight=w[0])), weight=w[1])

    convert = {"convert_to": "mlprogram", "minimum_deployment_target": ct.target.iOS18}
    model = build.quietly(lambda: ct.convert(program, skip_model_load=True, **convert))
    build.quietly(model.save, str(tmp_path / "theirs.mlpackage"))
    small = tmp_path / "small.mlpackage"
    compress(tmp_path / "theirs.mlpackage", small, Wanted(**WAYS[way]))
    decompress(small, tmp_path / "ours.mlpackage")
    opened = build.quietly(lambda: ct.models.MLModel(str(small), skip_model_load=True))
    dense = build.quietly(lambda: ct.optimize.coreml.decompress_weights(opened))
    build.quietly(dense.save, str(tmp_path / "dense.mlpackage"))
    one, two = (by_coremltools(tmp_path / f"{n}.mlpackage") for n in ("ours", "dense"))
    big = [sorted(v.tobytes() for v in d.values() if v.size > 2000) for d in (one, two)]
    assert big[0] == big[1]
    assert len(big[0]) == 2


def test_what_is_shared_stays_shared_and_bytes_repeat(world: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.mlpackage" for n in "ab"]
    for path in paths:
        compress(world / "x.mlpackage", path, Wanted(palettize=4))
    assert adapters.snapshot(paths[0]) == adapters.snapshot(paths[1])
    made = packages.read(paths[0])
    blocks = [f.block_specializations[f.opset] for f in made.functions.values()]
    held = [
        {op.outputs[0].name: op.SerializeToString() for op in b.operations if "lut" in op.type}
        for b in blocks
    ]
    assert len(held) == 3
    assert held[0] == held[1] == held[2]
    assert len(held[0]) == 16  # 5 x 3 (k and v are small) and the embedding, which is the head too


def test_left_alone_with_the_reason(world: Path, tmp_path: Path) -> None:
    report = compress(world / "x.mlpackage", tmp_path / "a.mlpackage", Wanted(palettize=4))
    left = {r.name: r.reason for r in report.rows if r.way is None}
    assert left["model_norm_weight"] == "norm"
    assert left["rope_full_attention_cos"] == "rotation table"
    assert left["A0_0"]
    only = compress(
        world / "x.mlpackage",
        tmp_path / "b.mlpackage",
        Wanted(palettize=4, include="q_proj.weight"),
    )
    assert {r.name for r in only.rows if r.way} == {
        f"model_layers_{i}_self_attn_q_proj_weight" for i in range(3)
    }
    rest = compress(
        world / "x.mlpackage", tmp_path / "c.mlpackage", Wanted(palettize=4, exclude="embed")
    )
    assert not any("embed" in r.name for r in rest.rows if r.way)


def test_adapters_of_a_compressed_package(world: Path, tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "a.mlpackage"
    compress(world / "x.mlpackage", path, Wanted(palettize=6, adapter_bits=8, include=EVERY))
    listed = json.loads(cli("package", "list", path, "--json").output)
    assert [a["name"] for a in listed["adapters"]] == ["one", "two"]
    before = _logits(path, "one")
    assert cli("package", "extract", path, "one", "-o", tmp_path / "one").exit_code == 0
    assert cli("package", "add", path, f"again={tmp_path / 'one'}").exit_code == 0
    np.testing.assert_array_equal(_logits(path, "again"), before)
    assert cli("package", "add", path, "half=one:0.5").exit_code == 0
    assert np.abs(_logits(path, "half") - before).max() > 0
    assert cli("package", "remove", path, "one").exit_code == 0
    assert cli("package", "compact", path).exit_code == 0
    np.testing.assert_array_equal(_logits(path, "again"), before)
    assert "constexpr_lut_to_dense" in cli("inspect", path).output


def test_dora_on_a_compressed_base(world: Path, tmp_path: Path) -> None:
    """Its norms are those of the compressed weights, as on a package that holds their values."""
    small, dense = tmp_path / "a.mlpackage", tmp_path / "b.mlpackage"
    compress(world / "x.mlpackage", small, Wanted(palettize=3))
    decompress(small, dense)
    for path in (small, dense):
        package.add(path, {"new": [package.Member(str(world / "two"))]})
    np.testing.assert_array_equal(_logits(small, "new"), _logits(dense, "new"))
    assert (_logits(small, "new") != _logits(small, "base")).any()


def test_budgets_are_kept(world: Path, tmp_path: Path) -> None:
    origin = world / "x.mlpackage"
    plan = compress(origin, None, Wanted(bits_per_weight=3.5))
    made = compress(origin, tmp_path / "a.mlpackage", Wanted(bits_per_weight=3.5))
    assert {r.name: r.way for r in plan.rows} == {r.name: r.way for r in made.rows}
    assert sum(r.after for r in plan.rows) == sum(r.after for r in made.rows)
    assert made.bits <= 3.5
    size = made.after + 20_000
    fits = compress(origin, tmp_path / "b.mlpackage", Wanted(size=size))
    assert package.size_of(tmp_path / "b.mlpackage") == fits.after <= size
    assert not (tmp_path / "none.mlpackage").exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a width": ({"palettize": 5}, "5 bits"),
    "an adapter's width": ({"palettize": 4, "adapter_bits": 7}, "7 bits"),
    "too small": ({"size": 1000}, "the smallest possible is"),
    "too few bits": ({"bits_per_weight": 0.1}, "the smallest possible is"),
    "a pattern": ({"palettize": 4, "include": "("}, "regular expression"),
    "nothing": ({"palettize": 4, "include": "zzz"}, "nothing to compress"),
    "too many values": (
        {"palettize": 8, "lut": "unique"},
        "distinct values, mode unique holds 256",
    ),
    "all fits": ({"size": 900 * 10**9}, "fits --size 900000000000 as it is"),
    "no fewer bits": ({"bits_per_weight": 16}, "fits these bits per weight as it is"),
    "a scale": ({"quantize": "int8", "per_channel_scale": True}, "goes with --palettize"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(world: Path, tmp_path: Path, name: str) -> None:
    wanted, message = BAD[name]
    with pytest.raises(Refused, match=message) as e:
        compress(world / "x.mlpackage", tmp_path / "a.mlpackage", Wanted(**wanted))
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["too many values", "all fits", "no fewer bits"])
def test_a_plan_is_refused_as_the_run_is(world: Path, name: str) -> None:
    wanted, message = BAD[name]
    with pytest.raises(Refused, match=message):
        compress(world / "x.mlpackage", None, Wanted(**wanted))


@pytest.mark.parametrize("group", [0, 16])
def test_tables_of_all_values_where_they_suffice(world: Path, tmp_path: Path, group: int) -> None:
    """Of a package whose values are few: the plan and the run take the same tensors, which stay exact."""
    few, dense, out = (tmp_path / f"{n}.mlpackage" for n in ("few", "dense", "out"))
    compress(
        world / "x.mlpackage", few, Wanted(palettize=4, group_size=group or None, exclude="q_proj")
    )
    decompress(few, dense)
    wanted = Wanted(palettize=4, group_size=group or None, lut="unique")
    plan, made = compress(dense, None, wanted), compress(dense, out, wanted)
    assert {r.name: r.reason for r in plan.rows} == {r.name: r.reason for r in made.rows}
    taken = {r.name for r in made.rows if r.way}
    left = {r.name for r in made.rows if "distinct values" in (r.reason or "")}
    assert taken
    assert left
    assert all("q_proj" in name for name in left)
    before, after = by_coremltools(dense), by_coremltools(out)
    for key, values in before.items():
        if key[1] in taken:
            np.testing.assert_array_equal(after[key], values)


def test_a_package_is_not_written_into_its_source(world: Path, tmp_path: Path) -> None:
    source, small = tmp_path / "s.mlpackage", tmp_path / "small.mlpackage"
    shutil.copytree(world / "x.mlpackage", source)
    compress(source, small, Wanted(palettize=4))
    shutil.copytree(source, tmp_path / "out.mlpackage/in.mlpackage")
    shutil.copy(source / "Manifest.json", tmp_path / "out.mlpackage")
    before = adapters.snapshot(tmp_path)
    for path in (source, tmp_path / "out.mlpackage/in.mlpackage"):
        for out in (path / "in.mlpackage", path / "Data/in.mlpackage", tmp_path / "out.mlpackage"):
            if path == source and out.name == "out.mlpackage":
                continue
            with pytest.raises(Refused, match="lies in"):
                compress(path, out, Wanted(palettize=4, force=True))
    with pytest.raises(Refused, match="lies in"):
        decompress(small, small / "in.mlpackage", force=True)
    assert adapters.snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("wanted", "message"),
    [({"palettize": 3}, "3 bits need iOS18"), ({"quantize": "int4"}, "4 bits need iOS18"),
     ({"palettize": 4, "group_size": 16}, "several tables need iOS18"),
     ({"palettize": 4, "per_channel_scale": True}, "scales of tables need iOS18")],
)  # fmt: skip
def test_what_an_older_system_lacks(
    world: Path, tmp_path: Path, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        compress(world / "old.mlpackage", tmp_path / "a.mlpackage", Wanted(**wanted))


def test_compressed_already_and_never(world: Path, tmp_path: Path) -> None:
    small = tmp_path / "a.mlpackage"
    compress(world / "x.mlpackage", small, Wanted(palettize=4))
    before = adapters.snapshot(small)
    with pytest.raises(Refused, match="compressed already"):
        compress(small, small, Wanted(palettize=2, force=True))
    with pytest.raises(Refused, match="--force"):
        decompress(small, small)
    assert adapters.snapshot(small) == before
    with pytest.raises(Refused, match="no compressed constants"):
        decompress(world / "x.mlpackage", tmp_path / "b.mlpackage")
    compress(small, small, Wanted(adapter_bits=3, include="^[AB]", force=True))  # adapters, later
    assert "compression" in packages.read(small).model.description.metadata.userDefined["loraduct"]


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN"), (np.inf, "NaN|Inf"), (0.25, None), (0.0, None)]
)
@pytest.mark.parametrize(
    "way",
    ["4 bits", "int8", *(pytest.param(w, marks=pytest.mark.heavy) for w in ("groups", "scaled"))],
)
def test_broken_and_constant_tensors(
    world: Path, tmp_path: Path, way: str, value: float, message: str | None
) -> None:
    """One number that is none is refused by name; a tensor of equal numbers is kept exactly."""
    path, small = tmp_path / "a.mlpackage", tmp_path / "b.mlpackage"
    shutil.copytree(world / "x.mlpackage", path)
    name = "model_layers_1_mlp_up_proj_weight"
    made = packages.read(path)
    block = made.functions["base"].block_specializations["CoreML8"]
    op = next(o for o in block.operations if name in [r.name for r in o.outputs])
    blob = made.blobs.record(op.attributes["val"].blobFileValue.offset, "FLOAT16", (80, 48), name)
    count = 1 if message else 80 * 48
    with made.blobs.path.open("r+b") as file:
        file.seek(blob.data)
        file.write(np.full(count, value, np.float16).tobytes())
    if message:
        with pytest.raises(Refused, match=f"{name}.*({message})"):
            compress(path, small, Wanted(**WAYS[way]))
        assert not small.exists()
        return
    compress(path, small, Wanted(**WAYS[way]))
    found = by_coremltools(small)["base", name]
    np.testing.assert_array_equal(found, np.full((80, 48), value, np.float16))


def test_a_weight_that_was_not_written_as_meant(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file holds is read again: a wrong byte leaves nothing behind."""
    from loraduct.converters import compress_code

    right = compress_code.packed

    def wrong(values: Any, bits: int) -> Any:
        return right(values, bits) ^ 1

    monkeypatch.setattr(compress_code, "packed", wrong)
    with pytest.raises(Refused, match="not read back as it was meant"):
        compress(world / "x.mlpackage", tmp_path / "a.mlpackage", Wanted(palettize=4))
    assert list(tmp_path.iterdir()) == []


def test_sizes_as_people_write_them() -> None:
    given = ["60MB", "1.5 GB", "57MiB", "1000", "2kb"]
    wanted = [60_000_000, 1_500_000_000, 57 * 2**20, 1000, 2000]
    assert list(map(bytes_of, given)) == wanted
    for bad in ("", "MB", "-1", "1TB", "1e6", "nan", "9" * 400):
        with pytest.raises(Refused, match="no size"):
            bytes_of(bad)


def test_the_command(world: Path, tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "a.mlpackage"
    planned = cli("compress", world / "x.mlpackage", "--palettize", "4", "--plan")
    assert planned.exit_code == 0
    assert "1 x lut4" in planned.output
    assert "3 x lut4" in planned.output
    done = cli("compress", world / "x.mlpackage", "-o", out, "--bits-per-weight", "4", "--json")
    assert json.loads(done.output)["bytes_after"] == package.size_of(out)
    assert cli("decompress", out, "-o", tmp_path / "b.mlpackage").exit_code == 0
    assert cli("compress", world / "x.mlpackage", "-o", out).exit_code == 2
    assert cli("compress", world / "x.mlpackage", "--palettize", "4").exit_code == 2
    assert cli("compress", tmp_path, "-o", out, "--palettize", "4").exit_code == 1
