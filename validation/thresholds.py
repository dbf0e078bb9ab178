"""Gates: from loraduct.toml and flags, and what of the suites' numbers they are held against."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.text import number, printable, several
from loraduct.text import size as size_text
from loraduct.validation import gates
from loraduct.validation.checks import Check
from loraduct.validation.suites import SCHEMA, Suite

CONFIG = "loraduct.toml"


def nbytes(value: object) -> float:
    """``60MB``, ``1.5GiB`` or a number of bytes. Raises Refused."""
    return gates.bytes_in(str(value))


def share(value: object) -> float:
    """``5%`` or ``0.05``, from 0 to 1. Raises ValueError, Refused."""
    return 1.0 if str(value).strip() in ("1", "1.0", "100%") else gates.share_in(str(value))


def positive(value: object) -> float:
    """A number above 0. Raises ValueError."""
    found = float(str(value))
    if isinstance(value, bool) or not (math.isfinite(found) and found > 0):
        raise ValueError("expected a number above 0")
    return found


def _path(value: object) -> str:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("expected a path")
    return str(value)


@dataclass(frozen=True)
class Threshold:
    """``at``: the path of what is compared with it in its suite's numbers; ``most``: an upper bound.
    ``read`` makes the value of what the user wrote."""

    read: Callable[[object], Any]
    help: str
    suite: str | None = None
    at: str = ""
    most: bool = True
    default: Any = None
    shown: Callable[[float], str] = number


THRESHOLDS: dict[str, Threshold] = {
    "min_gain_kept": Threshold(
        share, "Least share of A's gain that B keeps (lower end of its interval).",
        "quality", "gain_kept.low", False, 0.95,
    ),
    "min_greedy_agreement": Threshold(
        share, "Least share of scored tokens where B's likeliest is A's.",
        "quality", "greedy_agreement", False, 0.9,
    ),
    "max_size": Threshold(
        nbytes, "Largest size on disk of what ships.", "size", "bytes", shown=size_text
    ),
    "max_memory": Threshold(
        nbytes, "Largest peak of memory.", "latency", "peak_memory_bytes", shown=size_text
    ),
    "max_ms_per_prompt_token": Threshold(
        positive, "Most milliseconds per prompt token.", "latency", "ms_per_prompt_token"
    ),
    "min_tokens_per_second": Threshold(
        positive, "Fewest tokens per second generated.", "latency", "tokens_per_second", False
    ),
    "regress_from": Threshold(_path, "An earlier --json document that must not be fallen behind."),
    "tolerance": Threshold(share, "How much worse than --regress-from: 5%."),
}  # fmt: skip
# what --regress-from compares: (suite, number, whether more is worse)
REGRESSIONS = (
    ("size", "bytes", True),
    ("quality", "perplexities.result", True),
    ("latency", "ms_per_prompt_token", True),
    ("latency", "tokens_per_second", False),
    ("latency", "peak_memory_bytes", True),
)


def from_file(path: Path | None) -> dict[str, Any]:
    """What [validate] of ``path`` says, or of loraduct.toml in the working directory, if there is one.

    Raises Refused for keys and values that are unknown.
    """
    import tomllib

    from loraduct.files import read_bytes

    file = path or Path(CONFIG)
    if path is None and not file.exists():
        return {}
    try:
        table = tomllib.loads(read_bytes(file, 1 << 20).decode()).get("validate", {})
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as e:
        raise Refused(file, f"is not TOML: {printable(str(e), 200)}") from None
    if not isinstance(table, dict):
        raise Refused(file, "validate is not a table: [validate]")
    given = {str(k).replace("-", "_"): v for k, v in table.items()}
    if unknown := sorted(given.keys() - THRESHOLDS.keys()):
        known = several([k.replace("_", "-") for k in THRESHOLDS], 12)
        raise Refused(file, f"[validate] has unknown {several(unknown)}; known are {known}")
    read = {k: _value(k, v, f"{file}: {k.replace('_', '-')}") for k, v in given.items()}
    if "regress_from" in read:
        read["regress_from"] = str(file.parent / read["regress_from"])
    return read


def from_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those flags that were given, read. Raises Refused."""
    given = {k: v for k, v in flags.items() if v is not None}
    return {k: _value(k, v, f"--{k.replace('_', '-')}") for k, v in given.items()}


def _value(key: str, value: object, where: str) -> Any:
    try:
        return THRESHOLDS[key].read(value)
    except (ValueError, Refused) as e:
        words = str(e) if isinstance(e, Refused) or str(e).startswith("expected") else "no number"
        raise Refused(None, f"{where} is {printable(repr(value), 60)}: {words}") from None


