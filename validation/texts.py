"""Files of texts that users give; those for `quality` put into tokens, and which of them are scored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.files import read_bytes
from loraduct.text import printable

MOST_BYTES, PAGE_BYTES = 16 << 20, 4 << 20  # of a file for `quality`; of prompts, of calibration
TURNS = ("role", "content")


@dataclass(frozen=True)
class Text:
    """``ids`` with ``scored``, the positions whose token counts for the loss; the first never does."""

    ids: tuple[int, ...]
    scored: tuple[int, ...]


def content_of(file: Path, most: int) -> str:
    """The text in a file of ``most`` bytes. Raises Refused."""
    try:
        return read_bytes(file, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(file, "is not UTF-8") from None


def lines(content: str) -> dict[int, str]:
    """Number -> line of those that aren't empty, as an editor counts: U+2028 in a JSON text ends none."""
    rows = enumerate(content.split("\n"), 1)
    return {n: row.rstrip("\r") for n, row in rows if row.strip()}


def json_object(row: str) -> dict[str, Any] | None:
    """The JSON object in a line; None where it is none."""
    try:
        value = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def check_whole(file: Path, number: int, text: str) -> None:
    """Raises Refused for half of a character (``\\ud800``), which JSON can say and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        what = "half of a character (a lone surrogate, \\ud800 to \\udfff)"
        raise Refused(file, f"line {number} has {what}") from None


def objects(file: Path) -> list[Mapping[str, Any]]:
    """One object a text: ``{text}``, ``{prompt, completion}`` or ``{messages}``. Raises Refused."""
    content, ending = content_of(file, MOST_BYTES), file.suffix.lower()
    rows = lines(content) if ending in (".jsonl", ".json") else {}
    if ending == ".json" and None in map(json_object, rows.values()):
        raise Refused(file, "is JSON: expected .jsonl, an object a line, or a text")
    if rows:
        found: list[Mapping[str, Any]] = [_checked(file, n, row) for n, row in rows.items()]
    else:
        paragraphs = re.split(r"\n[ \t]*\n", content.replace("\r\n", "\n"))
        found = [{"text": p.strip()} for p in paragraphs if p.strip()]
    if not found:
        raise Refused(file, "holds no text")
    return found


def _checked(file: Path, number: int, row: str) -> Mapping[str, Any]:
    """An object of a known form, no part of which is empty."""
    value = json_object(row)
    if value is None:
        raise Refused(file, f"line {number} is not a JSON object")
    if "messages" in value:
        turns = value["messages"]
        fine = isinstance(turns, list) and all(isinstance(t, dict) for t in turns)
        texts = [t.get(k) for t in turns for k in TURNS] if fine else [None]
        last = turns[-1].get("role") if fine and turns else None
        wanted = "messages with role and content that are texts, the last one the assistant's"
        if last != "assistant":
            texts = [None]
    else:
        keys = ("text",) if "text" in value else ("prompt", "completion")
        texts = [value.get(k) for k in keys]
        wanted = "an object with text, with prompt and completion, or with messages"
    if not all(isinstance(t, str) for t in texts):
        raise Refused(file, f"line {number} is not {wanted}")
    if not all(str(t).strip() for t in texts):
        raise Refused(file, f"line {number} has an empty text")
    for text in texts:
        check_whole(file, number, str(text))
    return value


def tokenized(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, limit: int, most: int, file: Path
) -> tuple[list[Text], int]:
    """(the first texts, of at most ``limit`` tokens each and about ``most`` in all, how many were
    cut). Raises Refused."""
    found: list[Text] = []
    cut = total = 0
    for number, row in enumerate(rows, 1):
        if total >= most:
            break
        ids, scored = _tokens(row, tokenizer, file, number)
        cut += len(ids) > limit
        kept = tuple(p for p in scored if 0 < p < limit)
        if not kept:
            why = f"text {number} has {len(ids)} tokens, and none is left to score"
            why += f" within the context of {limit}" if len(ids) > limit else ""
            raise Refused(file, why)
        found.append(Text(tuple(ids[:limit]), kept))
        total += len(found[-1].ids)
    return found, cut


def _tokens(
    row: Mapping[str, Any], tokenizer: Any, file: Path, number: int
) -> tuple[list[int], list[int]]:
    """All tokens of one text, and the positions that are scored."""
    if "text" in row:
        ids = list(tokenizer(row["text"])["input_ids"])
        return ids, list(range(1, len(ids)))
    turns = row.get("messages")
    if turns is None and getattr(tokenizer, "chat_template", None):
        turns = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    if turns is None:
        ids = list(tokenizer(row["prompt"])["input_ids"])
        more = list(tokenizer(row["completion"], add_special_tokens=False)["input_ids"])
        return ids + more, list(range(len(ids), len(ids) + len(more)))
    return _chat(turns, tokenizer, file, number)


def _chat(
    turns: Sequence[Mapping[str, str]], tokenizer: Any, file: Path, number: int
) -> tuple[list[int], list[int]]:
    """A conversation through the chat template; what the assistant says is scored."""
    try:
        ids = _templated(tokenizer, turns, False)
        scored: list[int] = []
        for n, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = _templated(tokenizer, turns[:n], True)
                after = _templated(tokenizer, turns[: n + 1], False)
                if ids[: len(after)] != after or after[: len(before)] != before:
                    what = "the chat template rewrites earlier turns; give one answer a line"
                    raise Refused(file, f"text {number}: {what}")
                scored += range(len(before), len(after))
    except Refused:
        raise
    except Exception as e:
        what = printable(f"{type(e).__name__}: {e}", 300)
        raise Refused(file, f"text {number}: the chat template can't be applied: {what}") from e
    return ids, scored


def _templated(tokenizer: Any, turns: Sequence[Mapping[str, str]], prompt: bool) -> list[int]:
    found = tokenizer.apply_chat_template(
        list(turns), add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    return [int(i) for i in found]
