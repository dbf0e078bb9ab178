"""How each tensor of a package is stored: as asked, or as a budget allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraduct.converters import bits
from loraduct.converters.compress_code import Way, stored_bytes, unfit
from loraduct.converters.compress_report import kind_of
from loraduct.converters.compress_sites import ADAPTER, BASE, OLD, Weight
from loraduct.converters.compress_wanted import PALETTES, Wanted
from loraduct.errors import Refused
from loraduct.text import size as shown_size

SMALLEST = 64  # numbers; fewer are never worth a table
_FULL = 16  # the width that stands for "as it is"
_OLD_BITS = (1, 2, 4, 6, 8)
_CHUNK = 1 << 18


@dataclass
class Plan:
    """A way for each tensor that gets one. ``errors``: squared, estimated, by tensor and width;
    ``norms``: squared, by tensor. ``exact``: see `loraduct.converters.bits.Plan`."""

    ways: dict[int, Way] = field(default_factory=dict)
    errors: dict[int, dict[int, float]] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    exact: bool | None = None


def asked(wanted: Wanted) -> dict[str, Way | None]:
    """The way of the base's tensors and of the adapters', where it is given. Raises Refused."""
    for width in (wanted.palettize, wanted.adapter_bits):
        if width is not None and width not in PALETTES:
            known = ", ".join(map(str, PALETTES))
            raise Refused(None, f"{width} bits: tables have {known}")
    group = wanted.group_size or 0
    if (wanted.per_channel_scale or group) and not (wanted.palettize or wanted.quantize):
        what = "--per-channel-scale" if wanted.per_channel_scale else "--group-size"
        raise Refused(
            None, f"{what} goes with --palettize{'' if 'p' in what[:3] else ' or --quantize'}"
        )
    base = None
    if wanted.palettize is not None:
        base = Way("lut", wanted.palettize, group, wanted.per_channel_scale)
    elif wanted.quantize is not None:
        if wanted.quantize not in ("int8", "int4"):
            raise Refused(None, f"--quantize {wanted.quantize}: int8 or int4")
        base = Way("int", int(wanted.quantize.removeprefix("int")), group)
    own = wanted.adapter_bits
    return {BASE: base, ADAPTER: None if own is None else Way("lut", own)}


def fixed(weights: Sequence[Weight], ways: Mapping[str, Way | None], form: str) -> Plan:
    """One way for all of a group; a tensor that it doesn't fit gets its reason."""
    plan = Plan()
    for weight in weights:
        way = ways[weight.group]
        if weight.reason is not None:
            continue
        if way is None:
            weight.reason = "not asked for"
            continue
        weight.reason = unfit(weight, way, form) or _useless(weight, way, form)
        if weight.reason is None:
            plan.ways[weight.offset] = way
    return plan


def _useless(weight: Weight, way: Way, form: str) -> str | None:
    if weight.count < SMALLEST:
        return f"fewer than {SMALLEST} numbers"
    if stored_bytes(weight, way, form) >= stored_bytes(weight, None, form):
        return "would not be smaller"
    return None


def budgeted(
    weights: Sequence[Weight], wanted: Wanted, form: str, read: Callable[[Weight], Any], rest: int
) -> Plan:
    """A width for each tensor of the base, so that all fit and the squared error is the least.

    ``rest``: bytes of the package besides these tensors, of which --size speaks too. Raises Refused
    for a budget that can't be met, with the least that can.
    """
    free = [w for w in weights if w.group == BASE and w.reason is None and w.count >= SMALLEST]
    plan = estimated(free, form, read)
    choices = {}
    for weight in free:
        found = [
            bits.Choice(width, stored_bytes(weight, Way("lut", width), form), error)
            for width, error in plan.errors[weight.offset].items()
        ]
        full = bits.Choice(_FULL, stored_bytes(weight, None, form), 0.0)
        choices[str(weight.offset)] = [*found, full]
    if wanted.size is not None:
        limit = wanted.size - rest
    else:
        assert wanted.bits_per_weight is not None
        limit = bits.size_of({n: w.count for n, w in _named(free).items()}, wanted.bits_per_weight)
    least = sum(min(c.nbytes for c in found) for found in choices.values())
    if least > limit:
        count = sum(w.count for w in free)
        per = f"{math.ceil(800 * least / count) / 100:g} bits per weight" if count else "nothing"
        whole = f"--size {wanted.size}: " if wanted.size is not None else ""
        asked_for = whole or f"--bits-per-weight {wanted.bits_per_weight:g}: "
        low = f"{least + rest} bytes" if wanted.size is not None else per
        raise Refused(None, f"{asked_for}the smallest possible is {low} ({len(free)} tensors)")
    made = bits.plan(choices, limit)
    for weight in free:
        width = made.widths[str(weight.offset)]
        if width == _FULL:
            weight.reason = "the budget holds it as it is"
        else:
            plan.ways[weight.offset] = Way("lut", int(width))
    plan.exact = made.exact
    return plan


def _named(weights: Sequence[Weight]) -> dict[str, Weight]:
    return {str(w.offset): w for w in weights}


def estimated(weights: Sequence[Weight], form: str, read: Callable[[Weight], Any]) -> Plan:
    """Errors of tables per tensor at each width that the package's opset has."""
    plan, widths = Plan(), _OLD_BITS if form == OLD else PALETTES
    for weight in weights:
        values = read(weight)
        plan.errors[weight.offset] = bits.estimates(values, widths, name=weight.name)
        plan.norms[weight.offset] = squared(values)
    return plan


def squared(values: Any) -> float:
    """The sum of squares."""
    import numpy as np

    flat, total = values.reshape(-1), 0.0
    for at in range(0, flat.size, _CHUNK):
        wide = flat[at : at + _CHUNK].astype(np.float32)
        total += float(np.einsum("i,i->", wide, wide))
    return total


def shown(weights: Sequence[Weight], plan: Plan, form: str) -> list[list[str]]:
    """Kinds of tensors x widths: bytes, relative error, and how many get that width."""
    widths = sorted({b for found in plan.errors.values() for b in found})
    kinds: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.offset in plan.errors:
            kinds.setdefault(kind_of(weight.name), []).append(weight)
    rows = [["tensors", "count", *(f"{b} bits" for b in widths), "chosen"]]
    for kind, held in kinds.items():
        norm = sum(plan.norms[w.offset] for w in held)
        cells = []
        for b in widths:
            nbytes = sum(stored_bytes(w, Way("lut", b), form) for w in held)
            error = sum(plan.errors[w.offset][b] for w in held)
            cells.append(f"{shown_size(nbytes)} {math.sqrt(error / norm) if norm else 0:.3f}")
        taken = [plan.ways[w.offset].bits if w.offset in plan.ways else _FULL for w in held]
        chosen = ", ".join(f"{taken.count(b)} x {b}" for b in sorted(set(taken)))
        rows.append([kind, str(len(held)), *cells, chosen])
    return rows
