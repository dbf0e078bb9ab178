"""Numerical parity of two adapters on one base: in the real runtimes, and module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraduct.adapter import Adapter, LowRank, Update
from loraduct.formats.base import Base
from loraduct.modules import block_of
from loraduct.text import printable
from loraduct.validation import as_stored, half, runtimes
from loraduct.validation.align import NameMap, aligned
from loraduct.validation.base_model import rope_trap
from loraduct.validation.checks import Check
from loraduct.validation.declared import (
    BASE,
    declared,
    explains,
    misplaced,
    tolerance,
)
from loraduct.validation.delta import BOUNDS, EQUAL, Delta, compare
from loraduct.validation.logits import finite, kl, largest
from loraduct.validation.moved import as_they_are
from loraduct.validation.runs import Runs
from loraduct.validation.runtimes import Run
from loraduct.validation.sides import Sides
from loraduct.validation.suites import CannotRun, Context, Suite, suite

SAME_RUNTIME = 1e-4  # largest logit difference within one runtime
BASE_FACTOR, EFFECT_FACTOR = 3.0, 1e-3  # across runtimes: of base against base, of the effect
ROUNDING_FACTOR = 4.0  # of dW's measured rounding, in the effect on the logits
BASE_MISREAD = 1e-3  # base against base, relative to the largest logit: above, a config is misread
PACKED = (
    "logits were not compared: the base is packed by mlx-lm, torch can't load it; give the unpacked"
    " base, or compare two MLX adapters"
)
ONE_COMPRESSED = (
    "logits were not compared: give the source adapter, not two of packages; one is compressed"
)


NORMS = "1 / ||W + dW||, which the package stores for DoRA, is neither the base's nor its compressed base's"


@dataclass
class Parity:
    """What was measured, and the checks drawn from it."""

    checks: list[Check] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    same_modules: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    loose: float = 0.0  # how far dW may be off where factors were compressed, at most
    pairs: dict[str, tuple[Update, Update]] = field(default_factory=dict)  # by common names

    @property
    def compared(self) -> list[Delta]:
        """Modules whose dW was really compared."""
        return [d for d in self.deltas if d.compared]

    def add(self, name: str, status: str, detail: str, module: str | None = None) -> None:
        """One more check."""
        self.checks.append(Check(name, status, detail, module))

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            **self.numbers,
            "greedy_text": self.text,
            "modules": [d.as_json() for d in self.deltas],
        }


def run(context: Context) -> Suite:
    """The suite: B against A."""
    if len(context.adapters) < 2:
        raise CannotRun("one adapter: give B, what was made of it")
    if not context.base.has_weights:
        raise CannotRun(f"{context.base.path} holds no weights to run")
    first, second = context.adapters
    parity = check(first, second, context.runs, context.names)
    return suite("parity", parity.checks, parity.as_json())


def check(first: Adapter, second: Adapter, runs: Runs, names: NameMap | None = None) -> Parity:
    """Compare ``second`` with ``first`` on the base of ``runs``."""
    base = runs.base
    parity = Parity()
    _modules(first, second, base, names, parity)
    kinds = [runtimes.RUNTIME[a.format] for a in (first, second)]
    if base.quantization is not None and "torch" in kinds:
        parity.add("logits", "skipped", PACKED)
        return parity
    try:
        _logits((first, second), kinds, runs, parity)
    except runtimes.RuntimeFailed as e:
        parity.add("logits", "failed", str(e))
    return parity


def _modules(
    first: Adapter, second: Adapter, base: Base, names: NameMap | None, parity: Parity
) -> None:
    """dW of every module, and the first one that is off."""
    renamed = []
    settled = as_they_are(first, second, base)
    if isinstance(settled, Check):
        parity.checks.append(settled)
        return
    for adapter in settled:
        updates = aligned(adapter, base, names)
        if isinstance(updates, Check):
            parity.checks.append(updates)
            return
        renamed.append(updates)
    one, two = renamed
    parity.same_modules = one.keys() == two.keys()
    for name in sorted(one.keys() ^ two.keys(), key=_order)[:1]:
        where = "second" if name in one else "first"
        parity.add("modules", "failed", f"is not in the {where} adapter", name)
    shared = sorted(one.keys() & two.keys(), key=_order)
    for n in shared:
        a, b = one[n], two[n]
        parity.pairs[n] = a, b
        delta = compare(n, a, b, base)
        if isinstance(a, LowRank) and isinstance(b, LowRank) and not delta.error <= EQUAL:
            delta = _loosened(delta, a, b, parity)
        parity.deltas.append(replace(delta, rank=getattr(a, "rank", None)))
    _judge(parity)


def _loosened(delta: Delta, first: LowRank, second: LowRank, parity: Parity) -> Delta:
    """With the bounds that a declared compression of the factors needs."""
    if what := misplaced(first, second):
        return replace(delta, bound=0.0, note=what)
    loose = tolerance(first, second)
    parity.loose = max(parity.loose, loose)
    bounds = max(delta.bound, loose), max(delta.gain_bound, loose)
    return replace(delta, bound=bounds[0], gain_bound=bounds[1]) if loose else delta


def _judge(parity: Parity) -> None:
    """The dW checks: what is off, what agrees, what can't be told, what was not compared."""
    count = len(parity.deltas)
    guilty = [d for d in parity.deltas if d.fits is False]
    fine = [d for d in parity.deltas if d.fits]
    if guilty:
        d = guilty[0]
        what = f"relative error {d.error:.2e} (bound {d.bound:.0e}), gain {d.gain:.5f}"
        what += f"; {d.note}" if d.note else ""
        parity.add("dW", "failed", f"{what}; {len(guilty)} of {count} modules are off", d.module)
    elif fine:
        worst = max(fine, key=lambda d: d.error)
        gains = [d.gain for d in fine]
        parity.add(
            "dW",
            "passed",
            f"{len(fine)} modules, largest relative error {worst.error:.1e} (bound"
            f" {worst.bound:.0e}), gain {min(gains):.6f} to {max(gains):.6f}",
        )
    if unsure := [d for d in parity.compared if d.fits is None]:
        what = f"not decided in {len(unsure)} of {count}: {unsure[0].note}"
        parity.add("dW", "warning", what, unsure[0].module)
    if left := [d for d in parity.deltas if not d.compared]:
        what = f"dW was not compared in {len(left)} of {count} modules ({left[0].module}):"
        parity.add("dW", "skipped", f"{what} {left[0].note}")
    if parity.compared:
        worst = max(parity.compared, key=lambda d: d.error)
        parity.numbers |= {
            "dw_worst_relative_error": worst.error,
            "dw_worst_module": worst.module,
            "gain_min": min(d.gain for d in parity.compared),
            "gain_max": max(d.gain for d in parity.compared),
        }


