"""Writers are all or nothing: a fault at any mutating system call leaves OLD or NEW, never a mix.

The loop is SQLite's: fail the first call, the second, the third, ... until a run meets no fault.
Every run is a forked child, so that it can be killed. `loraduct.files` makes all the mutating
calls, through the name `os` in its globals and its function `exchange`, which the child wraps.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kit import Folder, Kit

MUTATING = {
    "chmod", "copy_file_range", "fchmod", "fdatasync", "fsync", "ftruncate", "link", "makedirs",
    "mkdir", "mkfifo", "posix_fallocate", "pwrite", "pwritev", "remove", "rename", "renames",
    "replace", "rmdir", "sendfile", "symlink", "truncate", "unlink", "utime", "write", "writev",
}  # fmt: skip
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


@dataclass
class Faults:
    """Counts mutating calls and lets the `at`-th one (or, persistently, all from there) fail."""

    how: str = "none"
    at: int = 0
    count: int = 0
    inside: int = 0
    log: list[tuple[str, str]] = field(default_factory=list)
    paths: dict[int, str] = field(default_factory=dict)

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One mutating call, or the fault in its place."""
        self.count += 1
        due = self.count == self.at or ("forever" in self.how and 0 < self.at <= self.count)
        if due and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if due and self.how == "interrupt":
            raise KeyboardInterrupt
        if due and self.how != "short":
            number = ERRORS[self.how.split()[0]]
            raise OSError(number, os.strerror(number), str(args[0]) if args else None)
        if name in ("write", "pwrite") and self.how == "short":
            args = (args[0], bytes(args[1])[:7], *args[2:])
        if name in ("fsync", "fdatasync"):  # nobody pulls the plug here, and it is slow
            function = lambda number: None
        self.inside += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self.inside -= 1
        if name == "open":
            self.paths[result] = str(args[0])
        target = args[0] if args else ""
        self.log.append((name, self.paths.get(target, "") if name != "open" else str(target)))
        return result


class FaultyOs:
    """Stands in for the module `os`: the mutating functions go through the counter."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if name in MUTATING:
            return lambda *args, **kwargs: self.faults.call(name, value, *args, **kwargs)
        if name == "open":
            return self.open
        return value

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        """Opening to read doesn't count, but is remembered: folders are synced that way."""
        if flags & WRITE_FLAGS:
            return int(self.faults.call("open", os.open, path, flags, *args, **kwargs))
        number = os.open(path, flags, *args, **kwargs)
        self.faults.paths[number] = str(path)
        return number


@dataclass(frozen=True)
class Ended:
    """How a child ended: killed, or with an outcome; and the calls it made."""

    killed: bool
    code: int
    stderr: str
    crash: str
    count: int
    log: list[list[str]]
    outside: list[str]


def watch_disk(faults: Faults, outside: list[str]) -> None:
    """Note every change of the disk that doesn't come through the proxy."""
    changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
               "os.chmod", "os.truncate")  # fmt: skip

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if faults.inside or not (event == "open" or event in changes):
            return
        path = str(args[0])
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITE_FLAGS):
            return
        if "__pycache__" not in path and path != os.devnull:
            outside.append(f"{event} {path}")

    sys.addaudithook(hook)


def run_child(kit: Kit, args: list[Any], faults: Faults, report: Path, umask: int = 0o22) -> Ended:
    """Fork, wrap the disk, run the CLI in the child and read its report."""
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            from loraduct import files

            module: Any = files
            exchange = module.exchange
            module.os = FaultyOs(faults)
            module.exchange = lambda a, b: faults.call("exchange", exchange, a, b)
            os.umask(umask)
            outside: list[str] = []
            watch_disk(faults, outside)
            outcome = kit.run(*args)
            faults.inside = 1
            report.write_text(json.dumps([
                outcome.code, outcome.stderr, outcome.crash, faults.count, faults.log, outside,
            ]))  # fmt: skip
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return Ended(True, -1, "", "", 0, [], [])
    return Ended(False, *json.loads(report.read_text()))


def old_adapter(kit: Kit, kind: str, path: Path) -> Folder:
    """An adapter of this kind that differs from what a conversion writes there."""
    folder: Folder = kit.build(kind, path)
    for name in list(folder.tensors):
        if "v_proj" in name:
            del folder.tensors[name]
    if kind == "peft":
        folder.config["target_modules"] = ["q_proj"]
    else:
        folder.config["lora_parameters"]["keys"] = ["self_attn.q_proj"]
    folder.save()
    (path / "README.md").write_text("# the old one\n")
    return folder


