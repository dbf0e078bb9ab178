"""Extracting an adapter from two real models: the command against a dense SVD of every difference.

SmolLM2-135M in float16, and the same with a rank-4 adapter on all linear layers fused into it. The dense
SVD (float64, one thread) gives the best residual there is, of its rank; its time is that of the
decompositions alone, taken on some modules and extrapolated. Residuals are compared on those modules.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys

from fuse import ADAPTER, BASE, WEIGHTS, WORK, emptied
from measure import (
    Run,
    Sample,
    Table,
    Target,
    best,
    interleaved,
    largest,
    run_child,
    script,
    show,
    warm_page_cache,
)
from synthetic import CACHE

RANK = 4
TUNED = CACHE / "reply-fused"
OURS, DENSE = f"loraduct extract --rank {RANK}", "dense SVD of every difference"
MODULES = 21  # differences that the dense SVD is timed on

DENSE_SCRIPT = """
import json, sys, time
import numpy as np
from safetensors import safe_open
tuned, base, most, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
seconds, left = 0.0, {}
with safe_open(tuned, "numpy") as new, safe_open(base, "numpy") as old:
    names = sorted(n for n in old.keys() if ".layers." in n and "_proj" in n)
    chosen = names[:: len(names) // most][:most]
    for name in chosen:
        begin = time.perf_counter()
        d = new.get_tensor(name).astype(np.float64) - old.get_tensor(name)
        values = np.linalg.svd(d, full_matrices=False)[1]
        seconds += time.perf_counter() - begin
        left[name.removesuffix(".weight")] = float((values[rank:] ** 2).sum() / (values**2).sum())
print(json.dumps({"seconds": seconds * len(names) / len(chosen), "left": left}))
"""
_LEFT: dict[str, dict[str, float]] = {}  # side -> module -> share of the squared norm that is left


def run_ours() -> Sample:
    """The command as a user runs it."""
    out = emptied(WORK) / "out"
    words = ["extract", str(TUNED), str(BASE), "--rank", str(RANK), "--allow-approximate", "--json"]
    sample, text = run_child([script("loraduct"), *words, "-o", str(out)])
    modules = json.loads(text[text.index("{") :])["modules"]
    _LEFT[OURS] = {name: row["residual_energy"] for name, row in modules.items()}
    return sample


def run_dense() -> Sample:
    """The time of the decompositions alone."""
    words = [str(TUNED / WEIGHTS), str(BASE / WEIGHTS), str(MODULES), str(RANK)]
    sample, text = run_child([sys.executable, "-c", DENSE_SCRIPT, *words])
    found = json.loads(text.strip().rsplit("\n", 1)[-1])
    _LEFT[DENSE] = found["left"]
    return sample | {"wall": found["seconds"]}


def measure_all() -> tuple[list[Table], list[Target]]:
    """A table and its targets."""
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not (BASE / WEIGHTS).exists():
        raise SystemExit(f"{BASE} is missing: make demo makes it")
    words = ["fuse", str(ADAPTER), "--base", str(BASE), "-o", str(TUNED), "--force"]
    run_child([script("loraduct"), *words])
    warm_page_cache(BASE / WEIGHTS)
    runs: dict[str, Run] = {OURS: run_ours, DENSE: run_dense}
    try:
        found = interleaved(runs, 1)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    wall = {name: best(samples, "wall") for name, samples in found.items()}
    pairs = [(_LEFT[OURS][m], left) for m, left in _LEFT[DENSE].items()]
    worst = max(math.sqrt(ours / dense) for ours, dense in pairs)
    rows = [
        [name, f"{wall[name]:.2f}", f"{wall[name] / wall[OURS]:.1f}", f"{largest(found[name], 'rss'):.0f}",
         f"{sum(_LEFT[name][m] for m in _LEFT[DENSE]) / len(pairs):.3e}"]
        for name in runs
    ]  # fmt: skip
    header = ["", "s", "/ loraduct", "peak MB", "mean energy left"]
    table: Table = (
        "Extracting rank 4 from SmolLM2-135M with it fused in, 210 modules",
        header,
        rows,
    )
    return [table], [
        ("extract: dense SVD / loraduct", wall[DENSE] / wall[OURS], ">=", 5.0),
        ("extract: our residual over the dense SVD's, worst module", worst, "<=", 1.001),
    ]


def main() -> None:
    """`python extract.py`."""
    show(*measure_all())


if __name__ == "__main__":
    main()
