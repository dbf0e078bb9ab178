"""Gates and regressions: how limits are read, held against numbers, compared with an earlier document.

`loraduct.validation.thresholds` uses them for the suites of ``validate``; the second half is
for the rows of ``bench``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.files import read_bytes
from loraduct.text import number, printable, several, size
from loraduct.validation.checks import Check

TOLERANCE = 0.05
_LIMIT = 64 << 20
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
HIGHER_IS_BETTER = ("tokens_per_second",)  # of the numbers that are compared; of others less
# gate -> the fields of a row of ``bench`` that it holds for: measured, or forecast
FIELDS = {
    "max_ms_per_prompt_token": ("ms_per_prompt_token",),
    "min_tokens_per_second": ("tokens_per_second",),
    "max_memory": ("peak_bytes", "memory_bytes"),
}
# what of a row is compared with an earlier document
COMPARED = ("ms_per_prompt_token", "tokens_per_second", "peak_bytes", "memory_bytes")
KINDS = ("targets", "forecast")
SIDES = ("target", "against")  # whose a row of ``bench`` is: names may be alike


def bytes_in(value: object) -> float:
    """``60MB``, ``1.5GiB``, ``4096``. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?[iI]?[bB]?)", str(value).strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    found = float(match[1]) * factor if match and factor else 0.0
    if not 0 < found < 1e18:
        raise ValueError
    return found


def share_in(value: object) -> float:
    """``5%`` or ``0.05``, from 0 to 1. Raises ValueError."""
    plain = str(value).strip()
    found = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    if not 0 <= found <= 1:
        raise ValueError
    return found


def part_in(value: object) -> float:
    """A share below 1. Raises ValueError."""
    found = share_in(value)
    if found == 1:
        raise ValueError
    return found


def number_in(value: object) -> float:
    """A number above 0. Raises ValueError."""
    found = float(str(value))
    if not (math.isfinite(found) and found > 0):
        raise ValueError
    return found


def path_in(value: object) -> str:
    """A path. Raises ValueError."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError
    return str(value)


_SHARE, _NUMBER, _SIZE = "share such as 5%", "number above 0", "size such as 60MB"
# gate -> (what reads it, what it has to be)
READERS: dict[str, tuple[Callable[[object], Any], str]] = {
    "min_gain_kept": (share_in, _SHARE),
    "min_greedy_agreement": (share_in, _SHARE),
    "max_size": (bytes_in, _SIZE),
    "max_memory": (bytes_in, _SIZE),
    "max_ms_per_prompt_token": (number_in, _NUMBER),
    "min_tokens_per_second": (number_in, _NUMBER),
    "regress_from": (path_in, "path"),
    "tolerance": (part_in, _SHARE),
}


def consistent(given: Mapping[str, Any], flag: str = "") -> None:
    """Raises Refused for gates, read, that contradict each other. ``flag``: what stands before names."""
    if given.get("tolerance") is not None and not given.get("regress_from"):
        what = f"{flag}tolerance says how far behind {flag}regress-from, which is not given"
        raise Refused(None, what)
    most, memory = given.get("max_size"), given.get("max_memory")
    if most and memory and memory < most:
        what = f"{flag}max-memory {size(memory)} is below {flag}max-size {size(most)}"
        raise Refused(
            None, f"gates contradict each other: {what}: what is read has to fit in memory"
        )


def held(gate: str, limit: float, value: float | None, what: str = "it", why: str = "") -> Check:
    """The check of one gate. ``what``: whose value that is; ``why`` there is none, which fails."""
    words = gate.replace("_", "-")
    if value is None:
        return Check("gate", "failed", f"{words}: was not measured{why and f': {why}'}")
    shown = size if READERS[gate][1] == _SIZE else number
    fine = value >= limit if gate.startswith("min") else value <= limit
    detail = f"{words} {shown(limit)}: {what} is {shown(value)}"
    return Check("gate", "passed" if fine else "failed", detail)


def regression(words: str, name: str, now: float | None, before: float, tolerance: float) -> Check:
    """The check of one number against an earlier one. ``words`` say what it is."""
    better = name.rpartition(".")[2] in HIGHER_IS_BETTER
    worst = before * (1 - tolerance if better else 1 + tolerance)
    fine = now is not None and (now >= worst if better else now <= worst)
    what = f"{words} {'not measured' if now is None else number(now)}, before {number(before)}"
    what += f", tolerance {tolerance:.2%}"
    return Check("regression", "passed" if fine else "failed", what)


def value_at(numbers: Any, path: str) -> float | None:
    """The finite number at a dotted path, if there is one."""
    for key in path.split("."):
        numbers = numbers.get(key) if isinstance(numbers, Mapping) else None
    if isinstance(numbers, bool) or not isinstance(numbers, int | float):
        return None
    try:
        found = float(numbers)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def earlier_document(
    file: Path, verb: str, schema: int, known: Callable[[dict[str, Any]], bool], foreign: str
) -> dict[str, Any]:
    """What a verb's --json wrote. Raises Refused: ``foreign`` where it is not ``known``, or an old
    schema."""
    try:
        value = json.loads(read_bytes(file, _LIMIT))
    except (ValueError, RecursionError):
        raise Refused(file, "is not JSON") from None
    if not isinstance(value, dict) or not known(value):
        raise Refused(file, foreign)
    found = value.get("schema")
    if found != schema or isinstance(found, bool):
        what = f"has schema {printable(repr(found), 40)}, expected {schema}"
        raise Refused(file, f"{what}; run {verb} --json again")
    return value


def is_rows(value: object) -> bool:
    """Whether it is a list of objects."""
    return isinstance(value, list) and all(isinstance(r, dict) for r in value)


# -- rows of ``bench`` ------------------------------------------------------------------------------


def limits_of(given: Mapping[str, Any], *, runs: bool) -> dict[str, float]:
    """The gates that were set, read. ``runs``: whether anything is measured or forecast.

    Raises Refused for values that are none, and for gates that contradict what is asked for.
    """
    found = {}
    for key in (*FIELDS, "max_size", "tolerance"):
        read, what = READERS[key]
        try:
            if given.get(key) is not None:
                found[key] = read(given[key])
        except ValueError:
            flag = f"--{key.replace('_', '-')}"
            raise Refused(
                None, f"{flag}: {printable(str(given[key]), 40)!r} is no {what}"
            ) from None
    consistent({**found, "regress_from": given.get("regress_from")}, "--")
    idle = [k for k in (*FIELDS, "regress_from") if given.get(k) is not None and not runs]
    if idle:
        flag = idle[0].replace("_", "-")
        raise Refused(None, f"--{flag} has nothing to hold against: --lint alone runs nothing")
    return found


def bytes_of(path: Path) -> int | None:
    """Bytes of a target's files; of PACKAGE:NAME the package's, of a base's config.json the base's.

    None where there are none.
    """
    if path.name == "config.json":
        path = path.parent
    if not path.exists():
        path = Path(str(path).rpartition(":")[0])
    if path.is_file():
        return path.stat().st_size
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else []
    return sum(p.stat().st_size for p in files) if files else None


def judge(
    limits: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], nbytes: int | None
) -> list[Check]:
    """A check for each gate, on the worst of TARGET's rows, which is what ships."""
    own = [r for r in rows if r["side"] == SIDES[0]]
    values: dict[str, float | None] = {"max_size": nbytes}
    for gate, fields in FIELDS.items():
        found = [v for r in own for f in fields if (v := r.get(f)) is not None]
        worst = min if gate.startswith("min") else max
        values[gate] = worst(found) if found else None
    return [held(gate, limits[gate], value) for gate, value in values.items() if gate in limits]


