"""A validation's document for other tools: JUnit XML, and Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraduct.text import printable

SIGNS = {"passed": "✅", "failed": "❌", "skipped": "⏭️", "warning": "⚠️"}


def junit(document: Mapping[str, Any]) -> str:
    """One test suite a suite, one test case a check (the format of Jenkins' and GitLab's readers)."""
    from xml.etree.ElementTree import Element, SubElement, indent, tostring

    suites = document["suites"]
    root = Element("testsuites", name="loraduct validate")
    totals = [0, 0, 0]
    for suite in suites:
        rows = suite["checks"] or [{"name": suite["name"], "status": suite["status"], "detail": ""}]
        counts = [
            len(rows),
            sum(r["status"] == "failed" for r in rows),
            sum(r["status"] == "skipped" for r in rows),
        ]
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        part = SubElement(root, "testsuite", name=suite["name"], time=f"{suite['seconds']:.3f}")
        part.attrib |= _counts(counts)
        for row in rows:
            where = " ".join(str(row[k]) for k in ("adapter", "module") if row.get(k))
            name = f"{row['name']} {where}".strip()
            case = SubElement(part, "testcase", classname=suite["name"], name=_xml(name))
            detail = _xml(str(row["detail"] or suite["reason"]))
            if row["status"] == "failed":
                SubElement(case, "failure", message=detail).text = detail
            elif row["status"] == "skipped":
                SubElement(case, "skipped", message=detail)
            elif detail:
                SubElement(case, "system-out").text = f"{row['status']}: {detail}"
    root.attrib |= _counts(totals)
    indent(root)
    return f"<?xml version='1.0' encoding='utf-8'?>\n{tostring(root, encoding='unicode')}\n"


def _counts(counts: list[int]) -> dict[str, str]:
    return dict(zip(("tests", "failures", "skipped"), map(str, counts), strict=True))


def _xml(text: str) -> str:
    """Without characters that XML 1.0 has no way to write."""
    return printable(text, 2000)


def markdown(document: Mapping[str, Any]) -> str:
    """The verdict, a table of suites, and what failed or is worth knowing."""
    sign = SIGNS["passed" if document["passed"] else "failed"]
    inputs = [v["path"] for k in ("a", "b") if (v := document["inputs"].get(k))]
    lines = [
        f"### {sign} loraduct validate: {_cell(document['verdict'])}",
        "",
        f"{' against '.join(_code(p) for p in inputs)} on {_code(document['inputs']['base']['path'])}",
        "",
        "| suite | status | seconds | |",
        "|---|---|---:|---|",
    ]
    for suite in document["suites"]:
        words = _cell(suite["reason"]) or _summary(suite)
        status = f"{SIGNS[suite['status']]} {suite['status']}"
        lines.append(f"| {suite['name']} | {status} | {suite['seconds']:.1f} | {words} |")
    shown = ("failed", "warning")
    rows = [
        f"* {SIGNS[c['status']]} **{suite['name']}, {_cell(c['name'])}**: "
        + "".join(f"{_code(c[k])}: " for k in ("adapter", "module") if c.get(k))
        + _cell(c["detail"])
        for suite in document["suites"]
        for c in suite["checks"]
        if c["status"] in shown
    ]
    return "\n".join([*lines, *(["", *rows] if rows else [])]) + "\n"


def _summary(suite: Mapping[str, Any]) -> str:
    """What the last check that decided something says."""
    decided = [c for c in suite["checks"] if c["status"] in ("failed", "passed")]
    failed = [c for c in decided if c["status"] == "failed"]
    return _cell((failed or decided[-1:])[0]["detail"]) if decided else ""


def _cell(text: str) -> str:
    """Untrusted text in a table: nothing in it is Markdown or HTML."""
    shown = printable(text, 400)
    for c in "\\`*_{}[]<>|#~@":
        shown = shown.replace(c, f"\\{c}" if c != "<" else "&lt;")
    return shown


def _code(text: str) -> str:
    """Untrusted text as code, outside of tables (within, a | would end the cell)."""
    return "`" + printable(text, 300).replace("`", "'") + "`"
