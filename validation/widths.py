"""What became of each tensor, and why; and of each width together: bits, bytes and error.

Outcomes: ``carried`` (as it was), ``rounded``, ``compressed``, ``replaced`` (stands for a parameter of the
base), ``differs`` (more than rounding), ``skipped`` (not there, or of no effect), ``stored`` (nothing to
compare it with).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loraduct.adapter import Adapter, LowRank, Replacement, Update
from loraduct.formats.base import Base
from loraduct.formats.coded import Code, Decoded
from loraduct.modules import kind_of_module
from loraduct.tensor import FLOATS, Tensor, as_float32
from loraduct.validation import runtimes
from loraduct.validation.align import aligned
from loraduct.validation.checks import Check
from loraduct.validation.delta import EQUAL, compare

Row = dict[str, Any]
_NUMBERS = 1 << 20  # of a weight, at once
_SKIPPED = {"of": "adapter", "outcome": "skipped", "error": None, "norm": None}
_COMPARED = (
    {"outcome": "carried", "reason": ""},
    {"outcome": "rounded", "reason": "dW is off by what its dtype rounds"},
    {"outcome": "differs", "reason": "dW is off by more than its dtype rounds"},
)
_COPY = "a copy of another tensor, without an effect of its own"


def account(adapters: Sequence[Adapter], base: Base) -> list[Row]:
    """A row for each tensor of what ships (the last of ``adapters``), and for A's that it lacks."""
    ships = adapters[-1]
    outcomes = _outcomes(adapters, base) if len(adapters) > 1 else {}
    found = adapter_rows(ships, outcomes)
    found += [
        r for m, r in outcomes.items() if m not in ships.updates and r["outcome"] == "skipped"
    ]
    if ships.format == "coreml":
        found += _base_rows(ships, base)
    return found


def adapter_rows(adapter: Adapter, outcomes: Mapping[str, Row] | None = None) -> list[Row]:
    """A row for each tensor that is stored for an adapter, with what became of its module."""
    rows: dict[str, Row] = {}
    for module, update in adapter.updates.items():
        outcome = (outcomes or {}).get(module) or _alone(update)
        for tensor in update.tensors:
            for origin in tensor.origins:
                row = _adapter_row(tensor, origin, module, update, outcome)
                rows[origin.name] = {**row, "of": "adapter"}
    for tensor in adapter.set_aside:
        rows[tensor.name] = _row(tensor, tensor.name, None) | _SKIPPED | {"reason": _COPY}
    return list(rows.values())


