"""An adapter from what two copies of a model differ by: low rank where that is all there is.

The difference of two weights stored in 16 bits is the update plus rounding. Rounding is noise of a
known size, spread evenly over all directions: its largest singular value is near
sigma * (sqrt(rows) + sqrt(columns)) (Marchenko and Pastur, 1967). Directions above that are the
update; what is left over must then be of the size that rounding has, and is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loraduct.adapter import LowRank, Replacement, Update
from loraduct.computed import given
from loraduct.converters import lowrank
from loraduct.converters.approximate import Wanted
from loraduct.errors import Refused
from loraduct.modules import is_lookup, kind_of_module
from loraduct.tensor import UNIT_ROUNDOFF, Tensor, as_float32

ABOVE_NOISE = (
    1.5  # a direction counts from this multiple of the noise's largest; outliers reach 1.4
)
ARITHMETIC = 1e-6  # what float32 factors leave of any difference, relative
EXPLAINED = 1.25  # a residual up to this multiple of rounding's own size is rounding
FIRST_RANK = 12
_NUMBERS = 1 << 20  # compared at once
_VOCABULARY = ("embedding", "output head")


@dataclass(frozen=True)
class Found:
    """``residual``: norm of what the factors leave, relative to the difference; ``rounding``: what
    storing in 16 bits explains of it, likewise."""

    update: Update
    rank: int
    residual: float
    rounding: float

    @property
    def whole(self) -> bool:
        """Whether nothing but rounding is left."""
        return self.residual <= max(EXPLAINED * self.rounding, ARITHMETIC)


def differences(
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    wanted: Wanted,
    path: Path,
    turned: Callable[[str], bool] = lambda name: False,
) -> dict[str, Found]:
    """Module (low rank) or parameter (replaced) -> what changed from ``old`` to ``new``.

    ``wanted`` without a rank or an energy: all directions above noise. Weights of linear layers and
    embeddings become factors, all else is replaced; ``turned`` says of which parameters the weight is
    stored (in, out). Raises Refused for parameters that only one of them has and for shapes that differ.
    """
    found: dict[str, Found] = {}
    for name, tensor in new.items():
        base = old.get(name)
        if base is None:
            raise Refused(path, "the base has no such weight", tensor=name)
        if base.shape != tensor.shape:
            what = f"has shape {list(tensor.shape)}, the base {list(base.shape)}"
            if (
                tensor.shape[1:] == base.shape[1:]
                and kind_of_module(module_of(name)) in _VOCABULARY
            ):
                what += (
                    f": the vocabulary went from {base.shape[0]} to {tensor.shape[0]} tokens, which no"
                    " adapter of the base holds; resize the base's embeddings alike first"
                    " (transformers: resize_token_embeddings) and take that for the base"
                )
            raise Refused(path, what, tensor=name)
        if (one := changed(tensor, base, wanted, turned=turned(name))) is not None:
            found[module_of(name) if isinstance(one.update, LowRank) else name] = one
    missing = next((n for n in old if n not in new), None)
    if missing is not None:
        raise Refused(path, "has no such weight, which the base has", tensor=missing)
    return found


def module_of(name: str) -> str:
    """The module of a weight."""
    return name.removesuffix(".weight")


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether it is the weight of a linear layer or of an embedding that PEFT can adapt.

    Other matrices are bare parameters (Mamba's A_log, biases of experts) and tables of positions,
    whose layers do more than look up (OPT's), so that PEFT's layer in their place fails.
    """
    module = module_of(name)
    leaf = module.rpartition(".")[2]
    table = "emb" in leaf and kind_of_module(module) not in _VOCABULARY
    return len(tensor.shape) == 2 and module != name and not table


