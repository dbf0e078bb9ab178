"""A base model with adapters fused into it, as a folder that transformers or mlx-lm loads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.converters import fuse_packed, tied
from loraduct.converters.fuse_packed import Module
from loraduct.converters.fuse_places import Placed, check_parted, is_end, placed
from loraduct.converters.fuse_stream import fused_tensor
from loraduct.converters.neutral import neutral
from loraduct.errors import Refused
from loraduct.formats import model_folder, untied
from loraduct.formats.base import Base, correlation
from loraduct.formats.model_folder import Stored, copied
from loraduct.formats.quantised import check_plain
from loraduct.tensor import FLOATS, Tensor
from loraduct.text import printable

KIN = 0.8  # correlation of samples from which a packed base may be a copy: 2 bits came to 0.89
EXACT = "base_sha256"  # key of an adapter's metadata: the fingerprint of the base it is for
# what --remedy auto tries besides; rescaling costs ten times as long, and keeps less
COMPARED = ("compensate", "bits")
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Options:
    """``dtype``: keep, f32, f16 or bf16. ``shard``: bytes per file. ``growth``: what remedy ``bits``
    may add to the weights' bytes, as a share of them."""

    dtype: str = "keep"
    shard: int = model_folder.SHARD
    allow_kin: bool = False
    remedy: str = "none"
    growth: float = 0.10


@dataclass(frozen=True)
class Plan:
    """A folder to be written: decided and checked, no weights read yet."""

    base: Base
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]
    places: Placed
    adapters: Sequence[tuple[Adapter, float]]  # in transformers' names, relative to the base
    packed: Mapping[str, Module]
    untied: str | None  # the head that got a weight of its own
    notes: tuple[str, ...]
    shard: int

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def before(self) -> int:
        """Of the base's tensors."""
        return sum(t.nbytes for t in self.base.tensors.values())

    @property
    def side(self) -> int:
        """Of the adapters as they are, beside the base."""
        updates = (u for a, _ in self.adapters for u in a.updates.values())
        return sum(o.stored_nbytes for u in updates for t in u.tensors for o in t.origins)


def check_base(base: Base) -> None:
    """Refuse a base that can't be fused into, with the way out."""
    check_plain(base)
    if not base.has_weights:
        raise Refused(base.path, "holds no model*.safetensors; a base with weights is expected")


def plan(base: Base, adapters: Sequence[tuple[Adapter, float]], options: Options) -> Plan:
    """What is written for ``base`` with ``adapters`` (each with its weight) fused into it.

    Raises Refused for other bases, updates without a place, and what is packed otherwise than by MLX.
    """
    check_base(base)
    held = fuse_packed.modules(base)
    if held and options.dtype != "keep":
        what = "is packed: its dtype is kept; unpack it first (loraduct decompress)"
        raise Refused(base.path / "config.json", f"{what} to use --dtype")
    notes = [
        kinship(a, base, _kin_of(base, held), options.allow_kin, partial(fingerprint, base))
        for a, _ in adapters
    ]
    notes += [*idle(adapters), *model_folder.left(base)]
    given = [(neutral(a, base), weight) for a, weight in adapters]
    given, head, config, added = _heads(base, given)
    if head is not None:
        check_parted(given)
        notes.append(f"the head was tied to the embedding and now has a weight of its own ({head})")
    tensors = dict(base.tensors) | added
    base_now = replace(base, config=config)
    base_now.__dict__["tensors"] = tensors  # the cached property: the base as it will be
    held = fuse_packed.modules(base_now)
    places = placed(given, base_now, fuse_packed.shapes(base_now, held))
    if head is None and base.tied and base.embedding in places.touched():
        tensors.pop(base.stored_head or "", None)  # a copy that nobody reads, of what it was
    if held and options.remedy == "bits":
        room = int(options.growth * sum(t.nbytes for t in base.tensors.values()))
        held = fuse_packed.widened(held, places, room)
        config = _widened_config(config, held)
    return Plan(
        base, _stored(tensors, places, held, options), _with_dtype(config, options.dtype), places,
        given, held, head, tuple(notes), options.shard,
    )  # fmt: skip


