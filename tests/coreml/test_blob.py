"""The weight file against coremltools' own reader and writer."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loraduct import packing
from loraduct.errors import Refused
from loraduct.formats.coreml import blob
from loraduct.formats.coreml.program import immediate_value, value_of

# dtype -> (coremltools' method stem, numpy dtype of one value, smallest, largest)
KINDS = {
    "FLOAT16": ("fp16", np.float16, -4, 4),
    "FLOAT32": ("float", np.float32, -4, 4),
    "UINT8": ("uint8", np.uint8, 0, 255),
    "INT8": ("int8", np.int8, -128, 127),
    "INT16": ("int16", np.int16, -9999, 9999),
    "UINT16": ("uint16", np.uint16, 0, 60000),
    "INT32": ("int32", np.int32, -9999, 9999),
    "UINT32": ("uint32", np.uint32, 0, 99999),
    "INT4": ("int4", np.int8, -8, 7),
    "UINT1": ("uint1", np.uint8, 0, 1),
    "UINT2": ("uint2", np.uint8, 0, 3),
    "UINT3": ("uint3", np.uint8, 0, 7),
    "UINT4": ("uint4", np.uint8, 0, 15),
    "UINT6": ("uint6", np.uint8, 0, 63),
}
COUNTS = (1, 5, 64, 333)


@pytest.fixture(scope="module")
def storage():
    """coremltools' storage module, without the rest of coremltools."""
    import importlib.util
    import sys
    from pathlib import Path

    name = "coremltools.libmilstoragepython"  # it can be loaded once, by us or by coremltools
    if name not in sys.modules:
        folder = Path(importlib.util.find_spec("coremltools").origin).parent
        file = folder / "libmilstoragepython.so"
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def values_of(dtype, count):
    _, numpy_dtype, low, high = KINDS[dtype]
    rng = np.random.default_rng(count)
    if np.issubdtype(numpy_dtype, np.floating):
        return rng.uniform(low, high, count).astype(numpy_dtype)
    return rng.integers(low, high, count, dtype=np.int64, endpoint=True).astype(numpy_dtype)


@pytest.mark.parametrize("dtype", KINDS)
def test_reads_what_coremltools_writes(storage, tmp_path, dtype):
    stem = KINDS[dtype][0]
    writer = storage._BlobStorageWriter(str(tmp_path / "w.bin"))
    write = getattr(writer, f"write_{stem}_data")
    offsets = []
    for count in COUNTS:
        values = values_of(dtype, count)
        offsets.append(write(values.view(np.uint16) if dtype == "FLOAT16" else values))
    del writer
    file = blob.BlobFile(tmp_path / "w.bin")
    for count, offset in zip(COUNTS, offsets, strict=True):
        np.testing.assert_array_equal(
            file.array(offset, dtype, (count,), "x"), values_of(dtype, count)
        )


def laid_out(path, dtype, counts):
    layout = blob.Layout()
    bits = blob.CODES[dtype][1]
    offsets = []
    for count in counts:
        values = values_of(dtype, count)
        data = packing.packed(values.view(np.uint8) & (2**bits - 1), bits) if bits < 8 else values
        offsets.append(layout.add(dtype, count, [data]))
    path.write_bytes(b"".join(bytes(memoryview(c).cast("B")) for c in layout.chunks()))
    return offsets


@pytest.mark.parametrize("dtype", KINDS)
def test_coremltools_reads_what_we_write(storage, tmp_path, dtype):
    stem = KINDS[dtype][0]
    offsets = laid_out(tmp_path / "w.bin", dtype, COUNTS)
    reader = storage._BlobStorageReader(str(tmp_path / "w.bin"))
    for count, offset in zip(COUNTS, offsets, strict=True):
        found = np.asarray(getattr(reader, f"read_{stem}_data")(offset))
        wanted = values_of(dtype, count)
        if dtype == "FLOAT16":
            found = found.view(np.float16)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["FLOAT16", "UINT3", "INT32"])
