"""The page of a real run, all suites, end to end."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def numbers_in(value: Any) -> Iterator[float]:
    """Every number of a document, and the length of every list."""
    if isinstance(value, dict | list):
        if isinstance(value, list):
            yield len(value)
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.usefixtures("every_suite")
@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="draws with matplotlib")
def test_html_of_all_suites(world: Any, cli: Cli, tmp_path: Path) -> None:
    """What a real run draws, end to end: every number is in its JSON, and nothing is fetched."""
    page = tmp_path / "r.html"
    words = ("validate", world.peft, world.mlx, "--base", world.base, "--text", world.text)
    result = cli(*words, "--html", page, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {s["status"] for s in document["suites"]} == {"passed"}
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert len(text.encode()) <= 2_000_000
    assert "model.layers.1.mlp.down_proj" in text
    for name in ("Quality", "Latency", "Swap"):
        assert f"<h2>{name} " in text
    assert not re.findall(r"https?://|(?:src|href)=\"(?!#)|@import|<script|url\((?!#)", text)
    shown = re.findall(r'<data value="([^"]*)">', text)
    assert len(shown) > 300
    assert {float(v) for v in shown} <= set(numbers_in(document))
    bare = re.findall(r'<td class="number">(?!<data|–)([^<]*\d[^<]*)', text)
    assert not bare
