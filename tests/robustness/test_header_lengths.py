"""A header's length is no magic number: 640 bytes are written as a pickle's first two."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from loraduct.errors import Refused
from loraduct.formats.safetensors_file import read_header


def written(path: Path, length: int) -> Path:
    """A file of one tensor, its header padded to ``length`` as the format allows."""
    entry = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(entry).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", length) + header + bytes(4))
    return path


@pytest.mark.parametrize("length", [0x0280, 0x4B50, 0x503C, 640 + (1 << 16)])
def test_any_length_is_read(tmp_path: Path, length: int) -> None:
    tensors, _ = read_header(written(tmp_path / "x.safetensors", length))
    assert list(tensors) == ["a"]


def test_a_pickle_is_still_called_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s." + bytes(64))
    with pytest.raises(Refused, match="a pickle"):
        read_header(path)