def test_same_bytes_as_coremltools(storage, tmp_path, dtype):
    laid_out(tmp_path / "ours.bin", dtype, COUNTS)
    writer = storage._BlobStorageWriter(str(tmp_path / "theirs.bin"))
    for count in COUNTS:
        values = values_of(dtype, count)
        getattr(writer, f"write_{KINDS[dtype][0]}_data")(
            values.view(np.uint16) if dtype == "FLOAT16" else values
        )
    del writer
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()


def broken(tmp_path, change):
    laid_out(tmp_path / "w.bin", "FLOAT16", (64,))
    raw = bytearray((tmp_path / "w.bin").read_bytes())
    raw = change(raw) or raw
    (tmp_path / "w.bin").write_bytes(raw)
    return tmp_path / "w.bin"


def at(position, value):
    def change(raw):
        raw[position : position + len(value)] = value

    return change


@pytest.mark.parametrize(
    ("change", "offset", "says"),
    [
        (lambda raw: raw[:100], 64, "offset 64 is not in the file"),
        (lambda raw: raw[:200], 64, "cut short"),
        (at(64, b"\0\0\0\0"), 64, "no blob at offset 64"),
        (at(68, b"\2\0\0\0"), 64, "dtype code 2, the program says FLOAT16"),
        (at(72, b"\1"), 64, "holds 1 bytes, the program says 128"),
        (at(80, b"\0"), 64, "is not in the file"),
        (at(80, b"\xff" * 8), 64, "is not in the file"),
        (lambda raw: None, 65, "offset 65 is not in the file"),
        (lambda raw: None, 1 << 40, "is not in the file"),
    ],
)
def test_broken_files_are_refused(tmp_path, change, offset, says):
    path = broken(tmp_path, change)
    with pytest.raises(Refused, match=says) as caught:
        blob.BlobFile(path).array(offset, "FLOAT16", (64,), "layer.weight")
    assert "w.bin" in str(caught.value)
    assert "layer.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "says"), [(b"x" * 10, "a header of 64"), (b"\1\0\0\0\7\0\0\0" + bytes(56), "version 7")]
)
def test_broken_header(tmp_path, raw, says):
    (tmp_path / "w.bin").write_bytes(raw)
    with pytest.raises(Refused, match=says):
        blob.BlobFile(tmp_path / "w.bin")


def test_a_copy_and_an_append_keep_values(storage, tmp_path):
    offsets = laid_out(tmp_path / "w.bin", "UINT6", COUNTS)
    file = blob.BlobFile(tmp_path / "w.bin")
    layout = blob.Layout()
    moved = [layout.copy(file, o, "x") for o in reversed(offsets)]
    (tmp_path / "v.bin").write_bytes(
        b"".join(bytes(memoryview(c).cast("B")) for c in layout.chunks())
    )
    reader = storage._BlobStorageReader(str(tmp_path / "v.bin"))
    for count, offset in zip(reversed(COUNTS), moved, strict=True):
        np.testing.assert_array_equal(reader.read_uint6_data(offset), values_of("UINT6", count))
    more = blob.Layout((tmp_path / "v.bin").stat().st_size)
    extra = more.add("FLOAT32", 3, [np.arange(3, dtype=np.float32)])
    with (tmp_path / "v.bin").open("ab") as f:
        for chunk in more.chunks():
            f.write(chunk)
    assert blob.BlobFile(tmp_path / "v.bin").array(extra, "FLOAT32", (3,), "x").tolist() == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    "dtype", [d for d, kind in KINDS.items() if kind[1] in (np.int8, np.uint8)]
)
@pytest.mark.parametrize("count", [1, 5, 9])
def test_values_in_the_program_are_coremltools(dtype, count):
    from coremltools.converters.mil.backend.mil.helper import create_tensor_value
    from coremltools.converters.mil.mil import types

    values = values_of(dtype, count)
    theirs = create_tensor_value(values.astype(types.string_to_nptype(dtype.lower())))
    ours = immediate_value(dtype, values)
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(
        deterministic=True
    )
    package = SimpleNamespace(spec_path=Path("x"))
    np.testing.assert_array_equal(value_of(package, ours, "w"), values)
    ours.immediateValue.tensor.bytes.values += b"\0"
    with pytest.raises(Refused, match=r"w: holds .* bytes, its type says"):
        value_of(package, ours, "w")
