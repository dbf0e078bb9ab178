"""Absurd sizes and floods: refused in time and within 512 MB, whatever a file claims.

Each run is a process of its own that reports its peak memory; RLIMIT_DATA keeps a runaway from
taking the machine with it.
"""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from kit import Folder, Kit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

MEMORY_LIMIT = 512 << 20
SECONDS = 15.0
MB = 1 << 20
WEIGHTS = "adapter_model.safetensors"
# VmHWM belongs to the process image, so that it doesn't inherit the peak of pytest's process.
DRIVER = """
import re, runpy, sys
report = sys.argv.pop(1)
try:
    runpy.run_module("loraduct", run_name="__main__", alter_sys=True)
finally:
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)
    open(report, "w").write(peak)
"""


@dataclass(frozen=True)
class Run:
    """What a measured process did."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak: int


def limit_data() -> None:
    """In the child: no more than 3 GB of private memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))


def measured(tmp_path: Path, *args: str | Path) -> Run:
    """Run the CLI in a process of its own; its output, time and peak memory."""
    report = tmp_path / "peak"
    words = [sys.executable, "-c", DRIVER, str(report), *map(str, args)]
    started = time.monotonic()
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit_data
    )
    seconds = time.monotonic() - started
    return Run(done.returncode, done.stdout, done.stderr, seconds, int(report.read_text()) * 1024)


def check(run: Run, expected: tuple[int, ...], *names: str) -> None:
    """Exit code, memory, time and one clear line."""
    assert "Traceback" not in run.stderr, run.stderr[-2000:]
    assert run.code in expected, (run.code, run.stderr[-500:])
    assert run.peak < MEMORY_LIMIT, f"{run.peak / MB:.0f} MB"
    assert run.seconds < SECONDS, f"{run.seconds:.1f} s"
    if run.code:
        assert run.stderr.startswith("error: "), run.stderr[:500]
        assert run.stderr.count("\n") == 1, run.stderr[:500]
        assert len(run.stderr) < 2000
        assert [name for name in names if name not in run.stderr] == []


def headed(*parts: bytes, length: int | None = None) -> Callable[[Path], None]:
    """A weights file whose header is these parts."""

    def write(path: Path) -> None:
        size = sum(map(len, parts)) if length is None else length
        with path.open("wb") as file:
            file.write(struct.pack("<Q", size))
            for part in parts:
                file.write(part)

    return write


def flood(piece: bytes, size: int) -> bytes:
    """About `size` bytes of one piece."""
    return piece * (size // len(piece))


def sparse(size: int, header: bytes, length: int | None = None) -> Callable[[Path], None]:
    """A file of that size which takes no room on the disk."""

    def write(path: Path) -> None:
        headed(header, length=length)(path)
        with path.open("r+b") as file:
            file.truncate(size)

    return write


def entries(count: int, prefix: str = "t") -> bytes:
    """A header of many empty tensors."""
    rows = {f"{prefix}{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            for n in range(count)}  # fmt: skip
    return json.dumps(rows).encode()


def tensor_claim(shape: Iterable[int], end: int, name: str = "a") -> bytes:
    """A header of one tensor."""
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, end]}
    return json.dumps({name: entry}).encode()


