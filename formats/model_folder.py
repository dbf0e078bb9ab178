"""Writing a model's folder: weights in one file or in shards, config and companions, all or nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.files import file_chunks, resolved, write_file
from loraduct.formats import companions
from loraduct.formats.base import Base
from loraduct.formats.json_file import dump
from loraduct.formats.safetensors_file import read_header
from loraduct.formats.untied import CONFIG, INDEX, WEIGHTS
from loraduct.tensor import BITS, Tensor
from loraduct.text import several

SHARD = 5_000_000_000  # bytes, as transformers has it
_STEP = 4 << 20


@dataclass(frozen=True)
class Stored:
    """One tensor to be written: what it is, and its bytes in order (arrays that hold until the next)."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * BITS[self.dtype] // 8


def copied(tensor: Tensor) -> Stored:
    """A tensor's bytes as they lie in its file; no value is looked at, so any dtype will do."""

    def pieces() -> Iterator[Any]:
        source = tensor.source
        assert source is not None
        for done in range(0, tensor.stored_nbytes, _STEP):
            count = min(_STEP, tensor.stored_nbytes - done)
            yield source.read(tensor.offset + done, count, tensor.name)

    return Stored(tensor.stored_dtype, tensor.stored_shape, pieces)


def check_target(target: Path, sources: Sequence[Path], force: bool) -> None:
    """Refuse a target that can't or must not be written, before anything is read.

    ``force`` replaces folders that hold a model and nothing else.
    """
    real = resolved(target)
    for other in map(resolved, sources):
        if real == other or real in other.parents or other in real.parents:
            raise Refused(target, f"is {other}, lies in it, or holds it; choose another folder")
    if not target.parent.is_dir():
        raise Refused(target.parent, "does not exist, or is not a folder; make it first")
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise Refused(target, "exists; use --force to replace it, or choose another output folder")
    if not target.is_dir():
        raise Refused(target, "is not a folder; --force replaces model folders only")
    foreign = sorted(p.name for p in target.iterdir() if not _is_model_file(p))
    if foreign:
        what = f"holds files that are not a model's ({several(foreign)})"
        raise Refused(target, f"{what}; --force replaces model folders only: move them away first")


def _is_model_file(path: Path) -> bool:
    weights = path.name.startswith("model") and path.suffix == ".safetensors"
    known = path.name in (CONFIG, INDEX) or companions.is_companion(path.name)
    return (known or weights) and not path.is_dir()


def shards(tensors: Mapping[str, Stored], limit: int) -> dict[str, dict[str, Stored]]:
    """File name -> its tensors: in order, as many as fit ``limit`` bytes; at least one each."""
    groups: list[dict[str, Stored]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    last = len(groups)
    return {f"model-{i:05d}-of-{last:05d}.safetensors": g for i, g in enumerate(groups, 1)}


def write(
    base: Base,
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    limit: int,
    stage: Path,
) -> dict[str, int]:
    """Write the model into ``stage``: companions and texts are the base's. Returns bytes by file."""
    files = shards(tensors, limit)
    first = next(iter(base.tensors.values())).path
    assert first is not None
    metadata = read_header(first)[1]
    for name, held in files.items():
        write_file(stage / name, serialized(held, metadata))
    if len(files) > 1:
        total = {"total_size": sum(t.nbytes for t in tensors.values())}
        where = {n: name for name, held in files.items() for n in held}
        write_file(stage / INDEX, [dump({"metadata": total, "weight_map": where})])
    write_file(stage / CONFIG, [dump(dict(config))])
    for companion in companions.find(base.path)[0]:
        write_file(stage / companion.name, file_chunks(companion))
    return {p.name: p.stat().st_size for p in sorted(stage.iterdir())}


def serialized(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> Iterator[Any]:
    """The bytes of one weights file in pieces."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    yield struct.pack("<Q", len(raw)) + raw
    for tensor in tensors.values():
        yield from tensor.pieces()
