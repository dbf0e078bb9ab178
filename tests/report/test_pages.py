"""What the pages share that are no report: the heat map of `diff`, the curve of `compress --plan`."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraduct.cli.diff_map import heat_map
from loraduct.converters import compress_curve
from loraduct.modules import places


def compared(*modules: str) -> Any:
    """A comparison with a number of its own for each module."""
    rows = [
        SimpleNamespace(module=m, interference=n / 10, cosine=-n / 10, sign_conflict=n / 100)
        for n, m in enumerate(modules, 1)
    ]
    return SimpleNamespace(
        modules=rows, interference=0.5, cosine=0.1, only_first=(), only_second=()
    )


def test_two_towers_do_not_share_a_cell() -> None:
    """A vision and a language tower have layers of the same numbers and modules of the same names."""
    modules = [f"{tower}.layers.{n}.fc1" for tower in ("vision", "language") for n in (0, 1)]
    page = heat_map(compared(*modules, "lm_head"), ["a", "b"])
    for n, module in enumerate([*modules, "lm_head"], 1):
        assert page.count(f'title="{module}: {n / 10:.3g}"') == 1
    heads = re.findall(r"<tr><th>([^<]*)</th>", page)
    assert heads[1:4] == ["vision.layers.fc1", "language.layers.fc1", "lm_head"]
    assert page.count("<th>0</th><th>1</th><th>outside</th>") == 3


def test_one_list_of_blocks_needs_no_name() -> None:
    assert places(["m.layers.3.q", "m.layers.0.k", "head"]) == {
        "m.layers.3.q": (3, "q"),
        "m.layers.0.k": (0, "k"),
    }


@pytest.mark.parametrize("name", ["a\udcff", "\x1b[31m", "\u202egnp", "<b>&\"'"])
def test_strange_names_are_inert_and_can_be_written(name: str) -> None:
    """A file's name need not be UTF-8; Python holds such bytes as surrogates, which UTF-8 lacks."""
    report: Any = SimpleNamespace(
        source=Path(name), curve=[(1, 2.0, 3, 0.5), (2, 3.0, 4, 0.25)], predicted=True, bits=2.0, after=3
    )  # fmt: skip
    for page in (
        heat_map(compared(f"m.layers.0.{name}"), [name, name]),
        compress_curve.page(report),
    ):
        page.encode()
        assert name not in page
        assert "color-scheme: light dark" in page
        assert page.startswith("<!doctype html>")
