"""Packed adapters: ``adapter_config.json`` as it was + ``adapter_packed.safetensors``.

The file is the source's (PEFT's or MLX's) with its factors as indices into tables, or as integers with
scales; all else stands in it as it was. docs/packed.md describes it, with a reader of 20 lines. Reading
gives the source's tensors back, 16 bits each and made when they are asked for, to the source's reader.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraduct import packing
from loraduct.adapter import Adapter
from loraduct.errors import Refused
from loraduct.formats import CONFIG, mlx, peft, peft_config
from loraduct.formats.coded import WIDTHS as BITS
from loraduct.formats.coded import Code, Decoded
from loraduct.formats.json_file import parse_object, read_object
from loraduct.formats.options import ReadOptions
from loraduct.formats.safetensors_file import read_header
from loraduct.tensor import Tensor, is_finite
from loraduct.text import printable

WEIGHTS = "adapter_packed.safetensors"
KEY, VERSION = "packed", 1
STREAM = "packed.indices"  # all indices, tensor after tensor, each from a byte's beginning
NUMBERS = {"lut": "packed.tables", "int": "packed.scales"}  # kind -> the tensor beside them
SUMS = "packed.sums"  # CRC-32 of each tensor as it is read: a damaged one is known by name
_SPARSE = 1024  # at most so many ranks per stored one: a small file must not ask for all memory
READERS: dict[str, Callable[..., Adapter]] = {"peft": peft.interpreted, "mlx": mlx.interpreted}


@dataclass(frozen=True)
class Item:
    """One packed tensor of ``shape``: as a matrix with the ranks first.

    ``axis`` of the tensor comes first and the others are joined; ``rows`` of it are stored, the rest
    is zeros. ``group``: rows per table of ``lut`` (0: one table), columns per scale of ``int`` (0: one
    scale per row).
    """

    bits: int
    shape: tuple[int, ...]
    axis: int
    rows: int
    group: int = 0
    kind: str = "lut"

    @property
    def columns(self) -> int:
        """Of the matrix."""
        return math.prod(self.shape) // self.shape[self.axis]

    @property
    def nbytes(self) -> int:
        """Of the indices."""
        return -(-self.rows * self.columns * self.bits // 8)

    @property
    def numbers(self) -> int:
        """Entries of tables, or scales."""
        if self.kind == "lut":
            return -(-self.rows // (self.group or self.rows)) << self.bits
        return self.rows * (self.columns // (self.group or self.columns))

    def as_json(self) -> list[Any]:
        """[bits, shape, axis], and the rows where there are fewer than the shape has."""
        short = [self.rows] if self.rows != self.shape[self.axis] else []
        return [self.bits, list(self.shape), self.axis, *short]


def code_of(item: Item, stream: Any, numbers: Any) -> Code:
    """The matrix with the ranks first, ranks of zeros included, of its indices (bytes) and its tables
    or scales (float16)."""
    import numpy as np

    high, rows, columns = item.shape[item.axis], item.rows, item.columns
    middle = 1 << (item.bits - 1)
    codes = np.full((high, columns), 0 if item.kind == "lut" else middle, np.uint8)
    codes[:rows] = packing.unpacked(stream, item.bits, rows * columns).reshape(rows, columns)
    if item.kind == "int":
        full = np.zeros((high, columns // (item.group or columns)), np.float16)
        full[:rows] = numbers.reshape(rows, -1)
        return Code(item.kind, item.bits, codes, full)
    tables, each = numbers.reshape(-1, 1 << item.bits), item.group or rows
    even = math.gcd(each, rows, high)  # blocks of one size: what groups and zeros have in common
    starts = np.arange(0, high, even)
    full = np.zeros((len(starts), 1, 1 << item.bits), np.float16)
    full[starts < rows, 0] = tables[starts[starts < rows] // each]
    return Code(item.kind, item.bits, codes, full)


def values(item: Item, stream: Any, numbers: Any) -> Any:
    """The tensor (float16) of its indices (bytes) and its tables or scales (float16)."""
    import numpy as np

    full = code_of(item, stream, numbers).values()
    rest = [n for i, n in enumerate(item.shape) if i != item.axis]
    return np.ascontiguousarray(np.moveaxis(full.reshape(-1, *rest), 0, item.axis))


def layout(source: str, kind: str, group: int, items: Mapping[str, Item]) -> str:
    """What the metadata key ``packed`` says."""
    said = {"version": VERSION, "source": source, "kind": kind, "group": group}
    listed = {name: item.as_json() for name, item in items.items()}
    return json.dumps({**said, "layout": listed}, separators=(",", ":"))


def read(folder: Path, options: ReadOptions) -> Adapter:
    """The adapter in ``folder``: `format` and names are the source's, `container` is "packed"."""
    weights = options.weights or folder / WEIGHTS
    source, tensors, metadata = unpacked(weights)
    config = folder / CONFIG
    if source == "peft" and peft_config.kind_of(read_object(config), config) != "LORA":
        raise Refused(config, "is not LoRA's, and only LoRA's tensors are packed")
    # factors were turned, and the padding that a record tells of may be part of that
    plain = replace(options, restore=False)
    found = READERS[source](folder, plain, weights, tensors, metadata)
    return replace(found, container="packed")


