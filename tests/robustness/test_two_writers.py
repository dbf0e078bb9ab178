"""One writer at a time, the same bytes every time, and modes as the umask says."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kit import Folder, Kit


class Paused:
    """Stands in for `os` in loraduct.files: the first fsync tells and waits to be released."""

    def __init__(self, tell: int, wait: int) -> None:
        self.tell, self.wait, self.done = tell, wait, False

    def __getattr__(self, name: str) -> Any:
        return self.fsync if name == "fsync" else getattr(os, name)

    def fsync(self, number: int) -> None:
        """Sync, after the pause."""
        if not self.done:
            self.done = True
            os.write(self.tell, b"x")
            os.read(self.wait, 1)
        os.fsync(number)


def paused_child(kit: Kit, args: list[Any]) -> tuple[int, int]:
    """A child that is in the midst of writing; its pid and the descriptor that releases it."""
    reached, tell = os.pipe()
    wait, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            from loraduct import files

            module: Any = files
            module.os = Paused(tell, wait)
            code = kit.run(*args).code
        finally:
            os._exit(code & 0xFF)
    os.close(tell)
    os.close(wait)
    assert os.read(reached, 1) == b"x", "the writer ended without an fsync"
    os.close(reached)
    return pid, release


@pytest.fixture
def writer(adapter: Folder, kit: Kit, tmp_path: Path) -> Iterator[list[Any]]:
    """The arguments of a conversion over an old OUT, which another process is now doing."""
    args = ["convert", adapter.path, "--to", adapter.target, "-o", tmp_path / "out"]
    assert kit.run(*args).tidy().code == 0
    args.append("--force")
    pid, release = paused_child(kit, args)
    yield args
    os.write(release, b"x")
    os.close(release)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the first writer fails"


def test_second_writer_is_refused(writer: list[Any], kit: Kit, tmp_path: Path) -> None:
    """It says so in one line and disturbs neither OUT nor the first writer's files."""
    before = {item.name for item in tmp_path.iterdir()}
    old = kit.snapshot(tmp_path / "out")
    kit.run(*writer).refused("out", "another|being written|in use|lock")
    assert {item.name for item in tmp_path.iterdir()} == before
    assert kit.snapshot(tmp_path / "out") == old


def test_annotate_during_a_write(writer: list[Any], kit: Kit, tmp_path: Path) -> None:
    """annotate of the folder that is being replaced is a second writer too."""
    old = kit.snapshot(tmp_path / "out")
    kit.run("annotate", tmp_path / "out", "--name", "bot").refused("out")
    assert kit.snapshot(tmp_path / "out") == old


def test_readers_are_not_blocked(writer: list[Any], kit: Kit, tmp_path: Path) -> None:
    """Reading the old OUT works while the new one is being written."""
    assert kit.run("inspect", tmp_path / "out", "--stats").tidy().code == 0


def test_other_outs_are_not_blocked(
    writer: list[Any], adapter: Folder, kit: Kit, tmp_path: Path
) -> None:
    """The lock is OUT's, not the room's, nor that of a name that begins alike."""
    for name in ("out2", "out.tmp-x", "ou"):
        args = ("convert", adapter.path, "--to", adapter.target, "-o", tmp_path / name)
        assert kit.run(*args).tidy().code == 0


def test_stale_lock_file(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """A lock file that nobody holds, as a killed writer leaves it, doesn't stop anybody."""
    (tmp_path / ".out.lock").write_text("12345")
    args = ("convert", adapter.path, "--to", adapter.target, "-o", tmp_path / "out")
    outcome = kit.run(*args).tidy()
    assert outcome.code == 0, outcome.stderr


def test_lock_file_is_a_link(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """A link planted under the lock's name does no harm to the file it leads to."""
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    (tmp_path / ".out.lock").symlink_to(victim)
    kit.run("convert", adapter.path, "--to", adapter.target, "-o", tmp_path / "out").tidy()
    assert victim.read_text() == "keep me"


def test_leftover_is_a_link(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """Clearing what a killed writer left never follows links."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis").write_text("keep me")
    (tmp_path / ".out.tmp-link").symlink_to(victim)
    (tmp_path / ".out.tmp-0000").mkdir()
    (tmp_path / ".out.tmp-0000" / "link").symlink_to(victim)
    args = ("convert", adapter.path, "--to", adapter.target, "-o", tmp_path / "out")
    assert kit.run(*args).tidy().code == 0
    assert (victim / "thesis").read_text() == "keep me"


def test_same_bytes_twice(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """Other processes, hash seeds, time zones, places and working folders: the same bytes."""
    (adapter.path / "README.md").write_text("# card\n")
    copies = []
    for number, zone in enumerate(("UTC", "Asia/Tokyo")):
        room = tmp_path / f"room{number}"
        room.mkdir()
        source = kit.build(adapter.kind, room / f"source{number}").save().path
        (source / "README.md").write_text("# card\n")
        env = {"PYTHONHASHSEED": str(number), "TZ": zone, "COLUMNS": str(40 + 80 * number)}
        args = ("convert", source, "--to", adapter.target, "-o", room / "out")
        assert kit.run_process(*args, env=env).tidy().code == 0
        copies.append(kit.snapshot(room / "out"))
    assert copies[0] == copies[1]
    assert copies[0]


def test_annotate_twice(adapter: Folder, kit: Kit) -> None:
    """The same annotation again changes no byte."""
    args = ("annotate", adapter.path, "--name", "bot", "--version", "1.0", "--license", "MIT")
    assert kit.run(*args).tidy().code == 0
    first = kit.snapshot(adapter.path)
    assert kit.run(*args).tidy().code == 0
    assert kit.snapshot(adapter.path) == first


@pytest.mark.parametrize("verb", ["convert", "force", "annotate"])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_modes(umask: int, verb: str, adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """Files and folders get the umask's modes, companions too, and nothing is executable."""
    (adapter.path / "README.md").write_text("# card\n")
    (adapter.path / "README.md").chmod(0o700)
    out = tmp_path / "out"
    args: list[Any] = ["convert", adapter.path, "--to", adapter.target, "-o", out]
    before = os.umask(umask)
    try:
        assert kit.run(*args).tidy().code == 0
        if verb == "force":
            assert kit.run(*args, "--force").tidy().code == 0
        if verb == "annotate":
            assert kit.run("annotate", out, "--name", "bot").tidy().code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    for item in out.rglob("*"):
        assert stat.S_IMODE(item.stat().st_mode) == 0o666 & ~umask, item.name
