"""How large will an adapter be? From a base's config alone, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraduct.architectures import KINDS, block_of, kind_of_module
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats.base import Base
from loraduct.text import printable, several, size, table

WIDTHS = (16, 8, 6, 4, 3, 2, 1)  # bits per value


def estimate(config: Path, rank: int, targets: list[str]) -> dict[str, Any]:
    """Parameters and bytes of a LoRA of ``rank`` on ``targets`` (last names, or ends of paths).

    Shapes come from the base's weights where they are there, else from its config.json. Raises
    Refused for a target the base does not have.
    """
    if config.is_file() and config.name != "config.json":
        from loraduct.formats.json_file import read_object

        base = Base(config.parent / "nowhere", read_object(config))
    else:
        base = base_folder.read(config)
    shapes = _from_weights(base) if base.has_weights else _from_config(base, config)
    rows: list[dict[str, Any]] = []
    missing = []
    for target in targets:
        hits = [s for m, s in shapes.items() if m == target or m.endswith(f".{target}")]
        if not hits:
            missing.append(target)
            continue
        rows.append(
            {
                "target": target,
                "kind": kind_of_module(next(m for m in shapes if m.endswith(target))),
                "modules": len(hits),
                "out_in": [list(s) for s in sorted(set(hits))],
                "parameters": sum(rank * (o + i) for o, i in hits),
            }
        )
    if missing:
        known = sorted({m.rsplit(".", 1)[-1] for m in shapes})
        raise Refused(config, f"the base has no {several(missing)}; it has {several(known, 20)}")
    total = sum(r["parameters"] for r in rows)
    return {
        "base": str(config),
        "model_type": base.model_type,
        "layers": base.layers,
        "rank": rank,
        "targets": sorted(rows, key=lambda r: KINDS.index(r["kind"])),
        "parameters": total,
        "bytes": {str(w): (total * w + 7) // 8 for w in WIDTHS},
    }


def _from_weights(base: Base) -> dict[str, tuple[int, int]]:
    found = {}
    for name in base.tensors:
        module = name.removesuffix(".weight")
        shape = base.shape_of(module) if name.endswith(".weight") else None
        if shape is not None and len(shape) == 2 and kind_of_module(module) != "embedding":
            found[module] = (shape[0], shape[1])
    return found


def _from_config(base: Base, file: Path) -> dict[str, tuple[int, int]]:
    """Linear layers of a decoder with grouped-query attention and a (gated) feed-forward."""
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
    per_block = {
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
    from loraduct.architectures import table as architectures

    known = architectures().get(base.model_type, {}).get("equal", frozenset())
    if not known:
        raise Refused(
            file,
            f"model_type {printable(base.model_type)!r} is not known well enough; give the base's"
            " folder with its weights",
        )
    present = {b[2] for m in known if (b := block_of(m.replace("{}", "0")))}
    return {
        f"model.layers.{i}.{name}": shape
        for i in range(layers)
        for name, shape in per_block.items()
        if name in present
    }


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
        f"  {d['parameters']:,} parameters: {bits}",
    ]
