"""Several adapters as one: the weighted sum of their updates, exactly or with the error said.

``cat`` and ``linear`` are the true weighted sum sum_i w_i s_i B_i A_i, factors side by side;
``svd``, and ``linear`` with a rank, its best approximation (`loraduct.converters.lowrank`). TIES,
DARE and magnitude pruning act on the entries of dW (`merge_dense`), PEFT's formulas on the factors
(`merge_peft`, under its name only). A weighted sum of DoRA updates is DoRA again (`merge_dora`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter, LowRank, Update
from loraduct.computed import given, joined
from loraduct.converters import lowrank, merge_dense, merge_dora, merge_peft, merge_rest
from loraduct.converters.merge_names import aligned, labels_of, own_naming
from loraduct.converters.recipe import Weight, weights_of
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.tensor import Tensor, is_exact
from loraduct.text import number, printable, several

_LARGEST = 3.4e38  # about float32's: both libraries multiply by the scale in it

_NOTHING = 1e-6  # of the norm: what float32 leaves of updates that cancel out


@dataclass(frozen=True)
class Method:
    """``on``: "sum", "entries" of dW, or PEFT's "factors". What else it needs to be told."""

    on: str
    dense: bool = False  # the result has full rank: a rank or an energy must say how near
    density: bool = False
    random: bool = False


METHODS = {
    "cat": Method("sum"),
    "linear": Method("sum"),
    "svd": Method("sum", dense=True),
    "ties": Method("entries", True, True),
    "dare": Method("entries", True, True, True),
    "dare-ties": Method("entries", True, True, True),
    "magnitude": Method("entries", True, True),
    "peft-cat": Method("factors"),
    "peft-svd": Method("factors"),
    "peft-linear": Method("factors"),
    "peft-ties": Method("factors", density=True),
    "peft-dare-linear": Method("factors", density=True, random=True),
    "peft-dare-ties": Method("factors", density=True, random=True),
    "peft-magnitude-prune": Method("factors", density=True),
}


@dataclass(frozen=True)
class Settings:
    """How to merge. ``sign``: how TIES elects, by "total" size or by "frequency".

    ``replacements``: what to do where replaced parameters differ: refuse, average, first.
    """

    method: str = "linear"
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    seed: int | None = None
    sign: str = "total"
    replacements: str = "refuse"


@dataclass(frozen=True)
class Module:
    """``residual``: Frobenius norm of what the result lacks, over that of the merged update."""

    module: str
    sources: int
    rank_before: int
    rank: int
    residual: float


@dataclass(frozen=True)
class Merged:
    """An adapter with PEFT's or mlx-lm's names, and what became of each module."""

    adapter: Adapter
    modules: tuple[Module, ...]
    notes: tuple[str, ...]
    labels: tuple[str, ...] = ()


@dataclass
class _Job:
    """What every module's merging is told."""

    settings: Settings
    base: Base | None
    scale: float
    rng: Any = None  # PEFT's draws go on from module to module
    notes: list[str] = field(default_factory=list)


