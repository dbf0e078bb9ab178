"""`validate` on compressed artefacts: sound ones pass, one wrong code or table entry is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from loraduct.formats.coreml import package as packages
from loraduct.formats.coreml.blob import CODES

pytest.importorskip("peft")

import adapters
import families

Cli = Callable[..., Any]
EVERY = ("--include", "weight|^[AB]")  # tiny factors are left alone unless they are asked for
# name -> (how the package is compressed, how the adapter is)
WAYS: dict[str, tuple[list[str], list[str]]] = {
    "lut4": (["--palettize", "4"], []),
    "lut6": (["--palettize", "6"], []),
    "lut8": (["--palettize", "8"], []),
    "groups": (["--palettize", "4", "--group-size", "16"], []),
    "scaled": (["--palettize", "6", "--per-channel-scale"], []),
    "int8": (["--quantize", "int8"], []),
    "blocks": (["--quantize", "int4", "--group-size", "16"], []),
    "budget": (["--bits-per-weight", "5"], []),
    "lut6, packed": (["--palettize", "6"], ["--palettize", "4"]),
    "int8, packed": (["--quantize", "int8"], ["--quantize", "int8"]),
    "adapter alone": ([], ["--palettize", "4"]),
    "adapter bits": (["--palettize", "8", "--adapter-bits", "6", *EVERY], []),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of two kinds, and every package of WAYS with them."""
    room = tmp_path_factory.mktemp("declared")
    model, folder = families.saved("qwen2", room / "base")
    made = adapters.trained(model, adapters.config(["v_proj", "down_proj"]), 3)
    adapters.save(made, room / "one", copies=False)
    run("package", "--base", folder, "-o", room / "x.mlpackage", "--context", "48")
    return room


def run(*arguments: Any) -> Any:
    """The tool, which must do it."""
    from click.testing import CliRunner

    from loraduct.cli import main

    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def package_of(world: Path) -> Callable[[str], Path]:
    """The package of one way, made once."""

    def made(way: str) -> Path:
        path = world / f"{way.replace(', ', '_').replace(' ', '_')}.mlpackage"
        if path.exists():
            return path
        whole, own = WAYS[way]
        source = world / "one"
        if own:
            source = world / f"{path.stem}.packed"
            run("compress", world / "one", "-o", source, *own)
        if own and whole:  # added to a compressed package
            run("compress", world / "x.mlpackage", "-o", path, *whole)
            run("package", "add", path, f"one={source}")
            return path
        plain = world / f"{path.stem}.plain.mlpackage"
        shutil.copytree(world / "x.mlpackage", plain)
        run("package", "add", plain, f"one={source}")
        if whole:
            run("compress", plain, "-o", path, *whole)
        else:
            plain.rename(path)
        return path

    return made


def validated(cli: Cli, world: Path, second: Any, *more: Any) -> tuple[int, str]:
    """(exit code, what is printed) of validating against the source."""
    done = cli("validate", world / "one", second, "--base", world / "base",
               "--suite", "structure", "--suite", "parity", *more)  # fmt: skip
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.output


@pytest.mark.parametrize("way", WAYS)
def test_sound_ones_pass(cli: Cli, world: Path, package_of: Any, way: str) -> None:
    code, said = validated(cli, world, f"{package_of(way)}:one")
    assert code == 0, said
    if WAYS[way][0]:
        assert "each value is its table's nearest" in said


def blob_of(path: Path, name: str, key: str, function: str = "one") -> tuple[Any, Any]:
    """(where an argument's data lies, its type) of a compressed constant of a function."""
    made = packages.read(path)
    f = made.functions[function]
    held = f.block_specializations[f.opset].operations
    op = next(o for o in held if [out.name for out in o.outputs] == [name])
    value = op.inputs[key].arguments[0].value
    tensor = value.type.tensorType
    dtype = next(n for n, d in _codes().items() if d == tensor.dataType)
    shape = [d.constant.size for d in tensor.dimensions]
    return made.blobs.record(value.blobFileValue.offset, dtype, shape, name), value