@dataclass(frozen=True)
class Scenario:
    """A verb that writes: its name, the kind of its source, and whether OUT is there before."""

    id: str
    kind: str
    old: bool
    annotate: bool = False

    def prepare(self, kit: Kit, room: Path) -> tuple[list[Any], Path]:
        """Lay out the room; the arguments, and the folder that must change all at once."""
        shutil.rmtree(room, ignore_errors=True)
        folder = kit.build(self.kind, room / "src", dora=True).save()
        (folder.path / "README.md").write_text("# the new one\n")
        (folder.path / "tokenizer.json").write_text("{}")
        if self.annotate:
            return ["annotate", folder.path, "--name", "bot", "--license", "MIT"], folder.path
        out = room / "out"
        if self.old:
            old_adapter(kit, folder.target, out)
        force = ["--force"] if self.old else []
        return ["convert", folder.path, "--to", folder.target, "-o", out, *force], out


# Each with the faults it meets at every call; the first meets all there are.
LOOPS = {
    Scenario("to_mlx_over_old", "peft", True):
        ["kill", "ENOSPC", "EIO", "ENOSPC forever", "interrupt"],
    Scenario("to_peft_over_old", "mlx", True): ["kill", "EIO"],
    Scenario("to_mlx_fresh", "peft", False): ["kill", "EIO forever"],
    Scenario("to_peft_fresh", "mlx", False): ["kill"],
    Scenario("annotate_peft", "peft", True, True): ["kill", "EIO", "ENOSPC forever"],
    Scenario("annotate_mlx", "mlx", True, True): ["kill"],
}  # fmt: skip
SCENARIOS = list(LOOPS)
PAIRS = [pytest.param(s, how, id=f"{s.id}-{how}") for s, hows in LOOPS.items() for how in hows]


OURS = re.compile(
    r"\.(src|out|adapters\.safetensors|adapter_model\.safetensors)\.(tmp-|lock$|old-)"
)


def leftovers(room: Path) -> list[str]:
    """What lies beside SRC and OUT, and temporary files in SRC (annotate works on its files)."""
    beside = [item.name for item in room.iterdir() if item.name not in ("src", "out")]
    return sorted(beside + [name.name for name in (room / "src").iterdir() if is_ours(name)])


def is_ours(path: Path) -> bool:
    """Whether a name has a prefix that the product keeps for itself."""
    return OURS.match(path.name) is not None


def state(kit: Kit, out: Path) -> dict[str, bytes] | None:
    """A folder's files without the temporary ones."""
    files = kit.snapshot(out)
    return files and {name: data for name, data in files.items() if not OURS.match(name)}


def check_ended(ended: Ended, how: str, is_new: bool) -> None:
    """A fault is told in one line, and exit 0 means NEW and nothing else does."""
    if ended.killed:
        assert how == "kill"
        return
    if how == "interrupt":
        assert is_new or ended.code != 0
        assert "Traceback" not in ended.stderr
        return
    assert not ended.crash, ended.crash
    assert "Traceback" not in ended.stderr
    assert (ended.code == 0) == is_new, (ended.code, ended.stderr)
    if ended.code:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert ended.code == 1
        assert len(lines) == 1, ended.stderr
        assert ended.stderr.splitlines()[-1] == lines[0]


def fault_loop(kit: Kit, scenario: Scenario, how: str, tmp_path: Path) -> int:
    """Fail call 1, 2, 3, ... until nothing fails; the number of mutating calls of a run."""
    room = tmp_path / "room"
    report = tmp_path / "report"
    args, out = scenario.prepare(kit, room)
    old = kit.snapshot(out)
    assert kit.run(*args).tidy().code == 0
    new = kit.snapshot(out)
    assert new not in (old, None)
    assert leftovers(room) == []
    for at in range(1, 200):
        scenario.prepare(kit, room)
        ended = run_child(kit, args, Faults(how, at), report)
        where = f"{how} at call {at}"
        now = state(kit, out)
        assert now in (old, new), f"{where}: neither OLD nor NEW: {sorted(now or {})}"
        check_ended(ended, how, now == new)
        left = leftovers(room)
        assert all(map(OURS.match, left)), f"{where}: {left}"
        if not ended.killed and ended.count < at:
            assert now == new, where
            return at - 1
        if not left and at % 5:
            continue  # nothing to recover from: now and then is enough
        retry = [*args, "--force"] if now == new and args[0] == "convert" else args
        after = kit.run(*retry).tidy()
        assert after.code == 0, f"{where}: the next run fails: {after.stderr}"
        assert kit.snapshot(out) == new, where
        assert leftovers(room) == [], where
    pytest.fail("more than 200 mutating calls for a small adapter")


