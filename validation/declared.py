"""What a package says was compressed in it, and how far that may move what is compared.

loraduct's record names the way each part was stored (``lut4``: tables of 16 entries). Values without
that declaration get no allowance.
"""

from __future__ import annotations

import math
from typing import Any

from loraduct.adapter import Adapter

BASE, ADAPTER = "base", "adapter"
# bits -> squared error of the best table for normal values of variance 1 (Max 1960, table I; beyond
# 5 bits the limit 2.72 / entries^2)
_NORMAL = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 6: 2.72 / 64**2, 8: 2.72 / 256**2}
FACTOR = 4.0  # two factors, and tails heavier than normal ones (measured: 1.3 times, at 4 bits)


def declared(adapter: Adapter) -> dict[str, Any]:
    """``base``, ``adapter`` -> how it was compressed; empty for all but packages that say so."""
    if adapter.format != "coreml":
        return {}
    from loraduct.formats.coreml import record
    from loraduct.formats.coreml.package import read

    return dict(record.read(read(adapter.path)).get("compression") or {})


def tolerance(adapter: Adapter) -> float:
    """How far dW may be off (relative) by the declared width of the adapter's factors."""
    way = str(declared(adapter).get(ADAPTER, ""))
    digits = way.removeprefix("lut")
    known = _NORMAL.get(int(digits)) if digits.isdecimal() and len(digits) < 3 else None
    return FACTOR * math.sqrt(known) if known else 0.0


def explains(source: list[Any], compressed: list[Any]) -> float:
    """||difference|| / ||logits less their mean||: at 1 a base says nothing of what it said."""
    import numpy as np

    off = size = 0.0
    for x, y in zip(source, compressed, strict=True):
        wide = x.astype(np.float64)
        off += float(((wide - y) ** 2).sum())
        size += float(((wide - wide.mean(-1, keepdims=True)) ** 2).sum())
    return math.sqrt(off / size) if size else math.inf
