"""All benchmarks, as `make bench` runs them. Exit code 3 when a target is missed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import convert
import experts
import fuse
import interpreter
import merge
import package
import startup
from measure import (
    Table,
    Target,
    is_met,
    machine,
    table_markdown,
    table_text,
    target_table,
)
from synthetic import RANKS

MISSED = 3
NOTE = (
    "Made by `{command}`. Times run until the file is on the disk (fsync) with the source in the"
    " page cache; competitors are interleaved, and ratios and targets compare the best runs."
    " Peak memory is the largest of all runs, as the kernel reports it for the process."
)


def measure_all(ranks: tuple[int, ...]) -> tuple[list[Table], list[Target]]:
    """Tables and targets of every benchmark."""
    start_tables, start_targets = startup.measure_all()
    tables, targets = convert.measure_all(ranks)
    moe_tables, moe_targets = experts.measure_all()
    run_tables, run_targets = interpreter.measure_all()
    merge_tables, merge_targets = merge.measure_all()
    edit_tables, edit_targets = package.measure_all()
    fuse_tables, fuse_targets = fuse.measure_all()
    return (
        start_tables + tables + moe_tables + run_tables + merge_tables + edit_tables + fuse_tables,
        start_targets
        + targets
        + moe_targets
        + run_targets
        + merge_targets
        + edit_targets
        + fuse_targets,
    )


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
    tables.append(target_table(targets))
    for table in tables:
        print(table_text(table))
    print("\n".join(machine()))
    if options.markdown:
        options.markdown.write_text(markdown(tables, "make bench"), encoding="utf-8")
    missed = [target for target in targets if not is_met(target)]
    for name, value, relation, limit in missed:
        print(f"missed: {name} is {value:.2f}, target {relation} {limit:g}", file=sys.stderr)
    return MISSED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
