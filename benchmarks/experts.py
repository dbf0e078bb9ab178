"""PEFT -> MLX of a mixture of experts: every tensor is permuted, split or both.

PEFT keeps a layer's experts in two matrices with the experts as the fastest axis of B, mlx-lm in
three tensors with the experts first. `cp` is the floor; gate and up share their A in PEFT and have
one each in MLX, so the output is a third larger than what is copied.
"""

from __future__ import annotations

import sys

from convert import COPY, WHOLE, emptied, run_copy
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
    warm_page_cache,
)
from synthetic import CACHE, EXPERTS, MOE, MOE_BASE, MOE_HIDDEN, MOE_RANK, WEIGHTS

ROUNDS = 3
WORK = CACHE / "work"
LARGEST_TENSOR = EXPERTS * MOE_RANK * MOE_HIDDEN * 2 / 1e6  # MB


def run_loraduct() -> Sample:
    """The command as a user runs it."""
    emptied(WORK).mkdir()
    words = ["convert", str(MOE), "--to", "mlx", "-o", str(WORK / "out"), "--base", str(MOE_BASE)]
    return run_child([script("loraduct"), *words])[0]


def measure_all() -> tuple[list[Table], list[Target]]:
    """One table and its targets."""
    run_child([sys.executable, str(CACHE.parents[1] / "benchmarks" / "synthetic.py"), "experts"])
    warm_page_cache(MOE / WEIGHTS)
    runs: dict[str, Run] = {COPY: lambda: run_copy(MOE, WORK), WHOLE: run_loraduct}
    try:
        samples = interleaved(runs, ROUNDS)
    finally:
        emptied(WORK)
    floor = best(samples[COPY], "wall")
    rows = [
        [
            name,
            f"{best(found, 'wall'):.3f}",
            f"{median(found, 'wall'):.3f}",
            f"{best(found, 'wall') / floor:.2f}",
            f"{largest(found, 'rss'):.0f}",
        ]
        for name, found in samples.items()
    ]
    size = (MOE / WEIGHTS).stat().st_size / 1e6
    title = f"PEFT to MLX, {EXPERTS} experts of rank {MOE_RANK}, {size:.0f} MB, {ROUNDS} runs each"
    header = ["", "best s", "median s", "/ cp", "peak MB"]
    peak = largest(samples[WHOLE], "rss")
    targets: list[Target] = [
        ("experts: loraduct / cp", best(samples[WHOLE], "wall") / floor, "<=", 3.0),
        (f"experts: peak MB (largest tensor {LARGEST_TENSOR:.0f})", peak, "<=", 128.0),
    ]
    return [(title, header, rows)], targets


def main() -> None:
    """`python experts.py`."""
    show(*measure_all())


if __name__ == "__main__":
    main()
