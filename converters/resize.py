"""An adapter with smaller ranks: of every module the best approximation of its rank.

What is cut is known beforehand from the singular values (Eckart and Young). Of DoRA the part of low
rank is cut, with the magnitudes worked out anew from the base (`merge_dora`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from loraduct.adapter import Adapter, LowRank, Update
from loraduct.converters import lowrank, merge_dora
from loraduct.converters.merge import Merged, Module, Settings, truncated
from loraduct.converters.merge_names import aligned, own_naming
from loraduct.formats.base import Base
from loraduct.text import number


@dataclass(frozen=True)
class Wanted:
    """One of ``rank``, ``energy`` (share of the squared norm kept), ``error`` (of the norm, lost).

    Without ``per_module`` all modules get one rank, the smallest that does for the adapter as a
    whole. With it each module gets its own; with ``rank`` the parameters that this rank would take
    are spent where they keep most.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    per_module: bool = False

    @property
    def share(self) -> float:
        """Of the squared norm that is to be kept."""
        return self.energy if self.energy is not None else 1.0 - (self.error or 0.0) ** 2


def resize(adapter: Adapter, wanted: Wanted, base: Base | None = None, to: str = "peft") -> Merged:
    """The adapter with its ranks cut, and what each module lost of its norm. Reads the values.

    ``to``: the format it is for, whose modules are cut where the adapter has their names.
    """
    adapter = aligned([adapter], base, own_naming([adapter], to))[0]
    dora = any(u.magnitude is not None for u in adapter.low_rank.values())
    if dora:
        merge_dora.check([adapter], {m: [(u, 1.0)] for m, u in adapter.low_rank.items()}, base)
    spectra = {m: _spectrum(m, u, base) for m, u in adapter.low_rank.items()}
    ranks = ranks_for(spectra, _costs(adapter), wanted)
    done: dict[str, Update] = dict(adapter.updates)
    modules = []
    for name, u in adapter.low_rank.items():
        rank, residual = ranks[name], 0.0
        if rank < u.rank:
            part = [(u, 1.0)]
            one, residual = (
                merge_dora.merged(name, part, Settings(rank=rank), base)
                if dora
                else truncated(name, part, rank, None)
            )
            done[name] = replace(one, bias=u.bias and u.bias.times(u.scale).to("F32"))
        modules.append(Module(name, 1, u.rank, min(rank, u.rank), residual))
    notes = []
    if wanted.rank is not None and wanted.rank >= adapter.rank and not wanted.per_module:
        notes.append(f"rank {number(wanted.rank)} is no less than the adapter has: nothing was cut")
    if len({m.rank for m in modules}) > 1 and adapter.format == "peft":
        notes.append(
            "ranks per module: vLLM, LoRAX, Olive and llama.cpp read no patterns; --uniform pads all"
            " to the largest"
        )
    return Merged(replace(adapter, updates=done, origin=None), tuple(modules), tuple(notes))


def _spectrum(name: str, u: LowRank, base: Base | None) -> Any:
    """Squared singular values (k,) of what is cut, largest first; of experts summed place by place."""
    a, b = lowrank.factors(u)
    if u.magnitude is not None:
        b = merge_dora.growth(merge_dora.weight_of(base, name, u), u)[:, None] * b
    values = lowrank.values_of(a, b)
    return (values.reshape(-1, values.shape[-1]) ** 2).sum(0)


def _costs(adapter: Adapter) -> dict[str, int]:
    """Parameters that one rank takes in each module."""
    return {m: (prod(u.a.shape) + prod(u.b.shape)) // u.rank for m, u in adapter.low_rank.items()}


def ranks_for(
    spectra: Mapping[str, Any], costs: Mapping[str, int], wanted: Wanted
) -> dict[str, int]:
    """Module -> rank, at least 1. ``spectra``: squared singular values, largest first."""
    import numpy as np

    most = max(len(s) for s in spectra.values())
    if wanted.rank is not None and not wanted.per_module:
        return {m: min(wanted.rank, len(s)) for m, s in spectra.items()}
    if wanted.rank is not None:
        return _spent(spectra, costs, wanted.rank)
    if wanted.per_module:
        return {m: _enough(np.cumsum(s), wanted.share) for m, s in spectra.items()}
    total = np.zeros(most)
    for s in spectra.values():
        total[: len(s)] += s
    rank = _enough(np.cumsum(total), wanted.share)
    return {m: min(rank, len(s)) for m, s in spectra.items()}


def _enough(kept: Any, share: float) -> int:
    """The smallest rank that keeps the share of the squared norm."""
    import numpy as np

    if not kept[-1]:
        return 1
    found = int(np.searchsorted(kept, share * kept[-1] * (1 - 1e-12))) + 1
    return min(found, len(kept))


def _spent(spectra: Mapping[str, Any], costs: Mapping[str, int], rank: int) -> dict[str, int]:
    """The budget of ``rank`` everywhere, spent on the directions that keep most a parameter."""
    budget = sum(min(rank, len(spectra[m])) * costs[m] for m in spectra)
    ranks = dict.fromkeys(spectra, 1)
    left = budget - sum(costs.values())
    order = sorted(
        ((float(v) / costs[m], m) for m, s in spectra.items() for v in s[1:]), reverse=True
    )
    for worth, module in order:
        if worth > 0 and costs[module] <= left:
            ranks[module] += 1
            left -= costs[module]
    return ranks
