"""What the predictions lose when tensors get other values, measured, and what plans make of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from loraduct.converters.compress_report import kind_of

PROBES = 64  # runs that measure what errors do, about at most
DAMPED = (1.0, 0.5, 0.25)  # powers of measured losses by which plans are made; one is taken
_NUMBER = re.compile(r"[0-9]+")
Loss = Callable[[Mapping[str, Any]], float | None]
P = TypeVar("P")


def measured(
    names: Sequence[str], changed: Callable[[str], tuple[Any, float]], loss: Loss
) -> dict[str, float]:
    """What is lost per unit of each tensor's error, of those that the text's run shows.

    Tensors of a kind in neighbouring layers are changed together, alone among all. ``changed``: a
    tensor's other values, and their error.
    """
    found: dict[str, float] = {}
    for held in _neighbours(names):
        values, error = {}, 0.0
        for name in held:
            values[name], own = changed(name)
            error += own
        lost = loss(values)
        if lost is not None and error > 0:
            found |= dict.fromkeys(held, max(lost, 1e-12) / error)
    return found


def damped(
    share: Mapping[Any, float], relative: Mapping[Any, float], power: float
) -> dict[Any, float]:
    """What a unit of error counts: as measured (``power`` 1), relative to the tensor (0), or between.

    What is not measured gets the median.
    """
    usual = sorted(share.values())[len(share) // 2]
    return {k: share.get(k, usual) ** power * other ** (1 - power) for k, other in relative.items()}


class Lazily(Mapping[str, Any]):
    """Values that are made when they are asked for, so that they are not held together."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Any]) -> None:
        self.names, self.make = names, make

    def __getitem__(self, name: str) -> Any:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def best(plans: Sequence[P], changed: Callable[[P], Mapping[str, Any]], loss: Loss) -> P:
    """Of several plans the one by which the predictions lose least, with all tensors changed at once.

    Losses of tensors that are changed alone add up only about, and tell too much of small changes: a
    plan that trusts them less is often the better one, and none is always.
    """
    plans = [plan for i, plan in enumerate(plans) if plan not in plans[:i]]
    if len(plans) == 1:
        return plans[0]
    return min(plans, key=lambda plan: loss(changed(plan)) or 0.0)


def _neighbours(names: Sequence[str]) -> list[list[str]]:
    """Tensors of a kind, so many together that there are about PROBES groups."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    for held in kinds.values():  # layer 2 before layer 10
        held.sort(key=lambda name: [int(n) for n in _NUMBER.findall(name)])
    step = -(-len(names) // PROBES)
    return [held[at : at + step] for held in kinds.values() for at in range(0, len(held), step)]
