"""One tensor in few bits: how, how many bytes that is, what it stands for, and its operations.

A `Way` says how. Sizes follow from shapes alone, so that the weight file is laid out before any value
is read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from loraduct.converters import palette, quantize
from loraduct.converters.compress_sites import NEW, OLD, Weight
from loraduct.errors import Refused
from loraduct.formats.coreml.blob import ALIGN, CODES
from loraduct.formats.coreml.coded import INLINE
from loraduct.formats.coreml.constexpr import compressed
from loraduct.formats.coreml.package import WEIGHTS_NAME
from loraduct.formats.coreml.program import (
    blob_value,
    immediate_value,
    mangled,
)
from loraduct.packing import packed

BLOCK = 1 << 22  # numbers packed at once
_PIECE = 1 << 16  # numbers expanded at once: numpy widens their indices to eight bytes
_SCALED = "_unscaled"  # name of what a scale is applied to


@dataclass(frozen=True)
class Way:
    """``kind`` lut or int, of ``bits``. ``group``: channels per table, or input channels per scale;
    0: one table, or a scale per channel.

    Of tables: ``scaled``, with a scale per channel behind the table; ``lut``, how entries are found
    (kmeans, uniform, unique); ``cluster_dim``, numbers per entry; ``axis``, along which channels form
    groups and numbers form entries (0: outputs, 1: inputs). Of integers: ``symmetric``, without
    offsets; ``whole``, one scale for the tensor.
    """

    kind: str
    bits: int
    group: int = 0
    scaled: bool = False
    lut: str = "kmeans"
    cluster_dim: int = 1
    axis: int = 0
    symmetric: bool = True
    whole: bool = False

    def __str__(self) -> str:
        said = {
            f"groups of {self.group}": self.group > 0,
            "of inputs": self.axis == 1,
            f"pairs along axis {self.axis}": self.cluster_dim == 2,
            self.lut: self.lut != "kmeans",
            "scaled": self.scaled,
            "one scale": self.whole,
            "with offsets": not self.symmetric,
        }
        return ", ".join([f"{self.kind}{self.bits}", *(what for what, so in said.items() if so)])


@dataclass(frozen=True)
class Argument:
    """One argument of an operation: a MIL dtype, a shape, and in which operation it goes."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Values in it."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Bytes in the weight file, with its record and what aligns it."""
        if self.count < INLINE:
            return 0
        return ALIGN + -(-self.count * CODES[self.dtype][1] // (8 * ALIGN)) * ALIGN


def unfit(weight: Weight, way: Way, form: str) -> str | None:
    """Why this tensor can't be stored this way, or None if it can. Raises Refused if none can."""
    older = {
        f"{way.bits} bits": way.bits == 3 or (way.kind == "int" and way.bits != 8),
        "several tables": way.kind == "lut" and way.group > 0,
        "blocks": way.kind == "int" and way.group > 0,
        "scales of tables": way.scaled,
        "entries of several numbers": way.cluster_dim > 1,
    }
    for what, so in older.items():
        if form == OLD and so:
            raise Refused(None, f"{way}: {what} need iOS18; the package is for an older system")
    _consistent(way)
    axis = way.axis if way.kind == "lut" else 1
    for step in (way.group, way.cluster_dim):
        if step and weight.shape[axis] % step:
            return f"{weight.shape[axis]} channels, no multiple of {step}"
    return None


def _consistent(way: Way) -> None:
    """Raises Refused for what contradicts itself, whatever the tensor."""
    several = way.cluster_dim > 1
    wrong = {
        "entries have 1 or 2 numbers": way.cluster_dim not in (1, 2),
        "groups lie along axis 0 or 1": way.axis not in (0, 1),
        "entries of several numbers are found by kmeans, without scales": several
        and (way.scaled or way.lut != "kmeans"),
        f"groups of {way.group} don't hold whole entries": way.group % way.cluster_dim,
        "a scale for the tensor leaves no groups": way.whole and way.group > 0,
    }
    for what, so in wrong.items():
        if so:
            raise Refused(None, f"{way}: {what}")


