"""Updates of two adapters under one set of names, so that each can be compared with its like.

Where both libraries have one module for one, its transformers' name is used; where one has a fused
module and the other its parts, the parts' names in mlx-lm. The slicing is derived here a second
time, from the table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter, LowRank, Update
from loraduct.architectures import Rule, renamed, renamer, table
from loraduct.computed import moved
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.formats.experts import number_of
from loraduct.modules import block_of, pattern_of
from loraduct.validation.checks import Check


@dataclass(frozen=True)
class NameMap:
    """Names given by hand, transformers' to mlx-lm's, and the file they are from."""

    file: Path
    names: Mapping[str, str]


def hf_names(adapter: Adapter, base: Base, names: NameMap | None) -> dict[str, str | None] | Check:
    """Each module's transformers name; None for a part of one; a failed check for an unknown one."""
    modules = list(adapter.low_rank)
    if adapter.naming == "hf":
        return {m: m for m in modules}
    try:
        if names is not None:
            rename, _ = renamer(modules, base.architecture, names.file, names.names, reverse=True)
            return {m: rename(m) for m in modules}
        rules = _rules(base, reverse=True)
        whole = [m for m in modules if rules.get(pattern_of(m), _SAME).how == "same"]
        rename, _ = renamer(whole, base.architecture, base.path / "config.json", reverse=True)
        return {m: rename(m) if m in set(whole) else None for m in modules}
    except Refused as e:
        return Check("names", "failed", str(e))


def base_names(adapter: Adapter, base: Base, to_hf: Mapping[str, str | None]) -> dict[str, str]:
    """What each module is called in the base's file, which keeps older names than live models have."""
    rules = _rules(base, reverse=False)
    twins: dict[tuple[str, ...], list[str]] = {}
    for rule in rules.values():
        twins.setdefault(rule.mlx, []).append(rule.hf)
    found = {}
    for module, name in to_hf.items():
        if name is None or adapter.low_rank[module].layout in ("experts", "parameter"):
            continue  # fused parameters are written expert by expert, and not looked up
        pattern = pattern_of(name)
        rule = rules.get(pattern, Rule(pattern, (pattern,)))

        def there(*mlx: str, module: str = name, pattern: str = pattern) -> str | None:
            names = (renamed(module, pattern, n) for n in [*twins.get(mlx, []), *mlx])
            return next((n for n in names if base.weight_of(f"{n}.weight") is not None), None)

        own = name if base.weight_of(f"{name}.weight") is not None else None
        whole = own or (there(*rule.mlx) if rule.how == "same" else None)
        if whole is None and rule.how in _CUTS and all(map(there, rule.mlx)):
            continue  # fused when it is loaded, in parts in the file
        found[module] = whole or name
    return found


def in_live_model(modules: Iterable[str], adapter: Adapter, base: Base) -> set[str]:
    """Modules of the base's file by the names that a live model has, of the adapter's library.

    mlx-lm's are those of the table, as it leaves vision parts out; of two names that transformers
    has for one layer (with its vision part, or without), the adapter's is taken. Experts that are
    written one by one are no modules any more when they are loaded, unless the adapter's were.
    """
    known = table().get(base.architecture)
    if known is None:
        return set(modules)
    blocks = next((b[0] for m in adapter.adapted if (b := block_of(m))), "")
    back = known.by_mlx_within(blocks)
    found = set()
    for module in modules:
        pattern = pattern_of(module)
        rule = known.by_hf.get(pattern)
        if adapter.naming == "mlx":
            if rule is not None and rule.how != "stack":
                found |= {renamed(module, pattern, name) for name in rule.mlx}
            elif pattern in known.by_mlx or pattern in known.blocked:
                found.add(module)
        elif rule is None or rule.how != "stack" or module in adapter.adapted:
            live = back.get(rule.mlx[0]) if rule and rule.how == "same" else None
            found.add(renamed(module, pattern, live.hf) if live else module)
    return found


_SAME = Rule("", ("",))