def _order(name: str) -> tuple[Any, ...]:
    """Modules in the order in which the model runs through them, as far as names tell."""
    block = block_of(name)
    return (0, block[1], block[2]) if block else (1, 0, name)


def _logits(
    adapters: Sequence[Adapter],
    kinds: Sequence[str],
    runs: Runs,
    parity: Parity,
) -> None:
    """The real runtimes on the same tokens."""
    base, ids = runs.base, runs.ids
    bare = [runs.bare(a).run for a in adapters]
    across = kinds[0] != kinds[1]
    base_off = largest(bare[0].logits, bare[1].logits) if across else 0.0
    parity.numbers |= {"runtimes": kinds, "prompts": len(ids), "base_max_difference": base_off}
    for kind, run in zip(kinds, bare, strict=True):
        if not finite(run.logits):
            parity.add("base", "failed", f"the bare base computes NaN or Inf in {kind}")
            return
    packed = next((str(d[BASE]) for a in adapters if BASE in (d := declared(a))), None)
    if packed and not across:
        parity.add("logits", "skipped", f"{ONE_COMPRESSED} ({packed})")
        return
    if packed and not _compressed_base(packed, [run.logits for run in bare], parity):
        return
    if across and not packed and not _base_agrees(base, bare, parity):
        return
    done = [runs.adapted(a).run for a in adapters]
    if runs.tokenizer is not None:
        shown = {"base": bare[0], "first": done[0], "second": done[1]}
        parity.text = {name: runs.tokenizer.decode(run.greedy) for name, run in shown.items()}
    sides = Sides(bare, done, _allowed(adapters, parity.compared, parity))
    beyond = not sides.off <= _bound(sides, across=across)
    if packed or parity.loose or (beyond and _only_rounded(parity)):
        again = _restated(adapters, runs, sides, parity)
        if again is not None and across and not _base_agrees(base, again.bare, parity):
            return
        sides = again or sides
    parity.numbers |= sides.measured(_bound(sides, across=across))
    broken = [
        f"{label} computes NaN or Inf in {kind}"
        for label, kind, run in zip("AB", kinds, sides.done, strict=True)
        if not finite(run.logits)
    ]
    if broken:
        parity.add("logits", "failed", "; ".join(broken))
        parity.add("top-1", "failed", "the logits hold NaN or Inf")
        return
    _judge_logits(" / ".join(dict.fromkeys(kinds)), parity)
    for adapter in adapters:
        if adapter.format == "coreml":
            half.check(adapter, ids, sides.done[0].logits, parity.add, parity.numbers)


