"""A copy of a base model whose output head has a weight of its own, for mlx-lm.

``tie_word_embeddings`` becomes false, and the embedding's weight is stored once more as the head's.
Both libraries then have two modules where they had one, and compute what they did before.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraduct.architectures import Architecture, table
from loraduct.errors import Refused
from loraduct.files import Source, file_chunks, resolved, write_file
from loraduct.formats import model_folder
from loraduct.formats.base import HEADS, Base
from loraduct.formats.json_file import dump, read_object
from loraduct.formats.model_folder import CONFIG, INDEX, WEIGHTS
from loraduct.formats.safetensors_file import read_header
from loraduct.tensor import Tensor
from loraduct.text import printable

SHARD = "model-lm_head.safetensors"  # mlx-lm reads model*.safetensors, transformers the index
_STEP = 4 << 20


@dataclass(frozen=True)
class Untied:
    """What is to be written: decided and checked, no weights read yet."""

    base: Base
    head: str
    config: Mapping[str, Any]
    added: Mapping[str, Tensor]  # the head's tensors by name: regions of the base's files
    companions: tuple[Path, ...]
    notes: tuple[str, ...]


def has_form(base: Base) -> bool:
    """Whether mlx-lm has the base's architecture with a head of its own.

    The table is derived with heads that aren't tied, so it lists the head just where mlx-lm has
    one; gemma, gemma2, cohere, gpt2, lfm2 always use the embedding.
    """
    known = table().get(base.architecture)
    return known is not None and bool(_heads(known))


def _heads(known: Architecture) -> list[str]:
    """The head's names in transformers, in files or in memory."""
    return [p for p in known.by_hf if p.endswith(HEADS) and "{}" not in p]


def plan(base: Base) -> Untied:
    """The untied copy of ``base``. Raises Refused where there is none."""
    if base.tied is False:
        raise Refused(
            base.path / CONFIG, "tie_word_embeddings is false already: leave --untie-base out"
        )
    known = table().get(base.architecture)
    if known is None or not has_form(base):
        why = known.blocked.get("lm_head") if known else None
        raise Refused(
            base.path / CONFIG,
            f"is a {printable(base.model_type, 60)} model, of which no form with a head of its own is"
            f" known in mlx-lm ({why or 'its verified modules have none'}): --untie-base can't help;"
            " --allow-approximate can",
        )
    if not base.has_weights:
        raise Refused(base.path, "holds no model*.safetensors; --untie-base copies the weights")
    if not (base.path / INDEX).exists() and not (base.path / WEIGHTS).exists():
        raise Refused(base.path, f"holds neither {WEIGHTS} nor {INDEX}: can't be copied whole")
    if base.embedding is None:
        raise Refused(base.path, "which of its tensors is the embedding can't be told")
    stem = base.embedding.removesuffix(".weight")
    if base.stored_head is not None:
        raise Refused(
            base.path,
            "holds a head beside the embedding that it is said to be tied to: which one counts can't"
            " be told; set tie_word_embeddings to false by hand, or remove it",
            tensor=base.stored_head,
        )
    head = _head_beside(stem, _heads(known))
    added = {
        f"{head}{n.removeprefix(stem)}": t  # of a packed weight: its scales and biases too
        for n, t in base.tensors.items()
        if n.startswith(f"{stem}.")
    }
    found = tuple(model_folder.carried(base.path))
    left = tuple(model_folder.left(base, "not carried to the untied base"))
    return Untied(base, head, _config(base, stem, head), added, found, left)


def _head_beside(stem: str, heads: list[str]) -> str:
    """What the head is called in a file where the embedding is called ``stem``."""
    inner = "language_model.lm_head"
    if stem.startswith("language_model.") and inner in heads:
        return inner
    return "embed_out" if "embed_out" in heads else heads[0]  # GPT-NeoX's name in files


