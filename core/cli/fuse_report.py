"""What ``loraduct fuse`` says of what survives: measured by validation, from the folder written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraduct.errors import GateFailed, MissingExtra, Refused
from loraduct.text import printable, size, table

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.converters.fuse_folder import Plan
    from loraduct.converters.fuse_package import Plan as PackagePlan
    from loraduct.formats.base import Base
    from loraduct.validation.effect import Effect
    from loraduct.validation.survival import Survival, Survived

LEAST = 0.8  # cosine of the effect from which an update counts as kept
_WORST = 5  # modules that are named
SIDE = "side path"
_BESIDE = "loraduct_unfused"
_NO_ADAPTER = (
    "mlx-lm can't run this adapter beside the base (`loraduct convert --to mlx` says what of it)"
)


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


Logits = list[Any]  # (tokens, vocabulary) of each text


class Judge:
    """Runs the base and the base with its adapters once, and compares fused models with them."""

    def __init__(
        self,
        base: Base,
        given: Sequence[tuple[Adapter, float]],
        texts: list[str] | None,
        *,
        needed: bool,
    ) -> None:
        self.base, self.why = base, ""
        self.runs: tuple[Callable[[Path], Logits], Logits, Logits] | None = None
        try:
            self.runs = (_in_package if _is_package(base) else _in_folder)(base, given, texts)
        except (MissingExtra, _Unmeasured) as e:
            self.why = str(e)
        if needed and self.why:
            raise GateFailed(f"--min-effect: the effect can't be measured: {self.why}")

    def measure(self, remedy: str, plan: Plan | PackagePlan, folder: Path) -> Measured:
        """What is left in the model in ``folder``."""
        from loraduct.converters import fuse_package
        from loraduct.formats import base as base_folder
        from loraduct.validation import survival
        from loraduct.validation.effect import effect

        after = (fuse_package.opened if _is_package(self.base) else base_folder.read)(folder)
        survived = survival.survey(self.base, after, plan.places.updates)
        kept = None
        if self.runs is not None:
            run, bare, unfused = self.runs
            kept = effect(bare, unfused, run(folder))
        return Measured(remedy, plan.nbytes, survived, kept, self.why)


class _Unmeasured(Exception):
    """Why the base with its adapters beside it can't be run."""


def _is_package(base: Base) -> bool:
    from loraduct.formats.coreml.stored import PackageBase

    return isinstance(base, PackageBase)


def _in_folder(
    base: Base, given: Sequence[tuple[Adapter, float]], texts: list[str] | None
) -> tuple[Callable[[Path], Logits], Logits, Logits]:
    """(what runs a model's folder, logits of the base, of the base with the adapter beside it)."""
    from loraduct.converters.convert import Options, convert
    from loraduct.formats import base as base_folder
    from loraduct.formats import folder, read
    from loraduct.validation import runtimes

    adapter, weight = given[0]
    if len(given) > 1 or weight != 1.0:
        raise _Unmeasured("the runtimes take one adapter of weight 1")
    kind = "mlx" if base.quantization is not None else runtimes.RUNTIME[adapter.format]
    ids, _ = runtimes.tokenize(base, texts or runtimes.PROMPTS)

    def run(path: Path) -> Logits:
        return runtimes.run(kind, base_folder.read(path), None, ids, 0).logits

    bare = runtimes.run(kind, base, None, ids, 0).logits
    if runtimes.RUNTIME[adapter.format] == kind:
        return run, bare, runtimes.run(kind, base, adapter, ids, 0).logits
    with tempfile.TemporaryDirectory(prefix="loraduct-") as name:
        target = Path(name) / "adapter"
        try:
            folder.write(convert(adapter, Options(to="mlx", base=base)), target)
        except Refused:  # its ways out are those of `convert`
            raise _Unmeasured(_NO_ADAPTER) from None
        return run, bare, runtimes.run(kind, base, read(target), ids, 0).logits


def _in_package(
    base: Base, given: Sequence[tuple[Adapter, float]], texts: list[str] | None
) -> tuple[Callable[[Path], Logits], Logits, Logits]:
    """The same of a package, in the interpreter; the adapters beside it are a function of a copy."""
    from loraduct.converters.coreml import tokenizer_of
    from loraduct.converters.package import Member, add
    from loraduct.formats.base import Base as Folder
    from loraduct.formats.coreml.package import read
    from loraduct.validation import coreml, mil, runtimes

    words = base.tensors["model.embed_tokens.weight"].shape[0]
    tokenizer = Folder(tokenizer_of(base.path), {"vocab_size": words})
    ids, _ = runtimes.tokenize(tokenizer, texts or runtimes.PROMPTS)

    def run(path: Path, function: str | None = None) -> Logits:
        session = coreml.session(read(path), function, precision=mil.FULL)
        found = []
        for tokens in ids:
            session.start()
            found.append(session.feed(tokens))
        return found

    with tempfile.TemporaryDirectory(prefix="loraduct-") as name:
        copy = Path(name) / base.path.name
        shutil.copytree(base.path, copy)
        members = [Member(str(a.path), weight, a) for a, weight in given]
        try:
            add(copy, {_BESIDE: members})
        except Refused as e:
            raise _Unmeasured(f"the adapter can't be put beside the base: {e}") from None
        return run, run(base.path, _base_of(base)), run(copy, _BESIDE)


