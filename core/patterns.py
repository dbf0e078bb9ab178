"""Regular expressions of strangers, run with a time limit.

A pattern in a config can be built to run for ever ((a+)+$). Python's matcher looks for signals
while it works, so an alarm stops it on the main thread; elsewhere the work goes to a child.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.text import printable

SECONDS = 2.0
LENGTH = 10_000


class _TooSlow(Exception):
    pass


def is_plain(pattern: str) -> bool:
    """Whether a pattern is a dotted name, in which only ``.`` has a special meaning."""
    return re.fullmatch(r"[\w.\-]*", pattern) is not None


def plain_suffix(key: str, name: str) -> bool:
    """``re.match(rf"(.*\\.)?({key})$", name)`` for a plain key, without a regex."""
    tail = name[-len(key) :] if key else ""
    if len(tail) != len(key) or (len(name) > len(key) and name[-len(key) - 1] != "."):
        return False
    return tail == key or all(k in (".", c) for k, c in zip(key, tail, strict=True))


def first_matches(
    patterns: Sequence[str], names: Sequence[str], *, full: bool, file: Path, what: str
) -> list[int]:
    """For each name the index of the first pattern that matches it, or -1.

    ``full``: the whole name (``re.fullmatch``); otherwise PEFT's suffix rule for rank_pattern and
    alpha_pattern, ``re.match(rf"(.*\\.)?({key})$")`` (peft 0.21.2, utils/other.py). Raises Refused
    for a pattern that is invalid or too slow.
    """
    if full:
        if len(patterns) == 1 and is_plain(patterns[0]) and "." not in patterns[0]:
            return [0 if n == patterns[0] else -1 for n in names]
    elif all(is_plain(p) for p in patterns):
        return [
            next((i for i, p in enumerate(patterns) if plain_suffix(p, name)), -1) for name in names
        ]
    return _timed(patterns, names, "full" if full else "end", file, what)


def first_indices(
    patterns: Sequence[str], names: Sequence[str], *, file: Path, what: str
) -> list[int]:
    """For each name the number that follows a pattern in it, or -1: PEFT's rule for layers_pattern.

    Of the first pattern that matches ``re.match(rf"(?:^|.*?\\.){pattern}\\.(?P<idx>\\d+)\\.")``
    (peft 0.21.2, tuners/tuners_utils.py). Raises Refused as `first_matches` does.
    """
    return _timed(patterns, names, "index", file, what)


def _timed(
    patterns: Sequence[str], names: Sequence[str], how: str, file: Path, what: str
) -> list[int]:
    """`_match` with a time limit; errors as refusals."""
    for pattern in patterns:
        if len(pattern) > LENGTH:
            raise Refused(file, f"{what} holds a pattern of {len(pattern):,} characters")
    import signal
    import threading

    try:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            return _with_alarm(patterns, names, how)
        return _in_child(patterns, names, how)
    except _TooSlow:
        raise Refused(
            file,
            f"{what}: matching its patterns took over {SECONDS:g} s; write them as plain names",
        ) from None
    except (re.error, RecursionError, OverflowError) as e:
        raise Refused(file, f"{what} holds an invalid pattern: {printable(str(e), 200)}") from None


def _match(patterns: Sequence[str], names: Sequence[str], how: str) -> list[int]:
    if how == "index":
        inside = [re.compile(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.") for p in patterns]
        hits = (next((m for c in inside if (m := c.match(name))), None) for name in names)
        return [int(m["idx"]) if m and m["idx"] else -1 for m in hits]
    full = how == "full"
    compiled = [re.compile(p if full else rf"(.*\.)?({p})$") for p in patterns]
    found = []
    for name in names:
        numbers = (i for i, c in enumerate(compiled) if (c.fullmatch if full else c.match)(name))
        found.append(next(numbers, -1))
    return found


def _with_alarm(patterns: Sequence[str], names: Sequence[str], how: str) -> list[int]:
    import signal

    def ring(*_: Any) -> None:
        raise _TooSlow

    previous = signal.signal(signal.SIGALRM, ring)
    remaining = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return _match(patterns, names, how)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *remaining)
        signal.signal(signal.SIGALRM, previous)


def _in_child(patterns: Sequence[str], names: Sequence[str], how: str) -> list[int]:
    import json
    import subprocess

    try:
        done = subprocess.run(
            [sys.executable, "-m", "loraduct.patterns"],
            input=json.dumps([list(patterns), list(names), how]),
            capture_output=True,
            text=True,
            timeout=SECONDS + 2,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _TooSlow from None
    if done.returncode:
        raise re.error(done.stderr.strip().rsplit("\n", 1)[-1])
    return list(json.loads(done.stdout))


if __name__ == "__main__":
    import json

    json.dump(_match(*json.load(sys.stdin)), sys.stdout)
