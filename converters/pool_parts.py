"""What a pool needs to know of an adapter before a value of it is read, and how several combine.

Both runtimes share this: which module each update belongs to, what may be weighted, what can't
stand beside what. The runtimes' own modules (`pool_torch`, `pool_mlx`) only place and compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from loraduct.adapter import Adapter, LowRank
from loraduct.converters.fuse_places import DORA, REPLACES, TWICE, check_weight
from loraduct.errors import Refused
from loraduct.tensor import Tensor


@dataclass(eq=False)
class Low:
    """A low-rank update in the runtime's own arrays, oriented as `loraduct.adapter.LowRank` is.

    ``factor`` (out,) is DoRA's m / ||W + scale * b @ a||. ``kind`` is the layout; ``bare`` says that
    the parameter itself is updated (experts' and routers' in transformers), not a layer's output.
    """

    a: Any
    b: Any
    scale: float
    kind: str
    factor: Any = None
    bias: Any = None
    bare: bool = False


@dataclass(eq=False)
class Held:
    """An adapter in memory. ``updates`` by module (bare ones by parameter), ``replaced`` by
    parameter, ``rows`` by parameter: (row numbers, what stands there). ``nbytes``: of all arrays."""

    file: Path
    nbytes: int
    updates: dict[str, Low] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Any]] = field(default_factory=dict)


@dataclass(eq=False)
class Plan:
    """The same before it is read: checked against the live model, its size known."""

    adapter: Adapter
    nbytes: int
    updates: dict[str, tuple[LowRank, bool]] = field(default_factory=dict)  # and whether bare
    replaced: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)


Stack = Sequence[tuple[Held, float]]


class Runtime(Protocol):
    """What `loraduct.converters.pool` asks of a runtime. All but `read` run under the pool's lock."""

    naming: str

    def plan(self, adapter: Adapter) -> Plan:
        """Where everything goes. Raises Refused naming what the live model has no place for."""

    def weights(self, plan: Plan) -> Mapping[str, Any]:
        """The base's own arrays that reading needs, whatever is active now."""

    def read(self, plan: Plan, weights: Mapping[str, Any]) -> Held:
        """The values. Raises Refused for NaN and Inf, in the file or in the dtype of the model."""

    def show(self, stack: Stack) -> None:
        """Make the model compute with these, in this order, instead of what it had before.

        Raises Refused, before anything changes, for sums that overflow the dtype of the model.
        """

    @property
    def exchanged_bytes(self) -> int:
        """What stands in the place of base weights now."""


def check_stack(stack: Stack) -> None:
    """Refuse what has no meaning together: the same rules as `fuse` has.

    Raises Refused naming the module or parameter.
    """
    whole: set[str] = set()
    adapted: set[str] = set()
    for held, weight in stack:
        for name, low in held.updates.items():
            if low.factor is not None:
                check_weight(held.file, name, weight, DORA)
            adapted.add(name if low.bare else f"{name}.weight")
        for name in (*held.replaced, *held.rows):
            check_weight(held.file, name, weight, REPLACES)
            if name in whole:
                raise Refused(held.file, TWICE, tensor=name)
            whole.add(name)
        both = next(iter(sorted(adapted & whole)), None)
        if both is not None:
            what = "is adapted and replaced at once: which comes first is not defined"
            raise Refused(held.file, what, tensor=both)


def no_place(adapter: Adapter, name: str) -> Refused:
    """For what the live model doesn't have."""
    return Refused(
        adapter.weights, "the model has no such place: made for another base", tensor=name
    )


def overflow(file: Path | None, name: str, dtype: Any) -> Refused:
    """For values that are Inf or NaN in the dtype of the model."""
    found = str(dtype).rpartition(".")[2]
    how = (
        "load the base in bfloat16 or float32" if found == "float16" else "its values are too large"
    )
    what = f"does not fit the model's {found}, it has Inf or NaN there: {how}"
    return Refused(file, what, tensor=name)


def misfit(adapter: Adapter, name: str, given: Sequence[int], there: Sequence[int]) -> Refused:
    """For shapes that differ."""
    what = f"updates a weight of shape {list(given)}, the model has {list(there)}: made for another base"
    return Refused(adapter.weights, what, tensor=name)
