"""What a tuner of PEFT gives for one module, and the checks its arithmetic relies on.

The functions in ``peft_tuners_*`` turn a `Given` into an update. They run before any value is
read, so whatever is wrong in shapes and settings is refused here, by name, and not by NumPy while
the output is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraduct.adapter import Dense, LowRank, Replacement, Update
from loraduct.computed import given
from loraduct.errors import Refused
from loraduct.formats import CONFIG
from loraduct.formats.peft_config import looked_up
from loraduct.tensor import Tensor
from loraduct.text import printable

Array = Any  # an ndarray of float64
Part = tuple[Sequence[Tensor], Callable[[], Array]]  # what it is made from, and how


@dataclass(frozen=True)
class Given:
    """One module's tensors by leaf, those shared by all modules, the config, and the base's part.

    ``shape`` is (out, in) of the base's weight, when the base is known; ``modules``: how many the
    file has.
    """

    method: str
    module: str
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    config: Mapping[str, Any]
    folder: Path
    file: Path
    shape: tuple[int, int] | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    modules: int = 1

    def refuse(self, what: str, leaf: str | None = None) -> Refused:
        """A refusal that names the tensor, or the module."""
        tensor = self.tensors.get(leaf or "") or self.shared.get(leaf or "")
        return Refused(self.file, what, tensor=tensor.name if tensor else self.module)

    def find(self, leaf: str) -> Tensor:
        """A tensor of the module, or one shared by all."""
        found = self.tensors.get(leaf, self.shared.get(leaf))
        if found is None:
            raise self.refuse(f"has no {leaf}; the {self.method} adapter is incomplete")
        return found

    def sizes(self, **patterns: str) -> dict[str, int]:
        """Sizes by letter: ``sizes(hada_w1_a="o r", hada_w1_b="r i")``; where they clash, refused.

        A double underscore stands for a dot in a leaf's name. Letters o and i are the base's (out,
        in) when it is known; a number is itself, ``*`` is any size.
        """
        known = dict(zip("oi", self.shape or (), strict=False))
        for name, pattern in patterns.items():
            leaf = name.replace("__", ".")
            tensor, letters = self.find(leaf), pattern.split()
            fits = len(letters) == len(tensor.shape) and all(
                x == "*" or n == (int(x) if x.isdigit() else known.setdefault(x, n))
                for x, n in zip(letters, tensor.shape, strict=True)
            )
            if not fits:
                wanted = ", ".join(x if x.isdigit() else str(known.get(x, x)) for x in letters)
                raise self.refuse(f"shape {list(tensor.shape)}, expected [{wanted}]", leaf)
        return known

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number of the config."""
        value = self.config.get(field, default)
        if not _is_number(value):
            raise self._odd(field, value, "a finite number")
        return float(value)

    def count(self, field: str, default: int | None = None) -> int:
        """A positive integer of the config."""
        value = self.config.get(field, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self._odd(field, value, "a positive integer")
        return value

    def flag(self, field: str, default: bool = False) -> bool:
        """True or false, as the config has it."""
        value = self.config.get(field, default)
        if not isinstance(value, bool):
            raise self._odd(field, value, "true or false")
        return value

    def choice(self, field: str, default: Any, choices: Sequence[Any]) -> Any:
        """One of ``choices``."""
        value = self.config.get(field, default)
        # 1 == True in Python, but a config that says 1 where PEFT expects true is odd
        if not any(value == c and type(value) is type(c) for c in choices):
            raise self._odd(field, value, "one of " + ", ".join(map(repr, choices)))
        return value

    def pattern(self, field: str, default: float) -> float:
        """What rank_pattern and its like say of this module, by PEFT's rule; else ``default``."""
        patterns = self.config.get(field) or {}
        numbers = isinstance(patterns, dict) and all(_is_number(v) for v in patterns.values())
        if not numbers:
            raise self._odd(field, patterns, "an object of patterns and numbers")
        found = looked_up(patterns, [self.module], default, self.folder / CONFIG, field)[0]
        return float(found)

    def check_rank(self, rank: int, leaf: str, default: int = 8) -> int:
        """The rank of a tensor, which the config must say too."""
        expected = self.pattern("rank_pattern", self.count("r", default))
        if rank != expected:
            raise self.refuse(f"rank {rank}, the config says {expected:g}", leaf)
        return rank

    def _odd(self, field: str, value: Any, expected: str) -> Refused:
        return Refused(
            self.folder / CONFIG, f"{field} is {printable(repr(value), 80)}, expected {expected}"
        )

    def check_shape(self, out: int, inner: int) -> None:
        """The shape that the tensors imply is the base's, when that is known."""
        if self.shape is not None and self.shape != (out, inner):
            what = f"updates a weight of shape {[out, inner]}, the base has {list(self.shape)}"
            raise self.refuse(what)

    @property
    def out_in(self) -> tuple[int, int]:
        """The shape of the base's weight, where a method can't do without it."""
        assert self.shape is not None
        return self.shape

    def base_weight(self) -> Array:
        """The base's weight (out, in) in float64."""
        assert self.weight is not None
        return wide(self.weight)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) < 1e30