@pytest.mark.parametrize(("scenario", "how"), PAIRS)
def test_fault_at_every_call(scenario: Scenario, how: str, kit: Kit, tmp_path: Path) -> None:
    """The promise of this file, for each writer and each kind of fault."""
    calls = fault_loop(kit, scenario, how, tmp_path)
    assert calls >= 8, f"only {calls} calls were seen: is the disk touched elsewhere?"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.id)
def test_every_change_goes_through_one_module(scenario: Scenario, kit: Kit, tmp_path: Path) -> None:
    """Else the fault loop would test less than it says."""
    args, _ = scenario.prepare(kit, tmp_path / "room")
    ended = run_child(kit, args, Faults(), tmp_path / "report")
    assert ended.code == 0, ended.stderr
    assert ended.outside == []


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.id)
def test_short_writes(scenario: Scenario, kit: Kit, tmp_path: Path) -> None:
    """write() may take fewer bytes than it was given; the files are whole all the same."""
    args, out = scenario.prepare(kit, tmp_path / "room")
    assert kit.run(*args).code == 0
    new = kit.snapshot(out)
    scenario.prepare(kit, tmp_path / "room")
    ended = run_child(kit, args, Faults("short"), tmp_path / "report")
    assert ended.code == 0, ended.stderr
    assert kit.snapshot(out) == new


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.id)
def test_synced_before_the_swap(scenario: Scenario, kit: Kit, tmp_path: Path) -> None:
    """Each file is synced after its last write and before the swap, and the parent after it."""
    args, out = scenario.prepare(kit, tmp_path / "room")
    ended = run_child(kit, args, Faults(), tmp_path / "report")
    assert ended.code == 0, ended.stderr
    log = [tuple(row) for row in ended.log]
    swap = max(n for n, (name, _) in enumerate(log) if name in ("exchange", "rename", "replace"))
    written = {path for name, path in log[:swap] if name == "open" and not path.endswith(".lock")}
    assert written
    for path in written:
        last = max((n for n, row in enumerate(log) if row == ("write", path)), default=0)
        synced = [n for n, row in enumerate(log) if row == ("fsync", path)]
        assert [n for n in synced if last < n < swap], f"{path} is not synced before the swap"
    folders = [path for name, path in log[swap:] if name == "fsync"]
    assert str(out.parent) in folders or str(out) in folders, "the folder is not synced after"


@pytest.mark.parametrize("how", ["kill", "EIO"])
def test_without_exchange(how: str, kit: Kit, tmp_path: Path) -> None:
    """Where the system can't swap, two renames: OUT may be away, never lost nor mixed."""
    room = tmp_path / "room"
    scenario = SCENARIOS[0]
    args, out = scenario.prepare(kit, room)
    old = kit.snapshot(out)
    assert kit.run(*args).tidy().code == 0
    new = kit.snapshot(out)
    for at in range(1, 200):
        scenario.prepare(kit, room)
        ended = run_without_exchange(kit, args, Faults(how, at), tmp_path / "report")
        now = kit.snapshot(out)
        where = f"{how} at call {at}"
        if now is None:
            kept = [kit.snapshot(room / name) for name in leftovers(room)]
            assert old in kept, f"{where}: OUT is gone and nothing holds it"
        else:
            assert now in (old, new), where
            check_ended(ended, how, now == new)
        if not ended.killed and ended.count < at:
            return
        after = kit.run(*args).tidy()
        assert after.code == 0, f"{where}: the next run fails: {after.stderr}"
        assert kit.snapshot(out) == new, where
        assert leftovers(room) == [], where


def run_without_exchange(kit: Kit, args: list[Any], faults: Faults, report: Path) -> Ended:
    """As run_child, in a libc that has neither renameat2 nor renamex_np."""

    class Bare:
        """A C library without swapping."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

    before = ctypes.CDLL
    try:
        ctypes.CDLL = Bare  # type: ignore[assignment,misc]
        return run_child(kit, args, faults, report)
    finally:
        ctypes.CDLL = before  # type: ignore[misc]