def _stored(
    tensors: Mapping[str, Tensor], places: Placed, held: Mapping[str, Module], options: Options
) -> dict[str, Stored]:
    """Every tensor of the result, in the base's order."""
    touched, done = places.touched(), dict[str, Stored]()
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if (
            module in held
            and f"{module}.weight" in touched
            and part in ("scales", "biases", "weight")
        ):
            m = held[module]
            if f"{module}.weight" in places.replaced:
                what = "replaces a packed weight; fuse into the unpacked base and pack it again"
                raise Refused(places.replaced[f"{module}.weight"].path, what, tensor=module)
            done[name] = fuse_packed.stored(m, places, options.remedy)[name]
            continue
        floating = tensor.dtype in FLOATS
        dtype = DTYPES.get(options.dtype, tensor.dtype) if floating else tensor.dtype
        if name in touched:
            done[name] = fused_tensor(name, tensor, places, dtype)
        elif dtype == tensor.dtype:
            done[name] = copied(tensor)
        else:
            done[name] = Stored(dtype, tensor.shape, partial(tensor.to(dtype).chunks))
    return done


def _heads(
    base: Base, adapters: Sequence[tuple[Adapter, float]]
) -> tuple[list[tuple[Adapter, float]], str | None, dict[str, Any], dict[str, Tensor]]:
    """A tied head that moves otherwise than the embedding gets a weight of its own.

    (adapters, the head's name or None, the config, the head's tensors).
    """
    config = dict(base.config)
    if base.tied is False or (base.tied is None and base.stored_head):
        return list(adapters), None, config, {}
    done = []
    for adapter, weight in adapters:
        try:
            settled = tied.settle(adapter, base, allowed=False, untied=False).adapter
        except Refused:
            return _untie(base, adapters)
        if any(is_end(n) for n in adapter.replacements):
            return _untie(base, adapters)
        done.append((settled, weight))
    return done, None, config, {}


