"""Updates of adapters that move the base when PEFT loads them (PiSSA, OLoRA, KaSA), as they are.

Derived here a second time (peft 0.21.2, `lora/layer.py:pissa_init` and `olora_init`,
`lora/variants.py:KasaLinearVariant`): what PEFT takes out of the base's weight W first, its part of
the largest or the smallest singular values, or s times that of the first columns of Q in W = Q R,
counts against scale * b @ a. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loraduct.adapter import Adapter, Dense, LowRank, Update
from loraduct.computed import given
from loraduct.formats import peft_config
from loraduct.formats.base import Base
from loraduct.tensor import FLOATS, Tensor, as_float32
from loraduct.validation.checks import Check

_NOTE = "relative to a base that is moved first"


def as_they_are(first: Adapter, second: Adapter, base: Base) -> tuple[Adapter, Adapter] | Check:
    """Both relative to the base as it is; untouched where both move it alike."""
    ways = [_way(a) for a in (first, second)]
    if ways[0] == ways[1]:
        return first, second
    done = []
    for adapter, way in zip((first, second), ways, strict=True):
        updates: dict[str, Update] = dict(adapter.updates)
        for module, u in adapter.low_rank.items() if way else ():
            weight = base.weight_of(f"{module}.weight")
            taken = _TAKEN.get(way or "")
            if taken is None or weight is None or weight.stored_dtype not in FLOATS:
                why = "can't be told from the base" if taken is None else "needs the base's weight"
                return Check(
                    "dW", "skipped", f"the factors of {way} are {_NOTE}: how {why}", module
                )
            if u.magnitude is not None or weight.shape != u.shape:
                return Check(
                    "dW", "skipped", f"{way} on something else than a plain weight", module
                )
            updates[module] = _whole(u, weight, taken)
        done.append(replace(adapter, updates=updates))
    return done[0], done[1]


def _way(adapter: Adapter) -> str | None:
    if adapter.format != "peft" or not peft_config.moves_base(adapter.config):
        return None
    return peft_config.began(adapter.config)


def _whole(u: LowRank, weight: Tensor, taken: Callable[[Any, int, float], Any]) -> Dense:
    def delta() -> Any:
        import numpy as np

        b, a = (t.read(finite=False).astype(np.float64) for t in (u.b, u.a))
        w = as_float32(weight.raw(), weight.dtype).astype(np.float64)
        return (u.scale * (b @ a) - taken(w, u.rank, u.scale)).astype(np.float32)

    return Dense(given(u.a.name, [u.a, u.b], u.shape, delta), _NOTE)


def _largest(w: Any, rank: int, _: float) -> Any:
    return _spectral(w, slice(rank))


def _smallest(w: Any, rank: int, _: float) -> Any:
    return _spectral(w, slice(min(w.shape) - rank, None))


def _spectral(w: Any, which: slice) -> Any:
    import numpy as np

    left, values, right = np.linalg.svd(w, full_matrices=False)
    return left[:, which] @ np.diag(values[which]) @ right[which]


def _first_columns(w: Any, rank: int, scale: float) -> Any:
    import numpy as np

    q = np.linalg.qr(w)[0][:, :rank]
    return scale * (q @ (q.T @ w))


_TAKEN: dict[str, Callable[[Any, int, float], Any]] = {
    "pissa": _largest,
    "olora": _first_columns,
    "kasa": _smallest,
}
