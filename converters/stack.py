"""Several adapters side by side in one, active together, and taken apart again bit for bit.

The factors stand behind one another along the rank, so the stack does what the adapters do
together. A module has one scale there: b_i is stored as b_i * (s_i / s), which rounds in float32
unless the ratio is a power of two. What that changes in the way back, a unit in the last place here
and there, is kept with the record in the file's metadata, and so are configs, ranks, scales and
dtypes, and a hash of every adapter's tensors: what comes apart has it, or is refused.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loraduct import origin
from loraduct.adapter import Adapter, BaseRef, LowRank, Note, Replacement, Update
from loraduct.converters import merge_rest, names
from loraduct.converters.merge import Merged, Module, Settings, concatenated
from loraduct.converters.merge_names import aligned, labels_of, own_naming
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.tensor import FLOATS, Tensor, as_float32, from_float, same
from loraduct.text import number, printable, several

KEY = "loraduct_stack"
_ROOM = 12 << 20  # bytes of the record: a safetensors header may have 16 MB
_FIELDS = {"label": str, "format": str, "naming": str, "config": dict, "modules": dict}
# Fields by which PEFT's reader makes factors of other tensors, which are not in the stack.
_MADE = ("kasa_config", "use_qalora", "use_bdlora")


def stack(adapters: Sequence[Adapter], base: Base | None = None, to: str = "peft") -> Merged:
    """One adapter that does what all do together. Raises Refused for what can't be taken apart.

    ``to``: the format it is for; it has that side's names where all adapters have them.
    """
    for adapter in adapters:
        _check(adapter)
    named = aligned(adapters, base, own_naming(adapters, to) or "hf")
    for old, new in zip(adapters, named, strict=True):
        if len(old.low_rank) != len(new.low_rank):
            what = (
                "has other modules in transformers than in mlx-lm: stack MLX adapters alone, with --to"
                " mlx, or convert it to PEFT first"
            )
            raise Refused(old.path, what)
    labels = labels_of(named)
    scales = Counter(u.scale for a in named for u in a.low_rank.values() if u.scale)
    scale = scales.most_common(1)[0][0] if scales else 1.0
    updates: dict[str, Update] = {}
    modules = []
    fixes: list[dict[str, str]] = [{} for _ in named]
    for name in dict.fromkeys(m for a in named for m in a.low_rank):
        held = [(i, a.low_rank[name]) for i, a in enumerate(named) if name in a.low_rank]
        first = held[0][1]
        for i, u in held:
            if (u.shape, u.layout) != (first.shape, first.layout):
                what = f"updates a weight of shape {list(u.shape)}, another adapter {list(first.shape)}"
                raise Refused(named[i].weights, f"{what}: made for another base", tensor=name)
        whole = concatenated([(u, 1.0) for _, u in held], scale)
        start = 0
        for i, u in held:
            if (fix := _fix(whole, u, start)) is not None:
                fixes[i][name] = fix
            start += u.rank
        updates[name] = whole
        modules.append(Module(name, len(held), whole.rank, whole.rank, 0.0))
    ones = [dict.fromkeys(a.updates, 1.0) for a in named]
    updates |= _replacements(named)
    weights = [{**dict.fromkeys(updates, 1.0), **w} for w in ones]
    adapter = merge_rest.result(named, weights, labels, updates, Settings("cat"), base)
    record = [
        _record(label, old, new, fix)
        for label, old, new, fix in zip(labels, adapters, named, fixes, strict=True)
    ]
    told = {"model_type": base.architecture if base else None, "adapters": record}
    text = json.dumps(told, separators=(",", ":"))
    if len(text) > _ROOM:
        what = f"needs a record of {len(text):,} bytes to be taken apart again, over {_ROOM:,}"
        raise Refused(
            adapters[0].path, f"{what}: give the adapters one scale, or store them in 16 bits"
        )
    texts = {k: v for k, v in adapter.metadata.items() if k != merge_rest.KEY}
    notes = tuple(
        f"{printable(label)}: {_without(len(a.set_aside))}: {several([t.name for t in a.set_aside])}"
        for label, a in zip(labels, adapters, strict=True)
        if a.set_aside
    )
    done = replace(adapter, metadata=texts | {KEY: text})
    return Merged(done, tuple(modules), notes, tuple(labels))


def _without(copies: int) -> str:
    return (
        f"comes back without {number(copies)} copies of weights, which had no effect of their own"
    )


def _check(adapter: Adapter) -> None:
    odd = [f for f in _MADE if adapter.config.get(f)]
    if adapter.technique or odd:
        what = f"is {adapter.technique or odd[0]}, whose file holds other tensors than its factors"
        raise Refused(adapter.path, f"{what}: convert it to plain LoRA first")
    for name, u in adapter.low_rank.items():
        if u.magnitude is not None:
            what = "is DoRA: together with others it is DoRA of the sum, which can't be taken apart"
            raise Refused(adapter.path, f"{what}; merge it with --base BASE", tensor=name)
        if u.bias is not None:
            what = "has a low-rank bias: biases add up and can't be taken apart"
            raise Refused(adapter.path, what, tensor=name)
    if KEY in adapter.metadata:
        raise Refused(adapter.path, "is a stack itself: unstack it, and stack all adapters at once")


def _replacements(adapters: Sequence[Adapter]) -> dict[str, Update]:
    found: dict[str, Update] = {}
    for adapter in adapters:
        for name, r in adapter.replacements.items():
            first = found.setdefault(name, r)
            assert isinstance(first, Replacement)
            if first is not r and not same(first.weight, r.weight):
                what = (
                    "replaces this parameter otherwise than another adapter: only one can be active"
                )
                raise Refused(adapter.weights, what, tensor=name)
    return found


def _record(label: str, old: Adapter, new: Adapter, fixes: Mapping[str, str]) -> dict[str, Any]:
    modules = {m: [u.rank, u.scale, u.a.dtype, u.b.dtype] for m, u in new.low_rank.items()}
    return {
        "label": label,
        "format": old.format,
        "naming": old.naming,
        "config": dict(old.config),
        "texts": {k: v for k, v in old.metadata.items() if k not in (origin.KEY, "format")},
        "modules": modules,
        "replacements": list(new.replacements),
        "fixes": dict(fixes),
        "layers": old.layers,
        "copies": len(old.set_aside),
        "digest": digest(new),
    }


def digest(adapter: Adapter) -> str:
    """A hash of the values of all low-rank updates, in the order of their names."""
    import hashlib

    found = hashlib.sha256()
    for name in sorted(adapter.low_rank):
        u = adapter.low_rank[name]
        for t in (u.a, u.b):
            found.update(f"{name} {t.dtype} {t.shape}\n".encode())
            found.update(t.raw().tobytes())
    return found.hexdigest()[:32]


def _cut(
    whole: LowRank, start: int, rank: int, scale: float, dtypes: Sequence[str]
) -> tuple[Any, Any]:
    """Raw values of a and b of one adapter, as they come back before anything is set right."""
    import numpy as np

    span = slice(start, start + rank)
    experts = whole.layout == "experts"
    a = as_float32(whole.a.raw(), whole.a.dtype)
    b = as_float32(whole.b.raw(), whole.b.dtype)
    a, b = (a[:, span], b[:, :, span]) if experts else (a[span], b[:, span])
    factor = whole.scale / scale if scale else 1.0
    back = b if factor == 1.0 else b.astype(np.float64) * factor
    return from_float(a, dtypes[0]), from_float(back, dtypes[1])


def _fix(whole: LowRank, u: LowRank, start: int) -> str | None:
    """What must be added to the bits of b that come back; None if nothing."""
    import numpy as np

    a, b = _cut(whole, start, u.rank, u.scale, (u.a.dtype, u.b.dtype))
    wanted = np.ascontiguousarray(u.b.raw())
    b = np.ascontiguousarray(b)
    kind = np.int32 if u.b.dtype == "F32" else np.int16
    off = wanted.view(kind).astype(np.int64) - b.view(kind)
    if a.tobytes() != np.ascontiguousarray(u.a.raw()).tobytes() or np.abs(off).max(initial=0) > 127:
        what = f"can't be had back from a stack of scale {whole.scale:g} (its own is {u.scale:g})"
        raise Refused(u.b.path, what, tensor=u.b.name)
    if not off.any():
        return None
    return base64.b64encode(zlib.compress(off.astype(np.int8).tobytes(), 9)).decode()


def unstack(stacked: Adapter) -> dict[str, Adapter]:
    """Label -> the adapter as it was: tensors and config; a note says which copies it came without.

    Raises Refused where that can't be had.
    """
    text = stacked.metadata.get(KEY)
    if text is None:
        raise Refused(stacked.path, "is no stack: its weights hold no record of loraduct stack")
    try:
        record = json.loads(text)
        adapters = record["adapters"]
        sound = all(isinstance(a.get(f), t) for a in adapters for f, t in _FIELDS.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise Refused(stacked.weights, f"has a record of a stack ({KEY}) that can't be understood")
    inner = stacked
    if stacked.naming == "mlx" and any(a["naming"] == "hf" for a in adapters):
        inner = names.rename(stacked, "hf", record.get("model_type"), stacked.weights, None)[0]
    starts: Counter[str] = Counter()
    return {a["label"]: _one(inner, a, starts, record.get("model_type")) for a in adapters}


def _one(
    stacked: Adapter, told: Mapping[str, Any], starts: Counter[str], model_type: Any
) -> Adapter:
    updates: dict[str, Update] = {}
    for name, row in told["modules"].items():
        whole = stacked.low_rank.get(name)
        if whole is None or not _is_row(row) or starts[name] + row[0] > whole.rank:
            what = f"lacks what {printable(told['label'])} had here: it was changed since it was stacked"
            raise Refused(stacked.weights, what, tensor=name)
        updates[name] = _part(
            stacked, name, whole, starts[name], row, told.get("fixes", {}).get(name)
        )
        starts[name] += row[0]
    for name in told.get("replacements", []):
        if name in stacked.replacements:
            updates[name] = stacked.replacements[name]
    copies = told.get("copies") if type(told.get("copies")) is int else 0
    found = replace(
        stacked,
        format=told["format"] if told["format"] in ("peft", "mlx") else "peft",
        method="lora",
        updates=updates,
        config=told["config"],
        metadata={k: v for k, v in told.get("texts", {}).items() if isinstance(v, str)},
        origin=None,
        companions=(),
        notes=(Note("copies", _without(copies)),) if copies else (),
        layers=told.get("layers") if isinstance(told.get("layers"), int) else stacked.layers,
        base=BaseRef(told["config"].get("base_model_name_or_path") or told["config"].get("model")),
    )
    if digest(found) != told.get("digest"):
        what = f"no longer holds {printable(told['label'])} bit for bit: it was changed since it was stacked"
        raise Refused(stacked.weights, what)
    if told["naming"] == "mlx" and found.naming == "hf":
        found = names.rename(found, "mlx", model_type, stacked.weights, None)[0]
    return found


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) == 4
        and type(row[0]) is int
        and row[0] > 0
        and isinstance(row[1], int | float)
        and row[2] in FLOATS
        and row[3] in FLOATS
    )


def _part(
    stacked: Adapter, name: str, whole: LowRank, start: int, row: Sequence[Any], fix: Any
) -> LowRank:
    import numpy as np

    rank, scale, *dtypes = row
    a, b = (np.ascontiguousarray(x) for x in _cut(whole, start, rank, scale, dtypes))
    if fix is not None:
        kind = np.int32 if dtypes[1] == "F32" else np.int16
        try:
            packed = base64.b64decode(fix, validate=True)
            plain = zlib.decompressobj().decompress(packed, b.size + 1)
            off = np.frombuffer(plain, np.int8).reshape(b.shape)
        except (ValueError, TypeError, zlib.error):
            raise Refused(stacked.weights, f"its record ({KEY}) is broken", tensor=name) from None
        b = (b.view(kind) + off.astype(kind)).view(b.dtype)

    def held(side: str, value: Any, dtype: str) -> Tensor:
        return Tensor(f"{name}.{side}", dtype, value.shape, data=value, path=stacked.weights)

    return LowRank(held("a", a, dtypes[0]), held("b", b, dtypes[1]), scale, layout=whole.layout)
