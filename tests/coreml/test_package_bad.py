"""Packages that are broken or hostile: one line, nothing written, nothing outside touched."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest

from loraduct.converters import coreml, package
from loraduct.formats import base as base_folder
from loraduct.formats.coreml.package import read
from loraduct.formats.coreml.record import KEY

pytest.importorskip("peft")

import adapters
import families

DATA = Path("Data") / "com.apple.CoreML"
SPEC, WEIGHTS = DATA / "model.mlmodel", DATA / "weights" / "weight.bin"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A package with one adapter, and another adapter."""
    room = tmp_path_factory.mktemp("world")
    model, folder = families.saved("llama", room / "base")
    coreml.build(base_folder.read(folder), room / "x.mlpackage", coreml.Options(context=48))
    for i, name in enumerate(("one", "two")):
        adapters.save(adapters.trained(model, adapters.config(["q_proj"]), i), room / name)
    package.add(room / "x.mlpackage", {"one": [package.Member(str(room / "one"))]})
    return room


def edited(path, change):
    """Change the parsed specification and write it back."""
    found = read(path)
    change(found.model)
    (path / SPEC).write_bytes(found.model.SerializeToString())


def consts(model, function="base"):
    block = model.mlProgram.functions[function].block_specializations["CoreML8"]
    return [
        o for o in block.operations if o.attributes["val"].WhichOneof("value") == "blobFileValue"
    ]


def with_record(change):
    def edit(model):
        texts = model.description.metadata.userDefined
        record = json.loads(texts[KEY])
        texts[KEY] = json.dumps(change(record) or record)

    return lambda path: edited(path, edit)


def at_offset(value):
    def edit(model):
        consts(model)[3].attributes["val"].blobFileValue.offset = value

    return lambda path: edited(path, edit)


def named(value):
    def edit(model):
        consts(model)[3].attributes["val"].blobFileValue.fileName = value

    return lambda path: edited(path, edit)


def manifest(**changes):
    def edit(path):
        file = path / "Manifest.json"
        document = json.loads(file.read_text())
        root = document["rootModelIdentifier"]
        document["itemInfoEntries"][root] |= changes
        file.write_text(json.dumps(document))

    return edit


def nested(depth):
    """A program whose blocks lie in each other, written by hand."""
    inner = b""
    for _ in range(depth):  # Operation.blocks = 4, Block.operations = 3
        inner = b"\x22" + varint(len(inner)) + inner
        inner = b"\x1a" + varint(len(inner)) + inner
    return inner


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def linked_out(name):
    def edit(path):
        outside = path.parent / "outside"
        shutil.move(path / name, outside)
        (path / name).symlink_to(outside)

    return edit


def cut(name, keep):
    def edit(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * keep)])

    return edit


def overlapping(path):
    """A record whose data lies where another's does is read, but never written over."""
    with (path / WEIGHTS).open("r+b") as file:
        file.seek(64 + 16)
        file.write(struct.pack("<Q", 1 << 60))


def no_base(record):
    for row in record["functions"].values():
        row["adapters"] = [["one", 1]]


