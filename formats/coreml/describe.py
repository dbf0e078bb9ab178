"""What ``inspect`` says of a package: its functions, adapters, operations, compression, systems.

Of any ML program, whoever built it. No values are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from loraduct.formats.coreml import record
from loraduct.formats.coreml.constexpr import PREFIX, is_compressed
from loraduct.formats.coreml.edit import offsets_of
from loraduct.formats.coreml.package import Package
from loraduct.formats.coreml.program import block_of_function, names_in, type_of
from loraduct.formats.coreml.schema import ARRAY_TYPE_NAMES
from loraduct.text import number, printable, ranges, several, size, table

# opset -> what it needs (coremltools 9.0, ``_OPSET`` and its release notes)
SYSTEMS = {
    "CoreML5": "iOS 15, macOS 12",
    "CoreML6": "iOS 16, macOS 13",
    "CoreML7": "iOS 17, macOS 14",
    "CoreML8": "iOS 18, macOS 15",
    "CoreML9": "iOS 26, macOS 26",
}
_NESTED = ("cond", "while_loop")  # the operations that hold blocks
# what holds the bulk of a compressed constant's bits
_CODES = ("indices", "quantized_data", "data", "nonzero_data", "mask")


def describe(package: Package) -> dict[str, Any]:
    """The document. Raises Refused for a program whose weights are not there."""
    model, found = package.model, record.find(package) or {}
    offsets = {n: offsets_of(f) for n, f in package.functions.items()}
    spans = {o: package.blobs.span(o, "a weight") for o in sorted(set().union(*offsets.values()))}
    users = Counter(o for held in offsets.values() for o in held)
    data = {o: end - begin for o, (begin, end) in spans.items()}
    described = list(model.description.functions) or [model.description]
    counts = {n: Counter(_kinds(block_of_function(f))) for n, f in package.functions.items()}
    functions = [
        _function(package, d, offsets, users, data, found.get("functions", {}), counts)
        for d in described
    ]
    opsets = sorted({f.opset for f in package.functions.values()})
    kinds = sum(counts.values(), Counter[str]())
    weights = package.blobs.size if spans else 0
    live = sum(data.values()) + 64 * (len(data) + 1)
    texts = model.description.metadata.userDefined
    return {
        "schema": 1,
        "path": str(package.path),
        "format": "coreml",
        "kind": "package",
        "specification": model.specificationVersion,
        "opsets": opsets,
        "minimum": SYSTEMS.get(opsets[-1]),
        "default_function": model.description.defaultFunctionName or functions[0]["name"],
        "base": _base(found),
        "functions": functions,
        "adapters": _adapters(found, package, data),
        "operations": dict(sorted(kinds.items(), key=lambda kv: (-kv[1], kv[0]))),
        "compression": _compression(package, counts),
        "bytes": {
            "program": package.spec_path.stat().st_size,
            "weights": weights,
            "unused": max(0, weights - live - _padding(spans)),
        },
        "metadata": {k: texts[k] for k in sorted(texts) if k != record.KEY},
    }


def _padding(spans: Mapping[int, tuple[int, int]]) -> int:
    """Bytes between blobs that only align them."""
    ends = sorted(end for _, end in spans.values())
    return sum(-end % 64 for end in ends[:-1])


def _kinds(block: Any) -> Iterator[str]:
    """Kinds of a block's operations, blocks within included."""
    for op in block.operations:
        kind = op.type
        yield kind
        if kind in _NESTED:
            for inner in op.blocks:
                yield from _kinds(inner)


