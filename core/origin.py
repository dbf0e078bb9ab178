"""What loraduct writes into a file's metadata so that the way back is exact.

A padded, folded MLX adapter says nothing of the ranks, scales and config it came from. The record
under the metadata key ``loraduct`` does, and says for which state of the file it holds: once
another tool changes ranks, scales or modules, it no longer applies and is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loraduct.adapter import Adapter, LowRank, Update
from loraduct.modules import block_of
from loraduct.tensor import FLOATS
from loraduct.version import __version__

KEY = "loraduct"


def state_of(updates: Mapping[str, Update]) -> str:
    """A short hash over modules, ranks, scales and shapes of the low-rank updates."""
    import hashlib  # late: it loads OpenSSL

    rows = sorted(
        [m, u.a.shape, u.b.shape, f"{u.scale:.12g}"]
        for m, u in updates.items()
        if isinstance(u, LowRank)
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def record(
    source: Adapter,
    before: Mapping[str, Update],
    written: Mapping[str, Update],
    joined: Mapping[str, int],
    kin: str | None,
    tied: bool | None = None,
) -> str:
    """The record for a file that holds ``written``, made from ``source``.

    ``before`` are the updates in the file's names, but not yet padded, folded or cast; ``joined``
    says of those made of two updates which rank the first one had; ``tied`` whether it is meant for
    a base with tied embeddings, where that matters. The oldest origin is kept when
    the source is itself a conversion of this format, so that chains lead back to the start.
    """
    changed = {}
    for name, old in before.items():
        new = written[name]
        if not isinstance(old, LowRank) or not isinstance(new, LowRank):
            continue
        # a dtype that was asked for holds for all; one that folding alone chose is undone
        dtype = old.b.dtype if old.a.dtype == new.a.dtype else new.b.dtype
        if (old.rank, old.scale, dtype) != (new.rank, new.scale, new.b.dtype):
            bias = [old.bias.dtype] if old.bias is not None else []
            changed[name] = [old.rank, old.scale, dtype, *bias]
    value: dict[str, Any] = {
        "version": __version__,
        "format": source.format,
        "config": dict(source.config),
        "state": state_of(written),
    }
    if source.origin is not None:
        value["before"] = {k: source.origin[k] for k in ("format", "config") if k in source.origin}
    if changed:
        value["modules"] = changed
    if joined:
        value["joined"] = dict(joined)
    blocks = next((b[0] for m in source.low_rank if (b := block_of(m))), None)
    if source.naming == "hf" and blocks:
        value["blocks"] = blocks
    if kin or source.base.kin:
        value["kin"] = source.base.kin or kin  # whose it was first stays so
    if tied is not None:
        value["tied"] = tied
    if source.base.quantization_known:
        value["trained_on"] = source.base.quantization or "none"
    return json.dumps(value, separators=(",", ":"))  # unsorted: of two patterns the first one wins


def parse(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The record in a file's metadata, or None when there is none that can be understood."""
    try:
        value = json.loads(metadata.get(KEY, "null"))
    except (ValueError, RecursionError):
        return None
    sound = (
        isinstance(value, dict)
        and isinstance(value.get("format"), str)
        and isinstance(value.get("config"), dict)
        and isinstance(value.get("state"), str)
        and isinstance(value.get("kin", ""), str)
        and isinstance(value.get("tied", True), bool)
        and isinstance(value.get("trained_on", ""), str)
        and isinstance(value.get("modules", {}), dict)
        and all(_is_change(c) for c in value.get("modules", {}).values())
        and isinstance(value.get("blocks", ""), str)
        and isinstance(value.get("joined", {}), dict)
        and all(type(r) is int and r > 0 for r in value.get("joined", {}).values())
    )
    return value if sound else None


def _is_change(change: Any) -> bool:
    return (
        isinstance(change, list)
        and len(change) in (3, 4)
        and type(change[0]) is int
        and change[0] > 0
        and isinstance(change[1], int | float)
        and all(dtype in FLOATS for dtype in change[2:])
    )


def restore(
    updates: Mapping[str, Update], metadata: Mapping[str, str]
) -> tuple[dict[str, Update], dict[str, Any] | None]:
    """Undo padding, folding and widening by the record, if it still holds.

    Returns the updates and the record (None when absent or outdated).
    """
    value = parse(metadata)
    if value is None or value["state"] != state_of(updates):
        return dict(updates), None
    restored = dict(updates)
    for name, (rank, scale, *dtypes) in value.get("modules", {}).items():
        update = updates.get(name)
        if not isinstance(update, LowRank) or rank > update.rank:
            return dict(updates), None
        # a module whose scale was 0 has lost its b to the folding: it stays as it is
        factor = update.scale / scale if scale else 1.0
        bias = update.bias and update.bias.times(factor).to(dtypes[-1])
        cropped = update.with_rank(rank)
        b = cropped.b.times(factor).to(dtypes[0])
        restored[name] = replace(cropped, b=b, bias=bias, scale=scale)
    return restored, value
