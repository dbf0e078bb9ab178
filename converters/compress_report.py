"""What became of a package's weights: said for people and for programs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraduct.converters import compress_curve
from loraduct.text import printable, several, size, table

_NUMBERS = re.compile(r"(?<![A-Za-z])[0-9]+(?![A-Za-z])|(?<=[AB])[0-9]+")


def kind_of(name: str) -> str:
    """A constant's name without the layer it is of."""
    return _NUMBERS.sub("*", name)


@dataclass(frozen=True)
class Row:
    """One tensor. ``way``: how it is stored, None: as it was, for ``reason``; ``error`` and ``norm``:
    squared, of what is read back and of what it was (NaN: not known)."""

    name: str
    group: str
    shape: tuple[int, ...]
    before: int
    after: int
    way: str | None = None
    reason: str | None = None
    error: float = math.nan
    norm: float = math.nan

    @property
    def relative(self) -> float:
        """Of the tensor's norm."""
        return math.sqrt(self.error / self.norm) if self.norm > 0 else 0.0 * self.error

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": self.name, "group": self.group, "shape": list(self.shape), "way": self.way,
            "reason": self.reason, "bytes_before": self.before, "bytes_after": self.after,
            "relative_error": None if self.way is None else self.relative,
        }  # fmt: skip


@dataclass
class Report:
    """``before``, ``after``: bytes of the packages. ``output`` None: nothing was written."""

    source: Path
    output: Path | None
    done: str = "compressed"
    rows: list[Row] = field(default_factory=list)
    before: int = 0
    after: int = 0
    checked: int = 0
    notes: list[str] = field(default_factory=list)
    choices: list[list[str]] = field(default_factory=list)  # a table, of --plan
    exact: bool | None = None  # of a budget: no plan of this size has less error
    # of a budget: (bytes of its tensors, bits per weight, bytes of the package, error) of best plans
    curve: list[tuple[int, float, int, float]] = field(default_factory=list)
    predicted: bool = False  # the curve's errors are losses of the predictions (KL), else squares
    weighted: int = 0  # tensors whose errors count by what their inputs are like
    quality: list[Any] = field(default_factory=list)  # measured afterwards, by whoever can run it

    @property
    def bits(self) -> float:
        """Per weight of the tensors that are stored otherwise than before, tables included."""
        made = [r for r in self.rows if r.way is not None]
        count = sum(math.prod(r.shape) for r in made)
        return 8 * sum(r.after for r in made) / count if count else math.nan

    @property
    def curve_error(self) -> str:
        """What the curve's errors are."""
        return "predicted KL" if self.predicted else "squared error"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "schema": 1,
            "source": str(self.source),
            "output": str(self.output) if self.output else None,
            "bytes_before": self.before,
            "bytes_after": self.after,
            "bits_per_weight": self.bits,
            "checked": self.checked,
            "optimal": self.exact,
            "curve": [
                dict(
                    zip(("bytes", "bits_per_weight", "package_bytes", "error"), point, strict=True)
                )
                for point in self.curve
            ],
            "curve_error": self.curve_error,
            "weighted_tensors": self.weighted,
            "quality": [q.as_json() for q in self.quality],
            "tensors": [r.as_json() for r in self.rows],
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """For people."""
        where = str(self.output) if self.output else "nothing written (--plan)"
        out = [f"{printable(str(self.source), 300)} -> {printable(where, 300)}"]
        out += ["", *table(self.choices), ""] if self.choices else []
        if self.output is None and self.curve:
            out += [*compress_curve.lines(self.curve, self.curve_error), ""]
        made = [r for r in self.rows if r.way is not None]
        error = "error" if not self.weighted else "error of outputs"
        if made:
            out += table([["tensors", "how", "count", "before", "after", error], *_kinds(made)])
        left = Counter((r.group, r.reason or "") for r in self.rows if r.way is None)
        for (group, reason), count in sorted(left.items(), key=lambda kv: -kv[1]):
            held = [
                r.name
                for r in self.rows
                if r.way is None and (r.group, r.reason) == (group, reason)
            ]
            names = several(list(dict.fromkeys(map(kind_of, held))), 4)
            out.append(f"  left as it is: {count} of the {group} ({printable(reason)}): {names}")
        out += [f"  note: {printable(n, 600)}" for n in self.notes]
        out += [f"  {q.line()}" for q in self.quality]
        if self.checked:
            out.append(f"  {self.checked} tensors read back from the file, as they were meant")
        bits = (
            ""
            if math.isnan(self.bits)
            else f", {self.bits:.2f} bits per weight of {len(made)} tensors"
        )
        out.append(f"{self.done}: {size(self.before)} -> {size(self.after)}{bits}")
        return out


def _kinds(rows: Iterable[Row]) -> list[list[str]]:
    """A line for each kind of tensor and way."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((kind_of(row.name), row.way or ""), []).append(row)
    out = []
    for (kind, way), held in groups.items():
        error = sum(r.error for r in held)
        norm = sum(r.norm for r in held)
        shown = "-" if math.isnan(error) else f"{math.sqrt(error / norm) if norm else 0:.4f}"
        out.append(
            [printable(kind, 60), way, str(len(held)), size(sum(r.before for r in held)),
             size(sum(r.after for r in held)), shown]
        )  # fmt: skip
    return out