def _codes() -> dict[str, int]:
    from loraduct.formats.coreml.schema import DATA_TYPES

    return {n: d for n, d in DATA_TYPES.items() if n in CODES}


def changed(path: Path, at: int, edit: Callable[[int], int], count: int = 1) -> None:
    """Bytes of the weight file, each edited."""
    file = packages.read(path).blobs.path
    data = bytearray(file.read_bytes())
    for i in range(at, at + count):
        data[i] = edit(data[i])
    file.write_bytes(data)


def one_index(path: Path, name: str, key: str = "indices") -> None:
    """The code of one value, by half of the table."""
    record, _ = blob_of(path, name, key)
    bits = CODES[record.dtype][1]
    changed(path, record.data + 5 * bits, lambda b: b ^ (1 << (bits - 1)))


def one_step(path: Path, name: str) -> None:
    """The codes of eight values, by one entry: of a sorted table, the next one."""
    record, _ = blob_of(path, name, "indices")
    changed(path, record.data, lambda b: b ^ 0x11, 4)


def one_entry(path: Path, name: str) -> None:
    """The third entry of the table, by a bit of its mantissa: an eighth, or less."""
    record, _ = blob_of(path, name, "lut")
    changed(path, record.data + 4, lambda b: b ^ 0x80)


def other_module(path: Path, name: str, own: str = "layers_1", others: str = "layers_0") -> None:
    """The indices of another module of that shape."""
    other = name.replace(own, others)
    one, two = (blob_of(path, n, "indices")[0] for n in (name, other))
    file = packages.read(path).blobs.path
    data = bytearray(file.read_bytes())
    data[one.data : one.data + one.nbytes] = data[two.data : two.data + two.nbytes]
    file.write_bytes(data)


WEIGHT = "model_layers_1_mlp_down_proj_weight"
DAMAGED: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("index", "lut4", lambda p: one_index(p, WEIGHT), "model.layers.1.mlp.down_proj"),
    ("index of 8", "lut8", lambda p: one_index(p, WEIGHT), "model.layers.1.mlp.down_proj"),
    ("steps", "lut4", lambda p: one_step(p, WEIGHT), "model.layers.1.mlp.down_proj"),
    ("entry", "lut4", lambda p: one_entry(p, WEIGHT), "model.layers.1.mlp.down_proj"),
    ("entry of 8", "lut8", lambda p: one_entry(p, WEIGHT), "model.layers.1.mlp.down_proj"),
    ("entry of a group", "groups", lambda p: one_entry(p, WEIGHT), "model.layers.1.mlp.down_proj"),
    ("another's", "lut6", lambda p: other_module(p, WEIGHT), "model.layers.1.mlp.down_proj"),
    ("integer", "int8", lambda p: one_index(p, WEIGHT, "data"), "model.layers.1.mlp.down_proj"),
    ("factor", "lut6, packed", lambda p: one_index(p, "A0_2"), "model.layers.1.mlp.down_proj"),
    ("factor's step", "adapter alone", lambda p: one_step(p, "B0_3"), "model.layers.1.self_attn.v_proj"),
    ("factor's entry", "adapter alone", lambda p: one_entry(p, "A0_0"), "model.layers.0.mlp.down_proj"),
    ("plain factor", "adapter bits", lambda p: one_index(p, "A0_2"), "model.layers.1.mlp.down_proj"),
    ("plain entry", "adapter bits", lambda p: one_entry(p, "A0_0"), "model.layers.0.mlp.down_proj"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("way", "damage", "module"), [d[1:] for d in DAMAGED], ids=[d[0] for d in DAMAGED]
)
def test_damage_is_named(
    cli: Cli, world: Path, package_of: Any, tmp_path: Path, way: str, damage: Any, module: str
) -> None:
    path = tmp_path / "x.mlpackage"
    shutil.copytree(package_of(way), path)
    damage(path)
    code, said = validated(cli, world, f"{path}:one")
    assert code in (1, 3), said
    assert module in said
    assert "failed" in said or "damaged" in said