def wide(tensor: Tensor) -> Array:
    """Values in float64."""
    return tensor.read().astype(np.float64)


def integers(tensor: Tensor) -> Array:
    """Values of an integer tensor, or of whole numbers stored as floats, in int64."""
    raw = tensor.read()
    if tensor.stored_dtype.startswith("I"):
        raw = raw.view(f"<i{raw.dtype.itemsize}")
    return raw.astype(np.int64)


def low_rank(g: Given, a: Part, b: Part, shapes: tuple[int, int, int], scale: float) -> LowRank:
    """An exact low-rank form; ``shapes`` is (out, in, rank)."""
    out, inner, rank = shapes
    return LowRank(
        computed(f"{g.module}.a", a, (rank, inner)),
        computed(f"{g.module}.b", b, (out, rank)),
        scale,
    )


def dense(g: Given, part: Part, shape: tuple[int, int], note: str) -> Dense:
    """An update of full rank; ``note`` says why, for people."""
    return Dense(computed(f"{g.module}.delta", part, shape), note)


def factored(
    g: Given, a: Part, b: Part, shapes: tuple[int, int, int], scale: float, note: str
) -> Update:
    """``scale * b @ a``: low-rank where the rank is below both sizes of the weight, else dense."""
    out, inner, rank = shapes
    if rank < min(out, inner):
        return low_rank(g, a, b, shapes, scale)
    inputs = [*a[0], *(t for t in b[0] if t not in a[0])]
    return dense(g, (inputs, lambda: scale * (b[1]() @ a[1]())), (out, inner), note)


def changed(g: Given, inputs: Sequence[Tensor], new: Callable[[Array], Array], note: str) -> Dense:
    """dW = new(W) - W, W the base's weight."""

    def delta() -> Array:
        weight = g.base_weight()
        return new(weight) - weight

    return dense(g, (inputs, delta), g.out_in, note)


def new_bias(g: Given, inputs: Sequence[Tensor], new: Callable[[Array], Array]) -> Replacement:
    """The base's bias as the method leaves it."""
    bias = g.bias
    assert bias is not None
    name, shape = f"{g.module}.bias", (g.out_in[0],)
    return Replacement(computed(name, (inputs, lambda: new(wide(bias))), shape), "bias")


def computed(name: str, part: Part, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor made when it is written; the arithmetic before is in float64."""
    inputs, make = part

    def values() -> Any:
        made = make()
        assert made.shape == shape, (name, made.shape, shape)
        with np.errstate(over="ignore"):  # Inf is refused where the tensor is written
            return np.ascontiguousarray(made, dtype=np.float32)

    return given(name, inputs, shape, values)
