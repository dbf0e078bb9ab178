"""Numbers about an adapter's values, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from loraduct.adapter import Adapter, Dense, LowRank, Update
from loraduct.converters.lowrank import dense_singular_values, effective_rank, singular_values
from loraduct.tensor import Tensor, as_float32, is_finite

_AT_ONCE = 1 << 20  # values
# What the norms are of. DoRA's dW also depends on its magnitudes and on the base's weight.
NORM_OF = {"lora": "dW", "dora": "low-rank part"}


def stats_of(adapter: Adapter) -> dict[str, Any]:
    """Norm, largest singular value and effective rank of every update; tensors with NaN or Inf.

    A replaced parameter has only the norm of its own values: what it replaces isn't in the file.
    """
    modules, replaced, bad = [], [], []
    for name, update in adapter.updates.items():
        stored = {o.name: o for t in update.tensors for o in t.origins}
        broken = [name for name, t in stored.items() if not _all_finite(t)]
        bad += broken
        if broken:
            continue
        if isinstance(update, LowRank):
            modules.append({"module": name, **_spectrum(singular_values(update), update.rank)})
        elif isinstance(update, Dense):
            if 0 not in update.shape:  # which it has where only the base would tell it
                values = dense_singular_values(update)
                modules.append({"module": name, **_spectrum(values, min(update.shape))})
        else:
            replaced.append({"parameter": name, "norm": _norm(update)})
    bad += [t.name for t in adapter.set_aside if not _all_finite(t)]
    return {
        "norm_of": NORM_OF.get(adapter.method),
        "modules": modules,
        "replaced": replaced,
        "not_finite": bad,
    }


def _spectrum(values: Any, rank: int) -> dict[str, Any]:
    """Of experts, (experts, r): the norm of all, the largest of all, the mean effective rank."""
    each = values.reshape(-1, values.shape[-1])
    return {
        "norm": float((values**2).sum() ** 0.5),
        "largest": float(values.max(initial=0.0)),
        "effective_rank": sum(map(effective_rank, each)) / len(each),
        "rank": rank,
    }


def _norm(update: Update) -> float:
    """Frobenius norm over the update's tensors, in double precision."""
    total = 0.0
    for tensor in update.tensors:
        for piece in _pieces(tensor):
            values = as_float32(piece, tensor.dtype).astype("float64").reshape(-1)
            total += float(values @ values)
    return float(total**0.5)


def _all_finite(tensor: Tensor) -> bool:
    return all(is_finite(piece, tensor.dtype) for piece in _pieces(tensor))


def _pieces(tensor: Tensor) -> Iterator[Any]:
    """The tensor's raw values, a bounded number at a time."""
    matrix = len(tensor.stored_shape) == 2
    rows = tensor.shape[0] if matrix else prod(tensor.shape)
    step = max(1, _AT_ONCE // tensor.shape[1]) if matrix else _AT_ONCE
    for i in range(0, rows, step):
        yield tensor.rows(i, min(i + step, rows), finite=False)
