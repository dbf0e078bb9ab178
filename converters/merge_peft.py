"""What PEFT's ``add_weighted_adapter`` makes of factors, formula by formula (peft 0.21.2).

``lora/model.py:_generalized_task_arithmetic_weighted_adapter`` mixes A and B on their own, so that
(sum sqrt(w_i s_i) B_i)(sum sqrt(w_i s_i) A_i) holds products B_i A_j of different adapters:
it is not the weighted sum of the updates. Here for who wants PEFT's very result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loraduct.adapter import Adapter, LowRank
from loraduct.converters import lowrank
from loraduct.errors import Refused

if TYPE_CHECKING:
    from loraduct.converters.merge import Settings

Part = tuple[LowRank, float]
_FIELDS = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "lora_bias": "lora_bias"}


def source(seed: int | None) -> Any:
    """torch's CPU generator after ``torch.manual_seed(seed)``; None without a seed."""
    import numpy as np

    return None if seed is None else np.random.RandomState(seed & 0xFFFFFFFF)


def check(adapters: Sequence[Adapter]) -> None:
    """Refuse what PEFT's merging gets wrong without a word (measured: scales off by sqrt(r), ...)."""
    for adapter in adapters:
        odd = [name for field, name in _FIELDS.items() if adapter.config.get(field)]
        layouts = {u.layout for u in adapter.low_rank.values()} - {"linear", "embedding"}
        if adapter.method == "dora" and "DoRA" not in odd:
            odd.append("DoRA")
        if odd or layouts:
            what = (
                f"has {' and '.join([*odd, *sorted(layouts)])}, which PEFT's add_weighted_adapter does"
                " not merge rightly; use a method without peft- in its name"
            )
            raise Refused(adapter.path, what)


def merged(settings: Settings, parts: Sequence[Part], rng: Any, count: int) -> lowrank.Pair:
    """(a, b) of one module; ``count`` adapters are merged in all (of one: linear)."""
    import numpy as np

    name = settings.method.removeprefix("peft-") if count > 1 else "linear"
    pairs = [
        (u.a.read().astype(np.float64), u.b.read().astype(np.float64), u.scale * w)
        for u, w in parts
    ]
    if name == "cat":
        return lowrank.added([(f * a, b) for a, b, f in pairs])
    if name == "svd":
        a, b = lowrank.added([(a, f * b) for a, b, f in pairs])
        rank = settings.rank or max(u.rank for u, _ in parts)
        left, values, right = lowrank.svd(a, b, lambda v: min(rank, len(v)))
        return right, left * values[: left.shape[1]]
    ranks = {u.rank for u, _ in parts}
    if len(ranks) > 1:
        what = (
            f"has rank {max(ranks)}, another adapter {min(ranks)}: PEFT's {name} needs equal ranks"
        )
        raise Refused(parts[0][0].a.path, what, tensor=parts[0][0].a.name)
    roots = [math.sqrt(abs(f)) for _, _, f in pairs]
    signed = [r if f >= 0 else -r for (_, _, f), r in zip(pairs, roots, strict=True)]
    prune, combine = _STEPS[name]
    sides = []
    for tensors, weights in (([p[0] for p in pairs], signed), ([p[1] for p in pairs], roots)):
        kept = np.stack([prune(t, settings.density or 1.0, rng) for t in tensors])
        sides.append(combine(kept, np.array(weights)[:, None, None], settings.sign))
    return sides[0], sides[1]


def _all(values: Any, density: float, rng: Any) -> Any:
    return values


def _largest(values: Any, density: float, rng: Any) -> Any:
    """The share ``density`` of the largest entries (`peft/utils/merge_utils.py`)."""
    import numpy as np

    kept = int(density * values.size)
    if density >= 1 or kept == values.size:
        return values
    flat = np.abs(values).reshape(-1)
    mask = np.zeros(values.size)
    mask[np.argsort(-flat, kind="stable")[:kept]] = 1
    return values * mask.reshape(values.shape)


def _random(values: Any, density: float, rng: Any) -> Any:
    """torch.bernoulli: one draw of 24 bits each (ATen's uniform_real of float); rescaled."""
    import numpy as np

    if density >= 1:
        return values
    draws = rng.randint(0, 1 << 32, values.size, dtype=np.uint32) % (1 << 24) / 2.0**24
    mask = (draws < np.float32(density)).reshape(values.shape)
    return values * mask / density


def _sum(kept: Any, weights: Any, sign: str) -> Any:
    return (kept * weights).sum(0)


def _elected(kept: Any, weights: Any, sign: str) -> Any:
    """Those that have the elected sign, weighted, over their number (at least 1)."""
    import numpy as np

    votes = kept.sum(0) if sign == "total" else np.sign(kept).sum(0)
    mask = np.sign(kept) == np.where(votes >= 0, 1, -1)
    return (kept * weights * mask).sum(0) / np.maximum(mask.sum(0), 1)


_STEPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (_all, _sum),
    "ties": (_largest, _elected),
    "dare-linear": (_random, _sum),
    "dare-ties": (_random, _elected),
    "magnitude-prune": (_largest, _sum),
}
