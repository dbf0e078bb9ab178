"""A Core ML package in fewer bits, and back.

Each blob is compressed once and every constant that refers to it is rewritten, in all functions: what
was shared stays shared. Values stream from the old weight file into the new one, a few tensors at a
time. Before the new package takes its place, every compressed tensor is read back from it and must
stand for the values that were meant.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loraduct import files
from loraduct.converters import compress_code as code
from loraduct.converters import compress_plan as plans
from loraduct.converters.compress_expand import decompress
from loraduct.converters.compress_report import Report, Row
from loraduct.converters.compress_sites import (
    ADAPTER,
    BASE,
    Weight,
    blocks_of,
    compressed_in,
    form_of,
    tensor_of,
    weights,
)
from loraduct.converters.compress_wanted import Wanted
from loraduct.converters.package import size_of
from loraduct.converters.packaging import check_output
from loraduct.errors import Refused
from loraduct.formats.coreml import edit, record
from loraduct.formats.coreml.blob import Layout
from loraduct.formats.coreml.constexpr import expanded
from loraduct.formats.coreml.package import Package, read
from loraduct.text import size

__all__ = ["compress", "decompress"]
THREADS = min(4, os.cpu_count() or 1)
TEXT = 320  # bytes that a rewritten operation adds to the program, at most (measured: 230)


def compress(target: Path, output: Path | None, wanted: Wanted) -> Report:
    """Write ``output``: the package ``target`` with compressed weights. Without it: the plan alone.

    Raises Refused, with nothing written, for what can't be compressed as asked.
    """
    if output is not None:
        check_output(output, wanted.force)
    ways = plans.asked(wanted)
    package = read(target)
    form, found = form_of(package), record.find(package)
    whole = any(v is not None for v in (ways[BASE], wanted.size, wanted.bits_per_weight))
    count = compressed_in(package)
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
    if not plan.ways:
        why = sorted({w.reason or "" for w in held})
        raise Refused(target, f"holds nothing to compress ({'; '.join(why) or 'no weights'})")
    if plan.errors:
        report.choices = plans.shown(held, plan, form)
    if output is None:
        report.rows = [_planned_row(w, plan, form) for w in held]
        report.after = report.before + sum(r.after - r.before for r in report.rows)
        return report
    _note(report, found, ways, whole)
    _write(package, found, held, plan, form, report, wanted)
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
        return _values(package, weight)

    if wanted.size is None and wanted.bits_per_weight is None:
        plan = plans.fixed(held, ways, form)
        base = ways[BASE]
        if report.output is None and base is not None and base.kind == "lut":
            chosen = [w for w in held if w.offset in plan.ways]
            more = plans.estimated(chosen, form, values)
            plan.errors, plan.norms = more.errors, more.norms
        return plan
    of_adapters = plans.fixed([w for w in held if w.group == ADAPTER], ways, form)
    rest = report.before + sum(TEXT * len(w.ops) for w in held if w.reason is None)
    if package.functions:
        rest -= package.blobs.size
    for w in held:
        if w.group != BASE or w.reason is not None or w.count < plans.SMALLEST:
            rest += code.stored_bytes(w, of_adapters.ways.get(w.offset), form)
    plan = plans.budgeted(held, wanted, form, values, rest)
    plan.ways |= of_adapters.ways
    report.exact = plan.exact
    return plan


def _planned_row(weight: Weight, plan: plans.Plan, form: str) -> Row:
    way = plan.ways.get(weight.offset)
    errors = plan.errors.get(weight.offset, {})
    return Row(
        weight.name,
        weight.group,
        weight.shape,
        code.stored_bytes(weight, None, form),
        code.stored_bytes(weight, way, form),
        str(way) if way else None,
        weight.reason,
        errors.get(way.bits, float("nan")) if way else float("nan"),
        plan.norms.get(weight.offset, float("nan")),
    )


def _values(package: Package, weight: Weight) -> Any:
    """The tensor as it is stored; NaN and Inf are found where it is compressed."""
    raw = tensor_of(package, weight).raw(finite=False).reshape(weight.shape)
    return raw.view(weight.dtype.lower()) if raw.dtype.kind == "u" else raw


class _Encoder:
    """Tensors compressed one after the other, while their bytes are asked for."""

    def __init__(
        self, package: Package, held: list[Weight], plan: plans.Plan, form: str, layout: Layout
    ) -> None:
        self.package, self.plan, self.form = package, plan, form
        self.chosen = [w for w in held if w.offset in plan.ways]
        self.norms: dict[int, float] = {}
        self.errors: dict[int, float] = {}
        self.digests: dict[int, int] = {}
        self.given: dict[int, dict[str, Any]] = {}
        items = ((w, plan.ways[w.offset], self._reader(w)) for w in self.chosen)
        self.results = code.coded(items, THREADS)
        self.now: dict[str, Any] = {}
        for weight in self.chosen:
            self._lay_out(weight, layout)

    def _reader(self, weight: Weight) -> Any:
        def values() -> Any:
            found = _values(self.package, weight)
            self.norms[weight.offset] = plans.squared(found)
            return found

        return values

    def _lay_out(self, weight: Weight, layout: Layout) -> None:
        """Places of the arguments; their bytes come when the file is written."""
        found = code.arguments(weight, self.plan.ways[weight.offset], self.form)
        offsets: dict[str, int] = {}
        for i, argument in enumerate(found):
            if argument.count >= code.INLINE:
                pieces = self._pieces(weight, argument, offsets, first=i == 0)
                offsets[argument.key] = layout.add(argument.dtype, argument.count, pieces)

    def _pieces(
        self, weight: Weight, argument: code.Argument, offsets: dict[str, int], *, first: bool
    ) -> Iterator[Any]:
        if first:
            self._next(weight, offsets)
        yield from code.pieces(self.now.pop(argument.key), argument.dtype)

    def _next(self, weight: Weight, offsets: dict[str, int]) -> None:
        """The next tensor; its values are known from here on."""
        found = next(self.results)
        at = weight.offset
        self.digests[at], self.errors[at] = code.digest(found), found.error
        self.now = code.values_of(found, weight, self.form)
        self.given[at] = {
            a.key: code.value(a, offsets.get(a.key), self.now[a.key])
            for a in code.arguments(weight, self.plan.ways[at], self.form)
        }


def _write(
    package: Package,
    found: dict[str, Any] | None,
    held: list[Weight],
    plan: plans.Plan,
    form: str,
    report: Report,
    wanted: Wanted,
) -> None:
    """The new package, checked, in its place."""
    assert report.output is not None
    layout = Layout()
    used = edit.used_blobs(package)
    gone = {o for o in plan.ways}
    moved = {o: layout.copy(package.blobs, o, "a weight") for o in used if o not in gone}
    encoder = _Encoder(package, held, plan, form, layout)
    names = {id(op): w for w in encoder.chosen for op in w.ops}
    with files.staged_folder(report.output) as stage:
        try:
            _copied(package, stage, layout.chunks(), lambda: _program(package, found, encoder, names, moved, layout, wanted))
        except Refused as e:
            if "can't be written" in str(e):
                raise
            raise Refused(package.path, str(e)) from None
        report.checked = _checked(stage, report.output, encoder)
        report.after = size_of(stage)
    for weight in held:
        way = plan.ways.get(weight.offset)
        at = weight.offset
        report.rows.append(
            Row(
                weight.name, weight.group, weight.shape, code.stored_bytes(weight, None, form),
                code.stored_bytes(weight, way, form), str(way) if way else None, weight.reason,
                encoder.errors.get(at, float("nan")), encoder.norms.get(at, float("nan")),
            )
        )  # fmt: skip
