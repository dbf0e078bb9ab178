"""A packaged adapter in half precision: how far from the exact logits, and does it overflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loraduct.adapter import Adapter
from loraduct.text import several
from loraduct.validation import mil, runtimes
from loraduct.validation.logits import agreement, decisions, finite, largest

NAMES = {
    mil.STORAGE: "half",  # every value between two operations is FLOAT16
    mil.STRICT: "strict half",  # and those inside of reductions: the least a device may do
}


def check(
    adapter: Adapter,
    ids: Sequence[Sequence[int]],
    exact: Sequence[Any],
    add: Callable[[str, str, str], None],
    numbers: dict[str, Any],
) -> None:
    """Run the package's adapter in FLOAT16 against ``exact`` logits of the source.

    Fails on infinity, NaN, and a top-1 that differs though the margin exceeds twice the error.
    """
    import numpy as np

    scale = max(float(np.abs(x).max()) for x in exact)
    for precision, name in NAMES.items():
        run, warnings = runtimes.run_package(adapter.path, adapter.name, ids, precision, count=0)
        broken = [w for w in warnings if "overflow" in w or "NaN" in w]
        if broken or not finite(run.logits):
            add(name, "failed", f"overflows FLOAT16: {several(broken) or 'the logits'}")
            continue
        error, equal = largest(exact, run.logits), agreement(exact, run.logits)
        agree, decided = decisions(list(zip(exact, run.logits, strict=True)), error)
        wrong = decided - agree
        numbers[f"{name.replace(' ', '_')}_max_difference"] = error
        numbers[f"{name.replace(' ', '_')}_top1"] = equal
        what = (
            f"largest difference {error:.2g} of logits up to {scale:.3g}, top-1 equal at"
            f" {equal:.1%} of {sum(map(len, exact))} positions"
        )
        if wrong:
            what += f", and not at {wrong} where the margin exceeds twice the difference"
        add(name, "failed" if wrong else "passed", what)
