"""Adapters whose training began by moving the base weight (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA).

With factors (B0, A0) at the start the base became W - s B0 A0, and the trained adapter adds s B A
to that: relative to W the update is s (B A - B0 A0), plain LoRA of rank 2r (peft 0.21.2,
`lora/layer.py:pissa_init`, `olora_init`; `save_and_load.py` does the same for
path_initial_model_for_weight_conversion). B0 A0 comes from the adapter as it was saved before
training, or, for PiSSA and OLoRA, from the base: it is W cut to rank r by SVD, or by QR. KaSA's is always
from the base: it is what PEFT takes out of W whenever the adapter is loaded, the part of the r
smallest singular values (`lora/variants.py:KasaLinearVariant`).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from loraduct.adapter import Adapter, LowRank, Update
from loraduct.computed import given, joined
from loraduct.errors import Refused
from loraduct.formats import CONFIG, peft_config
from loraduct.formats.base import Base
from loraduct.tensor import Tensor, as_float32

FROM_BASE = ("pissa", "olora", "kasa")


def can_stay(adapter: Adapter) -> bool:
    """Whether PEFT's form may go on saying how it began: KaSA's diagonal is in B by now."""
    return adapter.config.get("kasa_config") is None


def check_unmoved(adapter: Adapter) -> None:
    """Raise Refused for factors that are relative to a base which training moved first."""
    if adapter.format == "peft" and peft_config.moves_base(adapter.config):
        way = peft_config.began(adapter.config)
        what = f"{way}: training moved the base; convert it first (--initial, or --base for KaSA)"
        raise Refused(adapter.path, what)


def undo(adapter: Adapter, initial: Adapter | None, base: Base | None) -> Adapter:
    """``adapter`` relative to the base as it was; unchanged if training didn't move the base.

    Raises Refused when neither ``initial`` nor ``base`` can tell where the factors began.
    """
    if adapter.format != "peft" or not peft_config.moves_base(adapter.config):
        if initial is not None:
            raise Refused(
                adapter.path, "is relative to the base as it is: it needs no --initial adapter"
            )
        return adapter
    way = peft_config.began(adapter.config)
    if way == "kasa" and initial is not None:
        raise Refused(
            initial.weights, "is of no use for KaSA, which begins from the base; give --base"
        )
    done: dict[str, Update] = dict(adapter.updates)
    for module, u in adapter.low_rank.items():
        if u.magnitude is not None:
            raise Refused(
                adapter.weights, f"is DoRA begun with {way}, which isn't carried", tensor=u.a.name
            )
        if initial is not None:
            start = initial.low_rank.get(module)
            if start is None or (start.a.shape, start.b.shape) != (u.a.shape, u.b.shape):
                raise Refused(
                    initial.weights, "has no factors of the same shape for it", tensor=module
                )
        else:
            start = _from_base(adapter, module, u, way, base)
        done[module] = _less(u, start)
    config = {**adapter.config, "init_lora_weights": True, "kasa_config": None}
    return replace(adapter, updates=done, config=config, origin=None)


def _less(u: LowRank, start: LowRank) -> LowRank:
    """u - start, side by side; in float32 unless both are of one dtype and need no factor.

    B0 A0 is of the size of the base's weight: rounding it to 16 bits would drown the update.
    """
    if start.scale == u.scale:
        a0, b0 = start.a, start.b.times(-1.0)
    elif u.scale:
        a0, b0 = start.a.to("F32"), start.b.to("F32").times(-start.scale / u.scale)
    else:
        raise Refused(u.a.path, "has scale 0, but was begun with factors", tensor=u.a.name)
    one = len({t.dtype for t in (u.a, a0, u.b, b0)}) == 1
    a, b = [u.a, a0], [u.b, b0]
    if not one:
        a, b = [t.to("F32") for t in a], [t.to("F32") for t in b]
    return replace(u, a=joined(a, 0), b=joined(b, 1))


def _from_base(adapter: Adapter, module: str, u: LowRank, way: str, base: Base | None) -> LowRank:
    """The factors at the start, worked out from the base's weight; float32 as PEFT has them."""
    if way not in FROM_BASE or base is None or not base.has_weights:
        if way == "kasa":
            what = "is KaSA, whose factors are relative to the base without its smallest singular values"
            raise Refused(adapter.path / CONFIG, f"{what}; give --base BASE, with weights")
        can = ", or --base BASE with its weights" if way in FROM_BASE else ""
        raise Refused(
            adapter.path / CONFIG,
            f"init_lora_weights is {way!r}: training moved the base weight, so the factors alone are"
            f" not the update; give the adapter as it was before training with --initial FOLDER{can},"
            " or save it in PEFT with path_initial_model_for_weight_conversion=...",
        )
    weight = base.weight_of(f"{module}.weight")
    if weight is None or u.layout != "linear" or weight.shape != u.shape:
        raise Refused(
            base.path, f"has no plain weight {module}.weight to begin from", tensor=u.a.name
        )
    if way == "kasa" and u.rank >= min(u.shape):
        what = f"rank {u.rank}, of which PEFT's KaSA leaves nothing of a weight of {list(u.shape)}"
        raise Refused(adapter.weights, what, tensor=u.a.name)
    a = given(u.a.name, [u.a], u.a.shape, lambda: _start(weight, u.rank, way)[0])
    b = given(u.b.name, [u.b], u.b.shape, lambda: _start(weight, u.rank, way)[1])
    return LowRank(a, b, u.scale if way == "olora" else 1.0)


@functools.lru_cache(maxsize=1)  # a and b of one module are asked for one after the other
def _start(weight: Tensor, rank: int, way: str) -> tuple[Any, Any]:
    """(A0, B0). PiSSA: B0 A0 = the best approximation of W of that rank (s cancels). OLoRA: W = Q R.

    KaSA: what the best approximation of all ranks but that many leaves.
    """
    import numpy as np

    w = as_float32(weight.raw(), weight.dtype).astype(np.float64)
    if way == "olora":
        q, r = np.linalg.qr(w)
        return r[:rank].astype(np.float32), q[:, :rank].astype(np.float32)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    kept = slice(-rank, None) if way == "kasa" else slice(rank)
    root = np.sqrt(s[kept])
    return (root[:, None] * vt[kept]).astype(np.float32), (u[:, kept] * root).astype(np.float32)
