"""Gates: from loraduct.toml and flags, and what of the suites' numbers they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.text import printable, several
from loraduct.validation import gates
from loraduct.validation.checks import Check
from loraduct.validation.suites import SCHEMA, Suite

CONFIG = "loraduct.toml"


@dataclass(frozen=True)
class Threshold:
    """``metavar`` and ``help`` of its flag. ``at``: the path of what is compared with it in the
    numbers of its ``suite``."""

    metavar: str
    help: str
    suite: str | None = None
    at: str = ""
    default: Any = None


THRESHOLDS: dict[str, Threshold] = {
    "min_gain_kept": Threshold(
        "SHARE", "Least share of A's gain that B keeps; 0.95.", "quality", "gain_kept.low", 0.95
    ),
    "min_greedy_agreement": Threshold(
        "SHARE", "Least share of tokens where B's likeliest is A's; 0.9.",
        "quality", "greedy_agreement", 0.9,
    ),
    "max_size": Threshold("SIZE", "Largest size on disk: 60MB.", "size", "bytes"),
    "max_memory": Threshold("SIZE", "Largest peak of memory.", "latency", "peak_memory_bytes"),
    "max_ms_per_prompt_token": Threshold(
        "MS", "Most milliseconds per prompt token.", "latency", "ms_per_prompt_token"
    ),
    "min_tokens_per_second": Threshold(
        "N", "Fewest tokens generated per second.", "latency", "tokens_per_second"
    ),
    "regress_from": Threshold("FILE", "An earlier --json document not to fall behind."),
    "tolerance": Threshold("SHARE", "How far behind it a number may be; 5%."),
}  # fmt: skip
# what --regress-from compares, of what ships: (suite, name, where it is; the first that there is)
REGRESSIONS = (
    ("size", "bytes", ("bytes",)),
    ("quality", "perplexity", ("perplexities.result", "perplexities.source")),
    ("latency", "ms_per_prompt_token", ("ms_per_prompt_token",)),
    ("latency", "tokens_per_second", ("tokens_per_second",)),
    ("latency", "peak_memory_bytes", ("peak_memory_bytes",)),
)


def from_file(path: Path | None) -> dict[str, Any]:
    """What [validate] of ``path`` says, or of loraduct.toml in the working directory, if there is one.

    Raises Refused for keys and values that are unknown, and where ``path`` has no such table.
    """
    import tomllib

    from loraduct.files import read_bytes

    file = path or Path(CONFIG)
    if path is None and not file.exists():
        return {}
    try:
        found = tomllib.loads(read_bytes(file, 1 << 20).decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as e:
        raise Refused(file, f"is not TOML: {printable(str(e), 200)}") from None
    if strange := sorted(found.keys() - {"validate"}):
        raise Refused(file, f"has unknown {several(strange)}; thresholds stand under [validate]")
    if path is not None and "validate" not in found:
        raise Refused(file, "has no [validate], under which thresholds stand")
    table = found.get("validate", {})
    if not isinstance(table, dict):
        raise Refused(file, "validate is not a table: [validate]")
    names = [k.replace("-", "_") for k in table]
    if twice := sorted(k for k in set(names) if names.count(k) > 1):
        raise Refused(file, f"[validate] has {twice[0].replace('_', '-')} twice: with - and with _")
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
    read, what = gates.READERS[key]
    try:
        return read(value)
    except ValueError:
        raise Refused(None, f"{where} is {printable(repr(value), 60)}: expected a {what}") from None


def settled(given: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """All thresholds, with defaults. Raises Refused for gates that contradict what is run."""
    for key in given:
        needed = THRESHOLDS[key].suite
        if needed and wanted and needed not in wanted:
            flag = key.replace("_", "-")
            raise Refused(None, f"{flag} needs the suite {needed}, which --suite leaves out")
    gates.consistent(given)
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
        value = gates.value_at(suite.numbers, t.at)
        if value is not None or key in given:
            why = suite.reason or _why(suite, t.at)
            by_name[t.suite] = _with(suite, gates.held(key, limit, value, t.at, why))
    return [by_name[s.name] for s in found]


def _why(suite: Suite, at: str) -> str:
    """Why a suite that ran has no such number."""
    if suite.name == "quality" and not gates.value_at(suite.numbers, "perplexities.result"):
        return "one adapter: give B, what was made of it"
    left = (c.detail for c in suite.checks if c.status == "skipped")
    return next(left, f"no {at}") if suite.name == "quality" else f"no {at}"


def _with(suite: Suite, check: Check) -> Suite:
    failed = check.status == "failed" or suite.status == "failed"
    status = "failed" if failed else suite.status
    return replace(suite, status=status, checks=(*suite.checks, check))


def previous(file: Path) -> dict[str, Any]:
    """An earlier document. Raises Refused where it is none of this schema."""
    foreign = "is no document of loraduct validate --json"
    value = gates.earlier_document(file, "validate", SCHEMA, lambda v: "passed" in v, foreign)
    if not gates.is_rows(value.get("suites")):
        raise Refused(file, "suites is not a list of objects: the document is damaged")
    return value


def regressed(
    found: Sequence[Suite],
    before: Mapping[str, Any],
    tolerance: float,
    text: Mapping[str, Any] | None = None,
) -> list[Suite]:
    """The suites with a check for each number that both documents have.

    ``text``: what quality was measured on, as documents name it; perplexities of another are no yardstick.
    """
    old = {str(s.get("name")): s.get("numbers") for s in before["suites"]}
    by_name = {s.name: s for s in found}
    compared = 0
    for name, key, places in REGRESSIONS:
        was, now = (_first(n, places) for n in (old.get(name), by_name[name].numbers))
        if was is None or (now is None and by_name[name].status == "skipped"):
            continue
        compared += 1
        if name == "quality" and now is not None and not _same_text(before, old[name], text, found):
            what = "perplexity was not compared with the earlier document's: it is of another text or part of it"
            by_name[name] = _with(by_name[name], Check("regression", "skipped", what))
            continue
        check = gates.regression(f"{key}:", key, now, was, tolerance)
        by_name[name] = _with(by_name[name], check)
    if not compared:
        raise Refused(
            None, "regress-from: the earlier document has no number that was measured now"
        )
    return [by_name[s.name] for s in found]


def _first(numbers: Any, places: Sequence[str]) -> float | None:
    values = (gates.value_at(numbers, p) for p in places)
    return next((v for v in values if v is not None), None)


def _same_text(
    before: Mapping[str, Any], numbers: Any, text: Mapping[str, Any] | None, found: Sequence[Suite]
) -> bool:
    """Whether the same bytes were scored, and as many tokens of them."""
    inputs = before.get("inputs")
    earlier = inputs.get("text") if isinstance(inputs, Mapping) else None
    digest = earlier.get("sha256") if isinstance(earlier, Mapping) else None
    now = next(s.numbers for s in found if s.name == "quality")
    tokens = gates.value_at(now, "tokens") == gates.value_at(numbers, "tokens")
    return text is not None and digest == text["sha256"] and tokens
