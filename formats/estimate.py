"""How large will an adapter be? From a base's config alone, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraduct.architectures import table as architectures
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats.base import Base
from loraduct.modules import KINDS, block_of, kind_of_module
from loraduct.text import printable, several, size, table

WIDTHS = (16, 8, 6, 4, 3, 2, 1)  # bits per value
ALL_LINEAR = "all-linear"  # PEFT's own word
_OWN = ("attention matrices", "attention projection", "feed-forward", "other mixers")
_ROUTERS = ("gate", "router", "classifier")  # rarely an nn.Linear, and small: not counted unasked
_SAME_SHAPES = ("full_attention", "sliding_attention", "chunked_attention")
_HEADS_DIFFER = ("num_attention_heads_per_layer", "attn_type_list")
_LATENT = "self_attn.kv_a_proj_with_mqa"  # multi-head latent attention has shapes of its own

Shapes = dict[str, tuple[int, int]]


def estimate(config: Path, rank: int, targets: list[str] | None = None) -> dict[str, Any]:
    """Parameters and bytes of a LoRA of ``rank`` on ``targets`` (last names, or ends of paths).

    Without targets: on the linear layers of the attention and the feed-forward, whatever the
    architecture calls them. Every module counts once, under the first target that hits it. Shapes
    come from the base's weights where they are there, else from its config.json; ``not_counted``
    names what neither tells. Raises Refused for a target the base does not have.
    """
    if config.is_file() and config.name != "config.json":
        from loraduct.formats.json_file import read_object

        base = Base(config.parent / "nowhere", read_object(config))
    else:
        base = base_folder.read(config)
    shapes, omitted = _from_weights(base) if base.has_weights else _from_config(base, config)
    if targets in (None, [ALL_LINEAR]):
        own = {m: s for m, s in shapes.items() if _is_own(m)}
        omitted |= {
            _name(m) for m in shapes.keys() - own if kind_of_module(m) in ("experts", *_OWN)
        }
        shapes, targets = own, sorted({_within(m) for m in own})
    rows = _rows(shapes, targets or [], rank, config)
    total = sum(r["parameters"] for r in rows)
    return {
        "base": str(config),
        "model_type": base.model_type,
        "layers": base.layers,
        "rank": rank,
        "targets": sorted(rows, key=lambda r: KINDS.index(r["kind"])),
        "not_counted": sorted(omitted),
        "parameters": total,
        "bytes": {str(w): (total * w + 7) // 8 for w in WIDTHS},
    }


def _rows(shapes: Shapes, targets: list[str], rank: int, file: Path) -> list[dict[str, Any]]:
    """One row for each target that hits a module no earlier one did."""
    rows: list[dict[str, Any]] = []
    missing, counted = [], set[str]()
    for target in targets:
        hits = {m: s for m, s in shapes.items() if m == target or m.endswith(f".{target}")}
        if not hits:
            missing.append(target)
        fresh = {m: s for m, s in hits.items() if m not in counted}
        counted |= fresh.keys()
        if fresh:
            row = {
                "target": target,
                "kind": kind_of_module(next(iter(fresh))),
                "modules": len(fresh),
                "out_in": [list(s) for s in sorted(set(fresh.values()))],
                "parameters": sum(rank * (o + i) for o, i in fresh.values()),
            }
            rows.append(row)
    if missing or not rows:
        known = sorted({m.rsplit(".", 1)[-1] for m in shapes})
        has = f"known are {several(known, 20)}" if known else "no linear layer of it is known"
        raise Refused(file, f"{several(missing) or 'nothing'} can't be counted: {has}")
    return rows


def _within(module: str) -> str:
    """The path within the block, with other indices left open; outside blocks the whole path."""
    block = block_of(module)
    return block[2] if block else module


def _name(module: str) -> str:
    """How a module that isn't counted is named: all experts alike."""
    return "experts" if kind_of_module(module) == "experts" else _within(module)


def _is_own(module: str) -> bool:
    return kind_of_module(module) in _OWN and module.rsplit(".", 1)[-1] not in _ROUTERS


