"""Numerical parity of two adapters on one base: in the real runtimes, and module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraduct.adapter import Adapter
from loraduct.architectures import block_of
from loraduct.formats.base import Base, misread_fields
from loraduct.text import printable, several
from loraduct.validation import runtimes
from loraduct.validation.checks import Check
from loraduct.validation.delta import BOUNDS, Delta, compare
from loraduct.validation.structure import hf_names

SAME_RUNTIME = 1e-4  # largest logit difference within one runtime
BASE_FACTOR, EFFECT_FACTOR = 3.0, 1e-3  # across runtimes: of base against base, of the effect
BASE_MISREAD = 1e-3  # base against base, relative to the largest logit: above, a config is misread


@dataclass
class Parity:
    """What was measured, and the checks drawn from it."""

    checks: list[Check] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            **self.numbers,
            "greedy_text": self.text,
            "modules": [d.as_json() for d in self.deltas],
        }


def check(
    first: Adapter,
    second: Adapter,
    base: Base,
    prompts: Sequence[str],
    name_map: Mapping[str, str] | None = None,
) -> Parity:
    """Compare ``second`` with ``first`` on ``base``."""
    parity = Parity()
    _modules(first, second, base, name_map, parity)
    try:
        _logits(first, second, base, prompts, parity)
    except runtimes.RuntimeFailed as e:
        parity.checks.append(Check("logits", "failed", str(e)))
    return parity


def _modules(
    first: Adapter,
    second: Adapter,
    base: Base,
    name_map: Mapping[str, str] | None,
    parity: Parity,
) -> None:
    """dW of every module, and the first one that is off."""
    renamed = []
    for adapter in (first, second):
        names = hf_names(adapter, base, name_map)
        if isinstance(names, Check):
            parity.checks.append(names)
            return
        renamed.append({names.get(n, n): u for n, u in adapter.updates.items()})
    one, two = renamed
    for name in sorted(one.keys() ^ two.keys(), key=_order)[:1]:
        where = "second" if name in one else "first"
        parity.checks.append(Check("modules", "failed", f"is not in the {where} adapter", name))
    shared = sorted(one.keys() & two.keys(), key=_order)
    parity.deltas = [compare(n, one[n], two[n], base) for n in shared]
    guilty = [d for d in parity.deltas if not d.fits]
    if guilty:
        d = guilty[0]
        parity.checks.append(
            Check(
                "dW",
                "failed",
                f"relative error {d.error:.2e} (bound {d.bound:.0e}), gain {d.gain:.5f}"
                f"{f'; {d.note}' if d.note else ''}; {len(guilty)} of {len(shared)} modules are off",
                d.module,
            )
        )
    elif parity.deltas:
        worst = max(parity.deltas, key=lambda d: d.error)
        gains = [d.gain for d in parity.deltas]
        parity.checks.append(
            Check(
                "dW",
                "passed",
                f"{len(shared)} modules, largest relative error {worst.error:.1e} (bound"
                f" {worst.bound:.0e}), gain {min(gains):.6f} to {max(gains):.6f}",
            )
        )
        parity.numbers |= {
            "dw_worst_relative_error": worst.error,
            "dw_worst_module": worst.module,
            "gain_min": min(gains),
            "gain_max": max(gains),
        }


def _order(name: str) -> tuple[Any, ...]:
    """Modules in the order in which the model runs through them, as far as names tell."""
    block = block_of(name)
    return (0, block[1], block[2]) if block else (1, 0, name)


def _logits(
    first: Adapter, second: Adapter, base: Base, prompts: Sequence[str], parity: Parity
) -> None:
    """The real runtimes on the same tokens."""
    import numpy as np

    kinds = [runtimes.RUNTIME[a.format] for a in (first, second)]
    ids, tokenizer = runtimes.tokenize(base, prompts)
    bare = {k: runtimes.run(k, base, None, ids) for k in dict.fromkeys(kinds)}
    across = kinds[0] != kinds[1]
    base_off = _largest(bare[kinds[0]].logits, bare[kinds[1]].logits) if across else 0.0
    parity.numbers |= {"runtimes": kinds, "prompts": len(ids), "base_max_difference": base_off}
    if across and not _base_agrees(base, base_off, bare[kinds[0]].logits, parity):
        return
    runs = [runtimes.run(k, base, a.path, ids) for k, a in zip(kinds, (first, second), strict=True)]
    effect = _largest(bare[kinds[0]].logits, runs[0].logits)
    diffs = [np.abs(x - y) for x, y in zip(runs[0].logits, runs[1].logits, strict=True)]
    worst = max(float(d.max()) for d in diffs)
    dtypes = {t.dtype for a in (first, second) for t in a.tensors()}
    # storage in 16 bits, where one side has it, costs its own rounding
    coarse = max(BOUNDS.get(d, 0.0) for d in dtypes) if len(dtypes) > 1 else 0.0
    bound = (
        max(BASE_FACTOR * base_off, max(EFFECT_FACTOR, coarse) * effect)
        if across
        else max(SAME_RUNTIME, coarse * effect)
    )
    agree, decided = _top1(runs[0].logits, runs[1].logits, worst)
    parity.numbers |= {
        "max_difference": worst,
        "bound": bound,
        "effect": effect,
        "mean_difference": float(np.mean([d.mean() for d in diffs])),
        "kl": float(
            np.mean([_kl(x, y) for x, y in zip(runs[0].logits, runs[1].logits, strict=True)])
        ),
        "top1_agreement": agree,
        "top1_decided_positions": decided,
        "greedy_equal": runs[0].greedy == runs[1].greedy,
    }
    if tokenizer is not None:
        parity.text = {
            "base": tokenizer.decode(bare[kinds[0]].greedy),
            "first": tokenizer.decode(runs[0].greedy),
            "second": tokenizer.decode(runs[1].greedy),
        }
    fine = worst <= bound and np.isfinite(worst)
    where = " / ".join(dict.fromkeys(kinds))
    parity.checks.append(
        Check(
            "logits",
            "passed" if fine else "failed",
            f"{where}: largest difference {worst:.2e} (bound {bound:.2e}), the adapter's own effect"
            f" {effect:.3g}, KL {parity.numbers['kl']:.1e}"
            + (
                ""
                if fine or any(not d.fits for d in parity.deltas)
                else "; dW agrees in every module, so the runtimes or the base differ"
            ),
            next((d.module for d in parity.deltas if not d.fits), None) if not fine else None,
        )
    )
    parity.checks.append(
        Check(
            "top-1",
            "passed" if agree == 1.0 else "failed",
            f"agrees at {agree:.1%} of {decided} positions where the margin decides",
        )
    )
    if effect == 0:
        parity.checks.append(Check("effect", "warning", "the adapter changes no logit at all"))


def _base_agrees(base: Base, off: float, logits: Sequence[Any], parity: Parity) -> bool:
    """Whether both runtimes compute the same base; else no adapter can be compared."""
    import numpy as np

    largest = max(float(np.abs(x).max()) for x in logits)
    if off <= BASE_MISREAD * largest:
        parity.checks.append(
            Check("base", "passed", f"torch and mlx agree on the bare base to {off:.1e}")
        )
        return True
    missing = misread_fields(base.config)
    why = (
        f"{base.path / 'config.json'} has {several([f'{k}={v}' for k, v in missing.items()])} only"
        " inside rope_parameters, which mlx-lm's model does not read; run again with --fix-base-config"
        if missing
        else "the runtimes disagree on the base model itself, not on the adapter"
    )
    parity.checks.append(
        Check("base", "failed", f"bare bases differ by {off:.3g} in logits: {why}")
    )
    return False


def _largest(xs: Sequence[Any], ys: Sequence[Any]) -> float:
    import numpy as np

    return max(float(np.abs(x - y).max()) for x, y in zip(xs, ys, strict=True))


def _kl(x: Any, y: Any) -> float:
    """Mean over positions of KL(softmax(x) || softmax(y)), in float64."""
    import numpy as np

    def log_softmax(z: Any) -> Any:
        z = z.astype(np.float64) - z.max(axis=-1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

    p, q = log_softmax(x), log_softmax(y)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _top1(xs: Sequence[Any], ys: Sequence[Any], off: float) -> tuple[float, int]:
    """(share of agreement, number of positions) where the first's margin exceeds twice the difference."""
    import numpy as np

    agree = decided = 0
    for x, y in zip(xs, ys, strict=True):
        two = np.partition(x, -2, axis=-1)[:, -2:]
        sure = (two[:, 1] - two[:, 0]) > 2 * off
        decided += int(sure.sum())
        agree += int((x.argmax(-1) == y.argmax(-1))[sure].sum())
    return (agree / decided if decided else 1.0), decided


def lines(parity: Parity) -> list[str]:
    """The greedy continuations, for people."""
    return [f"  {name:<8} {printable(text, 160)}" for name, text in parity.text.items()]