def counted(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """How many tensors became what: of the adapter, and of a package's base."""
    found: dict[str, Counter[str]] = {}
    for r in rows:
        found.setdefault(r["of"], Counter())[r["outcome"]] += 1
    return {of: dict(sorted(counts.items())) for of, counts in found.items()}


def curve(rows: Sequence[Row]) -> list[Row]:
    """Tensors of one part in one width together; nothing where nothing is compressed.

    ``bits``: of a value, with its tables and scales. ``error``: relative (Frobenius): of weights, and of
    an adapter's dW; null where there is nothing to compare with.
    """
    if not any(r["outcome"] == "compressed" for r in rows):
        return []  # one width is no curve
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        if r["outcome"] != "skipped":
            groups.setdefault((r["of"], r["dtype"]), []).append(r)
    points = []
    for (of, way), members in groups.items():
        values, size = (sum(r[k] for r in members) for k in ("values", "bytes"))
        off = [r for r in members if r["error"] is not None]
        whole = sum(r["norm"] ** 2 for r in off)
        lost = sum((r["error"] * r["norm"]) ** 2 for r in off)
        error = math.sqrt(lost / whole) if whole else None
        point = {"of": of, "way": way, "tensors": len(members), "values": values, "bytes": size}
        points.append(point | {"bits": round(8 * size / values, 3), "error": error})
    return sorted(points, key=lambda p: (p["of"], p["bits"]))


def _alone(update: Update) -> Row:
    """Of an update that nothing is compared with."""
    found: Row = {"outcome": "stored", "reason": "", "error": None, "norm": None}
    if isinstance(update, Replacement):
        why = f"stands for the base's own parameter ({update.origin})"
        return found | {"outcome": "replaced", "reason": why}
    return found


def _outcomes(adapters: Sequence[Adapter], base: Base) -> dict[str, Row]:
    """By B's module: what became of A's, and how far off dW is; by A's names what B lacks."""
    one, two = (aligned(a, base, None) for a in adapters)
    if isinstance(one, Check) or isinstance(two, Check):
        return {}
    found: dict[str, Row] = {}
    for module, update in two.items():
        row = _alone(update)
        if module not in one:
            found[module] = row | {"reason": "A does not have it"}
            continue
        delta = compare(module, one[module], update, base)
        if delta.compared:
            row |= {"error": delta.error, "norm": delta.norm}
            if row["outcome"] == "stored":
                row |= _COMPARED[0 if delta.error <= EQUAL else 1 if delta.fits else 2]
        found[module] = row
    for module in [m for m in one if m not in two]:
        row = _row(one[module].tensors[0], module, None) | _SKIPPED
        found[module] = row | {"bytes": 0, "reason": "A has it, B has not"}
    return found


def _adapter_row(tensor: Tensor, origin: Tensor, module: str, update: Update, outcome: Row) -> Row:
    """Of the stored tensor ``origin`` that ``tensor`` is made of."""
    if tensor.make is None:
        row = _row(origin, module, None) | outcome
    else:  # in few bits, in a package or in a packed file
        code = tensor.make.code() if isinstance(tensor.make, Decoded) else None
        stored = replace(tensor, transposed=False) if origin.dtype == "U8" else origin
        row = _row(stored, module, code) | {"tensor": origin.name} | outcome
        if code is None and origin.dtype == "U8":
            row |= {"dtype": "packed", "bytes": origin.stored_nbytes}
        if row["dtype"] not in FLOATS:
            row |= {"outcome": "compressed", "reason": f"stored as {row['dtype']}"}
    if not isinstance(update, LowRank):
        row["kind"] = kind_of_module(module.rsplit(".", 1)[0])
    return row


def _row(tensor: Tensor, module: str, code: Code | None) -> Row:
    stored, values = tensor.stored_nbytes, math.prod(tensor.stored_shape)
    if code is not None:
        stored = math.ceil(code.codes.size * code.bits / 8) + code.numbers.nbytes
    return {
        "tensor": tensor.name,
        "module": module,
        "kind": kind_of_module(module),
        "dtype": code.way if code is not None else tensor.stored_dtype,
        "shape": list(tensor.stored_shape),
        "values": values,
        "bytes": stored,
    }


def _base_rows(adapter: Adapter, base: Base) -> Iterator[Row]:
    """The weights of a package's base against the base's; compressed ones first, one at a time."""
    from loraduct.formats.coreml import record
    from loraduct.formats.coreml.stored import PackageBase

    package = runtimes.package_at(adapter.path)
    held = PackageBase(package, record.read(package))
    done = set()
    for name, code in held.codes():
        done.add(name)
        values = Tensor(name, "F16", code.codes.shape, data=code.values().view("u2"))
        row = _row(values, name.rpartition(".")[0], code) | _against(base, name, values)
        yield row | {"outcome": "compressed", "reason": f"stored as {code.way}"}
    for name, tensor in held.tensors.items():
        if name in done:
            continue
        row = _row(tensor, name.rpartition(".")[0], None) | _against(base, name, tensor)
        if tensor.make is not None:
            row |= {"outcome": "compressed", "reason": "in a form whose size is not known here"}
        yield row


def _against(base: Base, name: str, stored: Tensor) -> Row:
    """A weight of a package's base, compared with the base's own."""
    found: Row = {"of": "base", "outcome": "stored", "reason": "", "error": None, "norm": None}
    own = base.weight_of(name) if base.has_weights else None
    if own is None or own.stored_dtype not in FLOATS or own.shape != stored.shape:
        return found
    off, size = _lost(own, stored)
    found |= {"error": math.sqrt(off / size) if size else 0.0, "norm": math.sqrt(size)}
    if not off:
        return found | {"outcome": "carried"}
    return found | {"outcome": "rounded", "reason": f"{own.stored_dtype} as FLOAT16"}


def _lost(own: Tensor, stored: Tensor) -> tuple[float, float]:
    """(||W' - W||^2, ||W||^2), row block by row block."""
    import numpy as np

    off = size = 0.0
    matrix = len(own.shape) == 2
    count = own.shape[0] if matrix else math.prod(own.shape)
    step = max(1, _NUMBERS // (own.shape[1] if matrix else 1))
    for i in range(0, count, step):
        j = min(i + step, count)
        one, two = (
            as_float32(t.rows(i, j, finite=False), t.dtype).astype(np.float64)
            for t in (own, stored)
        )
        off += float(((two - one) ** 2).sum())
        size += float((one**2).sum())
    return off, size
