"""A Core ML package in fewer bits, and back.

Each blob is compressed once and every constant that refers to it is rewritten, in all functions: what
was shared stays shared. Values stream from the old weight file into the new one, a few tensors at a
time. Before the new package takes its place, every compressed tensor is read back from it and must
stand for the values that were meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraduct.converters import compress_code as code
from loraduct.converters import compress_curve
from loraduct.converters import compress_plan as plans
from loraduct.converters.compress_expand import decompress
from loraduct.converters.compress_report import Report
from loraduct.converters.compress_sites import (
    ADAPTER,
    BASE,
    Weight,
    base_functions,
    compressed_in,
    form_of,
    importance,
    weights,
)
from loraduct.converters.compress_wanted import Wanted
from loraduct.converters.compress_write import planned, values_of, write
from loraduct.converters.package import size_of
from loraduct.converters.packaging import check_output
from loraduct.errors import Refused
from loraduct.formats.coreml import record
from loraduct.formats.coreml.package import Package, read

__all__ = ["compress", "decompress"]


def compress(target: Path, output: Path | None, wanted: Wanted) -> Report:
    """Write ``output``: the package ``target`` with compressed weights. Without it: the plan alone.

    Raises Refused, with nothing written, for what can't be compressed as asked.
    """
    if output is not None:
        check_output(output, wanted.force, target)
    ways = plans.asked(wanted)
    package = read(target)
    form, found = form_of(package), record.find(package)
    whole = any(v is not None for v in (ways[BASE], wanted.size, wanted.bits_per_weight))
    count = compressed_in(package, base_functions(package, found))
    if count and whole:
        what = f"is compressed already ({count} constants); `loraduct decompress` it first"
        raise Refused(target, what)
    held = weights(package, found, wanted)
    if ways[ADAPTER] is not None and not any(w.group == ADAPTER for w in held):
        raise Refused(target, "holds no adapter that --adapter-bits could be for")
    report = Report(target, output, before=size_of(target))
    try:
        plan = _planned(package, held, ways, wanted, form, report)
    except Refused as e:
        raise Refused(target, str(e)) from None
    if not plan.ways and any(w.reason == plans.HELD for w in held):
        asked = f"--size {wanted.size}" if wanted.size is not None else "these bits per weight"
        raise Refused(target, f"fits {asked} as it is ({report.before} bytes): nothing to compress")
    if not plan.ways:
        why = sorted({w.reason or "" for w in held})
        raise Refused(target, f"holds nothing to compress ({'; '.join(why) or 'no weights'})")
    report.weighted = len(plan.importance)
    if plan.errors:
        report.choices = plans.shown(held, plan, form)
    if output is None:
        report.rows = planned(held, plan, form)
        report.after = report.before + sum(r.after - r.before for r in report.rows)
        return report
    _note(report, found, ways, whole)
    write(package, found, held, plan, form, report)
    if wanted.size is not None and report.after > wanted.size:
        report.notes.append(f"{report.after - wanted.size} bytes more than --size")
    return report


def _planned(
    package: Package,
    held: list[Weight],
    ways: Mapping[str, code.Way | None],
    wanted: Wanted,
    form: str,
    report: Report,
) -> plans.Plan:
    """A way for each tensor."""

    def values(weight: Weight) -> Any:
        return values_of(package, weight)

    moments = wanted.calibration.moments if wanted.calibration else {}
    if wanted.size is None and wanted.bits_per_weight is None:
        plan = plans.fixed(held, ways, form)
        plans.leave_many_values(held, plan, values)
        base = ways[BASE]
        chosen = [w for w in held if w.offset in plan.ways]
        if report.output is None and base is not None and plans.by_rows(base):
            ways_of = [replace(base, bits=b) for b in plans.widths(form)]
            more = plans.estimated(chosen, ways_of, form, values, moments)
            plan.errors, plan.norms = more.errors, more.norms
        plan.importance = importance(chosen, moments)
        return plan
    of_adapters = plans.fixed([w for w in held if w.group == ADAPTER], ways, form)
    rest = report.before + sum(plans.TEXT * len(w.users) for w in held if w.reason is None)
    if package.functions:
        rest -= package.blobs.size
    for w in held:
        if w.group != BASE or w.reason is not None or w.count < plans.SMALLEST:
            rest += code.stored_bytes(w, of_adapters.ways.get(w.offset), form)
    plan = plans.budgeted(held, wanted, form, values, rest)
    plan.ways |= of_adapters.ways
    own = [w for w in held if w.offset in of_adapters.ways]
    plan.importance |= importance(own, moments)
    report.exact, report.predicted = plan.exact, plan.predicted
    points = [(n, 8 * n / plan.count, n + rest, error) for n, error in plan.curve if plan.count]
    report.curve = compress_curve.thinned(points)
    return plan


def _note(
    report: Report,
    found: dict[str, Any] | None,
    ways: Mapping[str, code.Way | None],
    whole: bool,
) -> None:
    """What changes besides values; and the record's word on it."""
    if found is None:
        return
    dora = [n for n, a in found["adapters"].items() if a["method"] == "dora"]
    if dora and whole:
        report.notes.append(
            f"DoRA ({', '.join(dora[:4])}): its norms stay those of the weights before compression"
        )
    own = ways[ADAPTER]
    declared = dict(found.get("compression") or {})
    if whole:
        declared[BASE] = str(ways[BASE] or "lut")
    if own is not None:
        declared[ADAPTER] = str(own)
    found["compression"] = declared
