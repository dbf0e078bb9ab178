"""A packaged adapter in half precision: how far from the exact logits, and does it overflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loraduct.adapter import Adapter
from loraduct.text import several
from loraduct.validation import mil, runtimes

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

    for precision, name in NAMES.items():
        run, warnings = runtimes.run_package(adapter.path, adapter.name, ids, precision, count=0)
        broken = [w for w in warnings if "overflow" in w or "NaN" in w]
        if broken or not all(bool(np.isfinite(x).all()) for x in run.logits):
            add(name, "failed", f"overflows FLOAT16: {several(broken) or 'the logits'}")
            continue
        pairs = list(zip(exact, run.logits, strict=True))
        error = max(float(np.abs(x - y).max()) for x, y in pairs)
        largest = max(float(np.abs(x).max()) for x in exact)
        equal = sum(int((x.argmax(-1) == y.argmax(-1)).sum()) for x, y in pairs)
        count = sum(len(x) for x, _ in pairs)
        wrong = sum(_wrong(x, y, error) for x, y in pairs)
        numbers[f"{name.replace(' ', '_')}_max_difference"] = error
        numbers[f"{name.replace(' ', '_')}_top1"] = equal / count
        what = (
            f"largest difference {error:.2g} of logits up to {largest:.3g}, top-1 equal at"
            f" {equal / count:.1%} of {count} positions"
        )
        if wrong:
            what += f", and not at {wrong} where the margin exceeds twice the difference"
        add(name, "failed" if wrong else "passed", what)


def _wrong(x: Any, y: Any, error: float) -> int:
    import numpy as np

    two = np.partition(x, -2, axis=-1)[:, -2:]
    sure = (two[:, 1] - two[:, 0]) > 2 * error
    return int((x.argmax(-1) != y.argmax(-1))[sure].sum())