def changed(new: Tensor, old: Tensor, wanted: Wanted, *, turned: bool = False) -> Found | None:
    """What changed of one parameter; None if nothing but the rounding of the base's own values.

    Where the factors would be larger than the weight, unless the rank was asked for, it is replaced.
    """
    import numpy as np

    if new.dtype == old.dtype and _equal(new, old):
        return None
    after = new.read()
    before = as_float32(old.to(new.dtype).raw(), new.dtype)
    difference = after - before
    if not difference.any():
        return None
    if not is_matrix(new.name, new):
        return Found(Replacement(new, "full"), 0, 0.0, 0.0)
    difference = difference.T if turned else difference
    sigma = rounding_sigma(after, new.dtype)
    a, b, residual = nearest(difference, wanted, sigma)
    if wanted.rank is None and len(a) * sum(difference.shape) >= difference.size:
        return Found(Replacement(new, "full"), 0, 0.0, 0.0)
    size = float(np.linalg.norm(difference))
    noise = sigma * math.sqrt(difference.size)
    if is_lookup(module_of(new.name)):
        a, b, layout = b.T, a.T, "embedding"
    else:
        layout = "linear"
    parts = {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}
    held = {n: given(new.name, [new, old], x.shape, partial(_same, x)) for n, x in parts.items()}
    update = LowRank(held["a"], held["b"], 1.0, layout=layout)
    return Found(update, update.rank, residual / size, noise / size)


def _equal(new: Tensor, old: Tensor) -> bool:
    """Whether two stored tensors have the same bytes, looked at some rows at a time."""
    import numpy as np

    rows, width = new.shape if len(new.shape) == 2 else (math.prod(new.shape), 1)
    step = max(1, _NUMBERS // max(width, 1))
    spans = ((at, min(at + step, rows)) for at in range(0, rows, step))
    return all(np.array_equal(new.rows(*s), old.rows(*s)) for s in spans)


def _same(value: Any) -> Any:
    return value


def rounding_sigma(values: Any, dtype: str) -> float:
    """Standard deviation of the error that storing ``values`` in ``dtype`` makes.

    A value between powers of two p and 2p is rounded to steps of 2 * roundoff * p: the error is
    uniform, step / sqrt(12).
    """
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(-1)
    counts = np.bincount((bits >> 23) & 0xFF, minlength=256)
    lowest = -13 if dtype == "F16" else -125  # below, steps no longer shrink
    exponent = np.maximum(np.arange(256) - 126, lowest)  # of a fraction from 0.5 to 1
    steps = np.ldexp(np.float64(UNIT_ROUNDOFF[dtype]), exponent)
    return float(np.sqrt((counts * np.square(steps)).sum() / max(bits.size, 1) / 12))


def nearest(matrix: Any, wanted: Wanted, sigma: float) -> tuple[Any, Any, float]:
    """a (r, in), b (out, r) and the norm of what they leave of ``matrix`` (out, in)."""
    import numpy as np

    most = min(matrix.shape)
    total = float(np.sum(np.square(matrix, dtype=np.float64)))
    floor = ABOVE_NOISE * sigma * sum(math.sqrt(n) for n in matrix.shape)
    tried = min(most, wanted.rank or FIRST_RANK)
    whole = lowrank.Blocks(matrix.shape, lambda: iter([(0, len(matrix), matrix)]))
    while True:
        left, values, right = lowrank.leading(whole, tried)
        squares = np.square(values)
        rank = _rank(wanted, squares, total, floor)
        if rank < len(values) or tried == most or wanted.rank:
            break
        tried = min(most, 2 * tried)
    rank = min(rank, len(values))
    rest = max(total - float(np.sum(squares[:rank])), 0.0)
    a, b = lowrank.balanced(left[:, :rank], values[:rank], right[:rank])
    return a.astype(np.float32), b.astype(np.float32), math.sqrt(rest)


def _rank(wanted: Wanted, squares: Any, total: float, floor: float) -> int:
    import numpy as np

    if wanted.rank:
        return wanted.rank
    if wanted.energy:
        return lowrank.rank_for(squares, wanted.energy, total)
    return max(1, int(np.sum(squares > floor**2)))