FLOODS: dict[str, Callable[[Path], None]] = {
    "brackets": headed(flood(b"[", 16 * MB)),
    "braces": headed(flood(b'{"":', 16 * MB)),
    "brackets_inside": headed(b'{"a":', flood(b"[", 16 * MB)),
    "closed_brackets": headed(b'{"a":', flood(b"[", 8 * MB), flood(b"]", 8 * MB), b"}"),
    "empty_objects": headed(b'{"a":[{}', flood(b",{}", 16 * MB), b"]}"),
    "empty_lists": headed(b'{"a":{"shape":[[]', flood(b",[]", 16 * MB), b"]}}"),
    "one_shape": headed(
        b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[1', flood(b",1", 16 * MB), b"]}}"),
    "long_number": headed(
        b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[', flood(b"1", 16 * MB), b"]}}"),
    "long_name": headed(b'{"', flood(b"x", 16 * MB), b'":{}}'),
    "blanks": headed(b"{", flood(b" ", 90 * MB), b"}"),
    "quotes": headed(b'{"__metadata__":{"a":"', flood(b'\\"', 16 * MB), b'"}}'),
    "many_tensors": headed(entries(50_000)),
    "sparse_8gb_header": sparse(8 << 30, b"{", 8 << 29),
    "sparse_8gb_cap": sparse(8 << 30, b"{", 100_000_000),
    "sparse_8gb_tensor": sparse(8 << 30, tensor_claim([1 << 31], 8 << 30)),
    "sparse_8gb_square": sparse((8 << 30) + 88, tensor_claim([1 << 10, 1 << 21], 8 << 30)),
    "absurd_empty": headed(tensor_claim([0, 2**62], 0)),
    "absurd_shape": headed(tensor_claim([2**31, 2**31], 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOODS)
def test_header_flood(case: str, peft: Folder, tmp_path: Path) -> None:
    """Headers made to exhaust a parser."""
    FLOODS[case](peft.weights)
    check(measured(tmp_path, "convert", peft.path, "--dry-run", "--to", "mlx"), (1,), WEIGHTS)


CONFIGS: dict[str, bytes] = {
    "brackets": flood(b"[", 32 * MB),
    "empty_objects": b'{"peft_type":"LORA","a":[{}' + flood(b",{}", 32 * MB) + b"]}",
    "long_string": b'{"peft_type":"' + flood(b"x", 32 * MB) + b'"}',
    "long_number": b'{"peft_type":"LORA","r":' + flood(b"1", 32 * MB) + b"}",
    "many_modules": b'{"peft_type":"LORA","target_modules":["a"' + flood(b',"a"', 32 * MB) + b"]}",
    "seven_megabytes": b'{"peft_type":"LORA","r":"x","a":[{}' + flood(b",{}", 7 * MB) + b"]}",
    "seven_megabyte_number": b'{"peft_type":"LORA","r":' + flood(b"1", 7 * MB) + b"}",
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_flood(case: str, peft: Folder, tmp_path: Path) -> None:
    """Configs made to exhaust a parser."""
    peft.config_path.write_bytes(CONFIGS[case])
    check(measured(tmp_path, "inspect", peft.path), (1,), peft.config_path.name)


def test_many_modules_many_patterns(peft: Folder, tmp_path: Path) -> None:
    """5,000 modules under 5,000 real patterns: done or refused in time."""
    for layer in range(2500):
        for part, size in (("A", 12), ("B", 20)):
            peft.set(peft.name(part, layer), peft.factor(part, 4, size))
    peft.config["alpha_pattern"] = {rf"layers\.{n}\..*_pro[jk]x": 8 for n in range(5000)}
    peft.save()
    check(measured(tmp_path, "inspect", peft.path), (0, 1), peft.config_path.name)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_absurd_number(field: str, peft: Folder, tmp_path: Path) -> None:
    """A rank of 2**40 allocates nothing; neither does an alpha."""
    peft.config[field] = 2**40
    peft.save()
    expected = (1,) if field == "r" else (0, 1)
    check(measured(tmp_path, "convert", peft.path, "--to", "mlx", "-o", tmp_path / "o"), expected)


def test_uniform_with_one_huge_rank(kit: Kit, tmp_path: Path) -> None:
    """--uniform pads every module to the largest rank: no quadratic memory for one odd module."""
    folder = kit.build("peft", tmp_path / "src")
    for part, size in (("A", 12), ("B", 20)):
        folder.set(folder.name(part), folder.factor(part, 5_000, size))
    for layer in range(2, 100):
        for part, size in (("A", 12), ("B", 20)):
            folder.set(folder.name(part, layer), folder.factor(part, 4, size))
    folder.config["rank_pattern"] = {"model.layers.0.self_attn.q_proj": 5_000}
    folder.save()
    out = tmp_path / "out"
    run = measured(
        tmp_path, "convert", folder.path, "--to", "peft", "--uniform", "-o", out
    )  # fmt: skip
    check(run, (0, 1))


def test_large_adapter_streams(kit: Kit, tmp_path: Path) -> None:
    """A sound 600 MB adapter is converted without being held in memory."""
    size, rank = 8192, 256
    header: dict[str, Any] = {}
    at = 0
    for layer in range(36):
        base = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        for part, shape in (("A", [rank, size]), ("B", [size, rank])):
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * rank * size]}
            header[f"{base}.lora_{part}.weight"] = entry
            at += 4 * rank * size
    folder = kit.build("peft", tmp_path / "src")
    folder.config.update(r=rank, lora_alpha=rank, target_modules=["q_proj"])
    folder.save()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sparse(8 + len(text) + at, text)(folder.weights)
    run = measured(tmp_path, "convert", folder.path, "--to", "mlx", "-o", tmp_path / "out")
    check(run, (0,))
    assert np.isclose((tmp_path / "out" / "adapters.safetensors").stat().st_size, at, rtol=0.01)