def _bound(sides: Sides, *, across: bool) -> float:
    """Of the logits' difference."""
    if not across:
        return max(SAME_RUNTIME, sides.allowed * sides.effect)
    of_effect = max(EFFECT_FACTOR, sides.allowed) * sides.effect
    return max(BASE_FACTOR * sides.base_off, of_effect)


def _allowed(adapters: Sequence[Adapter], deltas: Sequence[Delta], parity: Parity) -> float:
    """How much of its effect an adapter may lose to a rounding that was measured in dW.

    A change of scale is no rounding and gets nothing; nor does what exact storage can't lose.
    """
    dtypes = {t.dtype for a in adapters for u in a.updates.values() for t in u.tensors}
    coarsest = max((BOUNDS.get(d, 0.0) for d in dtypes), default=0.0)
    coarsest = max(coarsest, parity.loose)
    measured = max((d.rounding for d in deltas), default=0.0)
    return min(ROUNDING_FACTOR * measured, coarsest)


def _only_rounded(parity: Parity) -> bool:
    """Whether dW was off nowhere: then rounding, further on, may be what the logits show."""
    return parity.same_modules and all(d.fits is not False for d in parity.deltas)


def _restated(
    adapters: Sequence[Adapter], runs: Runs, sides: Sides, parity: Parity
) -> Sides | None:
    """The same with what was rounded or compressed rounded on both sides; None if that can't be."""
    if all(a.format == "coreml" for a in adapters):
        return None
    which = int(adapters[0].format == "coreml")  # the numbers are a package's, or B's
    own, other = adapters[which], adapters[1 - which]
    sound = {d.module for d in parity.deltas if d.fits is not False}
    pairs = {n: (p[which], p[1 - which]) for n, p in parity.pairs.items() if n in sound}
    with as_stored.restated(own, other, runs.base, pairs) as given:
        if given is None:
            return None
        for module in given.wrong[:1]:
            parity.add("norm", "failed", NORMS, module)
        again = Runs(given.base, runs.prompts, progress=runs.progress)
        bare, done = list(sides.bare), list(sides.done)
        if given.base is not runs.base:
            bare[which] = again.bare(given.adapter).run
        done[which] = again.adapted(given.adapter).run
    left = [d for d in parity.compared if d.module not in given.modules]
    parity.numbers |= {
        "source_difference": sides.off,
        "restated": {
            "side": "AB"[which],
            "base": given.base is not runs.base,
            "modules": sorted(given.modules, key=_order),
        },
    }
    return Sides(bare, done, _allowed(adapters, left, parity))


