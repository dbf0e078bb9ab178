"""A base whose weights have the values that tables or integers would give, in the base's own dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from loraduct.converters import bits, palette, palettize, quantize
from loraduct.converters.base_report import Outcome
from loraduct.converters.compress_code import Way, linear, tables
from loraduct.converters.compress_wanted import PALETTES, Wanted
from loraduct.converters.compressible import left_alone
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.formats.model_folder import Stored, copied
from loraduct.tensor import FLOATS, Tensor, from_float


def planned(base: Base, wanted: Wanted) -> tuple[tuple[dict[str, Stored], dict[str, Any]], Outcome]:
    """What is written, and what is said of it."""
    held, kept = _weights(base, wanted)
    rest = sum(base.tensors[n].stored_nbytes for n in kept)
    ways = _ways(held, wanted, rest)
    errors: dict[str, float] = {}
    tensors = {
        n: Stored(t.dtype, t.shape, partial(_pieces, n, t, ways[n], errors))
        if n in ways
        else copied(t)
        for n, t in base.tensors.items()
    }
    whole = sum(t.stored_nbytes for t in base.tensors.values())
    inner = sum(_nbytes(ways[n], t) for n, t in held.items())
    widths = {n: w.bits if w.kind == "lut" else f"int{w.bits}" for n, w in ways.items()}
    outcome = Outcome(
        base.path, None, "expanded: the size is what it would take", widths,
        whole, inner + rest, sum(math.prod(t.shape) for t in held.values()), inner, kept, errors,
    )  # fmt: skip
    return (tensors, dict(base.config)), outcome


def _nbytes(way: Way, tensor: Tensor) -> int:
    """What it would take in Core ML; the last table may serve fewer channels."""
    count, high = math.prod(tensor.shape), tensor.shape[0]
    beside = -(-high // (way.group or high)) << (way.bits + 1)
    if way.kind == "int":
        beside = 2 * high * (count // high // way.group if way.group else 1)
    return -(-count * way.bits // 8) + beside


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
        raise Refused(base.path, "holds no weight to compress")
    return found, kept


def _ways(held: dict[str, Tensor], wanted: Wanted, rest: int) -> dict[str, Way]:
    """How each is stored. ``rest``: bytes of the tensors that stay as they are."""
    group = wanted.group_size or 0
    if wanted.quantize:
        return dict.fromkeys(held, Way("int", int(wanted.quantize.removeprefix("int")), group))
    if wanted.palettize:
        return dict.fromkeys(held, Way("lut", wanted.palettize, group))
    count = {n: math.prod(t.shape) for n, t in held.items()}
    choices = {}
    for name, tensor in held.items():
        values = _values(tensor)
        lost = bits.estimates(values, PALETTES, name=name)
        square = float((values.astype("float64") ** 2).mean()) or 1.0
        choices[name] = [
            bits.Choice(w, _nbytes(Way("lut", w, group), tensor), e / square)
            for w, e in lost.items()
        ]
    room = bits.size_of(count, wanted.bits_per_weight or 0)
    if wanted.size is not None:
        room = wanted.size - rest
    return {n: Way("lut", int(w), group) for n, w in bits.plan(choices, room).widths.items()}


def _values(tensor: Tensor) -> Any:
    """The weight as it is compressed: float16 as it is, all else as float32."""
    import numpy as np

    raw = tensor.raw()
    return raw.view(np.float16) if tensor.dtype == "F16" else tensor.read()


def _pieces(name: str, tensor: Tensor, way: Way, errors: dict[str, float]) -> Iterator[Any]:
    import numpy as np

    before = _values(tensor)
    kind = "float16" if tensor.dtype == "F16" else "float32"
    if way.kind == "int":
        after = quantize.expand(quantize.quantize(before, linear(way, kind), name=name))
    else:
        options = replace(tables(way, kind), ragged=True)
        after = palette.expand(palettize.palettize(before, options, name=name))
    raw = from_float(after, tensor.dtype)
    wide = before.astype(np.float32)
    norm = float(np.linalg.norm(wide))
    errors[name] = float(np.linalg.norm(after.astype(np.float32) - wide)) / norm if norm else 0.0
    yield np.ascontiguousarray(raw)
