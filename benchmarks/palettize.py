"""Lookup tables against coremltools': squared error and time, on SmolLM2's weights, in one process.

    python benchmarks/palettize.py [--all] [--bits 4 ...]

coremltools' own function is called (``_get_kmeans_lookup_table_and_weight``). For float16 tensors of
10,000 values and more it is exact; for smaller groups it needs scikit-learn, and without that its
exact solver is asked for instead, which coremltools itself does not use there.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import RSS_UNIT, Table, Target, is_met, table_text, target_table

from loraduct.converters.palette import Options, expand
from loraduct.converters.palettize import palettize, palettize_all
from loraduct.formats import safetensors_file
from loraduct.packing import packed

MODEL = Path(__file__).resolve().parent.parent / ".cache/smollm2-135m-instruct/model.safetensors"
THREADS = 2
GROUP = 16
BITS = (2, 3, 4, 6, 8)
LIMITS = {0: {2: 1.00001, 3: 1.00001, 4: 1.00001}, GROUP: {2: 1.0005, 3: 1.0005, 4: 1.0005}}
WIDE_LIMITS = {0: 1.001, GROUP: 1.01}  # 6 and 8 bits
SECONDS = {0: 2.5, GROUP: 12.0}  # the whole model at 4 bits
LEARN = importlib.util.find_spec("sklearn") is not None


def weights(path: Path) -> dict[str, Any]:
    """The model's matrices, mapped from the file, largest first."""
    found = {
        name: np.memmap(path, np.float16, "r", tensor.offset, tensor.shape)
        for name, tensor in safetensors_file.read_header(path)[0].items()
        if len(tensor.shape) == 2
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].size))


def theirs(w: Any, bits: int, group: int) -> Any:
    """coremltools' tables and indices, read back."""
    from coremltools.models.neural_network import quantization_utils as ct

    out = np.empty_like(w)
    for at in range(0, len(w), group or len(w)):
        part = np.asarray(w[at : at + (group or len(w))])
        exact = not LEARN and part.size < 10_000
        lut, chosen = ct._get_kmeans_lookup_table_and_weight(bits, part, exact)
        out[at : at + len(part)] = lut.astype(np.float16)[chosen].reshape(part.shape)
    return out


def ours(w: Any, bits: int, group: int) -> Any:
    """Our palette, its indices packed."""
    found = palettize(w, Options(bits, group=group), threads=THREADS)
    packed(found.indices, bits)
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds)."""
    begin = time.perf_counter()
    return work(), time.perf_counter() - begin


def squared(w: Any, dense: Any) -> float:
    """The sum of squared errors."""
    gap = w.astype(np.float64) - dense
    return float(np.einsum("ij,ij->", gap, gap))


def compared(
    found: dict[str, Any], bits: tuple[int, ...], group: int
) -> Iterator[tuple[int, float, float, float, float]]:
    """Per width: worst and mean ratio of errors, their seconds, our seconds."""
    for width in bits:
        ratios, seconds = [], [0.0, 0.0]
        for w in found.values():
            mine, quick = timed(lambda w=w, width=width: ours(w, width, group))
            other, slow = timed(lambda w=w, width=width: theirs(w, width, group))
            ratios.append(squared(w, expand(mine)) / squared(w, other))
            seconds = [seconds[0] + slow, seconds[1] + quick]
        yield width, max(ratios), sum(ratios) / len(ratios), seconds[0], seconds[1]


def whole_model(found: dict[str, Any], group: int) -> float:
    """Seconds for all matrices at 4 bits, indices packed; tensors or groups share the threads."""

    def every() -> int:
        done = palettize_all(found.items(), Options(4, group=group), threads=THREADS)
        return sum(int(packed(palette.indices, 4).size) for _, palette in done)

    return timed(every)[1]


def measure_all(
    bits: tuple[int, ...] = BITS, every: bool = False
) -> tuple[list[Table], list[Target]]:
    """Tables and targets."""
    if not MODEL.exists():
        raise SystemExit(f"{MODEL} is missing: make demo sets it up")
    found = weights(MODEL)
    layers = [f".{n}." for n in ((0, 15, 29) if not every else range(30))]
    some = {n: w for n, w in found.items() if every or any(layer in n for layer in layers)}
    rows, targets = [], []
    for group in (0, GROUP):
        seconds = min(whole_model(found, group) for _ in range(2))
        label = f"groups of {group}" if group else "per tensor"
        targets.append((f"whole model, 4 bits, {label}, s", seconds, "<=", SECONDS[group]))
        for width, worst, mean, slow, quick in compared(some, bits, group):
            limit = LIMITS[group].get(width, WIDE_LIMITS[group])
            if LEARN or not group:  # else what is compared with is not what coremltools gives
                targets.append((f"error, {width} bits, {label}, worst tensor", worst, "<=", limit))
            ratio = slow / quick
            rows.append([label, str(width), f"{worst:.6f}", f"{mean:.6f}", f"{ratio:.1f}x"])
    header = ["tables", "bits", "error, worst", "error, mean", "faster"]
    peer = "coremltools" if LEARN else "coremltools, all of it exact (no scikit-learn here)"
    return [(f"k-means tables against {peer}, {len(some)} matrices", header, rows)], targets


def main() -> int:
    """Measure, print, and name what was missed."""
    parser = argparse.ArgumentParser(description="Lookup tables against coremltools.")
    parser.add_argument("--all", action="store_true", help="compare all matrices (minutes)")
    parser.add_argument("--bits", type=int, action="append", choices=BITS)
    options = parser.parse_args()
    tables, targets = measure_all(tuple(options.bits or BITS), options.all)
    for table in [*tables, target_table(targets)]:
        print(table_text(table))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e6
    print(f"peak memory with coremltools and the mapped file: {peak:.0f} MB")
    return 0 if all(map(is_met, targets)) else 3


if __name__ == "__main__":
    sys.exit(main())
