"""Compressed constants of a package written out again: plain ones of the values they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraduct import files
from loraduct.converters.compress_report import Report, Row
from loraduct.converters.compress_sites import blocks_of, compressed_in, operations
from loraduct.converters.compress_write import arguments_of, copied, replaced
from loraduct.converters.package import size_of
from loraduct.converters.packaging import check_output
from loraduct.errors import Refused
from loraduct.formats.coreml import edit, record
from loraduct.formats.coreml.blob import CODES, Layout
from loraduct.formats.coreml.coded import INLINE
from loraduct.formats.coreml.constexpr import expanded, is_compressed, parts_of
from loraduct.formats.coreml.package import WEIGHTS_NAME, Package, read
from loraduct.formats.coreml.program import (
    blob_value,
    const,
    immediate_value,
    names_in,
    type_of,
)
from loraduct.formats.coreml.schema import new


@dataclass
class _Constant:
    """One set of compressed values: its operation, those it is made of, and the new constants."""

    op: Any
    by_name: Mapping[str, Any]
    made: list[tuple[Any, int]] = field(default_factory=list)  # block, index of operation


def decompress(target: Path, output: Path, *, force: bool = False) -> Report:
    """Write ``output``: the package ``target`` without compressed constants.

    Equal ones are stored once. Raises Refused where there is none, or one is broken.
    """
    check_output(output, force, target)
    package = read(target)
    if not compressed_in(package):
        raise Refused(target, "holds no compressed constants")
    found = record.find(package)
    report = Report(target, output, "decompressed", before=size_of(target))
    constants: dict[bytes, _Constant] = {}
    for _, block in blocks_of(package):
        _without(block, {}, constants)
    layout = Layout()
    kept = sorted(set().union(*(edit.offsets_of(f) for f in package.functions.values())))
    edit.moved(package, {o: layout.copy(package.blobs, o, "a weight") for o in kept})
    for one in constants.values():
        report.rows.append(_placed(package, one, layout))
    if found is not None:
        found["weights"] = {"end": layout.end, "blobs": len(layout.parts)}
        record.write(package.model, found)
    data = bytes(package.model.SerializeToString(deterministic=True))
    with files.staged_folder(output) as stage:
        copied(package, stage, layout.chunks(), lambda: data)
        report.after = size_of(stage)
    return report


def _without(block: Any, outer: Mapping[str, Any], constants: dict[bytes, _Constant]) -> None:
    """Put empty constants in the place of the compressed ones that something reads; the rest go."""
    by_name = {**outer, **{o.name: op for op in block.operations for o in op.outputs}}
    read_by = set(block.outputs)
    for op in operations(block):
        if not is_compressed(op):
            read_by.update(n for key in op.inputs for n in names_in(op, key))
        for inner in op.blocks:
            read_by.update(inner.outputs)
    kept: list[Any] = []
    places: list[tuple[bytes, int]] = []
    for op in block.operations:
        for inner in op.blocks:
            _without(inner, by_name, constants)
        if not is_compressed(op):
            kept.append(op)
        elif op.outputs[0].name in read_by:
            key = arguments_of(op, by_name) + op.outputs[0].type.SerializeToString()
            if key not in constants:
                parts = {p.outputs[0].name: _copy(p) for p in _made_of(op, by_name)}
                held = {o.name: p for p in parts.values() for o in p.outputs}
                constants[key] = _Constant(held[op.outputs[0].name], held)
            places.append((key, len(kept)))
            kept.append(const(op.outputs[0].name, immediate_value("INT32", 0)))
            kept[-1].outputs[0].type.CopyFrom(op.outputs[0].type)
    replaced(block, kept)
    for key, at in places:
        constants[key].made.append((block, at))


def _made_of(op: Any, by_name: Mapping[str, Any]) -> Iterator[Any]:
    """Compressed constants and plain ones that an operation is made of, itself included."""
    for part in parts_of(op, by_name):
        for key in part.inputs:
            for name in names_in(part, key):
                if name in by_name and by_name[name].type == "const":
                    yield by_name[name]
        yield part


def _copy(op: Any) -> Any:
    made = new("Operation")
    made.CopyFrom(op)
    return made


def _placed(package: Package, one: _Constant, layout: Layout) -> Row:
    """The values' place, in all constants that have them."""
    out = one.op.outputs[0]
    dtype, shape = type_of(out.type)
    sizes = tuple(n or 0 for n in shape)
    count = math.prod(sizes)
    if count < INLINE:
        value = immediate_value(dtype, expanded(package, one.op, one.by_name))
    elif dtype in CODES:
        value = blob_value(
            dtype, sizes, layout.add(dtype, count, _values(package, one)), WEIGHTS_NAME
        )
    else:
        raise Refused(package.spec_path, f"is a compressed {dtype}", tensor=out.name)
    for block, at in one.made:
        block.operations[at].attributes["val"].CopyFrom(value)
    size = count * CODES[dtype][1] // 8
    before = sum(package.blobs.span(o, out.name)[1] - package.blobs.span(o, out.name)[0]
                 for o in _offsets(one))  # fmt: skip
    return Row(out.name, "base", sizes, before, size, dtype)


def _values(package: Package, one: _Constant) -> Iterator[Any]:
    yield expanded(package, one.op, one.by_name).reshape(-1)


def _offsets(one: _Constant) -> set[int]:
    function = new("Function", opset="x")
    function.block_specializations["x"].operations.extend(one.by_name.values())
    return edit.offsets_of(function)
