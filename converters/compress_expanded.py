"""A base whose weights have the values that tables or integers would give, in the base's own dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from loraduct.converters import palette, palettize, quantize
from loraduct.converters.base_report import Outcome
from loraduct.converters.compress_code import Way, linear, stored_bytes, tables, unfit
from loraduct.converters.compress_plan import Plan, budgeted, integers, squared
from loraduct.converters.compress_sites import NEW, Weight, importance
from loraduct.converters.compress_wanted import Wanted
from loraduct.converters.compressible import left_alone
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.formats.model_folder import Stored, copied
from loraduct.tensor import FLOATS, Tensor, as_float32, from_float


def planned(base: Base, wanted: Wanted) -> tuple[tuple[dict[str, Stored], dict[str, Any]], Outcome]:
    """What is written, and what is said of it."""
    held, kept = _weights(base, wanted)
    # as a package would hold them: of float16, unless they are float32
    weights = [
        Weight(at, name, "FLOAT32" if tensor.dtype == "F32" else "FLOAT16", tensor.shape)
        for at, (name, tensor) in enumerate(held.items())
    ]
    plan = _planned(base, held, weights, wanted, sum(base.tensors[n].stored_nbytes for n in kept))
    ways = {w.name: plan.ways[w.offset] for w in weights if w.offset in plan.ways}
    counts = {w.name: plan.importance.get(w.offset) for w in weights}
    kept |= {w.name: w.reason for w in weights if w.reason is not None}
    rest = sum(base.tensors[n].stored_nbytes for n in kept)
    errors: dict[str, float] = {}
    tensors = {
        n: Stored(t.dtype, t.shape, partial(_pieces, n, t, ways[n], counts[n], errors))
        if n in ways
        else copied(t)
        for n, t in base.tensors.items()
    }
    whole = sum(t.stored_nbytes for t in base.tensors.values())
    inner = sum(stored_bytes(w, ways[w.name], NEW) for w in weights if w.name in ways)
    widths = {n: w.bits if w.kind == "lut" else f"int{w.bits}" for n, w in ways.items()}
    outcome = Outcome(
        base.path, None, "expanded: the size is what it would take", widths,
        whole, inner + rest, sum(math.prod(held[n].shape) for n in ways), inner, kept, errors,
        weighted=sum(counts[n] is not None for n in ways), predicted=plan.predicted,
    )  # fmt: skip
    return (tensors, dict(base.config)), outcome


def _weights(base: Base, wanted: Wanted) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that are compressed, and why the others are not."""
    found, kept = {}, {}
    tied = base.tied is not False and base.embedding is not None
    for name, tensor in base.tensors.items():
        why = left_alone(name, tensor.shape)
        if tied and name == base.stored_head:
            why = "a head that is tied"
        if wanted.left_out([name]) is not None:
            why = "left out on request"
        if why is None and tensor.stored_dtype not in FLOATS:
            why = f"{tensor.stored_dtype}, not floats"
        if why is None:
            found[name] = tensor
        else:
            kept[name] = why
    if not found:
        raise Refused(base.path, wanted.none_left("weight to compress"))
    return found, kept


def _planned(
    base: Base, held: Mapping[str, Tensor], weights: Sequence[Weight], wanted: Wanted, rest: int
) -> Plan:
    """How each is stored. ``rest``: bytes of the tensors that stay as they are. Raises Refused."""
    try:
        if wanted.palettize is None and wanted.quantize is None:
            return budgeted(weights, wanted, NEW, lambda w: _values(held[w.name]), rest)
        way = integers(wanted) if wanted.quantize else (
            Way("lut", wanted.palettize or 0, wanted.group_size or 0)
        )  # fmt: skip
        # the last table may be of fewer rows, the last scale of no fewer channels
        for weight in weights if way.kind == "int" else ():
            weight.reason = unfit(weight, way, NEW)
    except Refused as e:
        raise Refused(base.path, str(e)) from None
    fit = [w for w in weights if w.reason is None]
    if not fit:
        why = sorted({w.reason or "" for w in weights})
        raise Refused(base.path, f"holds nothing to compress ({'; '.join(why)})")
    moments = wanted.calibration.moments if wanted.calibration else {}
    return Plan({w.offset: way for w in fit}, importance=importance(fit, moments))


def _values(tensor: Tensor) -> Any:
    """The weight as it is compressed: float16 as it is, all else as float32."""
    import numpy as np

    raw = tensor.raw()
    return raw.view(np.float16) if tensor.dtype == "F16" else tensor.read()


def _pieces(
    name: str, tensor: Tensor, way: Way, counts: Any, errors: dict[str, float]
) -> Iterator[Any]:
    """``counts`` (input channels,): what squared errors count, or None."""
    import numpy as np

    before = _values(tensor)
    kind = "float16" if tensor.dtype == "F16" else "float32"
    if way.kind == "int":
        found = quantize.quantize(before, linear(way, kind), importance=counts, name=name)
        after = quantize.expand(found)
    else:
        options = replace(tables(way, kind), ragged=True)
        made = palettize.palettize(before, options, importance=counts, name=name)
        after = palette.expand(made)
    raw = from_float(after, tensor.dtype)
    norm = squared(before, counts)
    gap = as_float32(raw, tensor.dtype) - before.astype(np.float32)
    errors[name] = math.sqrt(squared(gap, counts) / norm) if norm else 0.0
    yield np.ascontiguousarray(raw)
