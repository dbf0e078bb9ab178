"""Limits on what ``loraduct bench`` found, row by row, and the comparison with an earlier document."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.files import read_bytes
from loraduct.text import number, printable, size
from loraduct.validation.checks import Check

TOLERANCE = 0.05
_LIMIT = 64 << 20
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip
# gate -> the fields of a row that it holds for: measured, or forecast
FIELDS = {
    "max_ms_per_prompt_token": ("ms_per_prompt_token",),
    "min_tokens_per_second": ("tokens_per_second",),
    "max_memory": ("peak_bytes", "memory_bytes"),
}
# what is compared with an earlier document: True where more is worse
COMPARED = {"ms_per_prompt_token": True, "tokens_per_second": False, "peak_bytes": True}
KINDS = ("targets", "forecast")


def bytes_in(text: str) -> float:
    """``60MB``, ``1.5GiB``, ``4096``. Raises Refused."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?[iI]?[bB]?)", text.strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    value = float(match[1]) * factor if match and factor else 0.0
    if not 0 < value < 1e18:
        raise Refused(None, f"{printable(text, 40)!r} is no size such as 60MB")
    return value


def share_in(text: str) -> float:
    """``5%`` or ``0.05``. Raises Refused."""
    plain = text.strip()
    try:
        value = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise Refused(None, f"tolerance {printable(text, 40)!r}, expected a share such as 5%")
    return value


def number_in(text: str) -> float:
    """A number above 0. Raises Refused."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise Refused(None, f"{printable(text, 40)!r} is no number above 0")
    return value


_READERS: dict[str, Callable[[str], float]] = {
    "max_ms_per_prompt_token": number_in,
    "min_tokens_per_second": number_in,
    "max_memory": bytes_in,
    "max_size": bytes_in,
    "tolerance": share_in,
}


def limits_of(given: Mapping[str, Any], *, runs: bool) -> dict[str, float]:
    """The gates that were set, read. ``runs``: whether anything is measured or forecast.

    Raises Refused for values that are none, and for gates that contradict what is asked for.
    """
    found = {k: read(str(given[k])) for k, read in _READERS.items() if given.get(k) is not None}
    if "tolerance" in found and not given.get("regress_from"):
        raise Refused(None, "--tolerance says how far behind --regress-from, which is not given")
    if "max_size" in found and found.get("max_memory", found["max_size"]) < found["max_size"]:
        what = f"--max-memory {size(found['max_memory'])} is below --max-size {size(found['max_size'])}"
        raise Refused(
            None, f"gates contradict each other: {what}: what is read has to fit in memory"
        )
    idle = [k for k in (*FIELDS, "regress_from") if given.get(k) is not None and not runs]
    if idle:
        flag = idle[0].replace("_", "-")
        raise Refused(None, f"--{flag} has nothing to hold against: --lint alone runs nothing")
    return found


def bytes_of(path: Path) -> int | None:
    """Bytes of a target's files; of PACKAGE:NAME the package's. None where there are none."""
    if not path.exists():
        path = Path(str(path).rpartition(":")[0])
    if path.is_file():
        return path.stat().st_size
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else []
    return sum(p.stat().st_size for p in files) if files else None


def judge(
    limits: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], nbytes: int | None
) -> list[Check]:
    """A check for each gate, on the worst of the first target's rows, which is what ships."""
    own = [r for r in rows if name_of(r) == name_of(rows[0])] if rows else []
    values: dict[str, float | None] = {"max_size": nbytes}
    for gate, fields in FIELDS.items():
        found = [v for r in own for f in fields if (v := r.get(f)) is not None]
        worst = min if gate.startswith("min") else max
        values[gate] = worst(found) if found else None
    checks = []
    for gate, value in values.items():
        if gate not in limits:
            continue
        words, shown = (
            gate.replace("_", "-"),
            size if gate in ("max_size", "max_memory") else number,
        )
        if value is None:
            checks.append(Check("gate", "failed", f"{words}: was not measured"))
            continue
        fine = value >= limits[gate] if gate.startswith("min") else value <= limits[gate]
        what = f"{words} {shown(limits[gate])}: it is {shown(value)}"
        checks.append(Check("gate", "passed" if fine else "failed", what))
    return checks


def name_of(row: Mapping[str, Any]) -> Any:
    """The target a row is about."""
    return row.get("name", row.get("target"))


def earlier(file: Path, schema: int, kind: str) -> dict[str, Any]:
    """An earlier document of ``bench --json``; ``kind``: one of KINDS, which it must hold.

    Raises Refused for another kind of document, and for an old schema.
    """
    try:
        value = json.loads(read_bytes(file, _LIMIT))
    except (ValueError, RecursionError):
        raise Refused(file, "is not JSON") from None
    if not isinstance(value, dict) or value.get("command") != "bench":
        raise Refused(file, "is not what `loraduct bench --json` writes")
    found = value.get("schema")
    if found != schema or isinstance(found, bool):
        what = f"has the schema {printable(repr(found), 40)}, expected {schema}"
        raise Refused(file, f"{what}; run bench --json again")
    rows = value.get(kind)
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        other = "a forecast" if kind == "targets" else "measurements"
        raise Refused(file, f"holds no {kind}; with {other} the two can't be compared")
    return value


def regressions(
    before: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], tolerance: float | None
) -> list[Check]:
    """A check for each number of a row that the earlier document has too; a failed one if none has."""
    allowed = TOLERANCE if tolerance is None else tolerance
    old = {_key(r): r for r in before}
    checks = []
    for row in rows:
        was = old.get(_key(row), {})
        for name, more_is_worse in COMPARED.items():
            now, then = _value(row, name), _value(was, name)
            if not now or not then:
                continue
            fine = now <= then * (1 + allowed) if more_is_worse else now >= then * (1 - allowed)
            where = " ".join(str(p) for p in _key(row) if p is not None)
            what = f"{where}: {name} {number(now)}, before {number(then)}, tolerance {allowed:.2%}"
            checks.append(Check("regression", "passed" if fine else "failed", what))
    if not checks:
        what = "the earlier document has no row of these targets, devices and contexts"
        checks.append(Check("regression", "failed", what))
    return checks


def _value(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if sound and math.isfinite(value) else None  # type: ignore[arg-type]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = ("runtime", "dtype", "device", "engine", "context")
    return (name_of(row), *(row.get(k) for k in keys))
