"""What ``inspect`` says: one document for programs, one screen for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from loraduct import origin
from loraduct.adapter import Adapter, kind_of
from loraduct.architectures import KINDS, block_of, kind_of_module
from loraduct.tensor import Tensor
from loraduct.text import number, printable, ranges, several, size, table

_TRAINING = (
    "lora_dropout",
    "task_type",
    "init_lora_weights",
    "peft_version",
    "learning_rate",
    "iters",
    "batch_size",
    "optimizer",
    "seed",
    "data",
)


def describe(adapter: Adapter, *, tensors: bool = False) -> dict[str, Any]:
    """The document. Reads no values, only what the readers found in headers and config."""
    updates = adapter.low_rank
    ranks = Counter(u.rank for u in updates.values())
    scales = Counter(u.scale for u in updates.values())
    everything = list(adapter.tensors())
    document: dict[str, Any] = {
        "schema": 1,
        "path": str(adapter.path),
        "format": adapter.format,
        "method": adapter.method,
        "kind": kind_of(adapter),
        "base": {
            "name": adapter.base.name,
            "revision": adapter.base.revision,
            "quantization": adapter.base.quantization,
            "quantization_known": adapter.base.quantization_known,
            "layers": adapter.layers,
        },
        "ranks": {str(r): n for r, n in sorted(ranks.items())},
        "scales": {number(s): n for s, n in sorted(scales.items())},
        "modules": len(updates),
        "targets": _targets(adapter),
        "parameters": sum(_elements(t) for t in everything),
        "bytes": sum(t.nbytes for t in everything),
        "dtypes": dict(sorted(Counter(t.dtype for t in everything).items())),
        "extras": _extras(adapter),
        "companions": [p.name for p in adapter.companions],
        "metadata": {k: v for k, v in sorted(adapter.metadata.items()) if k != origin.KEY},
        "origin": _origin(adapter),
        "training": {k: adapter.config[k] for k in _TRAINING if adapter.config.get(k) is not None},
        "traps": [{"kind": n.kind, "text": n.text} for n in adapter.notes],
    }
    if tensors:
        document["tensors"] = [
            {"name": t.name, "shape": list(t.stored_shape), "dtype": t.stored_dtype, "update": name}
            for name, update in adapter.updates.items()
            for t in update.tensors
        ]
    return document


def _elements(tensor: Tensor) -> int:
    count = 1
    for n in tensor.shape:
        count *= n
    return count


def _targets(adapter: Adapter) -> list[dict[str, Any]]:
    """Rows of module kind x module: which layers, which ranks, shapes (out, in), parameters."""
    rows: dict[str, dict[str, Any]] = {}
    for module, u in adapter.low_rank.items():
        block = block_of(module)
        name = block[2] if block else module
        row = rows.setdefault(
            name,
            {
                "kind": kind_of_module(module),
                "module": name,
                "layers": [],
                "ranks": set(),
                "scales": set(),
                "shape": [u.b.shape[0], u.a.shape[1]],
                "parameters": 0,
            },
        )
        if block:
            row["layers"].append(block[1])
        row["ranks"].add(u.rank)
        row["scales"].add(u.scale)
        row["parameters"] += sum(_elements(t) for t in u.tensors)
    for row in rows.values():
        row["layers"] = sorted(row["layers"])
        row["ranks"], row["scales"] = sorted(row["ranks"]), sorted(row["scales"])
    return sorted(rows.values(), key=lambda r: KINDS.index(r["kind"]))


def _extras(adapter: Adapter) -> dict[str, int]:
    """What is in the file besides A and B."""
    found = Counter(f"replaced parameters ({r.origin})" for r in adapter.replacements.values())
    found["DoRA magnitudes"] += sum(u.magnitude is not None for u in adapter.low_rank.values())
    found["low-rank biases (lora_bias)"] += sum(
        u.bias is not None for u in adapter.low_rank.values()
    )
    return {k: n for k, n in sorted(found.items()) if n}


def _origin(adapter: Adapter) -> dict[str, Any] | None:
    record = origin.parse(adapter.metadata)
    if record is None:
        return None
    return {
        "converted_from": record["format"],
        "by": f"loraduct {record.get('version', '')}".strip(),
        "still_holds": adapter.origin is not None,
        "changed_modules": len(record.get("modules", {})),
    }


def lines(d: dict[str, Any]) -> list[str]:
    """The document as text. Everything that comes from the file is escaped."""
    base, form = d["base"], {"peft": "PEFT", "mlx": "MLX"}[d["format"]]
    name = printable(base["name"]) if base["name"] else "not named in the file"
    if base["revision"]:
        name += f" @ {printable(base['revision'], 60)}"
    precision = base["quantization"] or ("not quantised" if base["quantization_known"] else "")
    out = [
        printable(d["path"], 300),
        f"  {form} adapter: {d['kind']}",
        f"  base        {name}" + (f" ({printable(precision, 60)})" if precision else ""),
    ]
    if d["ranks"]:
        ranks = d["ranks"]
        shown = (
            ", ".join(f"{r} ({n})" for r, n in ranks.items())
            if len(ranks) > 1
            else next(iter(ranks))
        )
        out.append(f"  rank        {shown}")
        scales = d["scales"]
        some = [f"{s} ({n})" if len(scales) > 1 else s for s, n in list(scales.items())[:6]]
        out.append(f"  scale       {', '.join(some)}{', ...' if len(scales) > 6 else ''}")
    dtypes = ", ".join(f"{t} ({n})" if len(d["dtypes"]) > 1 else t for t, n in d["dtypes"].items())
    out.append(f"  size        {d['parameters']:,} parameters, {size(d['bytes'])}, {dtypes}")
    if d["extras"]:
        out.append(f"  also        {', '.join(f'{n} {k}' for k, n in d['extras'].items())}")
    if d["companions"]:
        out.append(f"  files       {several(d['companions'], 10)}")
    if d["metadata"]:
        pairs = [f"{k}={v}" for k, v in d["metadata"].items()]
        out.append(f"  metadata    {several(pairs, 8)}")
    if d["training"]:
        out.append(f"  training    {several([f'{k}={v}' for k, v in d['training'].items()], 8)}")
    if d["origin"]:
        holds = "" if d["origin"]["still_holds"] else ", but the file was changed since"
        out.append(
            f"  origin      converted from {printable(d['origin']['converted_from'], 20)} by"
            f" {printable(d['origin']['by'], 40)}{holds}"
        )
    if d.get("other_adapters"):
        out.append(f"  beside it   {several(d['other_adapters'], 10)}")
    if d["targets"]:
        out += ["", *_target_table(d)]
    if stats := d.get("stats"):
        out += ["", *_stats_table(stats)]
    if d.get("tensors"):
        rows = [["tensor", "shape", "dtype"]]
        rows += [[printable(t["name"]), str(t["shape"]), t["dtype"]] for t in d["tensors"]]
        out += ["", *table(rows)]
    for trap in d["traps"]:
        out.append(f"  ! {printable(trap['text'], 400)}")
    return out


def _target_table(d: dict[str, Any]) -> list[str]:
    rows = [["kind", "module", "layers", "rank", "out x in", "parameters"]]
    last = ""
    for row in d["targets"]:
        kind = row["kind"] if row["kind"] != last else ""
        last = row["kind"]
        rows.append(
            [
                kind,
                printable(row["module"], 80),
                ranges(row["layers"]) or "-",
                ", ".join(map(str, row["ranks"][:4])),
                " x ".join(map(str, row["shape"])),
                f"{row['parameters']:,}",
            ]
        )
    return table(rows)


def _stats_table(stats: dict[str, Any]) -> list[str]:
    rows = [["module", "||dW||_F", "largest sv", "effective rank", "rank"]]
    rows += [
        [
            printable(m["module"], 80),
            f"{m['norm']:.4g}",
            f"{m['largest']:.4g}",
            f"{m['effective_rank']:.2f}",
            str(m["rank"]),
        ]
        for m in stats["modules"]
    ]
    out = table(rows)
    bad = stats["not_finite"]
    out.append(f"  ! NaN or Inf in {several(bad, 6)}" if bad else "  no NaN, no Inf")
    return out
