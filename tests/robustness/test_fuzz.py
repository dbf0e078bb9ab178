"""Random damage: whatever happens to the bytes, a run ends with 0 or 1 and no traceback.

OUT is there exactly when the exit code is 0, and then every number in it is finite.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from kit import Folder, Kit

# Reproducible in CI, and nothing is stored between runs.
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip

Flips = list[tuple[float, int]]
flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4)
cut = st.one_of(st.just(1.0), st.floats(0, 1))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(),
    st.text(max_size=8), st.sampled_from(["q_proj", "self_attn.q_proj", "F32", "LORA", "lora"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def damaged(data: bytes, where: Flips, keep: float) -> bytes:
    """XOR some bytes and cut the end off; `where` is given as parts of the length."""
    changed = bytearray(data)
    for part, mask in where:
        changed[int(part * len(changed))] ^= mask
    return bytes(changed[: max(0, round(keep * len(changed)))])


def all_finite(weights: Path) -> bool:
    """Whether every F32 number of a file is finite, read without the product's help."""
    data = weights.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    dtypes = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return dtypes != {"F32"} or bool(np.isfinite(np.frombuffer(data[8 + size :], "<f4")).all())


def check(kit: Kit, folder: Folder) -> None:
    """The promise of this file."""
    kit.run("inspect", folder.path).tidy()
    kit.run("inspect", folder.path, "--stats", "--json").tidy().one_document()
    room = folder.path.parent / "room"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    out = room / "out"
    outcome = kit.run("convert", folder.path, "--to", folder.target, "-o", out).tidy()
    assert outcome.code in (0, 1)
    assert [item.name for item in room.iterdir()] == (["out"] if outcome.code == 0 else [])
    if outcome.code == 0:
        assert all_finite(next(out.glob("*.safetensors")))
    else:
        outcome.error_line()


@FUZZ
@given(where=flips, keep=cut)
def test_weights_bytes(where: Flips, keep: float, adapter: Folder, kit: Kit) -> None:
    """Flips and cuts anywhere in the weights."""
    adapter.save()
    adapter.weights.write_bytes(damaged(adapter.weights.read_bytes(), where, keep))
    check(kit, adapter)


@FUZZ
@given(where=flips, keep=st.just(1.0))
def test_header_bytes(where: Flips, keep: float, adapter: Folder, kit: Kit) -> None:
    """Flips in the header alone, where they hurt most."""
    adapter.save()
    data = adapter.weights.read_bytes()
    border = 8 + struct.unpack_from("<Q", data)[0]
    adapter.weights.write_bytes(damaged(data[:border], where, keep) + data[border:])
    check(kit, adapter)


@FUZZ
@given(where=flips, keep=cut)
def test_config_bytes(where: Flips, keep: float, adapter: Folder, kit: Kit) -> None:
    """Flips and cuts in the config."""
    adapter.save()
    adapter.config_path.write_bytes(damaged(adapter.config_path.read_bytes(), where, keep))
    check(kit, adapter)


@FUZZ
@given(data=st.data(), value=values)
def test_config_values(data: st.DataObject, value: Any, adapter: Folder, kit: Kit) -> None:
    """Any JSON value in any known field."""
    config = json.loads(json.dumps(adapter.config))
    place = config
    if adapter.kind == "mlx" and data.draw(st.booleans(), label="nested"):
        place = config["lora_parameters"]
    place[data.draw(st.sampled_from(sorted(place)), label="field")] = value
    adapter.config_path.write_text(json.dumps(config))
    check(kit, adapter)


@FUZZ
@given(data=st.data(), value=values)
def test_entry_values(data: st.DataObject, value: Any, adapter: Folder, kit: Kit) -> None:
    """Any JSON value in any field of the header."""
    adapter.save()
    content = adapter.weights.read_bytes()
    border = 8 + struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8:border])
    name = data.draw(st.sampled_from(sorted(header)), label="name")
    field = data.draw(st.sampled_from([None, "dtype", "shape", "data_offsets"]), label="field")
    if field is None or name == "__metadata__":
        header[name] = value
    else:
        header[name][field] = value
    text = json.dumps(header).encode()
    adapter.weights.write_bytes(struct.pack("<Q", len(text)) + text + content[border:])
    check(kit, adapter)


@FUZZ
@given(raw=st.binary(max_size=200))
def test_noise(raw: bytes, adapter: Folder, kit: Kit) -> None:
    """Noise as a header, behind a length that is right."""
    adapter.weights.write_bytes(struct.pack("<Q", len(raw)) + raw)
    check(kit, adapter)


@pytest.mark.parametrize("kind", ["peft", "mlx"])
def test_every_byte_of_the_length(kind: str, kit: Kit, tmp_path: Path) -> None:
    """Each bit of the eight length bytes, and of the header's first bytes, flipped alone."""
    folder = kit.build(kind, tmp_path / "src").save()
    data = folder.weights.read_bytes()
    for bit in range(8 * 12):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        folder.weights.write_bytes(changed)
        kit.run("inspect", folder.path).refused(folder.weights.name)