def _config(base: Base, stem: str, head: str) -> dict[str, Any]:
    config = {**base.config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    for field in ("quantization", "quantization_config"):  # settings of single modules
        settings = config.get(field)
        if isinstance(settings, dict) and stem in settings:
            config[field] = {**settings, head: settings[stem]}
    return config


def _files(base: Base) -> list[Any]:
    """One tensor of each weights file."""
    return list({t.path: t for t in base.tensors.values()}.values())


def check_target(target: Path, *others: Path) -> None:
    """Refuse a folder that exists, or that is one of ``others``, in one or around one."""
    if target.exists() or target.is_symlink():
        raise Refused(
            target,
            "exists; an untied base is only written anew: remove it, or, if it is one, convert with"
            " --base on it and without --untie-base",
        )
    if not target.parent.is_dir():
        raise Refused(target.parent, "does not exist, or is not a folder; make it first")
    real = resolved(target)
    for other in map(resolved, others):
        if real == other or real in other.parents or other in real.parents:
            raise Refused(target, f"is {other}, lies in it, or holds it; choose another folder")


def write(untied: Untied, stage: Path) -> dict[str, int]:
    """Write the base into ``stage``, piece by piece; returns the bytes of each file."""
    base = untied.base
    index = base.path / INDEX
    home = next(iter(untied.added.values())).path
    assert home is not None
    metadata = read_header(home)[1]
    if index.exists():
        changed, names = _mended(read_object(index), untied)
        write_file(stage / INDEX, [dump(changed)])
        for name in names:
            write_file(stage / name, file_chunks(base.path / name))
        write_file(stage / SHARD, _serialized({}, untied.added, metadata))
    else:
        old = read_header(base.path / WEIGHTS)[0]
        write_file(stage / WEIGHTS, _serialized(old, untied.added, metadata))
    write_file(stage / CONFIG, [dump(dict(untied.config))])
    return model_folder.carry(base.path, untied.companions, stage)


def _mended(index: dict[str, Any], untied: Untied) -> tuple[dict[str, Any], list[str]]:
    """The index with the head's shard in it, and the names of the shards there were."""
    old: dict[str, str] = index["weight_map"]
    if SHARD in old.values():
        raise Refused(untied.base.path / INDEX, f"names a shard {SHARD} already")
    texts = index.get("metadata")
    texts = dict(texts) if isinstance(texts, dict) else {}
    more = {
        "total_size": sum(t.stored_nbytes for t in untied.added.values()),
        "total_parameters": sum(math.prod(t.stored_shape) for t in untied.added.values()),
    }
    texts |= {k: texts[k] + n for k, n in more.items() if type(texts.get(k)) is int}
    new = {**index, "metadata": texts, "weight_map": {**old, **dict.fromkeys(untied.added, SHARD)}}
    return new, sorted(set(old.values()))


def _serialized(
    old: Mapping[str, Tensor], added: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[Any]:
    """A weights file: the old data as it lies, and behind it the added tensors' bytes.

    Bytes are moved and no value is looked at, so it holds for every dtype.
    """
    begin = min((t.offset for t in old.values()), default=0)
    end = max((t.offset + t.stored_nbytes for t in old.values()), default=0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans = {n: (t, t.offset - begin) for n, t in old.items()}
    at = end - begin
    for name, tensor in added.items():
        spans[name] = tensor, at
        at += tensor.stored_nbytes
    for name, (tensor, first) in spans.items():
        header[name] = {
            "dtype": tensor.stored_dtype,
            "shape": list(tensor.stored_shape),
            "data_offsets": [first, first + tensor.stored_nbytes],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    yield struct.pack("<Q", len(raw)) + raw
    regions = [(t.source, t.offset, t.stored_nbytes, t.name) for t in added.values()]
    if old:
        any_ = next(iter(old.values()))
        regions.insert(0, (any_.source, begin, end - begin, any_.name))
    for source, offset, count, what in regions:
        assert source is not None
        yield from _region(source, offset, count, what)


def _region(source: Source, offset: int, count: int, what: str) -> Iterator[bytearray]:
    for done in range(0, count, _STEP):
        yield source.read(offset + done, min(_STEP, count - done), what)
