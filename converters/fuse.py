"""A weight with adapters fused into it: float32 throughout, one rounding to the stored dtype.

LoRA: W + sum of w_i s_i B_i A_i. DoRA (arXiv 2402.09353; PEFT's ``lora/dora.py``): multiplied row by
row by m / ||W + s B A||, where W is the base's. Of several adapters each works on what those before
it have made, as PEFT runs them: where DoRA is among them, the order counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraduct.adapter import Adapter, LowRank, Replacement
from loraduct.computed import given
from loraduct.errors import Refused
from loraduct.tensor import Tensor

Weighted = Sequence[tuple[Adapter, float]]
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def fused(tensors: Mapping[str, Tensor], adapters: Weighted, tied: bool) -> dict[str, Tensor]:
    """The base's tensors with ``adapters`` (each with its weight) in them, lazily.

    Adapters have transformers' names. A tied head or embedding that one of them changes gets a
    weight of its own: the caller finds ``lm_head.weight`` among the result. Raises Refused naming
    what has no weight in the base, and what can't be weighted.
    """
    done = dict(tensors)
    if tied and HEAD not in done and _moves_one_side(adapters):
        done[HEAD] = done[EMBEDDINGS]
    todo: dict[str, list[tuple[LowRank, float]]] = {}
    for adapter, weight in adapters:
        for name, u in adapter.replacements.items():
            _replace(done, tensors, adapter, name, u, weight)
        for module, low in adapter.low_rank.items():
            if low.magnitude is not None and weight != 1.0:
                what = "is DoRA, which sets lengths of rows: a weight other than 1 is not defined"
                raise Refused(adapter.weights, f"{what} (given {weight:g})", tensor=module)
            todo.setdefault(_parameter(module, low), []).append((low, weight))
    for name, updates in todo.items():
        base = done.get(name)
        if base is None:
            known = "the base has no such weight"
            raise Refused(updates[0][0].a.path, known, tensor=name)
        if base.shape != updates[0][0].shape:
            what = f"updates {list(updates[0][0].shape)}, the base has {list(base.shape)}"
            raise Refused(updates[0][0].a.path, what, tensor=name)
        done[name] = _fused(base, updates)
        bias = name.removesuffix("weight") + "bias"
        for low, weight in updates:
            if low.bias is not None:
                done[bias] = _moved(done.get(bias), low.bias, low.scale * weight, bias)
    return done


def _moves_one_side(adapters: Weighted) -> bool:
    ends = ("embed_tokens", "lm_head", "embed_tokens.weight", "lm_head.weight")
    return any(n.endswith(ends) for a, _ in adapters for n in a.updates)


def _parameter(module: str, low: LowRank) -> str:
    return module if low.layout == "parameter" else f"{module}.weight"


def _replace(
    done: dict[str, Tensor], tensors: Mapping[str, Tensor], adapter: Adapter, name: str,
    u: Replacement, weight: float,
) -> None:  # fmt: skip
    old = tensors.get(name, done.get(name))
    if weight != 1.0:
        what = f"replaces this weight: weighted by {weight:g} that is not defined"
        raise Refused(adapter.weights, what, tensor=name)
    if name in done and done[name] is not old and name in tensors:
        raise Refused(adapter.weights, "is replaced by another adapter too", tensor=name)
    if old is not None and old.shape != u.weight.shape:
        what = f"replaces {list(old.shape)} by {list(u.weight.shape)}"
        raise Refused(adapter.weights, what, tensor=name)
    if old is None and not name.endswith("bias"):
        raise Refused(adapter.weights, "the base has no such weight", tensor=name)
    done[name] = u.weight


def _moved(old: Tensor | None, change: Tensor, scale: float, name: str) -> Tensor:
    import numpy as np

    def make() -> Any:
        moved = np.float32(scale) * change.read()
        return moved if old is None else old.read() + moved

    return given(name, [change] if old is None else [old, change], change.shape, make)


def _fused(base: Tensor, updates: Sequence[tuple[LowRank, float]]) -> Tensor:
    inputs = [base, *(t for u, _ in updates for t in u.tensors)]
    return given(base.name, inputs, base.shape, lambda: fuse(base.read(), updates))


def fuse(weight: Any, updates: Sequence[tuple[LowRank, float]]) -> Any:
    """``weight`` (float32, changed in place unless DoRA is among them) with the updates in it."""
    import numpy as np

    dora = any(u.magnitude is not None for u, _ in updates)
    total = weight.copy() if dora else weight
    for u, w in updates:
        change = delta(u, w)
        total += change
        if u.magnitude is not None:
            total *= dora_factor(weight + change, u)
    return np.asarray(total, np.float32)


def delta(u: LowRank, weight: float = 1.0) -> Any:
    """dW in float32, of the base weight's shape."""
    import numpy as np

    a, b = u.a.read(), u.b.read()
    scale = np.float32(u.scale * weight)
    if u.layout == "conv":
        return scale * (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)).reshape(u.shape)
    return scale * ((b @ a).T if u.layout == "embedding" else b @ a)


def dora_factor(moved: Any, u: LowRank) -> Any:
    """m / ||W + dW|| in float32; the lengths are of rows, of an embedding's columns.

    PEFT keeps the magnitude of a linear layer per output and of an embedding per hidden value.
    """
    import numpy as np

    assert u.magnitude is not None
    axis = 0 if u.layout == "embedding" else tuple(range(1, moved.ndim))
    length = np.sqrt(np.sum(np.square(moved, dtype=np.float64), axis=axis, keepdims=True))
    return (u.magnitude.read().reshape(length.shape) / length).astype(np.float32)
