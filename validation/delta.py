"""Per-module comparison of two adapters' weight updates, in float64, from the files alone.

A second derivation, sharing nothing with converters: ||dW' - dW|| of low-rank updates from the
QR factors of the stacked difference; of DoRA from the base's weight, row block by row block.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loraduct.adapter import LowRank, Replacement, Update
from loraduct.formats.base import Base
from loraduct.tensor import as_float32

# How far dW may be off by storage dtype (relative, Frobenius), and the gain from 1.
BOUNDS = {"F32": 1e-6, "F16": 1e-3, "BF16": 8e-3}
GAIN = 3e-3
_ROWS = 1 << 21  # weight elements handled at once


@dataclass(frozen=True)
class Delta:
    """``error`` = ||dW' - dW|| / ||dW||, ``gain`` = <dW', dW> / <dW, dW>."""

    module: str
    error: float
    gain: float
    norm: float
    bound: float
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether both are within bounds."""
        return self.error <= self.bound and abs(self.gain - 1) <= max(GAIN, self.bound)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"fits": self.fits}


def compare(module: str, first: Update, second: Update, base: Base) -> Delta:
    """How far ``second`` is from ``first`` at one module or parameter."""
    if type(first) is not type(second):
        return Delta(module, 1.0, 0.0, 0.0, 0.0, "one replaces the parameter, the other adapts it")
    if isinstance(first, Replacement) and isinstance(second, Replacement):
        return _replaced(module, first, second, base)
    assert isinstance(first, LowRank)
    assert isinstance(second, LowRank)
    bound = _bound(first, second)
    shapes = [(u.b.shape[0], u.a.shape[1]) for u in (first, second)]
    if shapes[0] != shapes[1]:
        return Delta(module, 1.0, 0.0, 0.0, bound, f"shapes {shapes[0]} and {shapes[1]}")
    if (first.magnitude is None) != (second.magnitude is None):
        return Delta(module, 1.0, 0.0, 0.0, bound, "one is DoRA, the other is not")
    if first.magnitude is not None:
        return _dora(module, first, second, base, bound)
    return _plain(module, first, second, bound)


def _bound(*updates: LowRank) -> float:
    return max(BOUNDS[t.stored_dtype] for u in updates for t in (u.a, u.b))


def _factors(u: LowRank) -> tuple[Any, Any]:
    import numpy as np

    return u.a.read(finite=False).astype(np.float64), u.b.read(finite=False).astype(np.float64)


def _plain(module: str, first: LowRank, second: LowRank, bound: float) -> Delta:
    import numpy as np

    (a1, b1), (a2, b2) = _factors(first), _factors(second)
    left: Any = np.linalg.qr(np.hstack([first.scale * b1, -second.scale * b2]), mode="r")
    right: Any = np.linalg.qr(np.vstack([a1, a2]).T, mode="r")
    off = float(np.linalg.norm(left @ right.T))
    norm2 = float(np.sum((b1.T @ b1) * (a1 @ a1.T))) * first.scale**2
    inner = float(np.sum((b1.T @ b2) * (a1 @ a2.T))) * first.scale * second.scale
    note = ""
    if first.bias is not None or second.bias is not None:
        biases = [
            np.zeros(1)
            if u.bias is None
            else u.scale * u.bias.read(finite=False).astype(np.float64)
            for u in (first, second)
        ]
        off += float(np.linalg.norm(biases[1] - biases[0]))
        note = "with lora_bias"
    return _delta(module, off, norm2, inner, bound, note)


def _delta(
    module: str, off: float, norm2: float, inner: float, bound: float, note: str = ""
) -> Delta:
    if norm2 <= 0:  # no effect: then the other must have none either
        return Delta(
            module, 0.0 if off == 0 else 1.0, 1.0 if off == 0 else 0.0, 0.0, bound, "no effect"
        )
    norm = norm2**0.5
    return Delta(module, off / norm, inner / norm2, norm, bound, note)


def _dora(module: str, first: LowRank, second: LowRank, base: Base, bound: float) -> Delta:
    """dW = m * (W + s b a) / ||W + s b a||_row - W, with the base's W."""
    import numpy as np

    weight = base.tensors.get(f"{module}.weight") if base.has_weights else None
    if weight is None or weight.stored_dtype not in BOUNDS:
        return Delta(
            module, 0.0, 1.0, 0.0, bound, "DoRA: not compared, the base's weight is packed"
        )
    parts = [_factors(u) for u in (first, second)]
    magnitudes = [
        u.magnitude.read(finite=False).astype(np.float64) for u in (first, second) if u.magnitude
    ]
    off2 = norm2 = inner = 0.0
    rows, cols = weight.shape
    step = max(1, _ROWS // cols)
    for i in range(0, rows, step):
        j = min(i + step, rows)
        w = as_float32(weight.rows(i, j, finite=False), weight.dtype).astype(np.float64)
        deltas = []
        for u, (a, b), m in zip((first, second), parts, magnitudes, strict=True):
            moved = w + u.scale * (b[i:j] @ a)
            deltas.append(m[i:j, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - w)
        off2 += float(np.sum((deltas[1] - deltas[0]) ** 2))
        norm2 += float(np.sum(deltas[0] ** 2))
        inner += float(np.sum(deltas[0] * deltas[1]))
    return _delta(module, off2**0.5, norm2, inner, bound, "DoRA")


def _replaced(module: str, first: Replacement, second: Replacement, base: Base) -> Delta:
    import numpy as np

    bound = max(BOUNDS[r.weight.stored_dtype] for r in (first, second))
    if first.weight.shape != second.weight.shape:
        return Delta(module, 1.0, 0.0, 0.0, bound, "shapes differ")
    x, y = (r.weight.read(finite=False).astype(np.float64).ravel() for r in (first, second))
    return _delta(
        module, float(np.linalg.norm(y - x)), float(x @ x), float(x @ y), bound, "replaced"
    )