def arguments(weight: Weight, way: Way, form: str) -> list[Argument]:
    """The arguments that are stored as values, by what the tensor's shape says."""
    shape, rank, rows = weight.shape, len(weight.shape), weight.shape[0]
    ones = (1,) * (rank - 1)
    if way.kind == "int":
        if form == OLD:
            scales: tuple[int, ...] = () if way.whole else (rows,)
            return [
                Argument("quantized_data", "INT8", shape),
                Argument("scale", weight.dtype, scales),
                Argument("zero_point", "INT8", scales),
            ]
        blocks = (shape[1] // way.group, *ones[1:]) if way.group else ones
        scales = (1 if way.whole else rows, *blocks)
        kind = f"INT{way.bits}"
        given = [Argument("data", kind, shape), Argument("scale", weight.dtype, scales)]
        return given if way.symmetric else [*given, Argument("offset", kind, scales)]
    entries = 1 << way.bits
    if form == OLD:
        count = -(-weight.count * way.bits // 8)
        return [Argument("indices", "UINT8", (count,)), Argument("lut", weight.dtype, (entries,))]
    tables, chosen = [1] * rank, list(shape)
    tables[way.axis] = -(-shape[way.axis] // way.group) if way.group else 1
    chosen[way.axis] //= way.cluster_dim
    found = [
        Argument("indices", f"UINT{way.bits}", tuple(chosen)),
        Argument("lut", weight.dtype, (*tables, entries, way.cluster_dim)),
    ]
    scale = [Argument("scale", weight.dtype, (rows, *ones))]
    return found + (scale if way.scaled else [])


def stored_bytes(weight: Weight, way: Way | None, form: str) -> int:
    """Bytes of the weight file that it takes; None: as it is."""
    if way is None:
        return Argument("val", weight.dtype, weight.shape).stored
    return sum(a.stored for a in arguments(weight, way, form))


Found = palette.Palette | quantize.Linear


def tables(way: Way, kind: str) -> palette.Options:
    """What the engine is asked for. ``kind``: dtype of entries."""
    return palette.Options(
        way.bits, way.lut, way.group, way.axis, vector=way.cluster_dim, scaled=way.scaled, lut=kind
    )


def linear(way: Way, kind: str) -> quantize.Options:
    """The same for integers."""
    how = "tensor" if way.whole else "block" if way.group else "channel"
    return quantize.Options(
        way.bits, symmetric=way.symmetric, granularity=how, block=way.group or 32, scale=kind
    )


def digest(found: Found) -> int:
    """A checksum of the values that a code stands for, a few rows at a time."""
    codes = found.indices if isinstance(found, palette.Palette) else found.data
    step = max(1, _PIECE * len(codes) // max(codes.size, 1))
    if isinstance(found, palette.Palette) and found.axis == 0 and len(found.lut) > 1:
        rows = found.group // found.vector
        step = -(-step // rows) * rows
    total = 0
    for at in range(0, len(codes), step):
        part = _rows(found, at, min(at + step, len(codes)))
        expand = palette.expand if isinstance(part, palette.Palette) else quantize.expand
        total = zlib.crc32(expand(part).data, total)
    return total


def _rows(found: Any, begin: int, end: int) -> Any:
    """A code of some rows of the tensor alone; ``begin`` and ``end`` count rows of codes."""
    part = slice(begin, end)
    if isinstance(found, quantize.Linear):
        if len(found.scale) == 1:
            return replace(found, data=found.data[part])
        offset = None if found.offset is None else found.offset[part]
        return replace(found, data=found.data[part], scale=found.scale[part], offset=offset)
    each = found.vector if found.axis == 0 else 1  # rows of the tensor per row of indices
    rows = slice(begin * each, end * each)
    scale = None if found.scale is None else found.scale[rows]
    shape = ((end - begin) * each, *found.shape[1:])
    part_of = replace(found, indices=found.indices[part], shape=shape, scale=scale)
    if found.axis:
        return part_of
    if len(found.lut) == 1:
        return replace(part_of, group=shape[0])
    return replace(part_of, lut=found.lut[rows.start // found.group : rows.stop // found.group])


def values_of(found: Any, weight: Weight, form: str) -> dict[str, Any]:
    """Argument -> its values, unpacked, as the operations take them."""
    if isinstance(found, quantize.Linear):
        given = quantize.ios18(found) if form == NEW else quantize.ios16(found, weight.name)
    elif form == NEW:
        given = palette.ios18(found, weight.name)
    else:
        given = palette.ios16(found, weight.name)
    return {key: values for key, (_, values) in given.items()}


def pieces(values: Any, dtype: str) -> Iterator[Any]:
    """The bytes of an argument as they lie in the weight file, some at a time."""
    import numpy as np

    bits = CODES[dtype][1]
    flat = np.ascontiguousarray(values).reshape(-1)
    for at in range(0, flat.size, BLOCK):
        part = flat[at : at + BLOCK]
        if bits >= 8:
            yield part.view(np.uint8)
        else:
            yield packed(part.view(np.uint8) & ((1 << bits) - 1), bits)


def value(argument: Argument, offset: int | None, values: Any) -> Any:
    """An argument's Value: in the weight file, or in the program."""
    if offset is not None:
        return blob_value(argument.dtype, argument.shape, offset, WEIGHTS_NAME)
    return immediate_value(argument.dtype, values.reshape(argument.shape))


def rewritten(op: Any, weight: Weight, way: Way, form: str, given: dict[str, Any]) -> list[Any]:
    """A constant's operations instead (the result keeps its name). ``given``: argument -> Value."""
    name, out = op.outputs[0].name, op.outputs[0].type
    if form == OLD:
        fixed = {
            "int": {"axis": immediate_value("INT32", 0)},
            "lut": {"shape": immediate_value("UINT32", weight.shape)},
        }[way.kind]
        kind = "affine_dequantize" if way.kind == "int" else "lut_to_dense"
        return [compressed(kind, name, out, {}, {**given, **fixed})]
    if way.kind == "int":
        return [compressed("blockwise_shift_scale", name, out, given)]
    if way.cluster_dim > 1:
        given = {**given, "vector_axis": immediate_value("INT32", way.axis)}
    if not way.scaled:
        return [compressed("lut_to_dense", name, out, given)]
    inner = mangled(f"{name}{_SCALED}")
    scale = {"scale": given["scale"]}
    first = {k: v for k, v in given.items() if k != "scale"}
    last = compressed("blockwise_shift_scale", name, out, scale)
    last.inputs["data"].arguments.add(name=inner)
    return [compressed("lut_to_dense", inner, out, first), last]