Part = tuple[LowRank, float]


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    settings: Settings,
    base: Base | None = None,
    to: str = "peft",
    recipe: Path | None = None,
) -> Merged:
    """One adapter that does what the weighted sum of ``adapters`` does to ``base``.

    ``to``: the format it is for; it has that side's modules where all adapters have them.
    ``weights``: one for each adapter: a number, one a layer, or by module; ``recipe``: the file they
    were given in, for messages. Reads values, but of exact sums of LoRA with weights of one sign.
    Raises Refused naming what can't be had.
    """
    adapters = aligned(adapters, base, own_naming(adapters, to))
    labels = labels_of(adapters)
    if settings.method.startswith("peft-"):
        merge_peft.check(adapters)
    names = list(dict.fromkeys(n for a in adapters for n in a.updates))
    layers = base.layers if base and base.layers else merge_rest.layers_of(adapters)
    found_weights = [
        weights_of(w, names, layers, recipe or a.path, printable(label))
        for w, a, label in zip(weights, adapters, labels, strict=True)
    ]
    each = [w for w, _ in found_weights]
    parts = _parts(adapters, each, names)
    if not parts:
        raise Refused(adapters[0].path, "every weight is 0: nothing is left to merge")
    notes = [*_explained(adapters, each, parts), *(n for _, told in found_weights for n in told)]
    dora = any(u.magnitude is not None for p in parts.values() for u, _ in p)
    if dora and METHODS[settings.method].on == "sum":
        merge_dora.check(adapters, parts, base)
    job = _Job(settings, base, _common_scale(parts), merge_peft.source(settings.seed))
    biased = any(u.bias is not None for p in parts.values() for u, _ in p)
    updates: dict[str, Update] = {}
    modules, gone = [], []
    for name, found in parts.items():
        if dora and METHODS[settings.method].on == "sum":
            update, residual = merge_dora.merged(name, found, settings, base)
        else:
            update, residual = _merged(name, found, job, len(adapters))
        if update.magnitude is None and _is_gone(update, found, lazy=_is_lazy(settings)):
            gone.append(name)
        updates[name] = _with_bias(name, update, found) if biased else update
        before = sum(u.rank for u, _ in found)
        modules.append(Module(name, len(found), before, update.rank, residual))
    updates |= merge_rest.replacements(adapters, each, settings.replacements)
    if (n := _short(modules, settings.rank)) is not None:
        notes.append(n)
    if gone:
        notes.append(
            f"nothing is left of {len(gone)} of {len(modules)} modules, whose updates cancel out or are"
            f" pruned away: {several(gone)}"
        )
    adapter = merge_rest.result(adapters, each, labels, updates, settings, base)
    return Merged(adapter, tuple(modules), (*notes, *job.notes), tuple(labels))


def _parts(
    adapters: Sequence[Adapter], weights: Sequence[Mapping[str, float]], names: Sequence[str]
) -> dict[str, list[Part]]:
    """Module -> its updates that count, each with its weight; shapes and layouts agree."""
    found: dict[str, list[Part]] = {}
    for name in names:
        for adapter, weight in zip(adapters, weights, strict=True):
            u = adapter.low_rank.get(name)
            if u is None or weight[name] == 0.0:
                continue
            if not abs(weight[name] * u.scale) < _LARGEST:
                what = f"its scale {number(u.scale)} times the weight {weight[name]:g} is beyond float32"
                raise Refused(adapter.weights, what, tensor=name)
            first = found.setdefault(name, [(u, weight[name])])[0][0]
            if (first.shape, first.layout) != (u.shape, u.layout):
                what = (
                    f"updates a {u.layout} weight of shape {list(u.shape)}, another adapter a"
                    f" {first.layout} one of {list(first.shape)}: made for another base"
                )
                raise Refused(adapter.weights, what, tensor=name)
            if first is not u:
                found[name].append((u, weight[name]))
    return found


def _merged(name: str, parts: list[Part], job: _Job, count: int) -> tuple[LowRank, float]:
    """The update of one module, and the share of the norm that it lacks."""
    settings = job.settings
    method = METHODS[settings.method]
    if method.on == "factors":
        return made(name, parts, *merge_peft.merged(settings, parts, job.rng, count)), 0.0
    if method.on == "entries":
        pair, residual = merge_dense.merged(name, parts, settings, job.base)
        return made(name, parts, *pair), residual
    if _is_lazy(settings):
        return concatenated(parts, job.scale), 0.0
    return truncated(name, parts, settings.rank, settings.energy)


def _is_lazy(settings: Settings) -> bool:
    """Whether sums of LoRA are made without a look at the values."""
    whole = settings.rank is None and settings.energy is None
    return whole and METHODS[settings.method].on == "sum"


def _is_gone(update: LowRank, parts: Sequence[Part], *, lazy: bool) -> bool:
    """Whether parts that are something add up to nothing; ``lazy``: not looked at where they can't."""
    if lazy and len({u.scale * w > 0 for u, w in parts}) < 2:
        return False
    before = sum(abs(w) * _norm(u) for u, w in parts)
    return before > 0 and _norm(update) <= _NOTHING * before


def _norm(u: LowRank) -> float:
    """Frobenius norm of dW, to a hundred millionth of that of its factors."""
    pair = lowrank.factors(u)
    return float(max(lowrank.inner(pair, pair), 0.0) ** 0.5)


