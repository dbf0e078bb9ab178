"""The file behind --prompts, as every verb reads it."""

from __future__ import annotations

from pathlib import Path


def prompts_of(file: Path) -> list[str]:
    """Prompts, one a line; in a .jsonl, and where every line is an object, its prompt field."""
    from loraduct.errors import Refused
    from loraduct.validation import texts

    lines = texts.lines(texts.content_of(file, texts.PAGE_BYTES))
    if not lines:
        raise Refused(file, "holds no prompts")
    values = {n: texts.json_object(row) for n, row in lines.items()}
    if file.suffix.lower() != ".jsonl" and None in values.values():
        return list(lines.values())
    found = []
    for number, row in lines.items():
        value = values[number]
        if value is None and row.lstrip().startswith("{"):
            raise Refused(file, f"line {number} is not a JSON object")
        prompt = row if value is None else value.get("prompt")
        if not isinstance(prompt, str):
            raise Refused(file, f"line {number} is not an object with a prompt that is a text")
        if not prompt.strip():
            raise Refused(file, f"line {number} has an empty prompt")
        texts.check_whole(file, number, prompt)
        found.append(prompt)
    return found
