"""What is left of an adapter's effect on the logits in another form of it.

The effect is what the adapter adds to the base's logits, less, of each position, its mean over the
vocabulary: softmax does not see that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.formats import read
from loraduct.formats.base import Base
from loraduct.formats.options import ReadOptions
from loraduct.validation import runtimes
from loraduct.validation.logits import divergence


@dataclass(frozen=True)
class Effect:
    """What one form of a model does against another, whose effect is wanted, on the same tokens.

    ``cosine`` of the two effects, ``size`` of the other one over the wanted one's, ``kl`` mean
    KL(wanted || other) per position, in nats; ``base_kl`` KL(wanted || base).
    """

    cosine: float
    size: float
    kl: float
    base_kl: float

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def effect(base: Sequence[Any], wanted: Sequence[Any], other: Sequence[Any]) -> Effect:
    """From logits (tokens, vocabulary) of each prompt."""
    cosine, size = compared(*(moved(xs, base) for xs in (wanted, other)))
    return Effect(cosine, size, divergence(wanted, other), divergence(wanted, base))


def moved(logits: Sequence[Any], base: Sequence[Any]) -> list[Any]:
    """The effect in ``logits``, float64 (tokens, vocabulary) of each prompt."""
    changes = [x.astype("float64") - y for x, y in zip(logits, base, strict=True)]
    return [c - c.mean(-1, keepdims=True) for c in changes]


def compared(wanted: Sequence[Any], other: Sequence[Any]) -> tuple[float, float]:
    """(cosine, size of the other over the wanted one's) of two effects, over all positions."""
    import numpy as np

    inner, one, two = (
        sum(float(np.vdot(x, y)) for x, y in zip(a, b, strict=True))
        for a, b in ((wanted, other), (wanted, wanted), (other, other))
    )
    cosine = inner / (one * two) ** 0.5 if one and two else float(one == two)
    return cosine, (two / one) ** 0.5 if one else 1.0


class Kept:
    """How much of one adapter's effect others have, in that adapter's own runtime."""

    def __init__(self, base: Base, path: Path, prompts: Sequence[str] = runtimes.PROMPTS) -> None:
        """Raises Refused for a base without weights, RuntimeFailed where a library refuses."""
        if not base.has_weights:
            raise Refused(base.path, "holds no weights to measure the effect on logits with")
        self.base = base
        self.ids, _ = runtimes.tokenize(base, prompts)
        self.options = ReadOptions(restore=False, base=base)
        self.runtime = runtimes.RUNTIME[read(path, self.options).format]
        self.alone = runtimes.run(self.runtime, base, None, self.ids, 0).logits
        self.whole = self._of(path)

    def _of(self, path: Path) -> list[Any]:
        adapter = read(path, self.options)
        return moved(runtimes.run(self.runtime, self.base, adapter, self.ids, 0).logits, self.alone)

    def cosine(self, path: Path) -> float:
        """Of the effect of the adapter in ``path`` with the first one's, over all positions."""
        return compared(self.whole, self._of(path))[0]