def concatenated(parts: Sequence[Part], scale: float) -> LowRank:
    """The exact sum, lazily, with this scale: nothing is read.

    b is multiplied by w_i s_i / scale; stored in float32 where that would round in its dtype.
    """
    first = parts[0][0]
    at_a, at_b = (1, 2) if first.layout == "experts" else (0, 1)
    factors = [u.scale * w / scale for u, w in parts]
    bs = [u.b.times(f) if f != 1.0 else u.b for (u, _), f in zip(parts, factors, strict=True)]
    exact = all(is_exact(f, b.dtype) for f, b in zip(factors, bs, strict=True))
    a_tensors = _one_dtype([u.a for u, _ in parts])
    b_tensors = _one_dtype(bs) if exact else [b.to("F32") for b in bs]
    if len(parts) == 1:
        return replace(first, a=a_tensors[0], b=b_tensors[0], scale=scale, bias=None)
    a, b = joined(a_tensors, at_a), joined(b_tensors, at_b)
    return LowRank(a, b, scale, layout=first.layout)


def _one_dtype(tensors: list[Tensor]) -> list[Tensor]:
    alike = len({t.dtype for t in tensors}) == 1
    return tensors if alike else [t.to("F32") for t in tensors]


def truncated(
    name: str, parts: Sequence[Part], rank: int | None, energy: float | None
) -> tuple[LowRank, float]:
    """The sum cut to a rank, or to the rank that keeps this share of its squared norm."""
    pairs = [lowrank.factors(u) for u, _ in parts]
    a, b = lowrank.added(pairs, [w for _, w in parts])
    pair, gone, total = lowrank.truncated(a, b, rank, energy)
    return made(name, parts, *pair), gone / total if total else 0.0


def made(name: str, parts: Sequence[Part], a: Any, b: Any) -> LowRank:
    """An update of these factors, rounded once to float32; a convolution gets its kernel back."""
    import numpy as np

    first = parts[0][0]
    if first.layout == "conv":
        a = a.reshape(a.shape[0], *first.a.shape[1:])
        b = b.reshape(*b.shape, *(1 for _ in first.b.shape[2:]))
    stored = [t for u, _ in parts for t in (u.a, u.b)]
    a_, b_ = (
        given(f"{name}.{side}", stored, x.shape, partial(np.asarray, x.astype(np.float32)))
        for side, x in (("a", a), ("b", b))
    )
    return LowRank(a_, b_, 1.0, layout=first.layout)


def _with_bias(name: str, update: LowRank, parts: Sequence[Part]) -> LowRank:
    """With sum_i w_i s_i bias_i, which every module needs once one of them has a bias."""
    import numpy as np

    total = np.zeros(update.shape[0], np.float64)
    stored = [u.bias for u, _ in parts if u.bias is not None]
    for u, w in parts:
        if u.bias is not None:
            total += w * u.scale * u.bias.read().astype(np.float64)
    value = (total / update.scale).astype(np.float32)
    inputs = stored or [parts[0][0].a]
    return replace(update, bias=given(f"{name}.bias", inputs, value.shape, lambda: value))


def _common_scale(parts: Mapping[str, Sequence[Part]]) -> float:
    """The product of scale and weight that occurs most: b stays as it is there."""
    counts = Counter(abs(u.scale * w) for p in parts.values() for u, w in p if u.scale)
    return counts.most_common(1)[0][0] if counts else 1.0


def _explained(
    adapters: Sequence[Adapter],
    weights: Sequence[Mapping[str, float]],
    parts: Mapping[str, Sequence[Part]],
) -> list[str]:
    """What a person should know of what goes in."""
    notes = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if not any(weight[m] for m in adapter.low_rank):
            notes.append(f"{adapter.path.name}: has weight 0: it contributes nothing")
        notes += [f"{adapter.path.name}: {n.text}" for n in adapter.notes if n.kind == "zero"]
    if len(adapters) > 1 and all(len(p) < 2 for p in parts.values()):
        notes.append("no module is adapted by more than one of them: each keeps its own")
    quantised = {a.path.name: a.base.quantization for a in adapters if a.base.quantization}
    if quantised and len(set(quantised.values()) | {None}) > 1:
        notes.append(
            f"trained on a quantised base: {several(sorted(quantised))}; on other weights each"
            " differs by what that changed"
        )
    return notes


def _short(modules: Sequence[Module], rank: int | None) -> str | None:
    """Of modules that can't have the rank asked for, or need less."""
    if rank is None:
        return None
    less = [m for m in modules if m.rank < rank]
    if not less:
        return None
    top = max(m.rank for m in less)
    return (
        f"rank {number(rank)} is more than {len(less)} of {len(modules)} modules have (at most {top}):"
        " they are exact"
    )
