"""The safetensors container: a strict reader of headers and a streaming writer.

Layout (safetensors README, "Format"): 8 bytes little-endian header length, a JSON header that
begins with ``{``, then the data, fully covered by the entries' ``data_offsets``. Our own reader
because the library's errors don't name the file, and because it needs neither numpy nor a
memory map, which turns a file truncated by somebody else into a crash.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.files import Source
from loraduct.formats.json_file import parse_object, read_object
from loraduct.tensor import BITS, Loss, Tensor
from loraduct.text import printable

# The format allows 100 MB; 16 MB describe 100,000 tensors and can be parsed within bounded memory.
HEADER_LIMIT = 16 << 20
NAME_LIMIT = 1024
_DISGUISES = {
    b"version https://git-lfs": "a git-lfs pointer: run `git lfs pull` to get the weights",
    b"PK\x03\x04": "a zip archive (a renamed torch .bin or .npz file?)",
    b"\x80\x02": "a pickle (a renamed torch .bin file?)",
    b"<!DOCTYPE": "an HTML page: the download went wrong",
    b"<html": "an HTML page: the download went wrong",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a numpy file",
}


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, in file order, and the ``__metadata__`` texts. Reads the header only.

    Raises Refused on anything the format doesn't allow, and on names that can't be shown.
    """
    source = Source(path)
    if source.size == 0:
        raise Refused(path, "is empty, expected a safetensors file; fetch or save it again")
    start = bytes(source.read(0, min(source.size, 32), "header"))
    headed = start[8:9] == b"{"  # a header of 640 bytes begins as a pickle does
    for magic, what in _DISGUISES.items():
        if start.startswith(magic) and not headed:
            raise Refused(path, f"is not a safetensors file but {what}")
    if source.size < 10:
        raise Refused(path, f"has {source.size} bytes, too short for a safetensors file")
    (length,) = struct.unpack("<Q", start[:8])
    if length > source.size - 8:
        raise Refused(
            path,
            f"header length {length:,} exceeds the file's {source.size:,} bytes: truncated, or not"
            " a safetensors file; fetch or save it again",
        )
    if length > HEADER_LIMIT:
        raise Refused(path, f"header of {length:,} bytes, at most {HEADER_LIMIT:,} are read")
    raw = bytes(source.read(8, length, "header"))
    if not raw.startswith(b"{"):
        raise Refused(path, "header does not begin with '{': not a safetensors file")
    # An entry takes over 50 bytes; a header made of brackets would eat memory when parsed.
    if (raw.count(b"{") + raw.count(b"[")) * 12 > length + 1024:
        raise Refused(path, "header holds more brackets than any list of tensors: refused unread")
    header = parse_object(raw, path, "header")
    del raw
    metadata = header.pop("__metadata__", {})
    metadata = {} if metadata is None else metadata  # null: MLX without texts, and Rust reads it
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Refused(path, "__metadata__ must map texts to texts")
    begin = 8 + length
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        tensor, first, last = _entry(path, name, entry, source, begin)
        spans.append((first, last, name))
        tensors[name] = tensor
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            what = "overlaps another tensor" if first < end else "leaves a hole before it"
            raise Refused(path, f"its data {what} (offset {first}, expected {end})", tensor=name)
        end = last
    if begin + end != source.size:
        what = "truncated" if begin + end > source.size else "bytes behind the last tensor"
        raise Refused(
            path,
            f"{what}: the header describes {begin + end:,} bytes, the file has {source.size:,}",
        )
    return tensors, metadata


def read_index(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a file in shards, by its ``*.safetensors.index.json``.

    Raises Refused when the index names files outside its folder, or not exactly their tensors.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise Refused(index, "weight_map must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    if any(Path(n).name != n for n in names):
        raise Refused(index, "names files outside the folder")
    found: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name in names:
        tensors, texts = read_header(index.with_name(name))
        for tensor in tensors:
            if weight_map.get(tensor) != name:
                raise Refused(index.with_name(name), f"is not in {index.name}", tensor=tensor)
        found |= tensors
        metadata |= texts
    for tensor in weight_map:
        if tensor not in found:
            raise Refused(index, f"is not in {weight_map[tensor]}", tensor=tensor)
    return found, metadata


def _entry(
    path: Path, name: str, entry: Any, source: Source, begin: int
) -> tuple[Tensor, int, int]:
    """One header entry, checked."""
    if len(name) > NAME_LIMIT or not name.isprintable() or not name:
        raise Refused(
            path, "tensor name is empty, too long or holds control characters", tensor=name
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refused(path, "entry must hold exactly dtype, shape and data_offsets", tensor=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Refused(path, f"unknown dtype {printable(repr(dtype), 40)}", tensor=name)
    if not _counts(shape) or len(shape) > 8:
        raise Refused(
            path, f"shape {printable(repr(shape), 80)} is not a list of sizes", tensor=name
        )
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Refused(path, f"data_offsets {printable(repr(offsets), 80)} are invalid", tensor=name)
    bits = BITS[dtype]
    for n in shape:
        bits *= n
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise Refused(
            path,
            f"{dtype} {printable(repr(shape), 80)} needs {bits / 8:.16g} bytes, its data_offsets"
            f" span {offsets[1] - offsets[0]}",
            tensor=name,
        )
    tensor = Tensor(name, dtype, tuple(shape), source, begin + offsets[0], path=path)
    return tensor, offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    """A list of non-negative integers (True is an int in Python, and is refused)."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)


def serialized(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], losses: dict[str, Loss]
) -> Iterator[Any]:
    """The file's bytes in pieces: header, then every tensor streamed in the given order.

    ``losses`` receives what rounding did to each tensor that is rounded.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data begins at a multiple of 8, as the library writes it
    yield struct.pack("<Q", len(raw)) + raw
    at = 8 + len(raw)
    for name, tensor in tensors.items():
        loss = losses.setdefault(name, Loss()) if tensor.rounds else None
        yield from tensor.chunks(loss, at)
        at += tensor.nbytes


def ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The order the library writes: widest dtype first, then by name (keeps data aligned)."""
    return dict(sorted(tensors.items(), key=lambda kv: (-BITS[kv[1].dtype], kv[0])))


def check_floats(tensors: Iterable[Tensor], file: Path) -> None:
    """Refuse dtypes that an adapter's tensors can't have; peers cast them as plain numbers."""
    from loraduct.tensor import FLOATS

    for tensor in tensors:
        if tensor.stored_dtype not in FLOATS:
            raise Refused(
                file,
                f"dtype {tensor.stored_dtype}, expected one of {', '.join(FLOATS)}",
                tensor=tensor.name,
            )
        if 0 in tensor.stored_shape:
            raise Refused(
                file, f"shape {list(tensor.stored_shape)} holds nothing", tensor=tensor.name
            )
