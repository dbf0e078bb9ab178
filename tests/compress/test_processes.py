"""Encoding in processes: what threads would give, refusals in one line, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import adapters
import families
from click.testing import CliRunner

from loraduct.cli import main
from loraduct.converters import compress_encode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
WAYS = {
    "one table": ("--palettize", "4"),
    "groups": ("--palettize", "3", "--group-size", "8"),
    "scaled": ("--bits-per-weight", "5"),
    "integers": ("--quantize", "int8"),
}
# as the command starts, with two workers whatever the machine has, and word of what they are
START = """
import sys
from concurrent.futures import ProcessPoolExecutor
from loraduct.converters import compress_encode, compress_write
compress_write.THREADS = 2
pool = compress_encode._pool
def told(workers):
    made = pool(workers)
    print(type(made).__name__, file=sys.stderr)
    return made
compress_encode._pool = told
from loraduct.cli import main
main()
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("processes")
    _, folder = families.saved("qwen2", room / "base")
    done = CliRunner().invoke(
        main, ["package", "--base", str(folder), "-o", str(room / "x.mlpackage")]
    )
    assert done.exit_code == 0, done.output
    return room / "x.mlpackage"


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", START, "compress", *map(str, words)]


def started(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("way", WAYS)
def test_processes_give_what_threads_do(package: Path, tmp_path: Path, way: str) -> None:
    apart, beside = tmp_path / "apart.mlpackage", tmp_path / "beside.mlpackage"
    done = started(package, "-o", apart, *WAYS[way])
    assert done.returncode == 0, done.stderr
    assert "ProcessPoolExecutor" in done.stderr
    words = ["compress", str(package), "-o", str(beside), *WAYS[way]]
    assert CliRunner().invoke(main, words).exit_code == 0  # torch is loaded here: threads
    assert adapters.snapshot(apart) == adapters.snapshot(beside)


def test_a_refusal_comes_through_in_one_line(package: Path, tmp_path: Path) -> None:
    from loraduct.formats.coreml.package import read

    broken = tmp_path / "broken.mlpackage"
    subprocess.run(["cp", "-r", package, broken], check=True)
    made, name = read(broken), "model_layers_1_mlp_up_proj_weight"
    function = made.functions["base"]
    held = function.block_specializations[function.opset].operations
    op = next(o for o in held if name in [r.name for r in o.outputs])
    blob = made.blobs.record(op.attributes["val"].blobFileValue.offset, "FLOAT16", (80, 48), name)
    with made.blobs.path.open("r+b") as file:
        file.seek(blob.data)
        file.write(np.full(1, np.nan, np.float16).tobytes())
    done = started(
        broken, "-o", tmp_path / "out.mlpackage", "--palettize", "4", "--group-size", "8"
    )
    lines = [x for x in done.stderr.splitlines() if "Executor" not in x]
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert f"{name}: holds NaN" in lines[0]
    assert not (tmp_path / "out.mlpackage").exists()


def test_workers_end_with_what_started_them(tmp_path: Path) -> None:
    """Even where it is killed; each writes its number and would sleep for a minute."""
    code = f"""
import os, time
from loraduct.converters import compress_encode
def work(n):
    open({str(tmp_path)!r} + f"/{{n}}", "w").write(str(os.getpid()))
    time.sleep(60)
pool = compress_encode._pool(2)
found = [pool.submit(work, n) for n in range(2)]
found[0].result()
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    files = [tmp_path / str(n) for n in range(2)]
    try:
        _until(lambda: all(f.exists() and f.read_text() for f in files))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    pids = [int(f.read_text()) for f in files]
    assert os.getpid() not in pids
    _until(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    """Not a zombie either."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(so: Any) -> None:
    for _ in range(300):
        if so():
            return
        time.sleep(0.1)
    raise AssertionError("not within 30 seconds")


def test_threads_where_a_fork_is_not_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(compress_encode._pool(2)).__name__ == "ThreadPoolExecutor"  # torch is here
    assert type(compress_encode._pool(1)).__name__ == "ThreadPoolExecutor"
