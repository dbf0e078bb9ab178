"""JSON of strangers: bounded, strict, with the file and the field named in every error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.files import CONFIG_LIMIT, read_bytes
from loraduct.text import printable


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file."""
    return parse_object(read_bytes(path, CONFIG_LIMIT), path)


def parse_object(raw: bytes, path: Path, what: str = "file") -> dict[str, Any]:
    """One JSON object. Refuses duplicate keys (parsers disagree on them), NaN and Infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise Refused(path, f"{what} names {printable(repr(key))} twice")
                seen.add(key)
        return found

    def constant(text: str) -> Any:
        raise Refused(path, f"{what} holds {text}, which is not JSON; a finite number is expected")

    def real(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else constant(text)

    if raw.startswith(b"\xef\xbb\xbf"):
        raise Refused(path, f"{what} begins with a byte order mark; save it as plain UTF-8")
    if not raw.strip():
        raise Refused(path, f"{what} is empty, expected a JSON object")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Refused(path, f"{what} is not UTF-8 (byte {e.start})") from None
    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=constant, parse_float=real
        )
    except json.JSONDecodeError as e:
        raise Refused(
            path, f"{what} is not JSON: {e.msg} at line {e.lineno} column {e.colno}"
        ) from None
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        raise Refused(path, f"{what} is nested too deeply or holds absurd numbers") from None
    if not isinstance(value, dict):
        raise Refused(path, f"{what} holds a JSON {type(value).__name__}, expected an object")
    return value


def dump(value: Any) -> bytes:
    """JSON as PEFT stores it, indented. In the order given: of two patterns the first one wins."""
    return json.dumps(value, indent=2).encode()
