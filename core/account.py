"""The account: what became of every tensor and of every config field that changes numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from loraduct.tensor import UNIT_ROUNDOFF, Loss, Tensor
from loraduct.text import number, printable

# What can become of a tensor, in the order in which it is reported.
ACTIONS = {
    "carried": "bytes as they were",
    "transposed": "same values, the target's orientation",
    "rearranged": "split, joined, stacked or computed as the target wants it",
    "padded": "zeros added up to the common rank",
    "cropped": "zeros of an earlier padding removed",
    "folded": "multiplied by its module's scale over the common scale",
    "widened": "stored in a wider dtype so that nothing is rounded",
    "rounded": "rounded once to the stored dtype",
    "zeroed": "its module's scale is 0, and the target has one scale for all",
    "set aside": "a copy without an effect of its own",
    "dropped": "left out on request",
}


@dataclass(frozen=True)
class Entry:
    """One source tensor and what became of it."""

    source: str
    target: str | None
    actions: tuple[str, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class OtherSide:
    """A side of a tied embedding that is moved otherwise than in the source.

    ``norm`` is that difference's Frobenius norm, ``relative`` that over the base's weight's.
    """

    module: str
    side: str
    what: str
    norm: float
    relative: float | None

    def line(self) -> str:
        """For people."""
        share = (
            "the base's weight was not there to compare with"
            if self.relative is None
            else f"{self.relative:.2e} of the base's weight"
        )
        return f"{printable(self.module)}: the {self.side} {self.what}: {self.norm:.4g} ({share})"


@dataclass
class Account:
    """Entries of one conversion; ``losses`` are filled in while the output is written."""

    entries: list[Entry] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    losses: dict[str, Loss] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)  # module -> share of the norm lost
    sides: tuple[OtherSide, ...] = ()  # of tied embeddings, approximated
    files: dict[str, int] = field(default_factory=dict)  # name -> bytes, of what was written

    def carry(self, target: str, tensor: Tensor) -> None:
        """Record that ``tensor`` is written as ``target``."""
        stored = tensor.stored_shape[::-1] if tensor.transposed else tensor.stored_shape
        size = tensor.shape
        done = [
            "transposed" if tensor.transposed else "",
            "padded" if any(n > m for n, m in zip(size, stored, strict=True)) else "",
            "cropped" if any(n < m for n, m in zip(size, stored, strict=True)) else "",
            "zeroed" if tensor.factor == 0.0 else "folded" if tensor.factor != 1.0 else "",
            "rounded" if tensor.rounds else "",
            "widened"
            if UNIT_ROUNDOFF.get(tensor.dtype, 0) < UNIT_ROUNDOFF.get(tensor.stored_dtype, 0)
            else "",
        ]
        if tensor.make is not None:
            done.insert(0, "rearranged")
        actions = tuple(a for a in done if a) or ("carried",)
        for origin in tensor.origins:
            self.entries.append(Entry(origin.name, target, actions, tensor.factor))

    def drop(self, tensors: Iterable[Tensor]) -> None:
        """Record that tensors were left out because the user asked for it."""
        names = dict.fromkeys(o.name for t in tensors for o in t.origins)
        self.entries += [Entry(name, None, ("dropped",)) for name in names]

    def set_aside(self, tensors: Iterable[Tensor]) -> None:
        """Record that tensors are copies of others and need no place of their own."""
        self.entries += [Entry(t.name, None, ("set aside",)) for t in tensors]

    def check_complete(self, tensors: Iterable[Tensor]) -> None:
        """Every source tensor has an entry, and nothing else has; else it is a bug of ours."""
        booked = {e.source for e in self.entries}
        found = {o.name for t in tensors for o in t.origins}
        if booked != found:
            raise AssertionError(f"tensors not accounted for: {sorted(booked ^ found)[:5]}")

    @property
    def worst_loss(self) -> tuple[str, float] | None:
        """The tensor that rounding hurt most, and its relative error."""
        measured = [(loss.relative, name) for name, loss in self.losses.items()]
        if not measured:
            return None
        relative, name = max(measured)
        return name, relative

    @property
    def worst_residual(self) -> tuple[str, float] | None:
        """The module that an approximation hurt most, and what it lost of its norm."""
        return max(self.residuals.items(), key=lambda kv: kv[1], default=None)

    def _done(self, entry: Entry) -> list[str]:
        """Its actions; a rounding that was measured to lose nothing is none."""
        loss = self.losses.get(entry.target or "")
        exact = loss is not None and loss.size > 0 and loss.error == 0
        return [a for a in entry.actions if not (exact and a == "rounded")] or ["carried"]

    def lines(self) -> list[str]:
        """The account for people."""
        counts = Counter(a for e in self.entries for a in self._done(e))
        out = [f"  {counts[a]:>5} {a:<10} {text}" for a, text in ACTIONS.items() if counts[a]]
        factors = sorted({e.factor for e in self.entries if e.factor != 1.0})
        if factors:
            shown = ", ".join(number(f) for f in factors[:6])
            out.append(f"        factors folded: {shown}{', ...' if len(factors) > 6 else ''}")
        if worst := self.worst_loss:
            out.append(
                f"        largest relative rounding error: {worst[1]:.2e} in {printable(worst[0])}"
            )
        if hurt := self.worst_residual:
            out.append(
                f"        {len(self.residuals)} updates of full rank approximated; largest"
                f" residual: {hurt[1]:.2e} of the norm, in {printable(hurt[0])}"
            )
        out += [f"        approximated: {side.line()}" for side in self.sides]
        width = max((len(k) for k in self.fields), default=0)
        out += [f"  {k.ljust(width)}  {printable(v, 160)}" for k, v in self.fields.items()]
        out += [f"  note: {printable(n, 400)}" for n in self.notes]
        return out

    def as_json(self) -> dict[str, Any]:
        """The account for programs."""
        worst = self.worst_loss
        return {
            "tensors": [
                {"source": e.source, "target": e.target, "actions": self._done(e)}
                | ({"factor": e.factor} if e.factor != 1.0 else {})
                | (
                    {"relative_error": self.losses[e.target].relative}
                    if e.target in self.losses
                    else {}
                )
                for e in self.entries
            ],
            "config": self.fields,
            "notes": self.notes,
            "largest_relative_error": worst[1] if worst else 0.0,
            "residuals": self.residuals,
            "tied": [asdict(side) for side in self.sides],
            "files": self.files,
        }
