"""Edits of a package are all or nothing: killed at any system call, it is the old or the new one.

The faults are those of the folder writers' tests. Bytes behind what the program speaks of may be
there after a kill; they are nobody's, and the next edit overwrites them.
"""

import json
import shutil
from pathlib import Path

import adapters
import families
import pytest
import test_atomic as atomic
from kit import Kit

from loraduct.converters import coreml, package
from loraduct.formats import base as base_folder
from loraduct.formats.coreml.package import read
from loraduct.formats.coreml.record import KEY

pytest.importorskip("peft")

kit = Kit()
WEIGHTS, SPEC = "Data/com.apple.CoreML/weights/weight.bin", "Data/com.apple.CoreML/model.mlmodel"
EDITS = {
    "add": ["add", "x.mlpackage", "two=second", "both=one+second:0.5"],
    "replace": ["replace", "x.mlpackage", "one=second"],
    "remove": ["remove", "x.mlpackage", "one"],
    "compact": ["compact", "x.mlpackage"],
}
HOWS = ["kill", "EIO", "ENOSPC forever", "interrupt"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A package with an adapter, and weights of one that was removed; and another adapter."""
    room = tmp_path_factory.mktemp("world")
    model, folder = families.saved("llama", room / "base")
    coreml.build(base_folder.read(folder), room / "x.mlpackage", coreml.Options(context=48))
    for i, name in enumerate(("one", "two", "gone")):
        adapters.save(adapters.trained(model, adapters.config(["q_proj"]), i), room / name)
    for name in ("gone", "one"):
        package.add(room / "x.mlpackage", {name: [package.Member(str(room / name))]})
    package.remove(room / "x.mlpackage", ["gone"])
    return room


def prepared(world, room):
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(world / "x.mlpackage", room / "x.mlpackage")
    shutil.copytree(world / "two", room / "second")
    return room / "x.mlpackage"


def meant(files):
    """What of a package counts: its files, and of the weights what the program speaks of."""
    kept = {n: d for n, d in files.items() if "/." not in n}
    end = end_of(kept[SPEC])
    return kept | {WEIGHTS: kept[WEIGHTS][64:end]}


def end_of(spec):
    from loraduct.formats.coreml.schema import messages

    model = messages()["Model"].FromString(spec)
    return json.loads(model.description.metadata.userDefined[KEY])["weights"]["end"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("edit", EDITS)
def test_fault_at_every_call(world, tmp_path, monkeypatch, edit, how):
    room, args = tmp_path / "room", ["package", *EDITS[edit]]
    path = prepared(world, room)
    monkeypatch.chdir(room)
    old = adapters.snapshot(path)
    assert kit.run(*args).tidy().code == 0
    new = adapters.snapshot(path)
    assert meant(new) != meant(old)
    prepared(world, room)
    monkeypatch.chdir(room)
    total = atomic.run_child(kit, args, atomic.Faults(), tmp_path / "report").count
    assert total > 5, f"only {total} calls were seen: is the disk touched elsewhere?"
    # most calls of a long run write one more blob: some of them stand for all
    for at in sorted({*range(1, 12), *range(12, total, 9), *range(max(1, total - 14), total + 2)}):
        prepared(world, room)
        monkeypatch.chdir(room)
        ended = atomic.run_child(kit, args, atomic.Faults(how, at), tmp_path / "report")
        now = adapters.snapshot(path)
        where = f"{how} at call {at}"
        assert meant(now) in (meant(old), meant(new)), where
        is_new = meant(now) == meant(new)
        atomic.check_ended(ended, how, is_new)
        assert list(read(path).functions)  # it loads
        if at > total:
            assert is_new
            break
        if not is_new:
            after = kit.run(*args).tidy()
            assert after.code == 0, f"{where}: the next run fails: {after.stderr}"
            assert adapters.snapshot(path) == new, where
        left = {p.name for p in room.iterdir()} - {"x.mlpackage", "second"}
        assert all(name.startswith(".x.mlpackage.") for name in left), left


@pytest.mark.parametrize("edit", EDITS)
def test_every_change_goes_through_one_module(world, tmp_path, monkeypatch, edit):
    prepared(world, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    args = ["package", *EDITS[edit]]
    for faults in (atomic.Faults(), atomic.Faults("short")):
        prepared(world, tmp_path / "room")
        monkeypatch.chdir(tmp_path / "room")
        ended = atomic.run_child(kit, args, faults, tmp_path / "report")
        assert ended.code == 0, ended.stderr
        assert ended.outside == []


def test_weights_are_on_the_disk_before_the_program(world, tmp_path, monkeypatch):
    prepared(world, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    args = ["package", *EDITS["add"]]
    ended = atomic.run_child(kit, args, atomic.Faults(), tmp_path / "report")
    log = [tuple(row) for row in ended.log]
    swap = next(n for n, (name, _) in enumerate(log) if name == "replace")
    written = [p for n, p in log[:swap] if n == "open" and not p.endswith(".lock")]
    assert any(p.endswith("weight.bin") for p in written)
    for path in written:
        assert ("fsync", path) in log[:swap], path


def test_a_second_writer_is_refused(world, tmp_path):
    from loraduct.files import editing

    path = prepared(world, tmp_path / "room")
    before = adapters.snapshot(path)
    with editing(path):
        for words in EDITS.values():
            words = [words[0], path, *(w.replace("=two", f"={world / 'two'}") for w in words[2:])]
            kit.run("package", *words).refused("another process")
    assert adapters.snapshot(path) == before


def test_a_reader_of_the_old_program_is_not_disturbed(world, tmp_path):
    """Bytes that an earlier program spoke of stay until the package is compacted."""
    from loraduct.formats import read as read_adapter

    path = prepared(world, tmp_path / "room")
    held = read_adapter(Path(f"{path}:one"))
    package.remove(path, ["one"])
    package.add(path, {"two": [package.Member(str(world / "two"))]})
    for module, update in read_adapter(world / "one").low_rank.items():
        assert held.low_rank[module].a.raw().tobytes() == update.a.raw().tobytes()
