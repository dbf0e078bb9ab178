"""What ``loraduct fuse`` says of what survives: measured by validation, from the folder written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraduct.errors import GateFailed, MissingExtra
from loraduct.text import printable, size, table

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.converters.fuse_folder import Plan
    from loraduct.formats.base import Base
    from loraduct.validation.survival import Effect, Survived

LEAST = 0.8  # cosine of the effect from which an update counts as kept
_WORST = 5  # modules that are named
SIDE = "side path"


@dataclass(frozen=True)
class Measured:
    """One way to pack, and what it keeps. ``effect`` None: not measured, ``why`` says why."""

    remedy: str
    nbytes: int
    survived: Survived
    effect: Effect | None
    why: str

    @property
    def kept(self) -> float:
        """The cosine of the effect; without it that of the weights, which is a lower one."""
        return self.effect.cosine if self.effect else self.survived.cosine


class Judge:
    """Runs the base and the base with its adapter once, and compares fused models with them."""

    def __init__(
        self,
        base: Base,
        given: Sequence[tuple[Adapter, float]],
        texts: list[str] | None,
        *,
        needed: bool,
    ) -> None:
        self.base, self.why, self.runs = base, "", None
        adapter, weight = given[0]
        if len(given) > 1 or weight != 1.0:
            self.why = "the runtimes take one adapter of weight 1"
        else:
            try:
                self.runs = _reference(base, adapter, texts)
            except MissingExtra as e:
                self.why = str(e)
        if needed and self.why:
            raise GateFailed(f"--min-effect: the effect can't be measured: {self.why}")

    def measure(self, remedy: str, plan: Plan, folder: Path) -> Measured:
        """What is left in the model in ``folder``."""
        from loraduct.formats import base as base_folder
        from loraduct.validation import runtimes, survival

        after = base_folder.read(folder)
        survived = survival.survey(self.base, after, plan.places.updates)
        effect = None
        if self.runs is not None:
            kind, ids, bare, unfused = self.runs
            effect = survival.effect(bare, unfused, runtimes.run(kind, after, None, ids, 0).logits)
        return Measured(remedy, plan.nbytes, survived, effect, self.why)


def _reference(
    base: Base, adapter: Adapter, texts: list[str] | None
) -> tuple[str, list[list[int]], list[Any], list[Any]]:
    """(runtime, tokens, logits of the base, logits of the base with the adapter beside it)."""
    from loraduct.converters.convert import Options, convert
    from loraduct.formats import folder, read
    from loraduct.validation import runtimes

    kind = "mlx" if base.quantization is not None else runtimes.RUNTIME[adapter.format]
    ids, _ = runtimes.tokenize(base, texts or runtimes.PROMPTS)
    bare = runtimes.run(kind, base, None, ids, 0).logits
    if runtimes.RUNTIME[adapter.format] == kind:
        return kind, ids, bare, runtimes.run(kind, base, adapter, ids, 0).logits
    with tempfile.TemporaryDirectory(prefix="loraduct-") as name:
        target = Path(name) / "adapter"
        folder.write(convert(adapter, Options(to="mlx", base=base)), target)
        return kind, ids, bare, runtimes.run(kind, base, read(target), ids, 0).logits


def chosen(found: Sequence[Measured], least: float | None) -> Measured:
    """The smallest that keeps enough; else the one that keeps most."""
    enough = [m for m in found if m.kept >= (least or LEAST)]
    return min(enough, key=lambda m: m.nbytes) if enough else max(found, key=lambda m: m.kept)


def gate(measured: Measured, least: float | None) -> None:
    """Raises GateFailed when less than ``least`` of the effect is left."""
    if least is not None and not measured.kept >= least:
        raise GateFailed(
            f"--min-effect {least:g}: cosine {measured.kept:.3f} of the adapter's effect survives"
            f" (remedy {measured.remedy}); nothing was written; --remedy auto compares what helps, and"
            " the adapter can stay beside the base unfused"
        )


def recommended(found: Sequence[Measured]) -> str:
    """The remedy that keeps enough for the fewest bytes, or the side path."""
    best = chosen(found, None)
    return best.remedy if best.kept >= LEAST else SIDE


def side_bytes(plan: Plan) -> int:
    """Of the adapters as they are."""
    return sum(
        t.stored_nbytes for a, _ in plan.adapters for u in a.updates.values() for t in _stored(u)
    )


def _stored(update: Any) -> list[Any]:
    return [o for t in update.tensors for o in t.origins]


def as_json(found: Sequence[Measured], plan: Plan) -> dict[str, Any]:
    """For programs; the first is the one that was written."""
    if not found:
        return {}
    first = found[0]
    return {
        "remedy": first.remedy,
        "survival": first.survived.as_json(),
        "effect": first.effect.as_json() if first.effect else None,
        "effect_not_measured": first.why or None,
        "remedies": [_row(m) for m in found],
        "side_path_bytes": side_bytes(plan),
        "recommended": recommended(found),
    }


def _row(m: Measured) -> dict[str, Any]:
    return {
        "remedy": m.remedy,
        "bytes": m.nbytes,
        "share": m.survived.share,
        "weight_cosine": m.survived.cosine,
        "codes_changed": m.survived.codes,
        "effect": m.effect.as_json() if m.effect else None,
    }


def lines(found: Sequence[Measured], plan: Plan, before: int) -> list[str]:
    """For people."""
    if not found:
        return []
    first = found[0].survived
    out = [f"  dW is {first.size:.2%} of the weights; of it survive (remedy {found[0].remedy}):"]
    heading = ["remedy", "bytes", "growth", "share of dW", "cosine", "codes", "effect", "KL"]
    rows = [heading, *(_cells(m, before) for m in found)]
    more = side_bytes(plan)
    rows.append([SIDE, size(before + more), f"{more / before:+.1%}", "1", "1", "0.0%", "1", "0"])
    out += table(rows, "    ")
    worst = sorted(first.modules, key=lambda m: m.share)[:_WORST]
    for m in worst:
        codes = "" if m.codes is None else f", {m.codes:.1%} of its codes changed"
        out.append(
            f"    {printable(m.module)}: share {m.share:.3f}, cosine {m.cosine:.3f}, {m.bits} bits{codes}"
        )
    if found[0].why:
        out.append(f"  the effect on logits was not measured: {printable(found[0].why, 300)}")
    best = recommended(found)
    told = "leave the adapter unfused beside the base" if best == SIDE else f"--remedy {best}"
    out.append(f"  recommended: {told}" if best != found[0].remedy else "  recommended: as written")
    return out


def _cells(m: Measured, before: int) -> list[str]:
    codes = "-" if m.survived.codes is None else f"{m.survived.codes:.1%}"
    cosine, kl = (f"{m.effect.cosine:.3f}", f"{m.effect.kl:.4f}") if m.effect else ("-", "-")
    growth = f"{m.nbytes / before - 1:+.1%}"
    weights = [f"{m.survived.share:.3f}", f"{m.survived.cosine:.3f}"]
    return [m.remedy, size(m.nbytes), growth, *weights, codes, cosine, kl]
