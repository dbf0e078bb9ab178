"""A package written with other weights: streamed, checked, all or nothing."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from loraduct import files
from loraduct.converters import compress_code as code
from loraduct.converters import compress_encode
from loraduct.converters.compress_plan import Plan
from loraduct.converters.compress_report import Report, Row
from loraduct.converters.compress_sites import Weight, blocks_of, operations, references
from loraduct.converters.lut import THREADS
from loraduct.converters.package import rewritten, size_of
from loraduct.errors import Refused
from loraduct.formats.coreml import edit, record
from loraduct.formats.coreml.blob import Layout
from loraduct.formats.coreml.coded import INLINE
from loraduct.formats.coreml.constexpr import expanded, parts_of
from loraduct.formats.coreml.package import WEIGHTS_NAME, Package, read

_NAN = float("nan")


def values_of(package: Package, weight: Weight) -> Any:
    """The tensor as it is stored; NaN and Inf are found where it is compressed."""
    return package.blobs.array(weight.offset, weight.dtype, weight.shape, weight.name)


class Encoder:
    """Tensors compressed one after the other, while their bytes are asked for.

    ``given``: the arguments of each, by offset, once it was its turn.
    """

    def __init__(
        self,
        package: Package,
        chosen: Sequence[Weight],
        plan: Plan,
        form: str,
        layout: Layout,
    ) -> None:
        self.package, self.plan, self.form, self.chosen = package, plan, form, chosen
        self.norms: dict[int, float] = {}
        self.errors: dict[int, float] = {}
        self.digests: dict[int, int] = {}
        self.given: dict[int, dict[str, Any]] = {}
        self.now: dict[str, Any] = {}
        self.results = compress_encode.coded(
            (
                compress_encode.Item(
                    w,
                    plan.ways[w.offset],
                    partial(values_of, package, w),
                    plan.importance.get(w.offset),
                )
                for w in chosen
            ),
            THREADS,
        )
        for weight in chosen:
            self._lay_out(weight, layout)

    def _lay_out(self, weight: Weight, layout: Layout) -> None:
        """Places of the arguments; their bytes come when the file is written."""
        offsets: dict[str, int] = {}
        arguments = code.arguments(weight, self.plan.ways[weight.offset], self.form)
        for i, argument in enumerate(arguments):
            if argument.count >= INLINE:
                pieces = self._pieces(weight, argument, offsets, first=i == 0)
                offsets[argument.key] = layout.add(argument.dtype, argument.count, pieces)

    def _pieces(
        self, weight: Weight, argument: code.Argument, offsets: dict[str, int], *, first: bool
    ) -> Iterator[Any]:
        if first:
            self._next(weight, offsets)
        yield from code.pieces(self.now.pop(argument.key), argument.dtype)

    def _next(self, weight: Weight, offsets: dict[str, int]) -> None:
        """The next tensor."""
        self.now = {}  # the last one's codes go before this one's come
        at = weight.offset
        found, self.digests[at] = next(self.results)
        self.errors[at], self.norms[at] = found.error, found.norm
        self.now = code.values_of(found, weight, self.form)
        self.given[at] = {
            a.key: code.value(a, offsets.get(a.key), self.now.get(a.key))
            for a in code.arguments(weight, self.plan.ways[at], self.form)
        }


def write(
    package: Package,
    found: dict[str, Any] | None,
    held: Sequence[Weight],
    plan: Plan,
    form: str,
    report: Report,
) -> None:
    """The new package, checked, in its place; and what became of each tensor, into the report."""
    assert report.output is not None
    layout = Layout()
    kept = [o for o in edit.used_blobs(package) if o not in plan.ways]
    moved = {o: layout.copy(package.blobs, o, "a weight") for o in kept}
    chosen = [w for w in held if w.offset in plan.ways]
    encoder = Encoder(package, chosen, plan, form, layout)

    def program() -> bytes:
        _move(package, held, moved)
        _rewrite(package, encoder)
        if found is not None:
            found["weights"] = {"end": layout.end, "blobs": len(layout.parts)}
            record.write(package.model, found)
        return bytes(package.model.SerializeToString(deterministic=True))

    with files.staged_folder(report.output) as stage:
        try:
            copied(package, stage, layout.chunks(), program)
        except Refused as e:  # of a tensor
            raise Refused(package.path, str(e)) from None
        report.checked = _checked(stage, encoder)
        report.after = size_of(stage)
    report.rows = [_row(w, plan, form, encoder.errors, encoder.norms) for w in held]


def _row(
    weight: Weight,
    plan: Plan,
    form: str,
    errors: Mapping[int, float],
    norms: Mapping[int, float],
) -> Row:
    way, at = plan.ways.get(weight.offset), weight.offset
    return Row(
        weight.name, weight.group, weight.shape, code.stored_bytes(weight, None, form),
        code.stored_bytes(weight, way, form), str(way) if way else None, weight.reason,
        errors.get(at, _NAN), norms.get(at, _NAN),
    )  # fmt: skip


def planned(held: Sequence[Weight], plan: Plan, form: str) -> list[Row]:
    """What would become of each tensor, with the errors that were estimated."""
    errors = {
        at: plan.errors[at][way] for at, way in plan.ways.items() if way in plan.errors.get(at, ())
    }
    return [_row(w, plan, form, errors, plan.norms) for w in held]


def _move(package: Package, held: Sequence[Weight], moved: Mapping[int, int]) -> None:
    """References to blobs that were copied as they are, to where they lie now."""
    if references(package) > sum(len(w.users) for w in held):  # others than constants
        edit.moved(package, {o: moved.get(o, o) for o in edit.used_blobs(package)})
        return
    for weight in held:
        for _, op in weight.users:
            if weight.offset in moved:
                op.attributes["val"].blobFileValue.offset = moved[weight.offset]


def _rewrite(package: Package, encoder: Encoder) -> None:
    """Each constant's operations in its place."""
    before: dict[str, Any] = {}  # results of operations -> what goes before them
    for weight in encoder.chosen:
        at = weight.offset
        way = encoder.plan.ways[at]
        for function, op in weight.users:
            *first, last = code.rewritten(op, weight, way, encoder.form, encoder.given[at])
            op.CopyFrom(last)
            if first:
                before[f"{function}:{op.outputs[0].name}"] = first
    if not before:
        return
    for function, block in blocks_of(package):
        for inner in (block, *(b for op in operations(block) for b in op.blocks)):
            made: list[Any] = []
            for op in inner.operations:
                key = f"{function}:{op.outputs[0].name}" if op.outputs else ""
                made += [*before.get(key, ()), op]
            replaced(inner, made)


