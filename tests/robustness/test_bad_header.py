"""Broken safetensors files: every way the container can lie is refused, naming the file.

The format promises a bounded header that is one JSON object without duplicate keys, and a buffer
that the tensors cover exactly; readers that are lax here accept polyglots and read wrong numbers.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kit import Folder, Kit

Rewrite = Callable[[bytes], bytes]
MODULE = r"layers\.0\.self_attn\.q_proj"


@dataclass(frozen=True)
class Case:
    """One corruption, and what the error line must name besides the weights file."""

    id: str
    rewrite: Rewrite
    names: tuple[str, ...] = ()


def split(data: bytes) -> tuple[bytes, bytes]:
    """Header text and buffer of a safetensors file."""
    (size,) = struct.unpack_from("<Q", data)
    return data[8 : 8 + size], data[8 + size :]


def join(header: bytes, buffer: bytes) -> bytes:
    """A file with exactly this header text."""
    return struct.pack("<Q", len(header)) + header + buffer


def length(change: Callable[[int, int], int]) -> Rewrite:
    """Lie about the header's length; `change` gets the true length and the file's size."""

    def rewrite(data: bytes) -> bytes:
        (size,) = struct.unpack_from("<Q", data)
        return struct.pack("<Q", change(size, len(data))) + data[8:]

    return rewrite


def text(change: Callable[[bytes], bytes]) -> Rewrite:
    """Change the header's text and fix the length."""

    def rewrite(data: bytes) -> bytes:
        header, buffer = split(data)
        return join(change(header), buffer)

    return rewrite


def tree(change: Callable[[dict[str, Any]], Any]) -> Rewrite:
    """Change the parsed header in place, or replace it by what `change` returns."""

    def rewrite(data: bytes) -> bytes:
        header, buffer = split(data)
        parsed = json.loads(header)
        result = change(parsed)
        return join(json.dumps(parsed if result is None else result).encode(), buffer)

    return rewrite


def first(header: dict[str, Any]) -> str:
    """The name of the first tensor."""
    return next(name for name in header if name != "__metadata__")


def entry(**fields: Any) -> Rewrite:
    """Set fields of the first tensor's entry; a field given as ... is removed."""

    def change(header: dict[str, Any]) -> None:
        target = header[first(header)]
        target.update(fields)
        for key in [key for key, value in fields.items() if value is ...]:
            del target[key]

    return tree(change)


def metadata(value: Any) -> Rewrite:
    """Replace the metadata."""
    return tree(lambda header: header.update(__metadata__=value))


def shift(start: float, end: float) -> Rewrite:
    """Move the first tensor's offsets."""

    def change(header: dict[str, Any]) -> None:
        offsets = header[first(header)]["data_offsets"]
        header[first(header)]["data_offsets"] = [offsets[0] + start, offsets[1] + end]

    return tree(change)


def hole(data: bytes) -> bytes:
    """64 bytes that no tensor covers, between the first and the second tensor."""
    header, buffer = split(data)
    parsed = json.loads(header)
    names = [name for name in parsed if name != "__metadata__"]
    cut = parsed[names[0]]["data_offsets"][1]
    for name in names[1:]:
        parsed[name]["data_offsets"] = [at + 64 for at in parsed[name]["data_offsets"]]
    return join(json.dumps(parsed).encode(), buffer[:cut] + bytes(64) + buffer[cut:])


def late(data: bytes) -> bytes:
    """64 bytes before the first tensor."""
    header, buffer = split(data)
    parsed = json.loads(header)
    for value in parsed.values():
        if "data_offsets" in value:
            value["data_offsets"] = [at + 64 for at in value["data_offsets"]]
    return join(json.dumps(parsed).encode(), bytes(64) + buffer)


def overlap(header: dict[str, Any]) -> None:
    """Two tensors of the same shape read the same bytes, and another's are read by nobody."""
    names = [name for name in header if name != "__metadata__"]
    twin = next(n for n in names[1:] if header[n]["shape"] == header[names[0]]["shape"])
    header[twin]["data_offsets"] = header[names[0]]["data_offsets"]


