"""All benchmarks, as `make bench` runs them. Exit code 3 when a target is missed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import convert
import experts
import extract
import forecast
import fuse
import interpreter
import merge
import package
import palettize
import startup
import swap
from measure import Table, Target, machine, show, table_markdown, target_table
from synthetic import RANKS

OTHERS = (experts, interpreter, merge, package, fuse, extract, palettize, swap, forecast)
NOTE = (
    "Made by `{command}`. Times run until the file is on the disk (fsync) with the source in the"
    " page cache; competitors are interleaved, and ratios and targets compare the best runs."
    " Peak memory is the largest of all runs, as the kernel reports it for the process."
)


def measure_all(ranks: tuple[int, ...]) -> tuple[list[Table], list[Target]]:
    """Tables and targets of every benchmark."""
    found = [startup.measure_all(), convert.measure_all(ranks), *(b.measure_all() for b in OTHERS)]
    return [t for tables, _ in found for t in tables], [t for _, targets in found for t in targets]


def markdown(tables: list[Table], command: str) -> str:
    """The results file: no date and no host name, so that a rerun changes figures only."""
    facts = "\n".join(f"- {line}" for line in machine())
    parts = ["# Benchmark results", NOTE.format(command=command), facts]
    return "\n\n".join([*parts, *(table_markdown(table).rstrip() for table in tables)]) + "\n"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run all benchmarks and compare with the targets.")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables here")
    parser.add_argument("--rank", type=int, action="append", help="only this rank (repeatable)")
    return parser.parse_args()


def main() -> int:
    """Measure, print, and name what was missed."""
    options = arguments()
    tables, targets = measure_all(tuple(options.rank or RANKS))
    if options.markdown:
        whole = [*tables, target_table(targets)]
        options.markdown.write_text(markdown(whole, "make bench"), encoding="utf-8")
    return show(tables, targets)


if __name__ == "__main__":
    sys.exit(main())