def _compression(package: Package, counts: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """Kind of compressed constant -> dtype of its codes -> how many."""
    found: dict[str, Counter[str]] = {}
    for name, function in package.functions.items():
        if not any(kind.startswith(PREFIX) for kind in counts[name]):
            continue
        ops = {o.name: op for op in block_of_function(function).operations for o in op.outputs}
        for op in ops.values():
            if is_compressed(op):
                found.setdefault(op.type, Counter())[_dtype(op, ops)] += 1
    return {k: dict(sorted(c.items())) for k, c in sorted(found.items())}


def _dtype(op: Any, ops: Mapping[str, Any]) -> str:
    """The dtype of a compressed constant's codes; iOS 16 has them as attributes."""
    for key in _CODES:
        if key in op.attributes:
            return type_of(op.attributes[key].type)[0]
        if key not in op.inputs:
            continue
        for binding in op.inputs[key].arguments:
            if binding.WhichOneof("binding") == "value":
                return type_of(binding.value.type)[0]
        made = [ops[n] for n in names_in(op, key) if n in ops]
        if made:
            return type_of(made[0].outputs[0].type)[0]
    return "?"


def _base(found: Mapping[str, Any]) -> dict[str, Any] | None:
    base = found.get("base")
    return base and {k: base.get(k) for k in ("model_type", "name", "layers", "tied")}


def _function(
    package: Package, described: Any, offsets: Mapping[str, set[int]], users: Counter[int],
    data: Mapping[int, int], rows: Mapping[str, Any], counts: Mapping[str, Counter[str]],
) -> dict[str, Any]:  # fmt: skip
    """One function: what it takes, gives and keeps, how many operations, how many bytes."""
    name = getattr(described, "name", "") or next(iter(package.functions))
    row = rows.get(name, {})
    used = offsets.get(name, set())
    return {
        "name": name,
        "adapters": [{"name": n, "weight": w} for n, w in row.get("adapters", [])],
        "q": row.get("q"),
        "operations": counts[name].total() if name in counts else 0,
        "inputs": [_feature(f) for f in described.input],
        "outputs": [_feature(f) for f in described.output],
        "states": [_feature(f) for f in described.state],
        "own_bytes": sum(data[o] for o in used if users[o] == 1),
        "shared_bytes": sum(data[o] for o in used if users[o] > 1),
    }


def _feature(feature: Any) -> dict[str, Any]:
    """Name, dtype and shape: a number per axis, or the smallest and largest (null: any)."""
    kind = feature.type.WhichOneof("Type")
    if kind not in ("multiArrayType", "stateType"):
        return {"name": feature.name, "dtype": kind or "other", "shape": []}
    array = (
        feature.type.multiArrayType
        if kind == "multiArrayType"
        else feature.type.stateType.arrayType
    )
    shape: list[Any] = list(array.shape)
    flexible = array.WhichOneof("ShapeFlexibility")
    if flexible == "shapeRange":
        spans = [(s.lowerBound, s.upperBound) for s in array.shapeRange.sizeRanges]
        shape = [a if a == b else [a, b if b >= 0 else None] for a, b in spans]
    row = {"name": feature.name, "dtype": ARRAY_TYPE_NAMES.get(array.dataType, "?"), "shape": shape}
    if flexible == "enumeratedShapes":
        row["shapes"] = [list(s.shape) for s in array.enumeratedShapes.shapes]
    return row


def _adapters(
    found: Mapping[str, Any], package: Package, data: Mapping[int, int]
) -> list[dict[str, Any]]:
    """The adapters that loraduct put in; ``bytes`` of their tensors, and which no other one has."""
    from loraduct.formats.coreml.stored import parts_of

    if not found:
        return []
    held: dict[str, set[int]] = {}
    for name in found["adapters"]:
        modules, replaced = parts_of(package, dict(found), name)
        blobs = [b for p in modules.values() for b in vars(p).values() if b is not None]
        held[name] = set().union(*(b.offsets for b in (*blobs, *replaced.values())))
    users = Counter(o for offsets in held.values() for o in offsets)
    done = []
    for name, row in found["adapters"].items():
        ranks = Counter(r["rank"] for r in row["modules"].values())
        functions = [
            f for f, r in found["functions"].items() if name in [n for n, _ in r["adapters"]]
        ]
        done.append(
            {
                "name": name,
                "method": row["method"],
                "source": row["source"],
                "modules": len(row["modules"]),
                "replaced": len(row["replaced"]),
                "ranks": {str(r): n for r, n in sorted(ranks.items())},
                "bytes": sum(data[o] for o in held[name]),
                "shared_bytes": sum(data[o] for o in held[name] if users[o] > 1),
                "functions": functions,
            }
        )
    return done


def lines(d: Mapping[str, Any]) -> list[str]:
    """The document as text; all that comes from the file is escaped."""
    needs = d["minimum"] or "an unknown system"
    out = [
        printable(d["path"], 300),
        f"  Core ML package, ML program, {printable(', '.join(d['opsets']), 60)} ({needs} or later)",
    ]
    if d["base"]:
        base = d["base"]
        kind = printable(str(base["model_type"] or "?"), 60)
        name = f"{printable(base['name'])}, " if base["name"] else ""
        out.append(f"  base        {name}{kind}, {base['layers']} layers")
    held = d["bytes"]
    unused = f", {size(held['unused'])} of it unused (compact)" if held["unused"] > 4096 else ""
    out.append(
        f"  size        weights {size(held['weights'])}{unused}, program {size(held['program'])}"
    )
    if d["compression"]:
        kinds = [
            f"{n} {kind.removeprefix(PREFIX)} {dtype}"
            for kind, dtypes in d["compression"].items()
            for dtype, n in dtypes.items()
        ]
        out.append(f"  compressed  {several(kinds, 6)}")
    ops = [f"{n} {kind}" for kind, n in d["operations"].items()]
    out.append(f"  operations  {sum(d['operations'].values()):,}: {several(ops, 6)}")
    first = next(
        (f for f in d["functions"] if f["name"] == d["default_function"]), d["functions"][0]
    )
    for key in ("inputs", "outputs", "states"):
        if first[key]:
            out.append(f"  {key:<11} {several([_shown(f) for f in first[key]], 6)}")
    if d["metadata"]:
        out.append(f"  metadata    {several([f'{k}={v}' for k, v in d['metadata'].items()], 8)}")
    rows = [["function", "adapters", "tokens", "operations", "own bytes"]]
    rows += [
        [printable(f["name"], 60), _sum(f["adapters"]), str(f["q"] or "any") if d["base"] else "-",
         f"{f['operations']:,}", size(f["own_bytes"])]
        for f in d["functions"]
    ]  # fmt: skip
    out += ["", *table(rows)]
    if d["adapters"]:
        out += ["", *adapter_table(d["adapters"])]
    return out


def adapter_table(adapters: list[dict[str, Any]]) -> list[str]:
    """One row for each adapter."""
    rows = [["adapter", "method", "rank", "modules", "bytes", "of it shared", "functions"]]
    for a in adapters:
        full = f" + {a['replaced']} parameters" if a["replaced"] else ""
        rows.append(
            [
                printable(a["name"], 60), a["method"], ranges(map(int, a["ranks"])) or "-",
                f"{a['modules']}{full}", size(a["bytes"]), size(a["shared_bytes"]),
                several(a["functions"], 4),
            ]
        )  # fmt: skip
    return table(rows)


def _sum(members: list[dict[str, Any]]) -> str:
    """``one + 0.5 two``."""
    shown = [
        printable(m["name"], 60) if m["weight"] == 1 else f"{number(m['weight'])} {printable(m['name'], 60)}"
        for m in members
    ]  # fmt: skip
    return " + ".join(shown) or "-"


def _shown(feature: Mapping[str, Any]) -> str:
    """``inputIds INT32 [1, 1-2048]``."""
    sizes = [
        str(s) if not isinstance(s, list) else f"{s[0]}-{s[1] if s[1] is not None else ''}"
        for s in feature["shape"]
    ]
    return f"{feature['name']} {feature['dtype']} [{', '.join(sizes)}]"