def _untie(
    base: Base, adapters: Sequence[tuple[Adapter, float]]
) -> tuple[list[tuple[Adapter, float]], str, dict[str, Any], dict[str, Tensor]]:
    if base.quantization is not None and not untied.has_form(base):
        kind = printable(base.model_type, 60)
        what = f"is a packed {kind} model, whose head is the embedding in mlx-lm, always; the adapter parts"
        way = "the two: fuse it into the unpacked base (transformers' folder)"
        raise Refused(base.path / "config.json", f"{what} {way}")
    if untied.has_form(base):
        stored = replace(base)
        stored.__dict__["tensors"] = {
            n: t for n, t in base.tensors.items() if n != base.stored_head
        }
        made = untied.plan(stored)
        return list(adapters), f"{made.head}.weight", dict(made.config), dict(made.added)
    if base.embedding is None:
        raise Refused(base.path, "which of its tensors is the embedding can't be told")
    config = {**base.config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    name = base.stored_head or "lm_head.weight"
    return list(adapters), name, config, {name: base.tensors[base.embedding]}


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config's word for the weights' dtype, wherever it stands."""
    done = dict(config)
    if dtype == "keep":
        return done
    for part in [
        done,
        *([done["text_config"]] if isinstance(done.get("text_config"), dict) else []),
    ]:
        named = {k: _NAMES[DTYPES[dtype]] for k in ("dtype", "torch_dtype") if k in part}
        if part is done:
            done = done | named
        else:
            done["text_config"] = {**part, **named}
    return done


def _widened_config(config: Mapping[str, Any], held: Mapping[str, Module]) -> dict[str, Any]:
    """MLX's settings of single layers."""
    own = {
        m.name: {"group_size": m.then.group, "bits": m.then.bits}
        for m in held.values()
        if m.then != m.now
    }
    fields = [k for k in ("quantization", "quantization_config") if isinstance(config.get(k), dict)]
    return {**config, **{k: {**config[k], **own} for k in fields}}


def idle(adapters: Sequence[tuple[Adapter, float]]) -> list[str]:
    """A note on each adapter that adds nothing. Raises Refused where all are."""
    if not any(weight for _, weight in adapters):
        raise Refused(adapters[0][0].path, "every weight is 0: nothing is left to fuse")
    found = []
    for adapter, weight in adapters:
        zero = ["has weight 0: it contributes nothing"] if weight == 0 else []
        why = zero + [n.text for n in adapter.notes if n.kind == "zero"]
        found += [f"{printable(adapter.path.name, 80)}: {what}" for what in why]
    return found


def kinship(
    adapter: Adapter,
    base: Base,
    kin: str | None,
    allowed: bool,
    exact: Callable[[], str] | None = None,
) -> str:
    """What is known of whether ``base`` is the adapter's own, as a note.

    ``kin``: its sample of weights; ``exact``: its fingerprint, where it can have one. Raises Refused
    where it is known to be another copy of it (in another precision) and nobody allowed that.
    """
    recorded, name = adapter.metadata.get(EXACT), printable(adapter.path.name, 80)
    if recorded is not None and exact is not None:
        if recorded == exact():
            return f"{name}: the base is byte for byte the one it was made for"
        return _kin(
            adapter, base, "its bytes are not those of the base the adapter records", allowed
        )
    if adapter.base.kin is None or kin is None:
        known = "modules and shapes fit"
    elif adapter.base.kin != kin:
        alike = correlation(adapter.base.kin, kin)
        if alike is not None and alike < KIN:
            what = f"sampled weights correlate {alike:.3f} with those it records, expected over {KIN:g}"
            raise Refused(base.path, f"is not the base of {adapter.path}: {what}")
        what = "its sampled weights are near those the adapter records, not equal"
        return _kin(adapter, base, what, allowed)
    else:
        known = "modules and shapes fit, and sampled weights are those it records"
    return f"{name}: records no fingerprint of its base, so this can't be proven to be it; {known}"


def _kin(adapter: Adapter, base: Base, what: str, allowed: bool) -> str:
    if allowed:
        return f"{printable(adapter.path.name, 80)}: taken for a copy of its base (--allow-kin): {what}"
    way = "fuse into that base, or use --allow-kin if this is a copy of it in another precision"
    raise Refused(base.path, f"is not the base of {adapter.path}: {what}; {way}")


def _kin_of(base: Base, held: Mapping[str, Module]) -> str | None:
    return (
        base.kin
        if base.quantization is None
        else _once(base, "unpacked_kin", lambda: _unpacked(base, held).kin)
    )


def _once(base: Base, key: str, make: Callable[[], Any]) -> Any:
    """Made once for each base, as its cached properties are: several plans may ask."""
    held = base.__dict__
    if key not in held:
        held[key] = make()
    return held[key]


def _unpacked(base: Base, held: Mapping[str, Module]) -> Base:
    """The base with float32 weights in the place of packed ones, to be sampled."""
    from loraduct.computed import given

    found = {n: t for n, t in base.tensors.items() if not n.endswith((".scales", ".biases"))}
    for name, m in held.items():
        found[f"{name}.weight"] = given(f"{name}.weight", [m.weight], m.shape, partial(_whole, m))
    config = {k: v for k, v in base.config.items() if not k.startswith("quantization")}
    done = replace(base, config=config)
    done.__dict__["tensors"] = found
    return done


def _whole(m: Module) -> Any:
    import numpy as np

    return np.concatenate([block for _, block in fuse_packed.read_blocks(m)]).reshape(m.shape)


def fingerprint(base: Base) -> str:
    """sha256 over the names, shapes, dtypes and bytes of all tensors, by name; worked out once."""
    return str(_once(base, "fingerprint", partial(_digest, base)))


def _digest(base: Base) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(base.tensors.items()):
        digest.update(f"{name} {tensor.stored_dtype} {list(tensor.stored_shape)}\n".encode())
        for piece in copied(tensor).pieces():
            digest.update(piece)
    return digest.hexdigest()


def write(made: Plan, stage: Path) -> dict[str, int]:
    """Write the folder's files into ``stage``; returns the bytes of each."""
    return model_folder.write(made.base, made.tensors, made.config, made.shard, stage)


def read_through(made: Plan) -> None:
    """Compute everything and write nothing, so that what would be refused is."""
    for tensor in made.tensors.values():
        for _ in tensor.pieces():
            pass
