"""PEFT -> MLX: loraduct against copying the file, and against the usual community script.

A conversion rewrites the whole file, so `cp` is the floor. The script (load with torch, transpose,
save) is what people run today. All three are timed until the new file is on the disk.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from measure import (
    Run,
    Sample,
    Table,
    Target,
    best,
    interleaved,
    largest,
    median,
    run_child,
    script,
    show,
    sync_file,
    warm_page_cache,
)
from synthetic import CACHE, RANKS, SMALL, WEIGHTS, adapter_folder, prepare

ROUNDS = {16: 9, 256: 7}
COPY, WHOLE, CALL, TORCH = "cp + fsync", "loraduct", "loraduct, past start-up", "torch script"

# Prints the seconds of its imports and of its work, which the whole wall time includes.
TORCH_SCRIPT = """
import sys, time
begin = time.perf_counter()
import json, os
import torch
from safetensors.torch import load_file, save_file
ready = time.perf_counter()
tensors = load_file(sys.argv[1])
save_file({name: t.T.contiguous() for name, t in tensors.items()}, sys.argv[2])
descriptor = os.open(sys.argv[2], os.O_RDONLY)
os.fsync(descriptor)
done = time.perf_counter()
print(json.dumps({"import": ready - begin, "work": done - ready}))
"""

# A small conversion first loads every module that a conversion needs, whichever these are.
CALL_SCRIPT = """
import json, sys, time
from loraduct.cli import main
small, source, target = sys.argv[1:]
def convert(adapter, folder):
    main(["convert", adapter, "--to", "mlx", "-o", folder, "--force"], standalone_mode=False)
convert(small, target + "-small")
begin = time.perf_counter()
convert(source, target)
print()
print(json.dumps({"work": time.perf_counter() - begin}))
"""


def emptied(folder: Path) -> Path:
    """A missing folder, so that no run pays for removing the output of the one before."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def with_figures(sample: Sample, output: str) -> Sample:
    """The sample with what the child measured itself: its last line."""
    figures: Sample = json.loads(output.strip().splitlines()[-1])
    return sample | figures


def run_copy(source: Path, work: Path) -> Sample:
    """cp without sharing blocks, until the copy is on the disk."""
    emptied(work).mkdir()
    options = [] if sys.platform == "darwin" else ["--reflink=never"]
    begin = time.perf_counter()
    sample, _ = run_child(["cp", *options, str(source / WEIGHTS), str(work / WEIGHTS)])
    sync_file(work / WEIGHTS)
    return sample | {"wall": time.perf_counter() - begin}


def run_loraduct(source: Path, work: Path) -> Sample:
    """The command as a user runs it."""
    emptied(work).mkdir()
    options = ["--to", "mlx", "-o", str(work / "out"), "--force"]
    return run_child([script("loraduct"), "convert", str(source), *options])[0]


def run_call(source: Path, work: Path) -> Sample:
    """Only the conversion, in a process that has loaded everything."""
    emptied(work).mkdir()
    words = [str(SMALL), str(source), str(work / "out")]
    return with_figures(*run_child([sys.executable, "-c", CALL_SCRIPT, *words]))


def run_torch(source: Path, work: Path) -> Sample:
    """The community script, which also says what its imports cost."""
    emptied(work).mkdir()
    words = [str(source / WEIGHTS), str(work / "adapters.safetensors")]
    return with_figures(*run_child([sys.executable, "-c", TORCH_SCRIPT, *words]))


def measure_rank(rank: int, rounds: int) -> dict[str, list[Sample]]:
    """All competitors on one adapter, interleaved; one output exists at a time."""
    source, work = adapter_folder(rank), CACHE / "work"
    warm_page_cache(source / WEIGHTS)
    runs: dict[str, Run] = {
        COPY: lambda: run_copy(source, work),
        WHOLE: lambda: run_loraduct(source, work),
        CALL: lambda: run_call(source, work),
        TORCH: lambda: run_torch(source, work),
    }
    try:
        return interleaved(runs, rounds)
    finally:
        emptied(work)


def rank_table(rank: int, samples: dict[str, list[Sample]]) -> Table:
    """Seconds and memory of every competitor, and how they compare with cp and with loraduct."""
    size = (adapter_folder(rank) / WEIGHTS).stat().st_size / 1e6
    figures = [
        (COPY, COPY, "wall"),
        ("loraduct convert", WHOLE, "wall"),
        ("loraduct convert, past start-up", CALL, "work"),
        ("torch script", TORCH, "wall"),
        ("torch script, past its imports", TORCH, "work"),
    ]
    floor = best(samples[COPY], "wall")
    rows = []
    for label, name, key in figures:
        ours = best(samples[WHOLE], "wall") if key == "wall" else best(samples[CALL], "work")
        quickest = best(samples[name], key)
        rows.append(
            [
                label,
                f"{quickest:.3f}",
                f"{median(samples[name], key):.3f}",
                f"{quickest / floor:.2f}",
                f"{quickest / ours:.2f}",
                f"{largest(samples[name], 'rss'):.0f}" if key == "wall" else "",
            ]
        )
    title = f"PEFT to MLX, rank {rank}, {size:.0f} MB, {len(samples[COPY])} runs each"
    header = ["", "best s", "median s", "/ cp", "/ loraduct", "peak MB"]
    return title, header, rows


def rank_targets(rank: int, samples: dict[str, list[Sample]]) -> list[Target]:
    """The targets that this rank's figures decide (ratios of best runs)."""
    whole, call = best(samples[WHOLE], "wall"), best(samples[CALL], "work")
    script_wall, script_work = best(samples[TORCH], "wall"), best(samples[TORCH], "work")
    targets: list[Target] = [
        (f"rank {rank}: torch script / loraduct", script_wall / whole, ">=", 3.0),
        (f"rank {rank}: loraduct peak MB", largest(samples[WHOLE], "rss"), "<=", 64.0),
    ]
    if rank == 256:
        copies, calls = whole / best(samples[COPY], "wall"), script_work / call
        targets.append((f"rank {rank}: loraduct / cp", copies, "<=", 2.0))
        targets.append((f"rank {rank}: torch / loraduct, past start-up", calls, ">=", 3.0))
    return targets


def measure_all(ranks: tuple[int, ...] = RANKS) -> tuple[list[Table], list[Target]]:
    """One table per rank, and all targets."""
    prepare(ranks)
    tables: list[Table] = []
    targets: list[Target] = []
    for rank in ranks:
        samples = measure_rank(rank, ROUNDS.get(rank, 5))
        tables.append(rank_table(rank, samples))
        targets += rank_targets(rank, samples)
    return tables, targets


def main() -> None:
    """`python convert.py [RANK ...]`."""
    show(*measure_all(tuple(int(word) for word in sys.argv[1:]) or RANKS))


if __name__ == "__main__":
    main()
