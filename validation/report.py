"""The page to look at before shipping: ``loraduct validate --json``'s document as one HTML file.

Nothing is computed here that the document does not hold: numbers are shown, counted and drawn. What a
document lacks is left out. The page needs no network and no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.pages import page, text
from loraduct.validation import report_plots as plots
from loraduct.validation.report_figures import FIGURES
from loraduct.validation.report_html import (
    Limits,
    details,
    key_table,
    listed,
    lists,
    mapped,
    missing,
    pairs,
    records,
    shown,
    table,
)
from loraduct.validation.report_style import STYLE
from loraduct.validation.suites import SCHEMA

MOST_BYTES = 2_000_000
MOST_JSON = 64 << 20  # bytes of a document that is read
ROWS = (400, 60, 8)  # of each table: fewer where the page would be too large
MOST_SUITES = 40
# beside what the shell has: nothing may be loaded, even if something should have slipped through
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
    " style-src 'unsafe-inline'\">\n"
)
SIDES = {"a": "A", "b": "B"}
SIGNS = {"passed": "✓", "failed": "✗", "warning": "!", "skipped": "–"}
WHAT = {
    "structure": "Names, shapes, values and identity",
    "base": "The base model under both runtimes",
    "parity": "Does B compute what A computes?",
    "quality": "What is left of the adapter's gain?",
    "size": "Bytes on disk, by kind of module and by dtype",
    "latency": "Time, measured and forecast",
    "swap": "Adapters loaded, swapped and evicted in a random order",
}


def html(document: Mapping[str, Any], source: Path | None = None) -> str:
    """One page for the document of ``loraduct validate --json``.

    Raises Refused where it is no such document or of another schema (``source`` is then named), and
    MissingExtra without matplotlib.
    """
    plots.available()
    _check(document, source)
    thresholds = mapped(document, "thresholds")
    suites = [(s, _plots(s, thresholds)) for s in document["suites"][:MOST_SUITES]]
    for rows in ROWS:
        made = _page(document, suites, Limits(rows))
        if len(made.encode()) <= MOST_BYTES:
            return made
    raise Refused(source, f"is too large for a page of {MOST_BYTES:,} bytes; read the JSON itself")


def _check(document: Mapping[str, Any], source: Path | None) -> None:
    """Refuse what is not a document of this schema; what is inside may still be incomplete."""
    schema = document.get("schema")
    if "suites" not in document and "checks" not in document:
        raise Refused(source, "is no document of `loraduct validate --json`")
    if schema != SCHEMA or isinstance(schema, bool):
        raise Refused(
            source,
            f"has schema {schema!r}, a report is made of schema {SCHEMA}; run `loraduct validate --json`"
            " of this version again",
        )
    wanted = {"suites": list, "passed": bool, "verdict": str}
    for key, kind in wanted.items():
        if not isinstance(document.get(key), kind):
            raise Refused(source, f"{key} is not a {kind.__name__}: the document is damaged")
    for n, suite in enumerate(document["suites"]):
        if not (isinstance(suite, Mapping) and isinstance(suite.get("name"), str)):
            raise Refused(source, f"suites[{n}] has no name: the document is damaged")
        for check in listed(suite, "checks"):
            if not (isinstance(check, Mapping) and isinstance(check.get("status"), str)):
                raise Refused(source, f"suites[{n}] holds a check without status: it is damaged")


def _page(
    document: Mapping[str, Any], suites: Sequence[tuple[Mapping[str, Any], str]], limits: Limits
) -> str:
    """``suites``: each with its plots, which no limit changes."""
    inputs = mapped(document, "inputs")
    names = " against ".join(_name(inputs[k]) for k in ("a", "b") if inputs.get(k))
    title = text(names or "Validation", 90)
    parts = [
        f"<h1>{title}</h1>\n",
        f'<p class="quiet">{_sides(inputs)}</p>\n<p class="quiet">{_made(document)}</p>\n',
        _verdict(document, limits),
        _suites(document),
        *(_suite(suite, drawn, limits) for suite, drawn in suites),
        _provenance(document, limits),
    ]
    return page(f"{_outcome(document)[1]}: {title}", STYLE, "".join(parts), POLICY)


def _name(given: object) -> str:
    """What an input is called: the last part of its path."""
    path = given.get("path", "") if isinstance(given, Mapping) else given
    return Path(str(path)).name or str(path)


def _sides(inputs: Mapping[str, Any]) -> str:
    """Which is A, which is B, and on what."""
    paths = {
        SIDES.get(key, key): given.get("path") if isinstance(given, Mapping) else given
        for key, given in list(inputs.items())[:8]
        if given
    }
    return "; ".join(f"{text(k, 40)}: {text(path, 300)}" for k, path in paths.items())


def _made(document: Mapping[str, Any]) -> str:
    """Which tool, and when."""
    tool, created = document.get("tool"), document.get("created")
    by = " ".join(str(v) for v in tool.values()) if isinstance(tool, Mapping) else tool
    return ", ".join(text(v, 120) for v in (by, created) if v)


def _outcome(document: Mapping[str, Any]) -> tuple[str, str]:
    """(class, words) of the verdict."""
    if not document["passed"]:
        return "failed", "✗ Failed"
    left = [s for s in document["suites"] if s.get("status") == "skipped"]
    return "passed", "✓ Passed, in part" if left else "✓ Passed"


def _verdict(document: Mapping[str, Any], limits: Limits) -> str:
    """The decision, what failed, and what was not looked at."""
    state, words = _outcome(document)
    lines = [f"<p>{text(document['verdict'])}</p>"]
    failed = [
        f"<li>{_where(suite, check)}: {text(check.get('detail') or '')}</li>"
        for suite in document["suites"]
        for check in listed(suite, "checks")
        if check["status"] == "failed"
    ]
    skipped = [
        f"<li>{text(suite['name'], 80)} was skipped: {text(suite.get('reason') or 'no reason given')}"
        "</li>"
        for suite in document["suites"]
        if suite.get("status") == "skipped"
    ]
    for items in (failed, skipped):
        if len(items) > (most := limits.rows // 8):
            items[most:] = [f"<li>and {len(items) - most:,} more</li>"]
        if items:
            lines.append(f"<ul>{''.join(items)}</ul>")
    return f'<div class="verdict {state}"><strong>{words}</strong>{"".join(lines)}</div>\n'


def _where(suite: Mapping[str, Any], check: Mapping[str, Any]) -> str:
    """Suite, check and module."""
    parts = [suite["name"], check.get("name"), check.get("adapter"), check.get("module")]
    return ", ".join(text(p, 160) for p in parts if p)


def _status(word: object) -> str:
    """A status by word and sign, not by colour alone."""
    known = str(word) if str(word) in SIGNS else "skipped"
    return f'<span class="status {known}">{SIGNS[known]} {text(word, 40)}</span>'


def _suites(document: Mapping[str, Any]) -> str:
    rows = [
        [
            text(s["name"], 80),
            _status(s.get("status")),
            "" if missing(s.get("seconds")) else shown(s["seconds"]),
            text(s.get("reason") or WHAT.get(s["name"], "")),
        ]
        for s in document["suites"][:MOST_SUITES]
    ]
    return "<h2>Suites</h2>\n" + table(
        ["suite", "status", "time [s]", "about"], rows, ["", "", "number", "text"]
    )


def _plots(suite: Mapping[str, Any], thresholds: Mapping[str, Any]) -> str:
    """The plots of one suite that was run."""
    name = suite["name"]
    if suite.get("status") == "skipped" or name not in FIGURES:
        return ""
    figures = FIGURES[name](mapped(suite, "numbers"), thresholds)
    return f'<div class="plots">\n{"".join(figures)}</div>\n' if figures else ""


def _suite(suite: Mapping[str, Any], drawn: str, limits: Limits) -> str:
    """One suite: its plots, its numbers, its checks."""
    if suite.get("status") == "skipped":
        return ""  # said in the verdict
    name, numbers = suite["name"], mapped(suite, "numbers")
    parts = [f"<h2>{text(name.capitalize(), 80)} {_status(suite.get('status'))}</h2>\n"]
    if name in WHAT:
        parts.append(f'<p class="quiet">{WHAT[name]}</p>\n')
    parts.append(drawn)
    if found := list(pairs(numbers)):
        parts.append(details("Numbers", key_table(found, limits), opened=len(found) <= 12))
    for label, rows in list(lists(numbers))[:40]:
        opened = len(rows) <= 12
        parts.append(details(f"{label} ({len(rows):,})", records(rows, limits), opened=opened))
    checks = listed(suite, "checks")
    parts.append(_checks(checks, limits))
    return "".join(parts)


def _checks(checks: Sequence[Mapping[str, Any]], limits: Limits) -> str:
    """What failed first; the rest opens on a click."""
    order = list(SIGNS)
    order.insert(0, order.pop(order.index("failed")))
    ranked = sorted(
        checks, key=lambda c: order.index(c["status"]) if c["status"] in order else len(order)
    )
    rows = [
        [
            _status(c["status"]),
            text(c.get("name") or "", 80),
            text(" ".join(str(c[k]) for k in ("adapter", "module") if c.get(k)), 200),
            text(c.get("detail") or ""),
        ]
        for c in ranked[: limits.rows]
    ]
    if not rows:
        return ""
    body = table(["status", "check", "where", "detail"], rows, ["", "", "name", "text"])
    more = "" if len(checks) <= len(rows) else f", the first {len(rows)} shown"
    failed = any(c["status"] == "failed" for c in checks)
    return details(f"Checks ({len(checks):,}{more})", body, opened=failed)


def _provenance(document: Mapping[str, Any], limits: Limits) -> str:
    """What was looked at, with what, and how to do it again."""
    parts = ["<h2>Provenance</h2>\n"]
    if command := document.get("command"):
        words = command if isinstance(command, str) else " ".join(map(str, command))
        parts.append(f"<pre><code>{text(words, 4000)}</code></pre>\n")
    given = [
        {"input": SIDES.get(k, k), **v}
        for k, v in mapped(document, "inputs").items()
        if isinstance(v, Mapping)
    ]
    if given:
        parts.append(f"<h3>Inputs</h3>\n{records(given, limits)}")
    for key, title in (
        ("thresholds", "Thresholds"),
        ("environment", "Environment"),
    ):
        part = mapped(document, key)
        if found := list(pairs(part)):
            parts.append(f"<h3>{title}</h3>\n{key_table(found, limits)}")
        for label, rows in list(lists(part))[:10]:
            parts.append(details(f"{title}: {label}", records(rows, limits)))
    return "".join(parts)
