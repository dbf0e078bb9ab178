"""Words for the terminal: escaping of untrusted text, sizes, ranges, plain tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def printable(text: str, limit: int = 200) -> str:
    """``text`` with control and other unprintable characters escaped, cut to ``limit``.

    Names and metadata come from files of strangers; escape sequences in them must not reach a
    terminal, and a name of a megabyte must not fill it.
    """
    if len(text) > limit:
        text = f"{text[: limit - 12]}...({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1000: ``48.7 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def ranges(numbers: Iterable[int]) -> str:
    """Sorted integers as ranges: ``0-11, 14``."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def number(value: float) -> str:
    """A float for people: 2, 0.5, 1.4142136."""
    return f"{value:.8g}"


def several(names: Sequence[str], most: int = 3) -> str:
    """A few names and how many more there are, each one escaped."""
    shown = ", ".join(printable(n, 120) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Rows as aligned plain text; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        (indent + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
