"""The file behind --prompts, as every verb reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def prompts_of(file: Path) -> list[str]:
    """Prompts, one a line; in a .jsonl, and where every line is an object, its prompt field."""
    from loraduct.errors import Refused
    from loraduct.files import read_bytes

    try:
        rows = read_bytes(file, 4 << 20).decode().split("\n")
    except UnicodeDecodeError:
        raise Refused(file, "is not UTF-8") from None
    lines = {n: row.rstrip("\r") for n, row in enumerate(rows, 1) if row.strip()}
    if not lines:
        raise Refused(file, "holds no prompts")
    values = {n: _object(row) for n, row in lines.items()}
    if file.suffix != ".jsonl" and None in values.values():
        return list(lines.values())
    found = []
    for number, row in lines.items():
        value = values[number]
        if value is None and row.lstrip().startswith("{"):
            raise Refused(file, f"line {number} is not a JSON object")
        prompt = row if value is None else value.get("prompt")
        if not isinstance(prompt, str):
            raise Refused(file, f"line {number} is not an object with a prompt that is a text")
        found.append(prompt)
    return found


def _object(row: str) -> dict[str, Any] | None:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