def _from_weights(base: Base) -> tuple[Shapes, set[str]]:
    """Shapes of the matrices in the base's files; names of fused experts, which are no matrices."""
    found: Shapes = {}
    omitted = set()
    for name, tensor in base.tensors.items():
        module = name.removesuffix(".weight")
        shape = base.shape_of(module) if name.endswith(".weight") else None
        if shape is not None and kind_of_module(module) != "embedding":
            found[module] = (shape[0], shape[1])
        elif len(tensor.shape) == 3 and kind_of_module(module) == "experts":
            omitted.add(_name(module))
    return found, omitted


def _from_config(base: Base, file: Path) -> tuple[Shapes, set[str]]:
    """Linear layers of a decoder with grouped-query attention and a (gated) feed-forward.

    Shapes by module, and the names of linear layers that the config alone does not size: with
    experts, which blocks have a plain feed-forward differs by architecture.
    """
    c = base.text_config

    def size_of(*names: str, default: int | None = None) -> int:
        value = next((c[n] for n in names if type(c.get(n)) is int), default)
        if value is None or value <= 0:
            raise Refused(file, f"has no {names[0]}; give the base's folder with its weights")
        return value

    layers, hidden = base.layers, size_of("hidden_size", "n_embd", "d_model")
    if layers is None or layers > 4096:
        raise Refused(file, "does not say the number of layers")
    heads = size_of("num_attention_heads", "n_head")
    kv = size_of("num_key_value_heads", default=heads)
    head = size_of("head_dim", default=hidden // heads)
    inter = size_of("intermediate_size", "n_inner", default=4 * hidden)
    q, k = heads * head, kv * head
    sizes = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (k, hidden),
        "self_attn.v_proj": (k, hidden),
        "self_attn.o_proj": (hidden, q),
        "self_attn.qkv_proj": (q + 2 * k, hidden),
        "mlp.gate_up_proj": (2 * inter, hidden),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
        "mlp.c_fc": (inter, hidden),
        "mlp.c_proj": (hidden, inter),
        "mlp.fc1": (inter, hidden),
        "mlp.fc2": (hidden, inter),
        "self_attn.dense": (hidden, q),
    }
    entry = architectures().get(base.architecture)
    # live names only: the table also knows the names of older versions
    hf = {*(r.hf for r in entry.by_mlx.values()), *entry.blocked} if entry else set[str]()
    first = {_block_0(p) for p in hf if "{}" in p}
    skipped = {"mlp"} if any(kind_of_module(m) == "experts" for m in first) else set[str]()
    if any(_within(m) == _LATENT for m in first):
        skipped.add("self_attn")
    alike = {_within(_block_0(p)) for p in (entry.equal if entry else ())}
    sized = sorted(n for n in alike if n in sizes and n.split(".")[0] not in skipped)
    kinds = c.get("layer_types")
    uneven = (
        any(kind_of_module(m) == "other mixers" for m in first)
        or any(k not in _SAME_SHAPES for k in (kinds if isinstance(kinds, list) else ()))
        or any(n in c for n in _HEADS_DIFFER)
    )
    if uneven or not sized:
        raise Refused(
            file,
            f"model_type {printable(base.model_type)!r}: its config alone does not tell the shapes"
            " of all layers; give the base's folder with its weights",
        )
    shapes = {f"model.layers.{i}.{n}": sizes[n] for i in range(layers) for n in sized}
    return shapes, {_name(m) for m in first if _within(m) not in sized}


def _block_0(pattern: str) -> str:
    return pattern.replace("{}", "0")


def lines(d: dict[str, Any]) -> list[str]:
    """The estimate as text."""
    rows = [["kind", "module", "count", "out x in", "parameters"]]
    rows += [
        [
            r["kind"],
            r["target"],
            str(r["modules"]),
            ", ".join(f"{o} x {i}" for o, i in r["out_in"][:3]),
            f"{r['parameters']:,}",
        ]
        for r in d["targets"]
    ]
    bits = "  ".join(f"{w}-bit {size(b)}" for w, b in d["bytes"].items())
    return [
        f"LoRA of rank {d['rank']} on {printable(d['base'], 200)}"
        f" ({printable(d['model_type'], 40)}, {d['layers']} layers)",
        *table(rows),
        *([f"  ! not counted: {several(d['not_counted'], 12)}"] if d["not_counted"] else []),
        f"  {d['parameters']:,} parameters: {bits}",
    ]
