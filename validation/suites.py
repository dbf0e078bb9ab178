"""The suites of a validation: what each needs, and how they are run one after the other.

A suite is a module with ``run(context) -> Suite``, imported when its turn comes. It raises `CannotRun`
where an input or an extra is missing: then it is skipped, with the reason, or failed if it was asked
for by name. docs/validation.md says what each proves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraduct.errors import LoraductError, MissingExtra
from loraduct.text import printable
from loraduct.validation.checks import Check, passed

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.formats.base import Base
    from loraduct.validation.align import NameMap
    from loraduct.validation.runs import Runs

SCHEMA = 2
# name -> its module here, in the order in which they run
SUITES = {
    "structure": "structure",
    "base": "base_model",
    "parity": "parity",
    "quality": "quality",
    "size": "size",
    "latency": "latency",
    "swap": "swap",
}
STATIC = ("structure", "base", "size")  # need no runtime, and run on what is broken too
MUST_HOLD = ("structure", "base")  # before anything is run
BROKEN = "the structure is broken"


class CannotRun(LoraductError):
    """A suite lacks an input; the message says which, and how to give it."""


@dataclass(frozen=True)
class Suite:
    """``status``: passed, failed or skipped (then ``reason``). ``numbers`` is JSON-able, seconds are
    wall time."""

    name: str
    status: str
    reason: str = ""
    checks: tuple[Check, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "checks": [c.as_json() for c in self.checks],
            "numbers": dict(self.numbers),
        }


def suite(name: str, checks: Sequence[Check], numbers: Mapping[str, Any] | None = None) -> Suite:
    """A suite that ran: failed if one of its checks did, skipped if none decided anything."""
    status = "passed" if passed(checks) else "failed"
    if checks and all(c.status == "skipped" for c in checks):
        return Suite(name, "skipped", checks[0].detail, tuple(checks), numbers or {})
    return Suite(name, status, "", tuple(checks), numbers or {})


@dataclass(frozen=True)
class Context:
    """What is validated, and against what.

    ``adapters``: A, or A and B. ``beside``: more adapters for `swap`. ``options``: of the latency suite
    (``context``, ``generate``), and the ``pool`` that `swap` tries. ``runs`` has the prompts and texts,
    loads each model once and keeps its results.
    """

    adapters: tuple[Adapter, ...]
    base: Base
    runs: Runs
    beside: tuple[Path, ...] = ()
    given: frozenset[str] = frozenset()  # thresholds that the user set
    options: Mapping[str, Any] = field(default_factory=dict)
    names: NameMap | None = None
    wanted: frozenset[str] = frozenset()  # suites asked for by name; empty: all that can run


def run(context: Context, progress: Callable[[str], None] = lambda _: None) -> list[Suite]:
    """Run what is wanted; the others are named as skipped. Raises Refused for broken input."""
    found: list[Suite] = []
    for name in SUITES:
        if context.wanted and name not in context.wanted:
            found.append(Suite(name, "skipped", "not asked for (--suite)"))
            continue
        broken = any(s.name in MUST_HOLD and s.status == "failed" for s in found)
        if broken and name not in STATIC:
            found.append(Suite(name, "skipped", BROKEN))
            continue
        progress(name)
        start = time.perf_counter()
        done = _one(name, context)
        found.append(replace(done, seconds=time.perf_counter() - start))
    return found


def _one(name: str, context: Context) -> Suite:
    """One suite; what it lacks skips it, or fails it where it was asked for by name."""
    try:
        module = import_module(f"loraduct.validation.{SUITES[name]}")
        done: Suite = module.run(context)
    except (CannotRun, MissingExtra) as e:
        if name not in context.wanted:
            return Suite(name, "skipped", printable(str(e), 500))
        return Suite(name, "failed", str(e), (Check(name, "failed", str(e)),))
    if done.status == "skipped" and name in context.wanted:
        checks = (*done.checks, Check(name, "failed", done.reason))
        return replace(done, status="failed", checks=checks)
    return done


def verdict(found: Sequence[Suite]) -> str:
    """The last line: FAILED and where; or passed, what was not compared, and what did not run."""
    failed = [s.name for s in found if s.status == "failed"]
    if failed:
        return f"FAILED: {', '.join(failed)}"
    if not any(s.status == "passed" for s in found):
        return "FAILED: nothing was run"
    checks = [c for s in found for c in s.checks]
    left = dict.fromkeys(c.detail for c in checks if c.status == "skipped")
    words = "passed" + "".join(f", but {printable(detail, 500)}" for detail in left)
    skipped = [s.name for s in found if s.status == "skipped"]
    return words + (f"; not run: {', '.join(skipped)}" if skipped else "")


def all_passed(found: Sequence[Suite]) -> bool:
    """Whether something ran and nothing failed."""
    statuses = {s.status for s in found}
    return "failed" not in statuses and "passed" in statuses