def _rules(base: Base, *, reverse: bool) -> Mapping[str, Rule]:
    known = table().get(base.architecture)
    return known.rules(reverse) if known else {}


def aligned(adapter: Adapter, base: Base, names: NameMap | None) -> dict[str, Update] | Check:
    """The updates by common names, fused ones cut into their parts, experts stacked."""
    to_hf = hf_names(adapter, base, names)
    if isinstance(to_hf, Check):
        return to_hf
    found: dict[str, Update] = {**adapter.replacements, **adapter.dense}
    if adapter.naming == "mlx":
        found |= {to_hf[m] or m: u for m, u in adapter.low_rank.items()}
        for u in adapter.low_rank.values():
            if u.layout == "embedding" and base.tied:  # one module in mlx-lm: it moves the head too
                found["lm_head"] = replace(u, a=u.b.T, b=u.a.T, layout="linear")
        return found
    rules = _rules(base, reverse=False) if names is None else {}
    experts: dict[str, dict[int, LowRank]] = {}
    for module, u in adapter.low_rank.items():
        pattern = pattern_of(module)
        rule = rules.get(pattern, _SAME)
        targets = [renamed(module, pattern, name) for name in rule.mlx]
        u = _transposed(u) if rule.turned and u.layout == "experts" else u
        u = _routed(u, base) if rule.zeros and u.layout == "experts" else u
        if rule.how in _CUTS:
            for name, cut in zip(targets, _CUTS[rule.how], strict=True):
                found[name] = _cut(u, cut)
        elif rule.how == "stack":
            index = int([w for w in module.split(".") if w.isdigit()][-1])
            experts.setdefault(targets[0], {})[index] = u
        else:
            found[module] = u
    for name, members in experts.items():
        ranks = {(u.rank, u.scale) for u in members.values()}
        if len(ranks) > 1:
            return Check("dW", "skipped", "its experts have ranks or scales of their own", name)
        first = members[0]
        order = [members[i] for i in sorted(members)]
        found[name] = LowRank(
            _piled([u.a for u in order]),
            _piled([u.b for u in order]),
            first.scale,
            layout="experts",
        )
    return found


def _halves(which: int) -> Callable[[Any], Any]:
    return lambda b: b.reshape(*b.shape[:-2], 2, b.shape[-2] // 2, b.shape[-1])[..., which, :, :]


def _turns(which: int) -> Callable[[Any], Any]:
    return lambda b: b.reshape(*b.shape[:-2], b.shape[-2] // 2, 2, b.shape[-1])[..., which, :]


# what is left of b, (..., out, r), for either part
_CUTS = {"halves": (_halves(0), _halves(1)), "interleaved": (_turns(0), _turns(1))}


def _cut(u: LowRank, cut: Callable[[Any], Any]) -> LowRank:
    shape = (*u.b.shape[:-2], u.b.shape[-2] // 2, u.b.shape[-1])
    return replace(u, b=moved(shape, [u.b], cut))


def _routed(u: LowRank, base: Base) -> LowRank:
    """Without the experts that do nothing, whose factors only PEFT has."""
    count = number_of(base.text_config) or u.shape[0]
    a, b = (moved((count, *t.shape[1:]), [t], lambda v: v[:count]) for t in (u.a, u.b))
    return replace(u, a=a, b=b)


def _transposed(u: LowRank) -> LowRank:
    """What PEFT adds to a parameter (experts, in, out) that it takes for (experts, out, in)."""

    def flip(values: Any) -> Any:
        return values.swapaxes(-1, -2)

    (experts, out, rank), inner = u.b.shape, u.a.shape[2]
    a, b = moved((experts, rank, out), [u.b], flip), moved((experts, inner, rank), [u.a], flip)
    return replace(u, a=a, b=b)


def _piled(tensors: list[Any]) -> Any:
    def pile(*values: Any) -> Any:
        import numpy as np

        return np.array(values)

    return moved((len(tensors), *tensors[0].shape), tensors, pile)