def _base_of(base: Any) -> str:
    """The name by which the base of a package is run."""
    from loraduct.validation import coreml

    names = coreml.functions(base.package)
    return next(n for n, members in names.items() if set(members.values()) <= set(base.functions))


def chosen(found: Sequence[Measured], least: float | None) -> Measured:
    """The smallest that keeps enough, of several the one that keeps most; else what keeps most."""
    enough = [m for m in found if m.kept >= (least or LEAST)]
    return (
        min(enough, key=lambda m: (m.nbytes, -m.kept))
        if enough
        else max(found, key=lambda m: m.kept)
    )


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


def as_json(found: Sequence[Measured], plan: Plan | PackagePlan) -> dict[str, Any]:
    """For programs; the first is the one that was written."""
    if not found:
        return {}
    first = found[0]
    return {
        "remedy": first.remedy,
        "survival": _survival(first.survived),
        "effect": first.effect.as_json() if first.effect else None,
        "effect_not_measured": first.why or None,
        "remedies": [_row(m) for m in found],
        "side_path_bytes": plan.side,
        "recommended": recommended(found),
    }


def _none(m: Survived | Survival) -> bool:
    """Whether dW is zero: survival counts it as kept, of which there is nothing to say."""
    return m.size == 0 and m.share == 1


def _survival(survived: Survived) -> dict[str, Any]:
    found = survived.as_json()
    parts: list[Survived | Survival] = [survived, *survived.modules]
    for row, part in zip([found, *found["modules"]], parts, strict=True):
        if _none(part):
            row |= {"share": None, "cosine": None}
    return found


def _row(m: Measured) -> dict[str, Any]:
    told = _survival(m.survived)
    return {
        "remedy": m.remedy,
        "bytes": m.nbytes,
        "share": told["share"],
        "weight_cosine": told["cosine"],
        "codes_changed": m.survived.codes,
        "effect": m.effect.as_json() if m.effect else None,
    }


def lines(found: Sequence[Measured], plan: Plan | PackagePlan, before: int) -> list[str]:
    """For people."""
    if not found:
        return []
    first = found[0].survived
    out = [f"  dW is {first.size:.2%} of the weights; of it survive (remedy {found[0].remedy}):"]
    heading = ["remedy", "bytes", "growth", "share of dW", "cosine", "codes", "effect", "KL"]
    rows = [heading, *(_cells(m, before) for m in found)]
    more = plan.side
    rows.append([SIDE, size(before + more), f"{more / before:+.1%}", "1", "1", "0.0%", "1", "0"])
    out += table(rows, "    ")
    worst = sorted((m for m in first.modules if not _none(m)), key=lambda m: m.share)
    for m in worst[:_WORST]:
        codes = "" if m.codes is None else f", {m.codes:.1%} of its codes changed"
        out.append(
            f"    {printable(m.module)}: share {m.share:.3f}, cosine {m.cosine:.3f}, {m.bits} bits{codes}"
        )
    if found[0].why:
        out.append(f"  the effect on logits was not measured: {printable(found[0].why, 300)}")
    best = recommended(found)
    told = f"--remedy {best}"
    if best == SIDE:
        told = "leave the adapter unfused beside the base"
        if found[0].why == _NO_ADAPTER:
            told = "an unpacked base, or one of more bits: no remedy keeps enough"
    out.append(f"  recommended: {told}" if best != found[0].remedy else "  recommended: as written")
    return out


def _cells(m: Measured, before: int) -> list[str]:
    codes = "-" if m.survived.codes is None else f"{m.survived.codes:.1%}"
    cosine, kl = (f"{m.effect.cosine:.3f}", f"{m.effect.kl:.4f}") if m.effect else ("-", "-")
    growth = f"{m.nbytes / before - 1:+.1%}"
    weights = [f"{m.survived.share:.3f}", f"{m.survived.cosine:.3f}"]
    weights = ["n/a", "n/a"] if _none(m.survived) else weights
    return [m.remedy, size(m.nbytes), growth, *weights, codes, cosine, kl]
