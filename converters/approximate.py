"""Updates of full rank as the nearest ones of low rank, and what is lost.

The best approximation of a matrix by one of rank r, in the Frobenius norm, is the part of its r
largest singular values (Eckart and Young), and what it loses is the rest of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from loraduct.adapter import Adapter, Dense, LowRank, Update
from loraduct.computed import given
from loraduct.converters.lowrank import rank_for
from loraduct.errors import Refused


@dataclass(frozen=True)
class Wanted:
    """How near: the rank, or the share of the squared norm to keep; ``allowed``: by the user."""

    rank: int | None = None
    energy: float | None = None
    allowed: bool = False


EXACT = Wanted()  # nothing is approximated


def approximate(
    adapter: Adapter, kept: Mapping[str, Update], wanted: Wanted
) -> tuple[dict[str, Update], dict[str, float]]:
    """``kept`` with every dense update made low-rank, and what each one lost of its norm.

    Reads values: which rank keeps a share of the norm is in them. Raises Refused where nobody
    allowed it, and where there is nothing to approximate.
    """
    dense = {m: u for m, u in kept.items() if isinstance(u, Dense)}
    chosen = wanted.rank is not None or wanted.energy is not None
    if not dense:
        if chosen:
            what = (
                "has no update of full rank: --rank and --energy have nothing to do; leave them out"
            )
            raise Refused(adapter.weights, what)
        return dict(kept), {}
    for u in dense.values():
        if 0 in u.shape:  # a stand-in: its base is missing, and it says so
            u.delta.raw()
    if not (chosen and wanted.allowed):
        kinds = sorted({u.note for u in dense.values()})
        raise Refused(
            adapter.weights,
            f"{adapter.technique or 'the adapter'} changes {len(dense)} modules by updates of full"
            f" rank ({kinds[0]}), which a LoRA only approximates: say how near, by --rank N or"
            " --energy 0.99 (share of the squared norm), with --allow-approximate, and mind the"
            " residuals; or merge it into the base with PEFT (merge_and_unload)",
        )
    done: dict[str, Update] = dict(kept)
    residuals = {}
    for module, update in dense.items():
        done[module], residuals[module] = _nearest(module, update, wanted)
    return done, residuals


def _nearest(module: str, update: Dense, wanted: Wanted) -> tuple[LowRank, float]:
    import numpy as np

    delta = update.delta.read().astype(np.float64)
    left, squares = _spectrum(delta)
    total = float(np.vdot(delta, delta))
    rank = wanted.rank or rank_for(squares, wanted.energy or 1.0)
    rank = min(rank, len(squares))
    lost = max(0.0, total - float(squares[:rank].sum())) if rank < len(squares) else 0.0
    b = left[:, :rank]
    a = b.T @ delta
    root = np.sqrt(np.linalg.norm(a, axis=1))  # half of the size on either side
    root[root == 0] = 1.0
    factors = (a / root[:, None]).astype(np.float32), (b * root).astype(np.float32)
    a_, b_ = (
        given(f"{module}.{side}", [update.delta], values.shape, partial(np.asarray, values))
        for side, values in zip("ab", factors, strict=True)
    )
    return LowRank(a_, b_, 1.0), (lost / total) ** 0.5 if total else 0.0


def _spectrum(delta: Any) -> tuple[Any, Any]:
    """(left singular vectors, squared singular values), largest first.

    By the eigenvectors of the smaller Gram matrix, several times faster than an SVD. That loses the
    digits of singular values below 1e-8 of the largest, which nobody keeps a rank for.
    """
    import numpy as np

    wide = delta.shape[0] <= delta.shape[1]
    gram = delta @ delta.T if wide else delta.T @ delta
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    if wide:
        return vectors, values
    left: Any = np.linalg.qr(delta @ vectors)[0]
    return left, values
