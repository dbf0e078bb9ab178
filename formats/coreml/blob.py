"""The weight file of an ML program (``weight.bin``), read, appended to and copied.

Layout (coremltools 9.0 ``MILBlob/Blob/StorageFormat.hpp``, and measured by writing each dtype): a
64-byte header (u32 count, u32 version 2), then blobs, each a 64-byte record at a multiple of 64
(u32 0xDEADBEEF, u32 dtype, u64 bytes, u64 absolute offset of the data, u64 bits of padding in the
last byte) followed by its data. A program refers to a blob by the offset of its record. Values
under 8 bits are a little-endian stream of bits, low bits first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.files import Source
from loraduct.packing import unpacked
from loraduct.tensor import Tensor

ALIGN = 64
_STEP = 1 << 20  # bytes of a blob copied at once
SENTINEL = 0xDEADBEEF
_HEADER, _RECORD = struct.Struct("<II"), struct.Struct("<IIQQQ")
# MIL's dtype -> (code in a record, bits of a value)
CODES = {
    "FLOAT16": (1, 16), "FLOAT32": (2, 32), "UINT8": (3, 8), "INT8": (4, 8), "INT16": (6, 16),
    "UINT16": (7, 16), "INT4": (8, 4), "UINT1": (9, 1), "UINT2": (10, 2), "UINT4": (11, 4),
    "UINT3": (12, 3), "UINT6": (13, 6), "INT32": (14, 32), "UINT32": (15, 32),
}  # fmt: skip
_NUMPY = {
    "FLOAT16": "<f2", "FLOAT32": "<f4", "UINT8": "u1", "INT8": "i1", "INT16": "<i2",
    "UINT16": "<u2", "INT32": "<i4", "UINT32": "<u4",
}  # fmt: skip
TENSOR_DTYPES = {"FLOAT16": "F16", "FLOAT32": "F32"}


@dataclass(frozen=True)
class Record:
    """One blob: where its data lies. ``count`` values of ``dtype``, as the program declares them."""

    offset: int
    dtype: str
    data: int
    nbytes: int


class BlobFile:
    """A weight file, opened for reading. Nothing but the records asked for is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = Source(path)
        if self.source.size < ALIGN:
            raise Refused(path, f"has {self.source.size} bytes, expected a header of {ALIGN}")
        _, version = _HEADER.unpack(self.source.read(0, _HEADER.size, "header"))
        if version != 2:
            raise Refused(path, f"has blob format version {version}, expected 2")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.source.size

    def record(self, offset: int, dtype: str, shape: Iterable[int], name: str) -> Record:
        """The record at ``offset``, checked against what the program declares.

        Raises Refused naming ``name`` when it is not there, or holds another dtype or size.
        """
        code, bits = CODES.get(dtype, (0, 0))
        if not code:
            raise Refused(
                self.path, f"has dtype {dtype}, which a weight file can't hold", tensor=name
            )
        if offset % ALIGN or not ALIGN <= offset <= self.size - ALIGN:
            raise Refused(
                self.path, f"offset {offset} is not in the file ({self.size} bytes)", tensor=name
            )
        head = self.source.read(offset, _RECORD.size, name)
        sentinel, found, nbytes, data, padding = _RECORD.unpack(head)
        if sentinel != SENTINEL:
            raise Refused(self.path, f"there is no blob at offset {offset}", tensor=name)
        if found != code:
            raise Refused(
                self.path,
                f"holds dtype code {found}, the program says {dtype} ({code})",
                tensor=name,
            )
        values = math.prod(shape) * bits
        if nbytes != -(-values // 8) or (bits < 8 and padding != nbytes * 8 - values):
            raise Refused(
                self.path,
                f"holds {nbytes} bytes, the program says {-(-values // 8)} ({list(shape)} {dtype})",
                tensor=name,
            )
        if data < offset + ALIGN or data + nbytes > self.size:
            raise Refused(
                self.path,
                f"data at {data} to {data + nbytes} is not in the file ({self.size} bytes):"
                " it was cut short",
                tensor=name,
            )
        return Record(offset, dtype, data, nbytes)

    def tensor(self, offset: int, dtype: str, shape: tuple[int, ...], name: str) -> Tensor:
        """A float blob as a lazy tensor."""
        record = self.record(offset, dtype, shape, name)
        if dtype not in TENSOR_DTYPES:
            raise Refused(self.path, f"has dtype {dtype}, expected a float", tensor=name)
        stored = TENSOR_DTYPES[dtype]
        return Tensor(name, stored, shape, source=self.source, offset=record.data, path=self.path)

    def array(self, offset: int, dtype: str, shape: tuple[int, ...], name: str) -> Any:
        """A blob's values; those under 8 bits unpacked, one a byte."""
        import numpy as np

        record = self.record(offset, dtype, shape, name)
        raw = self.source.read(record.data, record.nbytes, name)
        if dtype in _NUMPY:
            return np.frombuffer(raw, _NUMPY[dtype]).reshape(shape)
        return unpacked(
            raw, CODES[dtype][1], math.prod(shape), signed=dtype.startswith("INT")
        ).reshape(shape)

    def span(self, offset: int, name: str) -> tuple[int, int]:
        """Where a blob's data begins and ends. Raises Refused naming ``name`` if it isn't there."""
        inside = offset % ALIGN == 0 and ALIGN <= offset <= self.size - ALIGN
        head = self.source.read(offset, _RECORD.size, name) if inside else bytes(_RECORD.size)
        sentinel, _, nbytes, data, _ = _RECORD.unpack(head)
        if sentinel != SENTINEL or data < offset + ALIGN or data + nbytes > self.size:
            raise Refused(
                self.path,
                f"there is no whole blob at offset {offset} ({self.size} bytes): it was cut short, or is"
                " another program's",
                tensor=name,
            )
        return data, data + nbytes

    def kind(self, offset: int, name: str) -> tuple[int, int]:
        """(code of the dtype, bits of padding) of a blob. Raises Refused as `span` does."""
        self.span(offset, name)
        _, code, _, _, padding = _RECORD.unpack(self.source.read(offset, _RECORD.size, name))
        return code, padding

    def whole(self, offset: int, name: str) -> tuple[int, bytes, Iterator[memoryview]]:
        """A blob as it lies: bytes of its data, its record, and its data in pieces.

        A piece holds until the next is asked for.
        """
        data, end = self.span(offset, name)
        return (
            end - data,
            bytes(self.source.read(offset, ALIGN, name)),
            self._pieces(data, end, name),
        )

    def _pieces(self, data: int, end: int, name: str) -> Iterator[memoryview]:
        buffer = bytearray(min(_STEP, end - data))
        for at in range(data, end, _STEP):
            piece = memoryview(buffer)[: min(_STEP, end - at)]
            self.source.read_into(at, piece, name)
            yield piece


class Layout:
    """Where new blobs go in a weight file; their bytes come when the file is written.

    ``start``: bytes already in the file (0: a new file, whose header is written first).
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.end = start or ALIGN
        self.parts: list[tuple[int, bytes, Iterable[Any]]] = []  # record offset, record, data

    def add(self, dtype: str, count: int, chunks: Iterable[Any]) -> int:
        """Reserve a blob of ``count`` values and return the offset a program refers to."""
        code, bits = CODES[dtype]
        nbytes = -(-count * bits // 8)
        at = -(-self.end // ALIGN) * ALIGN
        record = _RECORD.pack(SENTINEL, code, nbytes, at + ALIGN, nbytes * 8 - count * bits)
        self.parts.append((at, record.ljust(ALIGN, b"\0"), chunks))
        self.end = at + ALIGN + nbytes
        return at

    def copy(self, blobs: BlobFile, offset: int, name: str) -> int:
        """Reserve a copy of another file's blob."""
        nbytes, head, pieces = blobs.whole(offset, name)
        at = -(-self.end // ALIGN) * ALIGN
        sentinel, code, _, _, padding = _RECORD.unpack(head[: _RECORD.size])
        record = _RECORD.pack(sentinel, code, nbytes, at + ALIGN, padding)
        self.parts.append((at, record.ljust(ALIGN, b"\0"), pieces))
        self.end = at + ALIGN + nbytes
        return at

    def chunks(self) -> Iterator[Any]:
        """The bytes to write from ``start`` on; of a new file the header first."""
        done = self.start
        if not done:
            yield header(len(self.parts))
            done = ALIGN
        for at, record, data in self.parts:
            yield bytes(at - done) + record
            done = at + ALIGN
            for piece in data:
                yield piece
                done += memoryview(piece).nbytes


def header(count: int) -> bytes:
    """A file's first bytes. ``count``: its blobs; readers go by their offsets alone."""
    return _HEADER.pack(count, 2).ljust(ALIGN, b"\0")