# what is wrong -> (what is done, what the line says)
CASES = {
    "no manifest": (lambda p: (p / "Manifest.json").unlink(), "Manifest.json"),
    "manifest is no JSON": (lambda p: (p / "Manifest.json").write_text("{"), "JSON"),
    "manifest names nothing": (lambda p: (p / "Manifest.json").write_text("{}"), "root model"),
    "manifest leads out": (manifest(path="../../outside"), "leaves the package"),
    "manifest is absolute": (manifest(path="/etc/passwd"), "leaves the package"),
    "no program": (lambda p: (p / SPEC).unlink(), "model.mlmodel"),
    "empty program": (lambda p: (p / SPEC).write_bytes(b""), "no ML program"),
    "program cut short": (cut(SPEC, 0.7), "cut short"),
    "program is noise": (lambda p: (p / SPEC).write_bytes(os.urandom(5000)), "Core ML spec|no ML program"),
    "program links out": (linked_out(SPEC), "leads out"),
    "nested for ever": (lambda p: (p / SPEC).write_bytes(nested(40_000)), "Core ML spec|no ML program"),
    "weights cut short": (cut(WEIGHTS, 0.5), "cut short"),
    "weights empty": (cut(WEIGHTS, 0), "header"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "weight.bin"),
    "weights are a folder": (
        lambda p: ((p / WEIGHTS).unlink(), (p / WEIGHTS).mkdir()), "folder|directory"),
    "weights link out": (linked_out(WEIGHTS), "leads out"),
    "weights of version 1": (
        lambda p: (p / WEIGHTS).write_bytes(struct.pack("<II", 1, 1) + bytes(1 << 20)), "version 1"),
    "offset beyond the end": (at_offset(1 << 40), "no whole blob"),
    "offset is odd": (at_offset(65), "no whole blob"),
    "offset without a blob": (at_offset(128), "no whole blob"),
    "data far away": (overlapping, "no whole blob"),
    "another file": (named("@model_path/weights/../../../../etc/passwd"), "inside the package"),
    "an absolute file": (named("/etc/passwd"), "inside the package"),
    "record is no JSON": (
        lambda p: edited(p, lambda m: m.description.metadata.userDefined.update({KEY: "{"})), "record"),
    "record nested": (
        lambda p: edited(p, lambda m: m.description.metadata.userDefined.update({KEY: "[" * 10**5})),
        "record"),
    "record of the future": (with_record(lambda r: r.update(format=2)), "format 2"),
    "no record": (
        lambda p: edited(p, lambda m: m.description.metadata.userDefined.clear()), "no loraduct record"),
    "record names a function": (with_record(lambda r: r["functions"].update(x={})), "record"),
    "record names an adapter": (
        with_record(lambda r: r["functions"]["one"].update(adapters=[["x", 1]])), "record"),
    "record without the base": (with_record(no_base), "base alone"),
    "record with a rank of text": (
        with_record(lambda r: next(iter(r["adapters"]["one"]["modules"].values())).update(rank="4")),
        "record"),
    "one function": (lambda p: edited(p, lambda m: m.description.ClearField("functions")), "one function"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_adding_to_it(world, tmp_path, cli, case):
    path = Path(shutil.copytree(world / "x.mlpackage", tmp_path / "x.mlpackage"))
    change, what = CASES[case]
    change(path)
    before = adapters.snapshot(tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    for words in (["add", path, f"two={world / 'two'}"], ["remove", path, "one"]):
        done = cli("package", *words)
        if case in ("another file", "an absolute file") and words[0] == "remove":
            continue  # what is removed needs no weights
        assert done.exit_code == 1, done.output
        (line,) = [ln for ln in done.output.splitlines() if ln.startswith("error: ")]
        assert len(line) < 1500
        if words[0] == "add":
            assert re.search(what, line), line
        assert adapters.snapshot(tmp_path) == before
        assert sorted(p.name for p in tmp_path.iterdir()) == files
    for words in (["inspect", path], ["inspect", f"{path}:one"], ["package", "list", path]):
        done = cli(*words)
        assert done.exit_code in (0, 1), done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
    done = cli("package", "compact", path)
    assert done.exit_code in (0, 1), done.output
    if done.exit_code:
        assert adapters.snapshot(tmp_path) == before


def test_shared_by_a_hard_link(world, tmp_path, cli):
    """Another package's weight file may be the same one: it must not grow behind its back."""
    path = Path(shutil.copytree(world / "x.mlpackage", tmp_path / "x.mlpackage"))
    os.link(path / WEIGHTS, tmp_path / "theirs")
    before = (tmp_path / "theirs").read_bytes()
    done = cli("package", "add", path, f"two={world / 'two'}")
    assert done.exit_code == 1
    assert "hard link" in done.output
    assert (tmp_path / "theirs").read_bytes() == before
    assert cli("package", "compact", path).exit_code == 0
    assert (tmp_path / "theirs").read_bytes() == before
    assert cli("package", "add", path, f"two={world / 'two'}").exit_code == 0


def test_not_packages(world, tmp_path, cli):
    for path in (
        tmp_path / "nothing",
        tmp_path,
        world / "one",
        world / "base",
        world / "one" / "x",
    ):
        done = cli("package", "add", path, f"two={world / 'two'}")
        assert done.exit_code == 1
        assert done.output.startswith("error: ")
        assert len(done.output.splitlines()) == 1
    for words in (["nonsense"], ["=x"], ["a="], [f"a={world / 'two'}:nan"], ["a=x", "a=y"]):
        assert cli("package", "add", world / "x.mlpackage", *words).exit_code == 2


def test_odd_adapters(world, tmp_path, cli):
    """Values that are no numbers, or too large, are refused, and the package is as it was."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    path = Path(shutil.copytree(world / "x.mlpackage", tmp_path / "x.mlpackage"))
    before = adapters.snapshot(path)
    for value, dtype, what in (
        (np.nan, "<f2", "NaN"),
        (np.inf, "<f4", "NaN"),
        (1e6, "<f4", "FLOAT16"),
    ):
        folder = Path(shutil.copytree(world / "two", tmp_path / f"{value}"))
        file = folder / "adapter_model.safetensors"
        tensors = {k: v.astype(dtype) for k, v in load_file(file).items()}
        last = sorted(k for k in tensors if "lora_A" in k)[-1]
        tensors[last][0, 0] = value
        save_file(tensors, file, {"format": "pt"})
        done = cli("package", "add", path, f"two={folder}")
        assert done.exit_code == 1, done.output
        assert what in done.output
        assert last in done.output
        assert adapters.snapshot(path) == before
