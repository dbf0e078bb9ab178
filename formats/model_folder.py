"""Writing a model's folder: weights in one file or in shards, config and companions, all or nothing."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.files import file_chunks, make_folder, read_bytes, resolved, sync, write_file
from loraduct.formats import companions
from loraduct.formats.base import Base
from loraduct.formats.json_file import dump, read_object
from loraduct.formats.safetensors_file import read_header
from loraduct.tensor import BITS, Tensor
from loraduct.text import several

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD = 5_000_000_000  # bytes, as transformers has it
_STEP = 4 << 20
_TEMPLATES = ("additional_chat_templates", "chat_templates")  # folders of *.jinja
_CODE = 4 << 20  # bytes of one file of code, at most
_IMPORT = re.compile(
    r"^\s*(?:from|import)\s+\.(\w+)", re.MULTILINE
)  # as transformers looks for them


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
    code = {p.name for p in _code(target)}
    foreign = sorted(p.name for p in target.iterdir() if not _is_model_file(p, code))
    if foreign:
        what = f"holds files that are not a model's ({several(foreign)})"
        raise Refused(target, f"{what}; --force replaces model folders only: move them away first")


def _is_model_file(path: Path, code: set[str]) -> bool:
    if path.name in _TEMPLATES and path.is_dir() and not path.is_symlink():
        return all(p.suffix == ".jinja" and not p.is_dir() for p in path.iterdir())
    weights = path.name.startswith("model") and path.suffix == ".safetensors"
    known = path.name in (CONFIG, INDEX, *code) or companions.is_companion(path.name)
    return (known or weights) and not path.is_dir()


def _code(folder: Path) -> list[Path]:
    """The files of Python that a model's configs name, and what these import from beside them.

    They are copied, and never run. What is named in another repository, or is not there, is none of them.
    """
    names = []
    for file in (
        CONFIG,
        "tokenizer_config.json",
        "processor_config.json",
        "preprocessor_config.json",
    ):
        try:
            config = read_object(folder / file)
        except Refused:  # whoever needs it reads it, and says what is wrong
            continue
        given = config.get("auto_map")
        for value in given.values() if isinstance(given, dict) else ():
            names += [
                str(v).split(".")[0] for v in (value if isinstance(value, list) else [value]) if v
            ]
        names.append(str(config.get("model_file")).removesuffix(".py"))  # mlx-lm's word for it
    found: dict[str, Path] = {}
    while names:
        name = names.pop()
        path = folder / f"{name}.py"
        fits = re.fullmatch(r"\w+", name) and name not in found and path.exists()
        if fits and companions.why_not(path, folder) is None and path.stat().st_size <= _CODE:
            found[name] = path
            names += _IMPORT.findall(read_bytes(path, _CODE).decode("utf-8", "replace"))
    return [found[name] for name in sorted(found)]


def carried(folder: Path) -> list[Path]:
    """The files of a model's folder that a changed copy of it needs as they are."""
    templates = [p for t in _TEMPLATES for p in sorted((folder / t).glob("*.jinja"))]
    templates = [p for p in templates if companions.why_not(p, folder) is None]
    return [*companions.find(folder)[0], *templates, *_code(folder)]


def left(base: Base, label: str = "left behind") -> list[str]:
    """Notes on what of the base's folder a changed copy neither has anew nor carries."""
    folder = base.path
    weights = {t.path for t in base.tensors.values()}
    known = {p.relative_to(folder).parts[0] for p in carried(folder)} | {CONFIG, INDEX}
    odd = [w for w in companions.find(folder)[1] if w.partition(" is ")[0] not in known]
    names = sorted(
        p.name
        for p in folder.iterdir()
        if p.name not in known
        and p not in weights
        and not p.name.startswith(".")
        and not companions.is_companion(p.name)
    )
    return [f"{label}: {several(names, 8)}", *odd] if names else odd


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
    """Write the model into ``stage``: companions, texts and code are the base's. Returns bytes by file."""
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
    return carry(base.path, carried(base.path), stage)


def carry(folder: Path, sources: Sequence[Path], stage: Path) -> dict[str, int]:
    """Copy files of ``folder`` into ``stage``, which is then whole; returns the bytes of all its files."""
    for source in sources:
        target = stage / source.relative_to(folder)
        if not target.parent.exists():
            make_folder(target.parent)
        write_file(target, file_chunks(source))
    files = [p for p in sorted(stage.rglob("*")) if p.is_file()]
    for there in {p.parent for p in files}:
        sync(there)
    return {p.relative_to(stage).as_posix(): p.stat().st_size for p in files}


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