def unpacked(weights: Path) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """The source's format, its tensors by name, and its metadata. Reads the header and the tables.

    Raises Refused unless the layout accounts for every byte of the packed tensors.
    """
    stored, metadata = read_header(weights)
    source, items = _items(metadata.pop(KEY, None), weights)
    kind = next(iter(items.values())).kind if items else "lut"
    parts = [stored.pop(name, None) for name in (STREAM, NUMBERS[kind], SUMS)]
    if None in parts:
        wanted = f"{STREAM}, {NUMBERS[kind]} and {SUMS}"
        raise Refused(weights, f"does not have {wanted}: not a packed adapter")
    stream, numbers, sums = (p for p in parts if p is not None)
    for tensor, dtype, size in (
        (stream, "U8", sum(i.nbytes for i in items.values())),
        (numbers, "F16", sum(i.numbers for i in items.values())),
        (sums, "U32", len(items)),
    ):
        if (tensor.stored_dtype, tensor.stored_shape) != (dtype, (size,)):
            what = f"{dtype} [{size}] is expected by the layout"
            found = f"{tensor.stored_dtype} {list(tensor.stored_shape)}"
            raise Refused(weights, f"is {found}; {what}", tensor=tensor.name)
    if not is_finite(numbers.rows(0, numbers.shape[0], finite=False), "F16"):
        raise Refused(weights, "holds NaN or Inf", tensor=numbers.name)
    done: dict[str, Tensor] = {}
    at = beside = 0
    for i, (name, item) in enumerate(items.items()):
        if name in stored:
            raise Refused(weights, "is there twice, packed and plain", tensor=name)
        own = replace(stream, name=name, stored_shape=(item.nbytes,), offset=stream.offset + at)
        table = replace(numbers, stored_shape=(item.numbers,), offset=numbers.offset + 2 * beside)
        one = _Stored(
            item, own, table, replace(sums, stored_shape=(1,), offset=sums.offset + 4 * i)
        )
        at, beside = at + item.nbytes, beside + item.numbers
        make = Decoded(one.code) if len(item.shape) == 2 else one.values
        done[name] = Tensor(name, "F16", item.shape, make=make, inputs=(own,), path=weights)
    return source, done | stored, metadata


@dataclass(frozen=True)
class _Stored:
    """Where a packed tensor lies."""

    item: Item
    own: Tensor
    table: Tensor
    sum: Tensor

    def values(self) -> Any:
        """Its values as raw storage. Raises Refused where they are not what was written."""
        import numpy as np

        found = values(self.item, self.own.raw(), self.table.raw().view(np.float16))
        if zlib.crc32(found) != int(self.sum.raw()[0]):
            what = "does not hold the values that were written: damaged"
            raise Refused(self.own.path, what, tensor=self.own.name)
        return found.view(np.uint16)

    def code(self) -> Code:
        """The code of a matrix, in its stored orientation."""
        import numpy as np

        self.values()
        found = code_of(self.item, self.own.raw(), self.table.raw().view(np.float16))
        return found.T if self.item.axis else found


def _items(text: str | None, file: Path) -> tuple[str, dict[str, Item]]:
    """(the source's format, items by name) of the metadata, checked."""
    if text is None:
        raise Refused(file, f"has no metadata key {KEY!r}: not a packed adapter")
    said = parse_object(text.encode(), file, f"metadata key {KEY!r}")
    if said.get("version") != VERSION:
        shown = printable(repr(said.get("version")), 20)
        raise Refused(file, f"is packed by version {shown}; version {VERSION} is read")
    source, kind, group = said.get("source"), said.get("kind"), said.get("group")
    if source not in READERS or kind not in NUMBERS or type(group) is not int or group < 0:
        what = f"source {source!r}, kind {kind!r}, group {group!r}"
        raise Refused(file, f"metadata key {KEY!r} says {printable(what, 200)}: not understood")
    listed = said.get("layout")
    if not isinstance(listed, dict) or not listed:
        raise Refused(file, f"metadata key {KEY!r} lists no tensors")
    return source, {n: _item(n, entry, kind, group, file) for n, entry in listed.items()}


def _item(name: str, entry: Any, kind: str, group: int, file: Path) -> Item:
    sound = (
        isinstance(entry, list)
        and len(entry) in (3, 4)
        and entry[0] in BITS[kind]
        and isinstance(entry[1], list)
        and 1 <= len(entry[1]) <= 8
        and all(_whole(n, 1) for n in entry[1])
        and _whole(entry[2], 0)
        and entry[2] < len(entry[1])
        and (len(entry) == 3 or (_whole(entry[3], 1) and entry[3] <= entry[1][entry[2]]))
    )
    if not sound:
        raise Refused(
            file, f"its layout {printable(repr(entry), 80)} is not understood", tensor=name
        )
    bits, shape, axis = entry[0], tuple(entry[1]), entry[2]
    item = Item(bits, shape, axis, entry[3] if len(entry) == 4 else shape[axis], group, kind)
    if item.rows * _SPARSE < shape[axis]:
        what = (
            f"shape {list(shape)} with {item.rows} of its ranks stored is nothing that was trained"
        )
        raise Refused(file, what, tensor=name)
    if kind == "int" and group and item.columns % group:
        what = f"has {item.columns} columns, which groups of {group} don't divide"
        raise Refused(file, what, tensor=name)
    return item


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**40
