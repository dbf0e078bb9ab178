"""What an adapter takes on disk, by kind of module and dtype, and what was compressed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.formats import CONFIG
from loraduct.text import size
from loraduct.validation.checks import Check
from loraduct.validation.declared import declared
from loraduct.validation.suites import Context, Suite, suite
from loraduct.validation.widths import account, adapter_rows, counted, curve


def run(context: Context) -> Suite:
    """The suite: both sides; what ships is B, or A alone."""
    labels = ["a", "b"][: len(context.adapters)]
    sides = {k: measured(a) for k, a in zip(labels, context.adapters, strict=True)}
    ships = sides[labels[-1]]
    numbers: dict[str, Any] = {"bytes": ships["bytes"], **sides}
    rows = account(context.adapters, context.base)
    numbers |= {"tensors": counted(rows), "curve": curve(rows)}
    numbers["account"] = [{k: v for k, v in r.items() if k != "norm"} for r in rows]
    what = f"{size(ships['bytes'])} on disk, {ships['bits_per_weight']:.3g} bits a weight"
    if "b" in sides and sides["a"]["bytes"]:
        numbers["ratio"] = ships["bytes"] / sides["a"]["bytes"]
        what += f", {numbers['ratio']:.3g} of A's {size(sides['a']['bytes'])}"
    if ships["compression"]:
        ways = ", ".join(f"{k} {v}" for k, v in ships["compression"].items())
        what += f"; compressed: {ways}"
    if lost := [r for r in rows if r["outcome"] == "skipped" and not r["bytes"]]:
        what += f"; {len(lost)} of A's modules are not in B"
    return suite("size", [Check("size", "passed", what)], numbers)


def measured(adapter: Adapter) -> dict[str, Any]:
    """Bytes of the files, and of the weights by kind and dtype; of a package's adapter its own."""
    files = files_of(adapter)
    rows = adapter_rows(adapter)
    total = sum(files.values())
    held = sum(r["bytes"] for r in rows) if adapter.format == "coreml" else total
    values = sum(r["values"] for r in rows)
    by_kind, by_dtype = Counter[str](), Counter[str]()
    for r in rows:
        by_kind[r["kind"]] += r["bytes"]
        by_dtype[r["dtype"]] += r["bytes"]
    return {
        "path": str(adapter.path),
        "bytes": total,
        "adapter_bytes": held,
        "bits_per_weight": 8 * held / values if values else 0.0,
        "values": values,
        "by_kind": dict(by_kind),
        "by_dtype": dict(by_dtype),
        "files": files,
        "compression": declared(adapter),
    }


def files_of(adapter: Adapter) -> dict[str, int]:
    """Name -> bytes of what the adapter is read from: weights and config, or the whole package."""
    return {name: path.stat().st_size for name, path in paths_of(adapter).items()}


def paths_of(adapter: Adapter) -> dict[str, Path]:
    """Name -> path of the same files, sorted."""
    if adapter.format == "coreml":
        found = [p for p in adapter.path.rglob("*") if p.is_file()]
    else:
        found = [p for p in (adapter.weights, adapter.path / CONFIG) if p.is_file()]
    root = adapter.path
    named = {str(p.relative_to(root)) if p.is_relative_to(root) else p.name: p for p in found}
    return dict(sorted(named.items()))