def _judge_logits(where: str, parity: Parity) -> None:
    """The checks drawn from finite logits."""
    n = parity.numbers
    if again := n.get("restated"):
        other = "BA"[again["side"] == "B"]
        where += f", {again['side']} with the numbers that {other} stores"
    fine = n["max_difference"] <= n["bound"]
    what = (
        f"{where}: largest difference {n['max_difference']:.2e} (bound {n['bound']:.2e}), the"
        f" adapter's own effect {n['effect']:.3g}, KL {n['kl']:.1e}"
    )
    guilty = None if fine else next((d.module for d in parity.deltas if d.fits is False), None)
    if not fine and guilty is None:
        what += f"; {_cause(parity)}"
    parity.add("logits", "passed" if fine else "failed", what, guilty)
    agree, decided = n["top1_agreement"], n["top1_decided_positions"]
    if agree is None:
        what = "top-1 was not compared: no position's margin exceeds twice the bound"
        parity.add("top-1", "skipped", what)
    else:
        what = f"agrees at {agree:.1%} of {decided} positions where the margin decides"
        parity.add("top-1", "passed" if agree == 1.0 else "failed", what)
    if n["effect"] == 0:
        parity.add("effect", "warning", "the adapter changes no logit at all")


def _cause(parity: Parity) -> str:
    """What dW says of logits that differ though no module is out of bounds."""
    if not parity.same_modules:
        return "the adapters don't adapt the same modules"
    if not parity.compared:
        return "dW was not compared"
    worst = max(parity.compared, key=lambda d: d.error)
    if worst.error <= EQUAL and all(d.fits for d in parity.deltas):
        return "dW agrees in every module, so the runtimes or the base differ"
    left = len(parity.deltas) - len(parity.compared)
    return (
        f"the module that differs most is {worst.module} (relative error {worst.error:.1e}, gain"
        f" {worst.gain:.5f})" + (f"; dW was not compared in {left} modules" if left else "")
    )


def _base_agrees(base: Base, bare: Sequence[Run], parity: Parity) -> bool:
    """Whether both runtimes compute the same base; else no adapter can be compared."""
    import numpy as np

    size = max(float(np.abs(x).max()) for x in bare[0].logits)
    off = largest(bare[0].logits, bare[1].logits)
    if off <= BASE_MISREAD * size:
        which = " and ".join(parity.numbers["runtimes"])
        parity.add("base", "passed", f"{which} agree on the bare base to {off:.1e}")
        return True
    why = rope_trap(base) or "the runtimes disagree on the base model itself, not on the adapter"
    parity.add("base", "failed", f"bare bases differ by {off:.3g} in logits: {why}")
    return False


def _compressed_base(packed: str, bare: Sequence[Sequence[Any]], parity: Parity) -> bool:
    """What the declared compression does to the base, by which adapters are then measured."""
    share = explains(list(bare[0]), list(bare[1]))
    mean = sum(kl(x, y) for x, y in zip(*bare, strict=True)) / len(bare[0])
    off = parity.numbers["base_max_difference"]
    parity.numbers |= {"compression": packed, "base_kl": mean, "base_relative_difference": share}
    what = (
        f"the package's is compressed ({packed}): alone it is off by {off:.3g} in logits, {share:.1%}"
        f" of their size, KL {mean:.2g}; what follows is measured on it"
    )
    parity.add("base", "passed" if share < 1 else "failed", what)
    return share < 1


def lines(text: Mapping[str, str]) -> list[str]:
    """The greedy continuations, for people."""
    return [f"  {name:<8} {printable(words, 160)}" for name, words in text.items()]
