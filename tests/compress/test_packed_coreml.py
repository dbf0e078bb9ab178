"""Packed adapters in Core ML packages: the same few bits, read by coremltools and the documented reader."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from loraduct.formats.coded import Code
from loraduct.formats.coreml import coded
from loraduct.formats.coreml import package as packages

pytest.importorskip("peft")
pytest.importorskip("coremltools")

import adapters
import families
import mil_build as build

Cli = Callable[..., Any]
IDS = families.tokens(7)
PREFIX = "base_model.model."
WAYS = {
    "lut4": ("--palettize", "4"),
    "lut3 ragged": ("--palettize", "3", "--group-size", "3"),
    "lut6": ("--palettize", "6"),
    "int8": ("--quantize", "int8"),
    "int4 groups": ("--quantize", "int4", "--group-size", "16"),
    "widths": ("--bits-per-weight", "5"),
}


@pytest.fixture(scope="module")
def read_packed(repo: Path) -> Callable[[Path], dict[str, Any]]:
    """The reader of docs/packed.md."""
    code = re.search(r"```python\n(.*?)```", (repo / "docs/packed.md").read_text(), re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(compile(code[1], "docs/packed.md", "exec"), names)  # noqa: S102
    return lambda folder: names["read_packed"](folder / "adapter_packed.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """A base, its package, and three adapters, one DoRA and one with an embedding."""
    from click.testing import CliRunner

    from loraduct.cli import main

    room = tmp_path_factory.mktemp("packed")
    model, folder = families.saved("qwen2", room / "base")
    kinds: dict[str, tuple[list[str], dict[str, Any]]] = {
        "one": (["v_proj", "down_proj"], {}),
        "dora": (["q_proj"], {"use_dora": True}),
        "embed": (["embed_tokens", "o_proj"], {"lora_alpha": 1 << 14}),
    }
    for i, (name, (targets, options)) in enumerate(kinds.items()):
        adapters.save(adapters.trained(model, adapters.config(targets, **options), i), room / name,
                      copies=False)  # fmt: skip
    made = ["package", "--base", folder, "-o", room / "x.mlpackage", "--context", "48"]
    done = CliRunner().invoke(main, list(map(str, made)))
    assert done.exit_code == 0, done.output
    return room


def by_coremltools(path: Path, function: str) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (kind of its operation, values) of a function's constants, as coremltools has them."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = build.ct.utils.load_spec(str(path))
    weights = str(path / "Data/com.apple.CoreML/weights")
    program = build.quietly(load, spec, spec.specificationVersion, weights)
    found = {}
    for op in program.functions[function].operations:
        name = op.outputs[0].name
        if op.op_type.startswith("constexpr_"):
            found[name] = (op.op_type, np.asarray(op.materialized_val_inference()))
        elif op.op_type == "const" and isinstance(op.val.val, np.ndarray):
            found[name] = (op.op_type, op.val.val)
    return found


def packed_in(cli: Cli, world: Path, room: Path, name: str, way: str) -> tuple[Path, Path]:
    """(the packed adapter, a copy of the package that has it)."""
    folder, path = room / f"{name}.packed", room / "x.mlpackage"
    done = cli("compress", world / name, "-o", folder, *WAYS[way])
    assert done.exit_code == 0, done.output
    if not path.exists():
        shutil.copytree(world / "x.mlpackage", path)
    done = cli("package", "add", path, f"{name}={folder}")
    assert done.exit_code == 0, done.output
    return folder, path


def size_of(path: Path) -> int:
    return (path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size


@pytest.mark.parametrize(
    ("name", "way"),
    [*(("one", w) for w in WAYS), *((n, w) for n in ("dora", "embed") for w in ("lut4", "int8"))],
)
def test_the_very_values_in_few_bits(
    cli: Cli, world: Path, read_packed: Any, tmp_path: Path, name: str, way: str
) -> None:
    folder, path = packed_in(cli, world, tmp_path, name, way)
    wanted = read_packed(folder)
    modules = list(dict.fromkeys(
        n.removeprefix(PREFIX).split(".lora_")[0] for n in wanted if ".lora_" in n))  # fmt: skip
    found = by_coremltools(path, name)
    kind = "constexpr_lut_to_dense" if "int" not in way else "constexpr_blockwise_shift_scale"
    seen = 0
    for i, module in enumerate(_modules(path, name)):
        for letter, leaf in (("A", "lora_A"), ("B", "lora_B")):
            key = next(n for n in wanted if n.startswith(f"{PREFIX}{module}.{leaf.replace('lora_', 'lora_embedding_')}")
                       or n.startswith(f"{PREFIX}{module}.{leaf}."))  # fmt: skip
            values = wanted[key]
            if "embedding" in key and letter == "A":
                values = values.T
            op, held = found[f"{letter}0_{i}"]
            assert op == kind
            fold = 2.0 ** (_row(path, name, module).get("fold", 0) if letter == "B" else 0)
            assert held.dtype == np.float16
            np.testing.assert_array_equal(held, (values.astype("f4") * fold).astype("f2"))
            seen += 1
    assert seen == 2 * len(modules)
    # taken out again, run, and against the same values in full
    assert cli("package", "extract", path, name, "-o", tmp_path / "back").exit_code == 0
    back = load_file(tmp_path / "back/adapter_model.safetensors")
    assert back.keys() == wanted.keys()
    for n, values in wanted.items():
        np.testing.assert_array_equal(back[n], values)
    full = tmp_path / "full.mlpackage"
    shutil.copytree(world / "x.mlpackage", full)
    assert cli("package", "add", full, f"{name}={tmp_path / 'back'}").exit_code == 0
    np.testing.assert_array_equal(
        adapters.logits(path, name, IDS), adapters.logits(full, name, IDS)
    )


def _record(path: Path) -> dict[str, Any]:
    texts = packages.read(path).model.description.metadata.userDefined
    found: dict[str, Any] = json.loads(texts["loraduct"])
    return found


def _modules(path: Path, name: str) -> list[str]:
    return list(_record(path)["adapters"][name]["modules"])


def _row(path: Path, name: str, module: str) -> dict[str, Any]:
    row: dict[str, Any] = _record(path)["adapters"][name]["modules"][module]
    return row


def test_it_saves_bytes_and_equal_ones_are_stored_once(
    cli: Cli, world: Path, tmp_path: Path
) -> None:
    folder, path = packed_in(cli, world, tmp_path, "one", "lut4")
    small = size_of(path) - size_of(world / "x.mlpackage")
    full = tmp_path / "full.mlpackage"
    shutil.copytree(world / "x.mlpackage", full)
    assert cli("package", "add", full, f"one={world / 'one'}").exit_code == 0
    # tables and records of 64 bytes weigh more in so small a model
    assert small < 0.75 * (size_of(full) - size_of(world / "x.mlpackage"))
    before = size_of(path)
    assert cli("package", "add", path, f"twin={folder}").exit_code == 0
    assert size_of(path) == before
    other = tmp_path / "other.mlpackage"
    shutil.copytree(world / "x.mlpackage", other)
    done = cli("package", "add", other, f"one={path}:one")  # from package to package: as it is
    assert done.exit_code == 0, done.output
    assert size_of(other) == before
    kinds = {
        op for n, (op, _) in by_coremltools(other, "one").items() if re.match(r"[AB]0_\d+$", n)
    }
    assert kinds == {"constexpr_lut_to_dense"}


def test_mlx_folders_too(cli: Cli, world: Path, read_packed: Any, tmp_path: Path) -> None:
    assert cli("convert", world / "one", "--to", "mlx", "-o", tmp_path / "m", "--base",
               world / "base").exit_code == 0  # fmt: skip
    done = cli("compress", tmp_path / "m", "-o", tmp_path / "p", "--palettize", "4")
    assert done.exit_code == 0, done.output
    path = tmp_path / "y.mlpackage"
    done = cli("package", "--base", world / "base", "-a", f"one={tmp_path / 'p'}", "-o", path)
    assert done.exit_code == 0, done.output
    wanted, found = read_packed(tmp_path / "p"), by_coremltools(path, "one")
    for i, module in enumerate(_modules(path, "one")):
        for letter in "AB":
            op, values = found[f"{letter}0_{i}"]
            assert op == "constexpr_lut_to_dense"
            np.testing.assert_array_equal(values, wanted[f"{module}.lora_{letter.lower()}"].T)


def test_edits_keep_the_tables(cli: Cli, world: Path, tmp_path: Path) -> None:
    """On a base that is compressed too: add, replace, remove, compact."""
    path = tmp_path / "x.mlpackage"
    done = cli("compress", world / "x.mlpackage", "-o", path, "--palettize", "6")
    assert done.exit_code == 0, done.output
    packed_in(cli, world, tmp_path, "one", "lut4")
    packed_in(cli, world, tmp_path, "dora", "lut6")
    before = {n: adapters.logits(path, n, IDS) for n in ("base", "one", "dora")}
    tables = {n: v for n, v in by_coremltools(path, "base").items() if v[0] != "const"}
    assert len(tables) >= 15
    other = cli("compress", world / "one", "-o", tmp_path / "three", "--palettize", "3")
    assert other.exit_code == 0
    assert cli("package", "replace", path, f"one={tmp_path / 'three'}").exit_code == 0
    assert (adapters.logits(path, "one", IDS) != before["one"]).any()
    back = f"one={tmp_path / 'one.packed'}"
    assert cli("package", "replace", path, back).exit_code == 0
    assert cli("package", "add", path, "half=one:0.5").exit_code == 0
    assert cli("package", "remove", path, "half").exit_code == 0
    grown = size_of(path)
    assert cli("package", "compact", path).exit_code == 0
    assert size_of(path) < grown
    for name, logits in before.items():
        np.testing.assert_array_equal(adapters.logits(path, name, IDS), logits)
        held = by_coremltools(path, name)
        for n, (op, values) in tables.items():
            assert held[n][0] == op
            assert held[n][1].tobytes() == values.tobytes()
    assert cli("inspect", f"{path}:one").exit_code == 0
    assert cli("package", "list", path).exit_code == 0


@pytest.mark.parametrize("way", [["--palettize", "4"], ["--quantize", "int8"], ["--bits-per-weight", "4"]],
                         ids=" ".join)  # fmt: skip
def test_the_base_under_packed_adapters(
    cli: Cli, world: Path, tmp_path: Path, way: list[str]
) -> None:
    """Compressed after they were added, it is what it is compressed before; they stay as they are."""
    first, later = tmp_path / "first", tmp_path / "later"
    first.mkdir(), later.mkdir()
    done = cli("compress", world / "x.mlpackage", "-o", first / "x.mlpackage", *way)
    assert done.exit_code == 0, done.output
    for name, table in (("one", "lut4"), ("embed", "int8")):
        packed_in(cli, world, first, name, table)
        packed_in(cli, world, later, name, table)
    before, out = later / "x.mlpackage", tmp_path / "y.mlpackage"
    done = cli("compress", before, "-o", out, *way)
    assert done.exit_code == 0, done.output
    for function in ("base", "one", "embed"):
        theirs, ours = (
            {n: v for n, v in by_coremltools(p, function).items() if v[0] != "const"}
            for p in (first / "x.mlpackage", out)
        )
        assert len(theirs) >= 15
        assert ours.keys() == theirs.keys()
        for name, (op, values) in theirs.items():
            assert ours[name][0] == op, name
            np.testing.assert_array_equal(ours[name][1], values)
        np.testing.assert_array_equal(
            adapters.logits(first / "x.mlpackage", function, IDS),
            adapters.logits(out, function, IDS),
        )
    for name in ("one", "embed"):
        cli("package", "extract", out, name, "-o", tmp_path / name)
        cli("package", "extract", before, name, "-o", later / name)
        one, two = (load_file(f / name / "adapter_model.safetensors") for f in (tmp_path, later))
        assert one.keys() == two.keys()
        assert all((one[n] == two[n]).all() for n in one)
    again = cli("compress", out, "-o", tmp_path / "z.mlpackage", *way)
    assert (again.exit_code, "is compressed already" in again.output) == (1, True), again.output
    done = cli("decompress", out, "-o", tmp_path / "dense.mlpackage")
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(
        adapters.logits(tmp_path / "dense.mlpackage", "one", IDS), adapters.logits(out, "one", IDS)
    )


def test_what_no_table_holds_is_stored_in_full_and_said(world: Path) -> None:
    from dataclasses import replace

    from loraduct.converters.coreml_adapter import _code
    from loraduct.formats.coded import Decoded
    from loraduct.tensor import Tensor

    rng = np.random.default_rng(1)
    code = Code("int", 8, rng.integers(0, 256, (8, 64), np.uint8),
                rng.uniform(1, 2, (8, 1)).astype("f2"))  # fmt: skip
    inner = Tensor("a", "F16", (8, 64))
    whole = replace(inner, make=Decoded(lambda: code), inputs=(inner,))
    moved = replace(whole, make=lambda: code.values().view("u2")[::-1].copy(), inputs=(whole,))
    assert _code(whole) is not None
    assert _code(moved) is None  # 512 values


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_codes_as_operations_and_back(data: st.DataObject) -> None:
    kind, bits = data.draw(
        st.sampled_from([("lut", b) for b in (1, 2, 3, 4, 6, 8)] + [("int", 4), ("int", 8)])
    )
    down, across, high, wide = (data.draw(st.integers(1, 3)) for _ in range(4))
    shape = (down * high, across * wide)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    codes = rng.integers(0, 1 << bits, shape, np.uint8)
    entries = (down, across, 1 << bits) if kind == "lut" else (down, across)
    code = Code(kind, bits, codes, rng.standard_normal(entries).astype("f2"))
    wanted = np.empty(shape, np.float16)
    for i in range(shape[0]):
        for j in range(shape[1]):
            one = code.numbers[i // high, j // wide]
            wanted[i, j] = (
                one[codes[i, j]] if kind == "lut" else one * np.float16(int(codes[i, j]) - (1 << bits - 1))
            )  # fmt: skip
    np.testing.assert_array_equal(code.values(), wanted)
    np.testing.assert_array_equal(code.T.values(), wanted.T)
    told = {key: dtype for key, (dtype, _) in coded.arguments(code).items()}
    width = f"UINT{bits}" if kind == "lut" else f"INT{bits}"
    assert next(iter(told.values())) == width
