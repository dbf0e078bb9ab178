"""One tensor in few bits: how, how many bytes that is, what it stands for, and its operations.

A `Way` says how. Sizes follow from shapes alone, so that the weight file is laid out before any value
is read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from loraduct.converters import palette, palettize, quantize
from loraduct.converters.compress_sites import NEW, OLD, Weight
from loraduct.errors import Refused
from loraduct.formats.coreml.blob import ALIGN, CODES
from loraduct.formats.coreml.edit import FILE
from loraduct.formats.coreml.program import (
    blob_value,
    immediate_value,
    mangled,
    string_value,
)
from loraduct.formats.coreml.schema import new
from loraduct.packing import packed

INLINE = 10  # fewer values than that are in the program itself, as coremltools has it
TOGETHER = 1 << 26  # numbers of tensors that are clustered together, at most
BLOCK = 1 << 22  # numbers expanded or packed at once
_SCALED = "_unscaled"  # name of what a scale is applied to


@dataclass(frozen=True)
class Way:
    """``kind`` lut or int, of ``bits``. ``group``: channels per table, or input channels per scale;
    0: one table, or a scale per channel. ``scaled``: with a scale per channel behind the table."""

    kind: str
    bits: int
    group: int = 0
    scaled: bool = False

    def __str__(self) -> str:
        many = f", groups of {self.group}" if self.group else ""
        return f"{self.kind}{self.bits}{many}{', scaled' if self.scaled else ''}"


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
    }
    for what, so in older.items():
        if form == OLD and so:
            raise Refused(None, f"{way}: {what} need iOS18; the package is for an older system")
    axis = 0 if way.kind == "lut" else 1
    if way.group and weight.shape[axis] % way.group:
        return f"{weight.shape[axis]} channels, no multiple of {way.group}"
    return None


def arguments(weight: Weight, way: Way, form: str) -> list[Argument]:
    """The arguments that are stored as values, by what the tensor's shape says."""
    shape, rank, rows = weight.shape, len(weight.shape), weight.shape[0]
    ones = (1,) * (rank - 1)
    if way.kind == "int":
        if form == OLD:
            return [
                Argument("quantized_data", "INT8", shape),
                Argument("scale", weight.dtype, (rows,)),
                Argument("zero_point", "INT8", (rows,)),
            ]
        blocks = (shape[1] // way.group, *ones[1:]) if way.group else ones
        return [
            Argument("data", f"INT{way.bits}", shape),
            Argument("scale", weight.dtype, (rows, *blocks)),
        ]
    entries = 1 << way.bits
    if form == OLD:
        count = -(-weight.count * way.bits // 8)
        return [Argument("indices", "UINT8", (count,)), Argument("lut", weight.dtype, (entries,))]
    tables = rows // way.group if way.group else 1
    found = [
        Argument("indices", f"UINT{way.bits}", shape),
        Argument("lut", weight.dtype, (tables, *ones, entries, 1)),
    ]
    scale = [Argument("scale", weight.dtype, (rows, *ones))]
    return found + (scale if way.scaled else [])


def stored_bytes(weight: Weight, way: Way | None, form: str) -> int:
    """Bytes of the weight file that it takes; None: as it is."""
    if way is None:
        return Argument("val", weight.dtype, weight.shape).stored
    return sum(a.stored for a in arguments(weight, way, form))


def coded(
    items: Iterable[tuple[Weight, Way, Any]], threads: int
) -> Iterator[palette.Palette | quantize.Linear]:
    """The tensors (weight, way, how to read its values) in few bits, in order.

    Neighbours with one table each are clustered together, as long as they are small.
    """
    batch: list[tuple[Weight, Way, Any]] = []
    for item in items:
        if batch and not _beside(batch, item):
            yield from _batch(batch, threads)
            batch = []
        batch.append(item)
    if batch:
        yield from _batch(batch, threads)


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items; the next one is made in another thread while one is worked on."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
            del item


def _beside(batch: Sequence[tuple[Weight, Way, Any]], item: tuple[Weight, Way, Any]) -> bool:
    first, way = batch[0][:2]
    alike = item[1] == way and item[0].dtype == first.dtype and way.kind == "lut"
    size = sum(w.count for w, _, _ in [*batch, item])
    return alike and size <= TOGETHER and len(batch) < palettize.TOGETHER


def _batch(batch: Sequence[tuple[Weight, Way, Any]], threads: int) -> Iterator[Any]:
    weight, way, read = batch[0]
    kind = weight.dtype.lower()
    if way.kind == "int":
        how = "block" if way.group else "channel"
        wanted = quantize.Options(way.bits, granularity=how, block=way.group or 32, scale=kind)
        yield quantize.quantize(read(), wanted, name=weight.name)
        return
    options = palette.Options(way.bits, group=way.group, scaled=way.scaled, lut=kind)
    if len(batch) == 1:
        yield palettize.palettize(read(), options, threads=threads, name=weight.name)
        return
    tensors = ((w.name, read()) for w, _, read in batch)
    for _, found in palettize.palettize_all(tensors, options, threads=threads):
        yield found


def digest(found: palette.Palette | quantize.Linear) -> int:
    """A checksum of the values that a code stands for, a few rows at a time."""
    codes = found.indices if isinstance(found, palette.Palette) else found.data
    step = max(1, BLOCK * len(codes) // max(codes.size, 1))
    if isinstance(found, palette.Palette):
        step = -(-step // found.group) * found.group if len(found.lut) > 1 else step
    total = 0
    for at in range(0, len(codes), step):
        part = _rows(found, at, min(at + step, len(codes)))
        expand = palette.expand if isinstance(part, palette.Palette) else quantize.expand
        total = zlib.crc32(expand(part).data, total)
    return total


def _rows(found: Any, begin: int, end: int) -> Any:
    """A code of some rows of the tensor alone."""
    part = slice(begin, end)
    if isinstance(found, quantize.Linear):
        offset = None if found.offset is None else found.offset[part]
        return replace(found, data=found.data[part], scale=found.scale[part], offset=offset)
    several = len(found.lut) > 1
    group = found.group if several else end - begin
    return replace(
        found,
        indices=found.indices[part],
        lut=found.lut[begin // group : end // group] if several else found.lut,
        group=group,
        shape=(end - begin, *found.shape[1:]),
        scale=None if found.scale is None else found.scale[part],
    )


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
        return blob_value(argument.dtype, argument.shape, offset, FILE)
    return immediate_value(argument.dtype, values.reshape(argument.shape))


def rewritten(op: Any, weight: Weight, way: Way, form: str, given: dict[str, Any]) -> list[Any]:
    """A constant's operations instead (the result keeps its name). ``given``: argument -> Value."""
    name = op.outputs[0].name
    if form == OLD:
        fixed = {
            "int": {"axis": immediate_value("INT32", _int(0))},
            "lut": {"shape": immediate_value("UINT32", _shape(weight.shape))},
        }[way.kind]
        kind = "affine_dequantize" if way.kind == "int" else "lut_to_dense"
        return [_operation(kind, name, op, attributes={**given, **fixed})]
    if way.kind == "int":
        return [_operation("blockwise_shift_scale", name, op, inputs=given)]
    if not way.scaled:
        return [_operation("lut_to_dense", name, op, inputs=given)]
    inner = mangled(f"{name}{_SCALED}")
    scale = {"scale": given["scale"]}
    first = {k: v for k, v in given.items() if k != "scale"}
    last = _operation("blockwise_shift_scale", name, op, inputs=scale)
    last.inputs["data"].arguments.add(name=inner)
    return [_operation("lut_to_dense", inner, op, inputs=first), last]


def _operation(kind: str, name: str, like: Any, inputs: Any = None, attributes: Any = None) -> Any:
    made = new("Operation", type=f"constexpr_{kind}")
    made.outputs.add(name=name, type=like.outputs[0].type)
    made.attributes["name"].CopyFrom(string_value(name))
    for key, held in (attributes or {}).items():
        made.attributes[key].CopyFrom(held)
    for key, held in (inputs or {}).items():
        made.inputs[key].arguments.add().value.CopyFrom(held)
    return made


def _int(number: int) -> Any:
    import numpy as np

    return np.int32(number)


def _shape(shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.array(shape, np.uint32)
