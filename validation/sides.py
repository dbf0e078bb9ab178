"""What two sides computed of the same tokens: their bases alone, and with the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraduct.validation.logits import by_position, kl, largest, per_position, top1
from loraduct.validation.runtimes import Run


@dataclass(frozen=True)
class Sides:
    """A's run, then B's. ``allowed``: how much of the effect may be lost to rounding."""

    bare: Sequence[Run]
    done: Sequence[Run]
    allowed: float = 0.0

    @property
    def base_off(self) -> float:
        """The largest difference of a logit between the bases."""
        return largest(self.bare[0].logits, self.bare[1].logits)

    @property
    def off(self) -> float:
        """The same between the adapters."""
        return largest(self.done[0].logits, self.done[1].logits)

    @property
    def effect(self) -> float:
        """The largest that the adapter does to a logit of A's."""
        return largest(self.bare[0].logits, self.done[0].logits)

    def measured(self, bound: float) -> dict[str, Any]:
        """All numbers of the two runs with adapters."""
        import numpy as np

        one, two = self.done
        pairs = list(zip(one.logits, two.logits, strict=True))
        with np.errstate(invalid="ignore"):
            agree, decided = top1(pairs, bound)
            rows = per_position(one.logits, two.logits)
            return {
                "max_difference": self.off,
                "mean_difference": float(np.mean([np.abs(x - y).mean() for x, y in pairs])),
                "kl": float(np.mean([kl(x, y) for x, y in pairs])),
                "top1_agreement": agree,
                "top1_decided_positions": decided,
                "greedy_equal": one.greedy == two.greedy,
                "per_position": by_position(rows),
                "per_prompt": rows,
                "bound": bound,
                "effect": self.effect,
            }
