"""Pieces of HTML: numbers with their exact value, and tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraduct.pages import text
from loraduct.text import size

DEEPEST = 6  # of mappings within mappings; deeper ones are not of our making
MOST_COLUMNS = 24

# What a key means: (label, unit). Units "bytes" and "share" are shown in MB and in per cent; what is
# within a mapping and has no meaning of its own has the mapping's unit.
FIELDS = {
    "a": ("A", ""),
    "b": ("B", ""),
    "error": ("relative error", ""),
    "gain": ("gain", ""),
    "account": ("account of tensors", ""),
    "values": ("values", ""),
    "norm": ("norm of dW (Frobenius)", ""),
    "gain_bound": ("bound of the gain", ""),
    "max_difference": ("largest difference of logits", ""),
    "mean_difference": ("mean difference of logits", ""),
    "base_max_difference": ("largest difference of the bare bases' logits", ""),
    "effect": ("largest effect of the adapter on a logit", ""),
    "kl": ("Kullback-Leibler divergence", "nats per token"),
    "top1_agreement": ("top-1 agreement", "share"),
    "top1_decided_positions": ("positions where the margin decides", ""),
    "greedy_agreement": ("greedy agreement", "share"),
    "min_greedy_agreement": ("least greedy agreement", "share"),
    "greedy_equal": ("greedy texts equal", ""),
    "gain_kept": ("share of the adapter's gain kept", "share"),
    "min_gain_kept": ("least share of the gain kept", "share"),
    "tolerance": ("tolerance against the earlier run", "share"),
    "max_size": ("largest size", "bytes"),
    "max_memory": ("largest memory", "bytes"),
    "texts": ("perplexity of each text", ""),
    "bytes": ("size", "bytes"),
    "by_kind": ("by kind", "bytes"),
    "by_dtype": ("by dtype", "bytes"),
    "files": ("files", "bytes"),
    "kin": ("correlation with the base trained on", ""),
    "bits": ("bits per weight", ""),
    "low": ("from", ""),
    "high": ("to", ""),
    "prompt_low": ("prompt token, from", "ms"),
    "prompt_high": ("prompt token, to", "ms"),
    "ms_per_prompt_token": ("time per prompt token", "ms"),
    "first_token_ms": ("time to first token", "ms"),
    "ttft_ms": ("time to first token", "ms"),
    "fits": ("fits", ""),
}
# What the end of a key says of its unit.
ENDINGS = {"_ms": "ms", "_seconds": "s", "_bytes": "bytes", "_s": "s", "_gb": "GB"}
BOX = '<div class="scroll" tabindex="0">'  # what is too wide scrolls in here, by keys as well
KEYS = f'{BOX}<table class="keys">'
NAMES = ("module", "source", "target", "name", "function", "path")  # columns of long words
HASHES = ("sha256",)


@dataclass(frozen=True)
class Limits:
    """How much of a long list is shown; the rest is in the JSON."""

    rows: int


def missing(value: object) -> bool:
    """None, and the NaN or infinity that JSON writes as null."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def is_number(value: object) -> bool:
    """A number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not missing(value) and abs(value) < 1e300


def shown(value: Any, unit: str = "") -> str:
    """A value for people; a number's exact value stays in its ``data`` element."""
    if missing(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return _interval(value, unit) if isinstance(value, Mapping) else text(value)
    if unit == "bytes":
        words = size(value)
    elif unit == "share":
        words = f"{100 * value:.4g} %"
    elif isinstance(value, int):
        words = f"{value:,}"
    else:
        words = f"{value:.4g}"
    return f'<data value="{value!r}">{words}</data>'


def _interval(value: Mapping[str, Any], unit: str) -> str:
    """``{value, low, high}`` as ``0.97 (0.95 to 0.99)``; other mappings as their items."""
    if is_interval(value):
        low, high = (shown(value[k], unit) for k in ("low", "high"))
        return f"{shown(value['value'], unit)} ({low} to {high})"
    items = [(k, v if isinstance(v, list | tuple) else [v]) for k, v in value.items()]
    return ", ".join(
        f"{label_of(k)} {' to '.join(shown(x, unit_of(k)) for x in v)}"
        for k, v in items[:MOST_COLUMNS]
        if len(v) <= 2 and all(_flat(x) for x in v)  # a number, a word, or two ends
    )


def is_interval(value: object) -> bool:
    """Whether it is a number with its interval."""
    return isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys()


def _flat(value: object) -> bool:
    return not isinstance(value, Mapping | list | tuple)


def label_of(key: object) -> str:
    """The words for a key, with its unit, escaped."""
    name = str(key)
    unit = unit_of(name)
    words = FIELDS.get(name.replace("-", "_"), ("",))[0]
    if not words:
        ending = next((e for e in ENDINGS if name.endswith(e)), "")
        words = name.removesuffix(ending).replace("_", " ")
    return text(words, 120) + (f" [{unit}]" if unit not in ("", "bytes", "share") else "")


def unit_of(key: object, around: str = "") -> str:
    """The unit of what a key holds; ``around``: that of the mapping it is in."""
    name = str(key).replace("-", "_")
    if name in FIELDS:
        return FIELDS[name][1]
    return next((unit for end, unit in ENDINGS.items() if name.endswith(end)), around)


def mapped(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping at a key, empty where there is none."""
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def listed(value: Mapping[str, Any], key: str) -> Sequence[Any]:
    """The list at a key, empty where there is none."""
    found = value.get(key)
    return found if isinstance(found, list | tuple) else ()


def pairs(
    value: Mapping[str, Any], prefix: str = "", unit: str = "", depth: int = 0
) -> Iterator[tuple[str, str]]:
    """(label, cell) of every single value in a mapping, and in the mappings within it."""
    for key, inner in value.items():
        label, own = f"{prefix}{label_of(key)}", unit_of(key, unit)
        if _flat(inner) or is_interval(inner):
            yield label, shown(inner, own)
        elif isinstance(inner, Mapping):
            if depth < DEEPEST:
                yield from pairs(inner, f"{label} / ", own, depth + 1)
        elif inner and all(_flat(v) for v in inner) and len(inner) <= 12:
            yield label, ", ".join(shown(v, own) for v in inner)


def lists(value: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(label, records) of every list of mappings in a mapping, and in the mappings within it."""
    for key, inner in value.items():
        label = f"{prefix}{label_of(key)}"
        if isinstance(inner, list | tuple) and any(isinstance(v, Mapping) for v in inner):
            yield label, [v for v in inner if isinstance(v, Mapping)]
        elif isinstance(inner, Mapping) and depth < DEEPEST:
            yield from lists(inner, f"{label} / ", depth + 1)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str]) -> str:
    """A table in a box that scrolls; cells are HTML, ``kinds`` the columns' classes."""
    cells = "".join(
        f'<th scope="col" class="{k}">{h}</th>' for h, k in zip(head, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{k}">{c}</td>' for c, k in zip(row, kinds, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return f"{BOX}<table><thead><tr>{cells}</tr></thead><tbody>\n{body}</tbody></table></div>\n"


def key_table(found: Sequence[tuple[str, str]], limits: Limits) -> str:
    """Names and values, numbers to the right."""
    rows = found[: limits.rows]
    body = "".join(
        f'<tr><th scope="row">{label}</th><td class="{_side(cell)}">{cell}</td></tr>\n'
        for label, cell in rows
    )
    return f"{KEYS}<tbody>\n{body}</tbody></table></div>\n" + left_out(len(found), len(rows))


def _side(cell: str) -> str:
    return "number" if cell.startswith("<data") or cell == "–" else ""


def records(found: Sequence[Mapping[str, Any]], limits: Limits) -> str:
    """A list of mappings as a table: one column for each key that any of them has."""
    keys = list(dict.fromkeys(k for r in found for k in r))[:MOST_COLUMNS]
    keys = [k for k in keys if any(r.get(k) not in (None, "", [], {}) for r in found)]
    kinds = [_kind(k, found) for k in keys]
    rows = [[_cell(r.get(k), k) for k in keys] for r in found[: limits.rows]]
    return table([label_of(k) for k in keys], rows, kinds) + left_out(len(found), len(rows))


def _kind(key: str, found: Sequence[Mapping[str, Any]]) -> str:
    values = [r[key] for r in found if not missing(r.get(key))]
    flat = [x for v in values for x in (v if isinstance(v, list | tuple) else [v])]
    if all(is_number(v) or is_interval(v) for v in flat):
        return "number"
    if key in HASHES:
        return "hash"
    return "name" if key in NAMES else "text" if _long(values) else ""


def _long(values: Sequence[Any]) -> bool:
    return any(len(str(v)) > 20 for v in values)


def _cell(value: Any, key: str) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(shown(v, unit_of(key)) for v in value[:12] if _flat(v))
    return "" if value == "" else shown(value, unit_of(key))


def left_out(count: int, rows: int) -> str:
    """The one line that says how much of a list is not shown."""
    if count <= rows:
        return ""
    return f'<p class="quiet">The first {rows:,} of {count:,}; all are in the JSON.</p>\n'


def details(summary: str, body: str, *, opened: bool = False) -> str:
    """A part that opens on a click."""
    mark = " open" if opened else ""
    return f"<details{mark}><summary>{summary}</summary>\n{body}</details>\n"


def figure(title: str, explained: str, svg: str) -> str:
    """A plot under its title, with a line on how to read it."""
    note = f'<span class="quiet">{explained}</span>' if explained else ""
    return f"<figure><figcaption><strong>{title}</strong>{note}</figcaption>\n{svg}</figure>\n"