def shared_end(header: dict[str, Any]) -> None:
    """One more tensor over bytes that are already taken: nothing is left uncovered."""
    header["extra"] = dict(header[first(header)])


def twice(header: bytes) -> bytes:
    """The first tensor's key stands twice; the second one points to another tensor's bytes."""
    parsed = json.loads(header)
    name = first(parsed)
    twin = json.dumps({name: {**parsed[name]}})[1:-1]
    return b"{" + twin.encode() + b", " + header.lstrip()[1:]


def archive() -> bytes:
    """A small zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as writer:
        writer.writestr("run.sh", "echo hello")
    return buffer.getvalue()


def replace(data: bytes) -> Rewrite:
    """Something else altogether under the weights' name."""
    return lambda _: data


def insert(old: bytes, new: bytes) -> Rewrite:
    """Replace the first occurrence of some header text."""
    return text(lambda header: header.replace(old, new, 1))


CASES = [
    Case("length_zero", length(lambda size, total: 0)),
    Case("length_one", length(lambda size, total: 1)),
    Case("length_too_small", length(lambda size, total: size // 2)),
    Case("length_less_8", length(lambda size, total: size - 8)),
    Case("length_plus_1", length(lambda size, total: size + 1)),
    Case("length_plus_8", length(lambda size, total: size + 8)),
    Case("length_whole_file", length(lambda size, total: total - 8)),
    Case("length_past_file", length(lambda size, total: total - 7)),
    Case("length_over_cap", length(lambda size, total: 100_000_001)),
    Case("length_2_31", length(lambda size, total: 2**31)),
    Case("length_2_63", length(lambda size, total: 2**63)),
    Case("length_2_64", length(lambda size, total: 2**64 - 1)),
    Case("header_empty_object", replace(join(b"{}", b""))),
    Case("header_metadata_only", replace(join(b'{"__metadata__":{"format":"pt"}}', b""))),
    Case("header_text", text(lambda header: b"hello world, not json")),
    Case("header_latin1", insert(b"self_attn", b"s\xe9lf_attn")),
    Case("header_bad_utf8", insert(b"self_attn", b"self\xff\xfeattn")),
    Case("header_overlong_utf8", insert(b"self_attn", b"self\xc0\xafattn")),
    Case("header_bom", text(lambda header: b"\xef\xbb\xbf" + header)),
    Case("header_leading_blank", text(lambda header: b" " + header)),
    Case("header_leading_newline", text(lambda header: b"\n" + header)),
    Case("header_trailing_text", text(lambda header: header.rstrip() + b"x")),
    Case("header_second_object", text(lambda header: header.rstrip() + b"{}")),
    Case("header_trailing_nul", text(lambda header: header + b"\0" * 8)),
    Case("header_array", tree(lambda header: [header])),
    Case("header_empty_array", text(lambda header: b"[]")),
    Case("header_string", text(lambda header: b'"{}"')),
    Case("header_number", text(lambda header: b"12345678")),
    Case("header_null", text(lambda header: b"null")),
    Case("header_true", text(lambda header: b"true")),
    Case("header_unclosed", text(lambda header: header.rstrip()[:-1])),
    Case("header_nested_arrays", replace(join(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", b""))),
    Case("header_nested_objects", replace(join(b'{"a":' * 5000 + b"1" + b"}" * 5000, b""))),
    Case("header_open_brackets", replace(join(b"[" * 100_000, b""))),
    Case("header_open_braces", replace(join(b'{"a":' * 100_000, b""))),
    Case("entry_list", tree(lambda header: header.update({first(header): [1, 2]})), (MODULE,)),
    Case("entry_null", tree(lambda header: header.update({first(header): None})), (MODULE,)),
    Case("entry_string", tree(lambda header: header.update({first(header): "F32"})), (MODULE,)),
    Case("entry_empty", tree(lambda header: header.update({first(header): {}})), (MODULE,)),
    Case("duplicate_tensor", text(twice), (MODULE,)),
    Case("duplicate_metadata", text(lambda h: b'{"__metadata__":{"a":"b"},' + h[1:])),
    Case("duplicate_in_metadata", insert(b'{"format":', b'{"format":"np","format":')),
    Case("duplicate_dtype", insert(b'"dtype": "F32"', b'"dtype":"F16","dtype":"F32"')),
    Case("duplicate_offsets", insert(b'"data_offsets"', b'"data_offsets":[0,4],"data_offsets"')),
    Case("metadata_list", metadata(["a"]), ("metadata",)),
    Case("metadata_string", metadata("pt"), ("metadata",)),
    Case("metadata_number_value", metadata({"format": 1}), ("metadata",)),
    Case("metadata_null_value", metadata({"format": None}), ("metadata",)),
    Case("metadata_nested_value", metadata({"format": {"a": "b"}}), ("metadata",)),
    Case("hole", hole),
    Case("overlap", tree(overlap)),
    Case("shared_bytes", tree(shared_end)),
    Case("starts_late", late),
    Case("shifted_by_4", shift(4, 4)),
    Case("trailing_byte", lambda data: data + b"\0"),
    Case("trailing_page", lambda data: data + bytes(4096)),
    Case("polyglot_zip", lambda data: data + archive()),
    Case("offsets_float", shift(0.0, 0.0), (MODULE,)),
    Case("offsets_half", shift(0.5, 0.5), (MODULE,)),
    Case("offsets_negative", entry(data_offsets=[-192, 0]), (MODULE,)),
    Case("offsets_bool", entry(data_offsets=[False, True]), (MODULE,)),
    Case("offsets_2_62", entry(data_offsets=[2**62, 2**62 + 192]), (MODULE,)),
    Case("offsets_2_70", entry(data_offsets=[0, 2**70]), (MODULE,)),
    Case("offsets_past_file", entry(data_offsets=[0, 10**9]), (MODULE,)),
    Case("offsets_reversed", entry(data_offsets=[192, 0]), (MODULE,)),
    Case("offsets_strings", entry(data_offsets=["0", "192"]), (MODULE,)),
    Case("offsets_three", entry(data_offsets=[0, 192, 192]), (MODULE,)),
    Case("offsets_one", entry(data_offsets=[192]), (MODULE,)),
    Case("offsets_null", entry(data_offsets=None), (MODULE,)),
    Case("offsets_object", entry(data_offsets={"0": 0}), (MODULE,)),
    Case("offsets_missing", entry(data_offsets=...), (MODULE,)),
    Case("offsets_nan", insert(b'"data_offsets": [0,', b'"data_offsets": [NaN,')),
    Case("offsets_1e999", insert(b'"data_offsets": [0,', b'"data_offsets": [1e999,')),
    Case("offsets_6000_digits",
         insert(b'"data_offsets": [0,', b'"data_offsets": [' + b"9" * 6000 + b",")),
    Case("shape_negative", entry(shape=[-4, 12]), (MODULE,)),
    Case("shape_two_negatives", entry(shape=[-4, -12]), (MODULE,)),
    Case("shape_float", entry(shape=[4.0, 12.0]), (MODULE,)),
    Case("shape_bool", entry(shape=[True, 48]), (MODULE,)),
    Case("shape_strings", entry(shape=["4", "12"]), (MODULE,)),
    Case("shape_nested", entry(shape=[[4, 12]]), (MODULE,)),
    Case("shape_null", entry(shape=None), (MODULE,)),
    Case("shape_number", entry(shape=48), (MODULE,)),
    Case("shape_missing", entry(shape=...), (MODULE,)),
    Case("shape_overflow", entry(shape=[2**40, 2**40]), (MODULE,)),
    Case("shape_wraps_to_48", entry(shape=[2**62 + 12, 4]), (MODULE,)),
    Case("shape_2_64", entry(shape=[2**64, 1]), (MODULE,)),
    Case("shape_too_small", entry(shape=[2, 12]), (MODULE,)),
    Case("shape_too_large", entry(shape=[8, 12]), (MODULE,)),
    Case("shape_hidden_zero", entry(shape=[2**62, 2**62, 0]), (MODULE,)),
    Case("shape_many_axes", entry(shape=[1] * 3000 + [48]), (MODULE,)),
    Case("dtype_unknown", entry(dtype="F33"), (MODULE, "F33")),
    Case("dtype_lower_case", entry(dtype="f32"), (MODULE, "f32")),
    Case("dtype_numpy", entry(dtype="<f4"), (MODULE,)),
    Case("dtype_object", entry(dtype="O"), (MODULE,)),
    Case("dtype_empty", entry(dtype=""), (MODULE,)),
    Case("dtype_number", entry(dtype=32), (MODULE,)),
    Case("dtype_null", entry(dtype=None), (MODULE,)),
    Case("dtype_list", entry(dtype=["F32"]), (MODULE,)),
    Case("dtype_missing", entry(dtype=...), (MODULE,)),
    Case("dtype_size_differs", entry(dtype="F16"), (MODULE,)),
    Case("html_page", replace(b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 9)),
    Case("lfs_pointer", replace(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32
        + b"\nsize 1234567\n"), ("LFS",)),
    Case("pickle", replace(pickle.dumps({"a": [1.0] * 99}))),
    Case("zip", replace(archive())),
    Case("gguf", replace(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64))),
    Case("numpy", replace(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'shape': (4,)}" + bytes(99))),
    Case("zeros", replace(bytes(4096))),
    Case("noise", replace(random.Random(7).randbytes(4096))),
    Case("empty_file", replace(b"")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_refused(case: Case, adapter: Folder, kit: Kit) -> None:
    """Both verbs refuse each corruption under both formats' file names."""
    before = adapter.weights.read_bytes()
    after = case.rewrite(before)
    assert after != before, "the case changes nothing"
    adapter.weights.write_bytes(after)
    kit.refuse_everywhere(adapter, adapter.weights.name, *case.names)


def test_truncated_anywhere(adapter: Folder, kit: Kit) -> None:
    """A file cut at any point is refused: at every early byte, around each border, and between."""
    data = adapter.weights.read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    cuts = {*range(17), *range(17, len(data), 41), *range(start - 9, start + 9), len(data) - 1}
    for cut in sorted(cuts):
        adapter.weights.write_bytes(data[:cut])
        kit.run("inspect", adapter.path).refused(adapter.weights.name)
    for cut in (0, 7, 8, start - 1, start, start + 5, len(data) - 1):
        adapter.weights.write_bytes(data[:cut])
        kit.convert_refused(adapter, adapter.weights.name)


HARMLESS = [
    Case("untouched", lambda data: data),
    Case("padded_header", text(lambda header: header + b" " * 800)),
    Case("empty_metadata", metadata({})),
    Case("metadata_null", metadata(None)),  # as MLX writes it
    Case("no_metadata", tree(lambda header: (header.pop("__metadata__"), None)[1])),
    Case("escaped_name", insert(b"self_attn", b"s\\u0065lf_attn")),
    Case("compact", text(lambda header: json.dumps(json.loads(header), separators=(",", ":"))
         .encode())),
]  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS, ids=lambda case: case.id)
def test_accepted(case: Case, adapter: Folder, kit: Kit) -> None:
    """The control group: what the format allows is read and converted."""
    adapter.weights.write_bytes(case.rewrite(adapter.weights.read_bytes()))
    for verb in (("inspect", adapter.path), ("inspect", adapter.path, "--stats", "--json")):
        outcome = kit.run(*verb).tidy()
        assert outcome.code == 0, outcome.stderr
    out = adapter.path.parent / "out"
    outcome = kit.run("convert", adapter.path, "--to", adapter.target, "-o", out).tidy()
    assert outcome.code == 0, outcome.stderr
    assert {item.name for item in adapter.path.parent.iterdir()} == {"src", "out"}
