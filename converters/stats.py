"""Numbers about an adapter's values, module by module."""

from __future__ import annotations

from typing import Any

from loraduct.adapter import Adapter, LowRank
from loraduct.converters.lowrank import effective_rank, singular_values
from loraduct.tensor import is_finite


def stats_of(adapter: Adapter) -> dict[str, Any]:
    """Frobenius norm, largest singular value and effective rank of every dW; tensors with NaN/Inf."""
    modules, bad = [], []
    for module, update in adapter.updates.items():
        broken = [t.name for t in update.tensors if not _all_finite(t)]
        bad += broken
        if isinstance(update, LowRank) and not broken:
            values = singular_values(update)
            modules.append(
                {
                    "module": module,
                    "norm": float((values**2).sum() ** 0.5),
                    "largest": float(values.max(initial=0.0)),
                    "effective_rank": effective_rank(values),
                    "rank": update.rank,
                }
            )
    return {"modules": modules, "not_finite": bad}


def _all_finite(tensor: Any) -> bool:
    step = max(1, (1 << 20) // max(1, tensor.shape[-1]))
    rows = (
        tensor.shape[0] if len(tensor.stored_shape) == 2 else tensor.nbytes // max(1, tensor.nbytes)
    )
    if len(tensor.stored_shape) != 2:
        from math import prod

        rows, step = prod(tensor.shape), 1 << 20
    return all(
        is_finite(tensor.rows(i, min(i + step, rows), finite=False), tensor.dtype)
        for i in range(0, rows, step)
    )
