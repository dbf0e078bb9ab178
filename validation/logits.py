"""Two runs of the same tokens, compared: lists of logits (tokens, vocabulary), one a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def finite(logits: Sequence[Any]) -> bool:
    """Whether there is no NaN and no infinity."""
    import numpy as np

    return all(bool(np.isfinite(x).all()) for x in logits)


def largest(xs: Sequence[Any], ys: Sequence[Any]) -> float:
    """The largest difference; NaN if there is one."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        return float(np.max([np.abs(x - y).max() for x, y in zip(xs, ys, strict=True)]))


def log_softmax(x: Any) -> Any:
    """Logarithms of the probabilities, float64."""
    import numpy as np

    wide = x.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def losses(x: Any, tokens: Sequence[int]) -> Any:
    """-log p of the token that follows each position, nats."""
    import numpy as np

    return -log_softmax(x)[np.arange(len(tokens)), np.asarray(tokens, int)]


def kl(x: Any, y: Any) -> float:
    """Mean over one prompt's positions of KL(softmax(x) || softmax(y)), in float64."""
    return divergence([x], [y])


def divergence(xs: Sequence[Any], ys: Sequence[Any]) -> float:
    """The same over the positions of all prompts."""
    return log_divergence([log_softmax(x) for x in xs], [log_softmax(y) for y in ys])


def log_divergence(ps: Sequence[Any], qs: Sequence[Any]) -> float:
    """The same from logarithms of probabilities."""
    import numpy as np

    total = sum(float((np.exp(p) * (p - q)).sum()) for p, q in zip(ps, qs, strict=True))
    return total / sum(map(len, ps))


def agreement(xs: Sequence[Any], ys: Sequence[Any]) -> float:
    """Share of all positions where both find the same token likeliest."""
    equal = sum(int((x.argmax(-1) == y.argmax(-1)).sum()) for x, y in zip(xs, ys, strict=True))
    return equal / sum(map(len, xs))


def top1(pairs: Sequence[tuple[Any, Any]], bound: float) -> tuple[float | None, int]:
    """(share of agreement, positions) where the first's margin exceeds twice the bound.

    Where it does not, a difference within bounds may swap the two; None when that is everywhere.
    """
    agree, decided = decisions(pairs, bound)
    return (agree / decided if decided else None), decided


def decisions(pairs: Sequence[tuple[Any, Any]], bound: float) -> tuple[int, int]:
    """`top1` in positions: (those that agree, all)."""
    import numpy as np

    agree = decided = 0
    for x, y in pairs:
        two = np.partition(x, -2, axis=-1)[:, -2:]
        sure = (two[:, 1] - two[:, 0]) > 2 * bound
        decided += int(sure.sum())
        agree += int((x.argmax(-1) == y.argmax(-1))[sure].sum())
    return agree, decided


def per_position(xs: Sequence[Any], ys: Sequence[Any]) -> list[list[float]]:
    """Of each prompt, the largest difference of any logit at each position."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        rows = [np.abs(x - y).max(axis=-1) for x, y in zip(xs, ys, strict=True)]
    return [[float(v) for v in row] for row in rows]


def by_position(rows: Sequence[Sequence[float]]) -> list[float]:
    """The largest of all prompts at each position."""
    longest = max(map(len, rows), default=0)
    return [max(row[n] for row in rows if n < len(row)) for n in range(longest)]
