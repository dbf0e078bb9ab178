"""What it costs to start: `loraduct inspect` against Python itself and against imports.

Looking at an adapter needs its header and a JSON file. A command that imports numpy or torch for
that is 3 to 40 times slower and larger, and such an import slips in easily: hence a target.
"""

from __future__ import annotations

import sys

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
)
from synthetic import adapter_folder, prepare

ROUNDS = 10
INSPECT = "loraduct inspect"


def child(*command: str) -> Run:
    """A run of this command."""
    return lambda: run_child(command)[0]


def measure_startup(rounds: int = ROUNDS) -> dict[str, list[Sample]]:
    """Every command, interleaved."""
    adapter = str(adapter_folder(16))
    runs: dict[str, Run] = {"python -c pass": child(sys.executable, "-c", "pass")}
    for module in ("click", "loraduct", "numpy", "torch"):
        statement = f"import {module}"
        runs[f"python -c '{statement}'"] = child(sys.executable, "-c", statement)
    runs[INSPECT] = child(script("loraduct"), "inspect", adapter)
    return interleaved(runs, rounds)


def startup_table(samples: dict[str, list[Sample]]) -> Table:
    """Milliseconds and memory of every command."""
    rows = [
        [
            name,
            f"{best(runs, 'wall') * 1e3:.0f}",
            f"{median(runs, 'wall') * 1e3:.0f}",
            f"{largest(runs, 'rss'):.1f}",
        ]
        for name, runs in samples.items()
    ]
    title = f"Start-up, {len(samples[INSPECT])} runs each"
    return title, ["", "best ms", "median ms", "peak MB"], rows


def measure_all() -> tuple[list[Table], list[Target]]:
    """The table and the targets."""
    prepare([16])
    samples = measure_startup()
    milliseconds = best(samples[INSPECT], "wall") * 1e3
    targets: list[Target] = [
        ("inspect: best ms", milliseconds, "<=", 60.0),
        ("inspect: peak MB", largest(samples[INSPECT], "rss"), "<=", 20.0),
    ]
    return [startup_table(samples)], targets


def main() -> None:
    """`python startup.py`."""
    show(*measure_all())


if __name__ == "__main__":
    main()