def settled(given: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """All thresholds, with defaults. Raises Refused for gates that contradict what is run."""
    for key in given:
        needed = THRESHOLDS[key].suite
        if needed and wanted and needed not in wanted:
            flag = key.replace("_", "-")
            raise Refused(None, f"{flag} needs the suite {needed}, which --suite leaves out")
    if "tolerance" in given and "regress_from" not in given:
        raise Refused(None, "tolerance says how far behind regress-from, which is not given")
    both = given.get("max_size"), given.get("max_memory")
    if both[0] and both[1] and both[1] < both[0]:
        what = f"max-memory {size_text(both[1])} is below max-size {size_text(both[0])}"
        raise Refused(
            None, f"gates contradict each other: {what}: what is read has to fit in memory"
        )
    found = {k: given.get(k, t.default) for k, t in THRESHOLDS.items()}
    if found["regress_from"] and found["tolerance"] is None:
        found["tolerance"] = gates.TOLERANCE
    return found


def gated(
    found: Sequence[Suite], thresholds: Mapping[str, Any], given: frozenset[str]
) -> list[Suite]:
    """The suites with the gates' checks.

    A gate that the user set and whose number was not measured fails: a skipped suite with it.
    """
    by_name = {s.name: s for s in found}
    for key, t in THRESHOLDS.items():
        limit = thresholds.get(key)
        if t.suite is None or limit is None:
            continue
        suite = by_name[t.suite]
        value = value_at(suite.numbers, t.at)
        words = key.replace("_", "-")
        if value is None:
            if key in given:
                why = f"{words}: was not measured: {suite.reason or 'no such number'}"
                by_name[t.suite] = _with(suite, Check("gate", "failed", why))
            continue
        fine = value <= limit if t.most else value >= limit
        what = f"{words} {t.shown(limit)}: {t.at} is {t.shown(value)}"
        by_name[t.suite] = _with(suite, Check("gate", "passed" if fine else "failed", what))
    return [by_name[s.name] for s in found]


def _with(suite: Suite, check: Check) -> Suite:
    failed = check.status == "failed" or suite.status == "failed"
    status = "failed" if failed else suite.status
    return replace(suite, status=status, checks=(*suite.checks, check))


def previous(file: Path) -> dict[str, Any]:
    """An earlier document. Raises Refused where it is none of this schema."""
    from loraduct.files import read_bytes

    try:
        value = json.loads(read_bytes(file, 64 << 20))
    except (ValueError, RecursionError):
        raise Refused(file, "is not JSON") from None
    schema = value.get("schema") if isinstance(value, dict) else None
    if not isinstance(value, dict) or "passed" not in value:
        raise Refused(file, "is no document of loraduct validate --json")
    if schema != SCHEMA or isinstance(schema, bool):
        what = f"has schema {printable(repr(schema), 40)}, expected {SCHEMA}; run validate --json again"
        raise Refused(file, what)
    rows = value.get("suites")
    if not isinstance(rows, list) or not all(isinstance(s, dict) for s in rows):
        raise Refused(file, "suites is not a list of objects: the document is damaged")
    return value


def regressed(found: Sequence[Suite], before: Mapping[str, Any], tolerance: float) -> list[Suite]:
    """The suites with a check for each number that both documents have."""
    old = {s.get("name"): s.get("numbers") for s in before["suites"]}
    by_name = {s.name: s for s in found}
    compared = 0
    for name, key, more in REGRESSIONS:
        was = value_at(old.get(name) or {}, key)
        now = value_at(by_name[name].numbers, key)
        if was is None or (now is None and by_name[name].status == "skipped"):
            continue
        compared += 1
        worst = was * (1 + tolerance) if more else was * (1 - tolerance)
        fine = now is not None and (now <= worst if more else now >= worst)
        what = f"{key}: {'not measured' if now is None else number(now)}, before {number(was)}"
        what += f", tolerance {tolerance:.2%}"
        check = Check("regression", "passed" if fine else "failed", what)
        by_name[name] = _with(by_name[name], check)
    if not compared:
        raise Refused(
            None, "regress-from: the earlier document has no number that was measured now"
        )
    return [by_name[s.name] for s in found]


def value_at(numbers: Any, path: str) -> float | None:
    """The number at a dotted path, if there is one."""
    for key in path.split("."):
        numbers = numbers.get(key) if isinstance(numbers, Mapping) else None
    fine = isinstance(numbers, int | float) and not isinstance(numbers, bool)
    return float(numbers) if fine and math.isfinite(numbers) else None
