"""What an operation of ML programs is to the interpreter: a function and a few facts about it.

The function's parameters are MIL's, by name and with MIL's defaults (coremltools 9.0
``converters/mil/mil/ops/defs``), so its signature says what is required and what is unknown.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

# Parameters that are tuples of values, whatever their number.
TUPLES = frozenset({"values", "ref_tensors", "begins", "ends", "end_masks"})
NUMBERS = "numbers"  # the parameter through which a function gets the Numbers to compute with


@dataclass(frozen=True)
class Op:
    """``run``: arrays in, an array or a tuple of arrays out.

    ``dtype``: of the output, a dtype's name or the parameter whose dtype it shares; one per output
    where they differ. Where that parameter is left out: ``default``. A text parameter names a dtype.
    ``moves``: its values are among those of its inputs, so that there is nothing to round.
    ``same``: parameters that must have one dtype.
    """

    run: Callable[..., Any]
    dtype: str | tuple[str, ...] = "x"
    moves: bool = False
    same: tuple[str, ...] = ()
    default: str = "FLOAT32"

    @cached_property
    def parameters(self) -> dict[str, bool]:
        """Parameter -> whether it is required."""
        found = inspect.signature(self.run).parameters.items()
        return {n: p.default is inspect.Parameter.empty for n, p in found if n != NUMBERS}

    @cached_property
    def wants_numbers(self) -> bool:
        """Whether its inner arithmetic depends on the precision asked for."""
        return NUMBERS in inspect.signature(self.run).parameters


def ints(values: Any) -> tuple[int, ...]:
    """A constant as plain integers."""
    return tuple(int(v) for v in np.asarray(values).reshape(-1))


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    """Axes as numbers from 0 to ``rank`` - 1; None: all. Raises ValueError for one out of range."""
    found = range(rank) if axes is None else ints(axes)
    for axis in found:
        if not -rank <= axis < rank:
            raise ValueError(f"axis {axis} of a value with {rank} axes")
    return tuple(sorted({axis % rank for axis in found}))


def axis_of(axis: Any, rank: int) -> int:
    """One axis as a number from 0 to ``rank`` - 1."""
    return axes_of([int(axis)], rank)[0]


def along(vector: Any, axis: int, rank: int) -> Any:
    """A vector shaped to broadcast along ``axis`` of a value of ``rank``; a scalar stays one."""
    vector = np.asarray(vector)
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)]) if vector.ndim else vector


def times(sizes: Iterable[int]) -> int:
    """A product without overflow."""
    count = 1
    for size in sizes:
        count *= int(size)
    return count