def earlier(file: Path, schema: int, kind: str) -> dict[str, Any]:
    """An earlier document of ``bench --json``; ``kind``: one of KINDS, which it must hold.

    Raises Refused for another kind of document, for an old schema, and for rows of two targets that
    don't say whose they are.
    """
    foreign = "is not what `loraduct bench --json` writes"
    value = earlier_document(file, "bench", schema, lambda v: v.get("command") == "bench", foreign)
    if not is_rows(value.get(kind)):
        other = "a forecast" if kind == "targets" else "measurements"
        raise Refused(file, f"holds no {kind}; with {other} the two can't be compared")
    if value.get("against") is not None and any(r.get("side") not in SIDES for r in value[kind]):
        what = "does not say which rows are TARGET's, and which OTHER's"
        raise Refused(file, f"{what}; run bench --json again")
    return value


def regressions(
    before: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], tolerance: float | None
) -> list[Check]:
    """A check for each number that the earlier document has of the same row, failed where it is gone.

    What only one of the two documents has is named in skipped checks; one that failed if they share
    nothing.
    """
    allowed = TOLERANCE if tolerance is None else tolerance
    old, new = ({_key(r): r for r in some} for some in (before, rows))
    checks, absent = [], []
    for key, row in new.items():
        was = old.get(key)
        if was is None:
            absent.append(_words(key))
            continue
        for name in COMPARED:
            now, then = value_at(row, name), value_at(was, name)
            if then:
                checks.append(regression(f"{_words(key)}: {name}", name, now, then, allowed))
            elif now:
                absent.append(f"{_words(key)}: {name}")
    if not checks:
        what = "the earlier document has no row of these targets, devices and contexts"
        return [Check("regression", "failed", what)]
    gone = [_words(k) for k in old if k not in new and k[0] in {n[0] for n in new}]
    for where, names in (("in the earlier document", absent), ("among what was run now", gone)):
        if names:
            what = f"not compared, as it is not {where}: {several(names)}"
            checks.append(Check("regression", "skipped", what))
    return checks


def _key(row: Mapping[str, Any]) -> tuple[str | None, ...]:
    """What a row is about; its side first."""
    keys = ("runtime", "dtype", "device", "engine", "context")
    name = row.get("name", row.get("target"))
    values = (row.get("side", SIDES[0]), name, *(row.get(k) for k in keys))
    return tuple(v if v is None else str(v) for v in values)  # a stranger's may be no keys


def _words(key: tuple[str | None, ...]) -> str:
    return " ".join(p for p in key[key[0] == SIDES[0] :] if p is not None)