def replaced(block: Any, operations: Sequence[Any]) -> None:
    """Other operations of a block."""
    fresh = [type(op).FromString(op.SerializeToString()) for op in operations]
    del block.operations[:]
    block.operations.extend(fresh)


def copied(
    package: Package, stage: Path, weights: Iterable[Any], program: Callable[[], bytes]
) -> None:
    """A package's files, with other weights and then another program. Links are refused."""
    spec = (made() for made in [program])  # asked for once the weights are written
    instead = {package.weight_path(WEIGHTS_NAME): weights, package.spec_path: spec}
    rewritten(package.path, stage, instead)


def _checked(stage: Path, encoder: Encoder) -> int:
    """Read every compressed tensor back. Raises Refused where one isn't what was meant."""
    made = read(stage)
    wanted = {(f, op.outputs[0].name): w for w in encoder.chosen for f, op in w.users}
    jobs: dict[tuple[int, bytes], tuple[Any, Mapping[str, Any]]] = {}
    for function, block in blocks_of(made):
        by_name = {o.name: op for op in operations(block) for o in op.outputs}
        for name, op in by_name.items():
            weight = wanted.get((function, name))
            if weight is not None and op.type != "const":
                jobs.setdefault((weight.offset, arguments_of(op, by_name)), (op, by_name))

    def sum_of(job: tuple[Any, Mapping[str, Any]]) -> int:
        return zlib.crc32(expanded(made, *job).reshape(-1).data)

    with ThreadPoolExecutor(THREADS) as pool:
        for key, total in zip(jobs, pool.map(sum_of, jobs.values()), strict=True):
            if total != encoder.digests[key[0]]:
                name = jobs[key][0].outputs[0].name
                what = "was not read back as it was meant; nothing was written"
                raise Refused(made.blobs.path, what, tensor=name)
    seen = {offset for offset, _ in jobs}
    if missing := [w.name for w in encoder.chosen if w.offset not in seen]:
        raise Refused(made.spec_path, "is not in the program that was written", tensor=missing[0])
    return len(seen)


def arguments_of(op: Any, by_name: Mapping[str, Any]) -> bytes:
    """What an operation is given, names aside: equal ones stand for equal values."""
    out = b""
    for part in parts_of(op, by_name):
        held = type(part)()
        held.CopyFrom(part)
        held.ClearField("outputs")
        del held.attributes["name"]
        for argument in held.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = ""
        out += held.SerializeToString(deterministic=True)
    return out
