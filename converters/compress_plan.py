"""How each tensor of a package is stored: as asked, or as a budget allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from loraduct.converters import bits, lut, palette, palettize
from loraduct.converters.coded import chunks, coded
from loraduct.converters.compress_code import Way, stored_bytes, tables, unfit
from loraduct.converters.compress_loss import DAMPED, Lazily, Loss, best, damped, measured
from loraduct.converters.compress_report import kind_of
from loraduct.converters.compress_sites import ADAPTER, BASE, OLD, Weight, importance
from loraduct.converters.compress_wanted import PALETTES, Calibration, Wanted
from loraduct.errors import Refused
from loraduct.formats.coreml.blob import CODES
from loraduct.text import size as shown_size

BLOCK = (
    32  # input channels per scale, where --granularity block says no more (coremltools' default)
)
TEXT = 320  # bytes that a rewritten operation adds to the program, at most (measured: 230)
SMALLEST = 64  # numbers; fewer are never worth a table
GROUPS = (0, 16, 4, 1)  # rows per table that a calibrated budget chooses among; 0: one table
PROBE = 16  # rows per table where a tensor is changed to see what that does to the predictions
HELD = "the budget holds it as it is"
_CHUNK = 1 << 18
Read = Callable[[Weight], Any]


@dataclass
class Plan:
    """A way for each tensor that gets one. ``errors``: squared, estimated, by tensor and way;
    ``norms``: squared, by tensor; both of a layer's outputs where ``importance`` is known.

    ``curve``: of a budget, (bytes of these tensors, error) of the best plans, smallest first; the
    errors are squared, or with ``predicted`` the loss of the predictions (mean KL, nats) that is
    expected if losses add up. ``exact``: see `loraduct.converters.bits.Plan`.
    """

    ways: dict[int, Way] = field(default_factory=dict)
    errors: dict[int, dict[Way, float]] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    importance: dict[int, Any] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    count: int = 0  # numbers in the tensors of the curve
    predicted: bool = False
    exact: bool | None = None


def asked(wanted: Wanted) -> dict[str, Way | None]:
    """The way of the base's tensors and of the adapters', where it is given. Raises Refused."""
    for width in (wanted.palettize, wanted.adapter_bits):
        if width is not None and width not in PALETTES:
            known = ", ".join(map(str, PALETTES))
            raise Refused(None, f"{width} bits: tables have {known}")
    group = wanted.group_size or 0
    budget = wanted.size is not None or wanted.bits_per_weight is not None
    forms = {
        "--per-channel-scale": (wanted.per_channel_scale, wanted.palettize or budget, ""),
        "--group-size": (group, wanted.palettize or wanted.quantize or budget, " or --quantize"),
        **{option: (given, wanted.palettize, "") for option, given in wanted.of_tables.items()},
    }
    for what, (given, fits, other) in forms.items():
        if given and not fits:
            raise Refused(None, f"{what} goes with --palettize{other}")
    for what, said in wanted.of_integers.items():
        if said and wanted.quantize is None:
            raise Refused(None, f"{what} goes with --quantize")
    if wanted.axis and not group and wanted.cluster_dim == 1:
        raise Refused(None, "--axis says along which axis groups lie: give --group-size too")
    base = None
    if wanted.palettize is not None:
        base = Way(
            "lut", wanted.palettize, group, wanted.per_channel_scale, wanted.lut,
            wanted.cluster_dim, wanted.axis,
        )  # fmt: skip
    elif wanted.quantize is not None:
        if wanted.quantize not in ("int8", "int4"):
            raise Refused(None, f"--quantize {wanted.quantize}: int8 or int4")
        base = integers(wanted)
    own = wanted.adapter_bits
    return {BASE: base, ADAPTER: None if own is None else Way("lut", own)}


def integers(wanted: Wanted) -> Way:
    """How --quantize int8 or int4 stores. Raises Refused for granularities that contradict the groups."""
    group, how = wanted.group_size or 0, wanted.granularity
    if group and how in ("tensor", "channel"):
        raise Refused(None, f"--granularity {how}: --group-size is for a scale per block")
    group = BLOCK if how == "block" and not group else group
    width = int((wanted.quantize or "").removeprefix("int"))
    return Way("int", width, group, symmetric=not wanted.asymmetric, whole=how == "tensor")


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


def leave_many_values(weights: Sequence[Weight], plan: Plan, read: Read) -> None:
    """Take tensors out of ``plan`` whose tables are to hold all of their values, and can't."""
    import numpy as np

    for weight in weights:
        way = plan.ways.get(weight.offset)
        if way is None or way.lut != "unique" or way.scaled:
            continue
        code = coded(np.moveaxis(read(weight), way.axis, 0), name=weight.name)
        each = (way.group or weight.shape[way.axis]) * (weight.count // weight.shape[way.axis])
        try:
            lut.bits_for(code, list(chunks(weight.count, each)), way.bits, None)
        except Refused as e:
            weight.reason = str(e)
            del plan.ways[weight.offset]


def _useless(weight: Weight, way: Way, form: str) -> str | None:
    if weight.count < SMALLEST:
        return f"fewer than {SMALLEST} numbers"
    if stored_bytes(weight, way, form) >= stored_bytes(weight, None, form):
        return "would not be smaller"
    return None


def widths(form: str) -> tuple[int, ...]:
    """Bits of tables that a form has."""
    return palette.IOS16_BITS if form == OLD else PALETTES


def by_rows(way: Way) -> bool:
    """Whether its error can be estimated on some of a tensor's rows."""
    return way.kind == "lut" and way.axis == 0 and way.cluster_dim == 1 and way.lut != "unique"


def candidates(wanted: Wanted, form: str) -> list[Way]:
    """What a budget chooses among: all widths, with a scale per row, and with a calibration also how many
    rows share a table. Scales keep loud rows from taking the table's entries, which hurts the predictions
    more than squared errors tell (docs/compression.md)."""
    if form == OLD:
        return [Way("lut", width) for width in widths(form)]
    scaled, known = wanted.per_channel_scale, widths(form)
    if wanted.group_size is not None:
        return [Way("lut", b, wanted.group_size, scaled) for b in known]
    rows = [Way("lut", b, 0, True) for b in known]
    if wanted.calibration is None or scaled:
        return rows
    # tables of more entries than that take more than they save
    return [*rows, *(Way("lut", b, g) for g in GROUPS for b in known if not g or 1 << b <= 16 * g)]


def budgeted(
    weights: Sequence[Weight],
    wanted: Wanted,
    form: str,
    read: Read,
    rest: int,
) -> Plan:
    """A way for each tensor of the base, so that all fit and the error is the least.

    The error is the sum of squares, each to the mean square of its tensor: layers stand behind norms, so
    how large one is says little of what its errors do. With a calibration it is that of the outputs, times
    how much the predictions lose by it. ``rest``: bytes of the package besides these tensors, of which
    --size speaks too. Raises Refused for a budget that can't be met, with the least that can.
    """
    free = [w for w in weights if w.group == BASE and w.reason is None and w.count >= SMALLEST]
    known = candidates(wanted, form)

    def nbytes(weight: Weight, way: Way | None) -> int:
        """In the weight file; of --size also a second operation, which scales take."""
        second = way is not None and way.scaled and wanted.size is not None
        return stored_bytes(weight, way, form) + TEXT * len(weight.users) * second

    least = sum(min(nbytes(w, way) for way in [None, *_fitting(w, known, form)]) for w in free)
    if wanted.size is not None:
        limit = wanted.size - rest
    else:
        assert wanted.bits_per_weight is not None
        limit = bits.size_of({str(w.offset): w.count for w in free}, wanted.bits_per_weight)
        if limit >= sum(w.count * CODES[w.dtype][1] // 8 for w in free):
            # all as it is: what aligns tensors in the file is no reason to change them
            limit = sum(nbytes(w, None) for w in free)
    if least > limit:
        raise Refused(None, wanted.unmet(least, rest, len(free), sum(w.count for w in free)))
    moments = wanted.calibration.moments if wanted.calibration else {}
    plan = estimated(free, known, form, read, moments)
    choices = {}
    for weight in free:
        errors = plan.errors[weight.offset]
        found = [bits.Choice(i, nbytes(weight, w), e) for i, (w, e) in enumerate(errors.items())]
        choices[str(weight.offset)] = [*found, bits.Choice(-1, nbytes(weight, None), 0.0)]
    _decide(plan, free, partial(bits.plan, choices, limit), form, read, wanted.calibration)
    for weight in free:
        if weight.offset not in plan.ways:
            weight.reason = HELD
    return plan


def _decide(
    plan: Plan,
    weights: Sequence[Weight],
    least: Callable[..., bits.Plan],
    form: str,
    read: Read,
    calibration: Calibration | None,
) -> None:
    """Take what has the least error, or of several such plans what is measured to lose least."""
    by_name = {w.name: w for w in weights}
    loss = calibration.loss if calibration else None
    share = sensitivities(weights, plan, form, read, loss) if loss else {}
    relative = {w.offset: w.count / (plan.norms[w.offset] or 1.0) for w in weights}

    def planned(power: float) -> tuple[bits.Plan, dict[int, Way]]:
        counts = damped(share, relative, power) if share else relative
        made = least(importance={str(at): s for at, s in counts.items()})
        chosen = {w.offset: int(made.widths[str(w.offset)]) for w in weights}
        return made, {at: list(plan.errors[at])[i] for at, i in chosen.items() if i >= 0}

    @cache  # plans have most in common
    def stored(name: str, way: Way) -> palette.Palette:
        return _stored(by_name[name], way, plan, read)

    def changed(found: tuple[bits.Plan, dict[int, Way]]) -> Mapping[str, Any]:
        ways = {n: found[1].get(w.offset) for n, w in by_name.items() if w.offset in share}
        taken = {n: way for n, way in ways.items() if way is not None}
        return Lazily(list(taken), lambda name: palette.expand(stored(name, taken[name])))

    first = found = planned(1.0)
    if loss and share:
        found = best([first, *map(planned, DAMPED[1:])], changed, loss)
        plan.predicted = True
    plan.ways, plan.exact = found[1], found[0].exact
    plan.curve, plan.count = first[0].curve, sum(w.count for w in weights)


def _stored(weight: Weight, way: Way, plan: Plan, read: Read) -> palette.Palette:
    """A tensor in this way, searched hastily."""
    options = replace(tables(way, weight.dtype.lower()), quick=True)
    counts = plan.importance.get(weight.offset)
    return palettize.palettize(read(weight), options, importance=counts, name=weight.name)


def _fitting(weight: Weight, ways: Sequence[Way], form: str) -> list[Way]:
    return [way for way in ways if unfit(weight, way, form) is None]


def estimated(
    weights: Sequence[Weight],
    ways: Sequence[Way],
    form: str,
    read: Read,
    moments: Mapping[str, Any],
) -> Plan:
    """Errors of the ways that fit each tensor: of one table from the histogram, of others by sample."""
    plan = Plan(importance=importance(weights, moments))
    for weight in weights:
        values, counts = read(weight), plan.importance.get(weight.offset)
        own = _fitting(weight, ways, form)
        plain = [way for way in own if way == Way("lut", way.bits)]
        rest = [way for way in own if way not in plain]
        whole = bits.estimates(
            values, [way.bits for way in plain], importance=counts, name=weight.name
        ) if plain else {}  # fmt: skip
        options = [tables(way, weight.dtype.lower()) for way in rest]
        other = bits.sampled(values, options, importance=counts, name=weight.name)
        found = {way: whole[way.bits] for way in plain} | dict(zip(rest, other, strict=True))
        plan.errors[weight.offset] = {way: found[way] for way in own}
        plan.norms[weight.offset] = squared(values, counts)
    return plan


def sensitivities(
    weights: Sequence[Weight], plan: Plan, form: str, read: Read, loss: Loss
) -> dict[int, float]:
    """What the predictions lose per unit of each tensor's error: measured.

    Tensors of a kind in neighbouring layers are changed together, alone among all, to what 4 bits make
    of them; so few that there are about PROBES such runs. What the text's run does not show gets the
    median. Losses are those of small changes, where they are about proportional to squared errors, and
    those of several tensors about add up.
    """
    by_name = {weight.name: weight for weight in weights}

    def changed(name: str) -> tuple[Any, float]:
        weight = by_name[name]
        way = Way("lut", 4, 0 if form == OLD or weight.shape[0] % PROBE else PROBE)
        made = _stored(weight, way, plan, read)
        return palette.expand(made), made.error

    found = measured(list(by_name), changed, loss)
    return {w.offset: found[w.name] for w in weights if w.name in found}


def squared(values: Any, counts: Any = None) -> float:
    """The sum of squares; ``counts``: what each channel of axis 1 counts."""
    import numpy as np

    rows, total = values.reshape(len(values), -1), 0.0
    each = np.ones(1) if counts is None else np.repeat(counts, rows.shape[1] // len(counts))
    step = max(1, _CHUNK // rows.shape[1])
    for at in range(0, len(rows), step):
        wide = rows[at : at + step].astype(np.float32)
        total += float((np.einsum("ij,ij->j", wide, wide, dtype=np.float64) * each).sum())
    return total


def shown(weights: Sequence[Weight], plan: Plan, form: str) -> list[list[str]]:
    """Kinds of tensors x widths: bytes, relative error, and how many get which way.

    Of the ways of one width the one with fewest tables is shown.
    """
    first: dict[int, Way] = {}
    for found in plan.errors.values():
        for way in found:
            first.setdefault(way.bits, way)
    columns = sorted(first)
    kinds: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.offset in plan.errors:
            kinds.setdefault(kind_of(weight.name), []).append(weight)
    rows = [["tensors", "count", *(f"{b} bits" for b in columns), "chosen"]]
    for kind, held in kinds.items():
        norm = sum(plan.norms[w.offset] for w in held)
        cells = []
        for way in (first[b] for b in columns):
            known = [w for w in held if way in plan.errors[w.offset]]
            nbytes = sum(stored_bytes(w, way, form) for w in known)
            error = sum(plan.errors[w.offset][way] for w in known)
            cells.append(f"{shown_size(nbytes)} {math.sqrt(error / norm) if norm else 0:.3f}")
        taken = [str(plan.ways.get(w.offset, "as it is")) for w in held]
        chosen = "; ".join(f"{taken.count(way)} x {way}" for way in sorted(set(taken)))
        rows.append([kind, str(len(held)), *cells, chosen])
    return rows
