"""What is said of a base that was compressed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraduct.text import printable, size


@dataclass
class Outcome:
    """What was compressed, or would be. ``errors``: relative Frobenius error by module; of the outputs
    of the ``weighted`` ones, whose inputs were measured. ``quality``: measured afterwards, by whoever can
    run it."""

    source: Path
    output: Path | None
    how: str
    widths: dict[str, int | str]
    before: int
    after: int
    weights: int  # numbers compressed
    nbytes: int  # what they take
    kept: dict[str, str]
    errors: dict[str, float] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weighted: int = 0
    predicted: bool = False  # a budget's widths are by measured losses of the predictions
    quality: list[Any] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        where = printable(str(self.output)) if self.output else "nothing written (--plan)"
        each = 8 * self.nbytes / self.weights if self.weights else 0.0
        out = [
            f"{printable(str(self.source))} -> {where}: {size(self.before)} -> {size(self.after)}"
            f" ({self.after / self.before:.3f}), {self.how}, {each:.2f} bits per weight"
        ]
        counts = Counter(str(w) for w in self.widths.values())
        out += [f"  {n:>5} modules at {w} bits" for w, n in sorted(counts.items())]
        worst = sorted(self.errors.items(), key=lambda kv: -kv[1])[:3]
        error = "error of outputs" if self.weighted else "error"
        out += [f"        {error} {e:.4f} {printable(n)}" for n, e in worst]
        reasons = Counter(self.kept.values())
        out += [f"  {n:>5} tensors as they were: {why}" for why, n in reasons.items()]
        out += [f"  note: {printable(n, 600)}" for n in self.notes]
        return [*out, *(f"  {q.line()}" for q in self.quality)]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "source": str(self.source),
            "output": str(self.output) if self.output else None,
            "how": self.how,
            "modules": {
                n: {"bits": w, **({"error": self.errors[n]} if n in self.errors else {})}
                for n, w in self.widths.items()
            },
            "kept": self.kept,
            "bytes": {"before": self.before, "after": self.after},
            "bits_per_weight": 8 * self.nbytes / self.weights if self.weights else 0.0,
            "files": self.files,
            "weighted_tensors": self.weighted,
            "predicted": self.predicted,
            "quality": [q.as_json() for q in self.quality],
            "notes": self.notes,
        }
