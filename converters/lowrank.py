"""Algebra on the factors of low-rank updates, never on the dense product."""

from __future__ import annotations

from typing import Any

from loraduct.adapter import Dense, LowRank


def factors(update: LowRank) -> tuple[Any, Any]:
    """(a (r, in), scale * b (out, r)) in float64, with a first axis of experts where there are any.

    A convolution's kernel counts among its inputs.
    """
    import numpy as np

    a = update.a.read(finite=False).astype(np.float64)
    b = update.b.read(finite=False).astype(np.float64) * update.scale
    if update.layout == "conv":
        return a.reshape(update.rank, -1), b.reshape(-1, update.rank)
    return a, b


def singular_values(update: LowRank) -> Any:
    """Singular values of scale * b @ a, largest first: QR of both factors, SVD of the small core.

    Of experts: (experts, r).
    """
    import numpy as np

    a, b = factors(update)
    left: Any = np.linalg.qr(b, mode="r")
    right: Any = np.linalg.qr(a.swapaxes(-1, -2), mode="r")
    return np.linalg.svd(left @ right.swapaxes(-1, -2), compute_uv=False)


def dense_singular_values(update: Dense) -> Any:
    """Singular values of an update of full rank, largest first."""
    import numpy as np

    return np.linalg.svd(update.delta.read(), compute_uv=False).astype(np.float64)


def effective_rank(values: Any) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007)."""
    import numpy as np

    total = float(values.sum())
    if not total:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))
