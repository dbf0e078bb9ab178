"""What ``inspect`` says: one document for programs, one screen for people."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable
from itertools import pairwise
from typing import Any

from loraduct import origin
from loraduct.adapter import Adapter, kind_of
from loraduct.modules import KINDS, block_of, kind_of_module
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
_FORMATS = {"peft": "PEFT", "mlx": "MLX", "coreml": "Core ML", "packed": "Packed"}
_CHECKPOINT = re.compile(r"\d{7}_adapters\.safetensors")
_UNSAID = "base-precision-unknown"  # a trap of nearly every PEFT adapter: said in the base's line


def _counting(adapter: Adapter, stored: list[Tensor]) -> list[Tensor]:
    """The tensors whose numbers are parameters: what stands for them is fewer bytes in a packed file."""
    return stored if adapter.container is None else [
        t for u in adapter.updates.values() for t in u.tensors
    ]  # fmt: skip


def describe(adapter: Adapter, *, tensors: bool = False) -> dict[str, Any]:
    """The document. Reads no values, only what the readers found in headers and config.

    The adapter should be read with ``restore=False``: then it is the file that is described, and
    not what a conversion back would make of it.
    """
    updates = adapter.low_rank
    everything = list(adapter.tensors())
    document: dict[str, Any] = {
        "schema": 1,
        "path": str(adapter.path),
        "weights": adapter.weights.name,
        "checkpoints": _checkpoints(adapter),
        "format": adapter.container or adapter.format,
        "method": adapter.method,
        "kind": kind_of(adapter),
        "base": {
            "name": adapter.base.name,
            "revision": adapter.base.revision,
            "quantization": adapter.base.quantization,
            "quantization_known": adapter.base.quantization_known,
            "layers": adapter.layers,
        },
        "ranks": _counted((u.rank for u in updates.values()), str),
        "scales": _counted((u.scale for u in updates.values()), number),
        "modules": len(updates),
        "targets": _targets(adapter),
        "replaced": _replaced(adapter),
        "parameters": sum(math.prod(t.shape) for t in _counting(adapter, everything)),
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
        listed = [
            (name, o) for name, u in adapter.updates.items() for t in u.tensors for o in t.origins
        ]
        listed += [("", t) for t in adapter.set_aside]
        document["tensors"] = [
            {"name": t.name, "shape": list(t.stored_shape), "dtype": t.stored_dtype, "update": name}
            for name, t in listed
        ]
    return document


def _counted(values: Iterable[float], shown: Callable[[float], str]) -> dict[str, int]:
    """How often each value occurs, by how it is shown; values shown alike are counted together."""
    counts: Counter[str] = Counter()
    for value, n in sorted(Counter(values).items()):
        counts[shown(value)] += n
    return dict(counts)


def _checkpoints(adapter: Adapter) -> list[str]:
    """Weights of other steps of the training beside the file that was read (mlx-lm keeps them)."""
    try:
        names = [p.name for p in adapter.path.iterdir()]
    except OSError:
        return []
    return sorted(n for n in names if _CHECKPOINT.fullmatch(n) and n != adapter.weights.name)


Row = dict[str, Any]


def _row(rows: dict[Any, Row], module: str, name: str, shape: list[int], count: int) -> Row:
    """The row for what has this name within its block and this shape, one more layer added."""
    block = block_of(name)
    inner = block[2] if block else name
    row = rows.setdefault(
        (inner, *shape),
        {
            "kind": kind_of_module(module),
            "module": inner,
            "layers": [],
            "shape": shape,
            "parameters": 0,
        },
    )
    row["layers"] += [block[1]] if block else []
    row["parameters"] += count
    return row


def _sorted(rows: dict[Any, Row]) -> list[Row]:
    for row in rows.values():
        for key, value in row.items():
            if isinstance(value, set) or key == "layers":
                row[key] = sorted(value)
    return sorted(rows.values(), key=lambda r: KINDS.index(r["kind"]))


def _targets(adapter: Adapter) -> list[Row]:
    """Rows of module kind x module: which layers, which ranks, shapes (out, in), parameters."""
    rows: dict[Any, Row] = {}
    for module, u in adapter.low_rank.items():
        count = sum(math.prod(t.shape) for t in u.tensors)
        row = _row(rows, module, module, list(u.shape), count)
        row.setdefault("ranks", set()).add(u.rank)
        row.setdefault("scales", set()).add(u.scale)
    for module, full in adapter.dense.items():
        count = sum(math.prod(o.shape) for t in full.tensors for o in t.origins)
        row = _row(rows, module, module, list(full.shape), count)
        row.setdefault("ranks", set())
        row.setdefault("scales", set())
    return _sorted(rows)


def _replaced(adapter: Adapter) -> list[Row]:
    """Rows of replaced parameters, with why they are in the file."""
    rows: dict[Any, Row] = {}
    for name, r in adapter.replacements.items():
        shape = list(r.weight.shape)
        row = _row(rows, name.rpartition(".")[0], name, shape, math.prod(shape))
        row.setdefault("origins", set()).add(r.origin)
    return _sorted(rows)


def _extras(adapter: Adapter) -> dict[str, int]:
    """What is in the file besides A and B."""
    found = Counter(f"replaced parameters ({r.origin})" for r in adapter.replacements.values())
    found["DoRA magnitudes"] += sum(u.magnitude is not None for u in adapter.low_rank.values())
    found["low-rank biases (lora_bias)"] += sum(
        u.bias is not None for u in adapter.low_rank.values()
    )
    found["copies without an effect"] += len(adapter.set_aside)
    return {k: n for k, n in sorted(found.items()) if n}


def _origin(adapter: Adapter) -> dict[str, Any] | None:
    """What loraduct recorded when it converted the file; one that tells no state tells no origin."""
    record = origin.parse(adapter.metadata)
    if record is None or not record["state"]:
        return None
    held = adapter.origin or origin.restore(adapter.updates, adapter.metadata)[1]
    return {
        "converted_from": record["format"],
        "by": f"loraduct {record.get('version', '')}".strip(),
        "still_holds": held is not None,
        "changed_modules": len(record.get("modules", {})),
    }


def lines(d: dict[str, Any], usual: Container[str] = ()) -> list[str]:
    """The document as text. Everything that comes from the file is escaped.

    A weights file whose name is among the ``usual`` ones isn't named.
    """
    out = [
        printable(d["path"], 300),
        f"  {_FORMATS[d['format']]} adapter: {d['kind']}",
    ]
    if d["weights"] not in usual:
        out.append(f"  weights     {printable(d['weights'])}")
    if d["checkpoints"]:
        out.append(f"  checkpoints {len(d['checkpoints'])} more: {several(d['checkpoints'])}")
    out.append(f"  base        {_base_line(d)}")
    if d["ranks"]:
        out.append(f"  rank        {_counts(d['ranks'])}")
        out.append(f"  scale       {_counts(d['scales'])}")
    dtypes = _counts(d["dtypes"])
    out.append(f"  size        {d['parameters']:,} parameters, {size(d['bytes'])}, {dtypes}")
    if d["extras"]:
        out.append(f"  also        {', '.join(f'{n} {k}' for k, n in d['extras'].items())}")
    if d["companions"]:
        out.append(f"  files       {several(d['companions'], 10)}")
    for key in ("metadata", "training"):
        if d[key]:
            out.append(f"  {key:<11} {several([f'{k}={v}' for k, v in d[key].items()], 8)}")
    if d["origin"]:
        out.append(f"  origin      {_origin_line(d['origin'], d['method'])}")
    if d.get("other_adapters"):
        out.append(f"  beside it   {several(d['other_adapters'], 10)}")
    if d["targets"]:
        out += ["", *_target_table(d["targets"])]
    if d["replaced"]:
        out += ["", *_replaced_table(d["replaced"])]
    if stats := d.get("stats"):
        out += ["", *_stats_table(stats)]
    if d.get("tensors"):
        rows = [["tensor", "shape", "dtype"]]
        rows += [[printable(t["name"]), str(t["shape"]), t["dtype"]] for t in d["tensors"]]
        out += ["", *table(rows)]
    for trap in d["traps"]:
        if trap["kind"] != _UNSAID:
            out.append(f"  ! {printable(trap['text'], 400)}")
    return out


def _counts(counts: dict[str, int]) -> str:
    """``4 (12), 8 (24), ...``; a single value stands alone."""
    some = [f"{v} ({n})" if len(counts) > 1 else v for v, n in list(counts.items())[:6]]
    return ", ".join(some) + (", ..." if len(counts) > 6 else "")


def _base_line(d: dict[str, Any]) -> str:
    base = d["base"]
    name = printable(base["name"]) if base["name"] else "not named in the file"
    if base["revision"]:
        name += f" @ {printable(base['revision'], 60)}"
    precision = base["quantization"] or ("not quantised" if base["quantization_known"] else "")
    if precision:
        return f"{name} ({printable(precision, 60)})"
    if any(trap["kind"] == _UNSAID for trap in d["traps"]):
        name += " (precision in training not said; --trained-on says it)"
    return name


def _origin_line(found: dict[str, Any], method: str) -> str:
    form = _FORMATS.get(found["converted_from"], printable(found["converted_from"], 20))
    line = f"converted from {form} by {printable(found['by'], 40)}"
    if not found["still_holds"]:
        return f"{line}, but the file was changed since: a conversion restores nothing"
    if method == "full":
        return line
    n = found["changed_modules"]
    modules = f" and the rank and scale of {n} module{'s' * (n > 1)}" if n else ""
    return f"{line}; back to {form} restores its config{modules}"


def _cells(row: Row) -> list[str]:
    """kind, module, layers of a row."""
    return [row["kind"], printable(row["module"], 80), ranges(row["layers"]) or "-"]


def _grouped(rows: list[list[str]]) -> list[str]:
    """A table in which a kind is said once."""
    cells = [r if r[0] != before[0] else ["", *r[1:]] for before, r in pairwise([[""], *rows])]
    return table(cells)


def _target_table(targets: list[Row]) -> list[str]:
    rows = [["kind", "module", "layers", "rank", "out x in", "parameters"]]
    for row in targets:
        shape = " x ".join(map(str, row["shape"]))
        ranks = _counts({str(r): 1 for r in row["ranks"]}).replace(" (1)", "") or "full"
        rows.append([*_cells(row), ranks, shape, f"{row['parameters']:,}"])
    return _grouped(rows)


def _replaced_table(replaced: list[Row]) -> list[str]:
    rows = [["kind", "replaced", "layers", "from", "shape", "parameters"]]
    for row in replaced:
        shape = " x ".join(map(str, row["shape"]))
        rows.append([*_cells(row), ", ".join(row["origins"]), shape, f"{row['parameters']:,}"])
    return _grouped(rows)


def _stats_table(stats: dict[str, Any]) -> list[str]:
    out = []
    if stats["modules"]:
        rows = [["module", f"||{stats['norm_of']}||_F", "largest sv", "effective rank", "rank"]]
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
        out += table(rows)
    if stats["replaced"]:
        rows = [["replaced parameter", "||W||_F"]]
        rows += [[printable(r["parameter"], 80), f"{r['norm']:.4g}"] for r in stats["replaced"]]
        out += ["", *table(rows)] if out else table(rows)
    bad = stats["not_finite"]
    out.append(f"  ! NaN or Inf in {several(bad, 6)}" if bad else "  no NaN, no Inf")
    return out
