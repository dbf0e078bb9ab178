"""Run commands in child processes and report wall time and peak memory.

Everything here is deliberately light (not even `statistics` or `tempfile`): the benchmark process
starts the children, and a child's peak memory can't be reported below its parent's.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Sample = dict[str, float]  # what one run measured, by name: "wall" (s), "rss" (MB), ...
Run = Callable[[], Sample]
Table = tuple[str, list[str], list[list[str]]]  # title, header, rows
Target = tuple[str, float, str, float]  # name, measured value, "<=" or ">=", limit

BYTECODE = Path(__file__).resolve().parent.parent / ".cache" / "bench" / "pycache"
MISSED = 3  # the exit code when a target is missed
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in


def run_child(command: Sequence[str], limit: float | None = None) -> tuple[Sample, str]:
    """Wall seconds, CPU seconds and peak RSS (MB) of one command, and what it printed.

    One that still runs after ``limit`` seconds is killed, and has ``stopped`` in its sample: its
    times are lower bounds then.

    The peak comes from wait4, so it is this child's and no other's. On Linux the high-water mark
    of the spawning process survives exec: the caller's own memory is a lower bound of the figure.
    """
    reading, writing = os.pipe()  # neither end is inherited, only the copies made below
    actions = [(os.POSIX_SPAWN_DUP2, writing, 1), (os.POSIX_SPAWN_DUP2, writing, 2)]
    begin = time.perf_counter()
    pid = os.posix_spawnp(command[0], list(command), environment(), file_actions=actions)
    os.close(writing)
    alarm = threading.Timer(limit or threading.TIMEOUT_MAX, os.kill, (pid, signal.SIGKILL))
    alarm.daemon = True
    if limit is not None:
        alarm.start()
    with open(reading, "rb") as output:
        text = output.read().decode(errors="replace")
    _, status, usage = os.wait4(pid, 0)
    alarm.cancel()
    wall = time.perf_counter() - begin
    code = os.waitstatus_to_exitcode(status)
    stopped = code == -signal.SIGKILL and limit is not None and wall >= limit
    if code and not stopped:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {code}:\n{text}")
    sample = {
        "wall": wall,
        "rss": usage.ru_maxrss * RSS_UNIT / 1e6,
        "cpu": usage.ru_utime + usage.ru_stime,
    }
    return sample | ({"stopped": 1.0} if stopped else {}), text


def environment() -> dict[str, str]:
    """The environment of every child: compiled modules are kept, as after an installation by pip.

    A developer's PYTHONDONTWRITEBYTECODE would have our modules, and only ours, compiled at every
    start. They are kept apart so that a benchmark leaves nothing in the source tree.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PYTHONPYCACHEPREFIX": str(BYTECODE)}


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[Sample]]:
    """A B A B ...: what disturbs the machine for a while then disturbs all competitors alike.

    A first round is thrown away: it compiles modules and fills the page cache.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run())
    return samples


def best(samples: list[Sample], key: str) -> float:
    """The least disturbed run."""
    return min(sample[key] for sample in samples)


def median(samples: list[Sample], key: str) -> float:
    """The typical run."""
    values = sorted(sample[key] for sample in samples)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def largest(samples: list[Sample], key: str) -> float:
    """The worst run: a bound on memory must hold in all of them."""
    return max(sample[key] for sample in samples)


def warm_page_cache(path: Path) -> None:
    """Read a file once, through a small buffer (the caller's memory is a floor: `run_child`)."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def sync_file(path: Path) -> None:
    """Wait until a file's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def script(name: str) -> str:
    """The console script `name` of the environment this benchmark runs in."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise SystemExit(f"{path} is missing: install the package into this environment first")
    return str(path)


def machine() -> list[str]:
    """What the figures depend on. No host name: results are published."""
    return [
        f"CPU: {cpu_model()}, {os.cpu_count()} cores",
        f"Kernel: {platform.system()} {platform.release()} {platform.machine()}",
        f"Python {platform.python_version()}, {', '.join(versions('numpy', 'torch', 'click'))}",
    ]


def cpu_model() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return run_child(["sysctl", "-n", "machdep.cpu.brand_string"])[1].strip()
    return platform.processor() or "unknown"


def versions(*packages: str) -> list[str]:
    """Name and version of installed packages.

    The import is not at the top because importlib.metadata costs several MB: see `run_child`.
    """
    from importlib import metadata

    return [f"{package} {metadata.version(package)}" for package in packages]


def table_text(table: Table) -> str:
    """A table for a terminal: first column to the left, figures to the right."""
    title, header, rows = table
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join([title, "", *lines, ""])


def table_markdown(table: Table) -> str:
    """The same table for a Markdown file."""
    title, header, rows = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in [header, rule, *rows]]
    return "\n".join([f"## {title}", "", *lines, ""])


def is_met(target: Target) -> bool:
    """Whether a target holds."""
    _, value, relation, limit = target
    return value <= limit if relation == "<=" else value >= limit


def target_table(targets: list[Target]) -> Table:
    """All targets with what was measured."""
    rows = [
        [name, f"{value:.2f}", f"{relation} {limit:g}", "yes" if value_met else "NO"]
        for (name, value, relation, limit), value_met in zip(
            targets, map(is_met, targets), strict=True
        )
    ]
    return "Targets", ["what", "measured", "target", "met"], rows


def show(tables: list[Table], targets: list[Target]) -> int:
    """Print the tables, the targets and the machine; MISSED if a target is missed, each named."""
    for table in [*tables, target_table(targets)]:
        print(table_text(table))
    print("\n".join(machine()))
    missed = [target for target in targets if not is_met(target)]
    for name, value, relation, limit in missed:
        print(f"missed: {name} is {value:.2f}, target {relation} {limit:g}", file=sys.stderr)
    return MISSED if missed else 0