def test_undeclared_compression_gets_no_allowance(
    cli: Cli, world: Path, package_of: Any, tmp_path: Path
) -> None:
    path = tmp_path / "x.mlpackage"
    shutil.copytree(package_of("lut4"), path)
    made = packages.read(path)
    texts = made.model.description.metadata.userDefined
    found = json.loads(texts["loraduct"])
    for told in ({}, {"base": "lut6"}, {"base": "int8"}):
        texts["loraduct"] = json.dumps(found | {"compression": told})
        made.spec_path.write_bytes(made.model.SerializeToString())
        code, said = validated(cli, world, f"{path}:one")
        assert code == 3
        assert "does not say that it was compressed so" in said


def test_packed_folders(cli: Cli, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    for way in (("--palettize", "2"), ("--palettize", "4"), ("--quantize", "int8")):
        run("compress", world / "one", "-o", folder, *way, "--force")
        code, said = validated(cli, world, folder)
        assert code == 0, said
    # one index, as a damaged file has it
    file = folder / "adapter_packed.safetensors"
    with safe_open(file, "np") as f:
        metadata = f.metadata()
    tensors = load_file(file)
    tensors["packed.indices"][3] ^= 0x10
    save_file(tensors, file, metadata)
    code, said = validated(cli, world, folder)
    assert code in (1, 3)
    name = next(iter(json.loads(metadata["packed"])["layout"]))
    assert name in said


def test_another_adapters_tables_are_no_rounding(cli: Cli, world: Path, tmp_path: Path) -> None:
    """Sound in itself, and off by more than its tables round: factors of a tenth more."""
    source = tmp_path / "s"
    shutil.copytree(world / "one", source)
    file = source / "adapter_model.safetensors"
    tensors = {n: t * np.float16(1.25) if "lora_B" in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    run("compress", source, "-o", tmp_path / "p", "--palettize", "6")
    code, said = validated(cli, world, tmp_path / "p")
    assert code == 3
    assert "dW" in said


@pytest.mark.heavy
def test_smollm2_in_6_bits(cli: Cli, tmp_path: Path) -> None:
    """Sound, it passes; codes that are one entry off, and another layer's indices, are named."""
    root = Path(__file__).parents[2]
    base, adapter = root / ".cache" / "smollm2-135m-instruct", root / "examples" / "summary"
    if not (base / "config.json").exists():
        pytest.skip("needs the base that `make demo` makes")
    plain, sound = tmp_path / "plain.mlpackage", tmp_path / "x.mlpackage"
    run("package", "--base", base, "-a", f"one={adapter}", "--context", 64, "-o", plain)
    run("compress", plain, "-o", sound, "--palettize", 6)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The new library opens on Monday.\n")

    def said_of(path: Path) -> tuple[int, str]:
        done = cli("validate", adapter, f"{path}:one", "--base", base, "--prompts", prompts,
                   "--suite", "structure", "--suite", "parity")  # fmt: skip
        return done.exit_code, done.output

    code, said = said_of(sound)
    assert code == 0, said
    assert "each value is its table's nearest" in said
    weight = "model_layers_15_mlp_gate_proj_weight"
    damages: list[Callable[[Path], None]] = [
        lambda p: one_step(p, weight),
        lambda p: other_module(p, weight, "layers_15", "layers_14"),
    ]
    for number, damage in enumerate(damages):
        path = tmp_path / f"{number}.mlpackage"
        shutil.copytree(sound, path)
        damage(path)
        code, said = said_of(path)
        assert code in (1, 3), said
        assert "model.layers.15.mlp.gate_proj" in said
