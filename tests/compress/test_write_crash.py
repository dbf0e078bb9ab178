"""Compressing is all or nothing: killed at any system call or moment, or with the disk full, the
source is as it was and the output is not there, the old one, or whole.

The faults are those of the folder writers' tests.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import adapters
import families
import numpy as np
import pytest
import test_atomic as atomic
from kit import Kit

from loraduct.converters import coreml
from loraduct.formats import base as base_folder
from loraduct.formats.coreml.package import read

pytest.importorskip("peft")

kit = Kit()
RUNS: dict[str, list[str]] = {
    "compress": ["compress", "x.mlpackage", "-o", "new.mlpackage", "--palettize", "4"],
    "over an old one": [
        "compress", "x.mlpackage", "-o", "old.mlpackage", "--quantize", "int8", "--force",
    ],
    "in place": ["compress", "x.mlpackage", "-o", "x.mlpackage", "--palettize", "3", "--force"],
    "decompress": ["decompress", "old.mlpackage", "-o", "new.mlpackage"],
}  # fmt: skip
HOWS = ["kill", "EIO", "ENOSPC forever", "interrupt"]
QUICK = {("compress", "ENOSPC forever"), ("in place", "kill")}  # the others: make heavy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package, and one that was compressed before."""
    room = tmp_path_factory.mktemp("world")
    base = base_folder.read(families.saved("llama", room / "base")[1])
    coreml.build(base, room / "x.mlpackage", coreml.Options(context=16))
    made = kit.run(
        "compress", room / "x.mlpackage", "-o", room / "old.mlpackage", "--palettize", "6"
    )
    assert made.tidy().code == 0
    return room


def prepared(world: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room.parent)
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    for name in ("x.mlpackage", "old.mlpackage"):
        shutil.copytree(world / name, room / name)
    monkeypatch.chdir(room)


def seen(room: Path) -> dict[str, Any]:
    """Every package in the room, by its files; what is hidden is nobody's."""
    return {
        p.name: adapters.snapshot(p) for p in sorted(room.iterdir()) if not p.name.startswith(".")
    }


@pytest.mark.parametrize(
    ("run", "how"),
    [
        pytest.param(run, how, marks=[] if (run, how) in QUICK else pytest.mark.heavy)
        for run in RUNS
        for how in HOWS
    ],
)
def test_fault_at_every_call(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, how: str
) -> None:
    room, args = tmp_path / "room", RUNS[run]
    prepared(world, room, monkeypatch)
    old = seen(room)
    assert kit.run(*args).tidy().code == 0
    new = seen(room)
    assert new != old
    prepared(world, room, monkeypatch)
    counted = atomic.run_child(kit, args, atomic.Faults(), tmp_path / "report")
    total = counted.count
    assert total > 20
    assert counted.outside == []
    # most calls write one more piece: some of them stand for all
    for at in sorted({1, 2, 5, 9, *range(14, total, 31), *range(total - 6, total + 2)}):
        prepared(world, room, monkeypatch)
        ended = atomic.run_child(kit, args, atomic.Faults(how, at), tmp_path / "report")
        now, where = seen(room), f"{how} at call {at} of {total}"
        assert now in (old, new), where
        atomic.check_ended(ended, how, now == new)
        if now == old:
            after = kit.run(*args).tidy()
            assert after.code == 0, f"{where}: the next run fails: {after.stderr}"
            assert seen(room) == new, where
            left = [p.name for p in room.iterdir() if p.name.startswith(".") and p.is_dir()]
            assert left == [], f"{where}: the next run leaves {left}"


@pytest.mark.parametrize("run", ["compress", "in place"])
def test_killed_at_random_moments(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    """The threads that encode are killed in the middle of it too."""
    room, args, chance = tmp_path / "room", RUNS[run], np.random.default_rng(0)
    prepared(world, room, monkeypatch)
    old, begin = seen(room), time.monotonic()
    assert kit.run(*args).tidy().code == 0
    took, new = time.monotonic() - begin, seen(room)
    outcomes = set()
    for moment in chance.uniform(0.0, 1.5 * took, 12):
        prepared(world, room, monkeypatch)
        pid = os.fork()
        if pid == 0:
            try:
                kit.run(*args)
            finally:
                os._exit(0)
        time.sleep(float(moment))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        now = seen(room)
        assert now in (old, new), f"killed after {moment:.3f} s"
        outcomes.add(now == new)
        for name in now:
            assert list(read(room / name).functions)
    assert False in outcomes
