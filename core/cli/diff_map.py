"""The heat map of ``loraduct diff``: one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraduct.modules import places
from loraduct.pages import page, text

if TYPE_CHECKING:
    from loraduct.converters.diff import Diff, Module

OUTSIDE = -1  # the column of what is in no layer
STYLE = (
    "th, td { padding: 1px 6px; } th { font-weight: normal; text-align: right; }"
    " td { min-width: 26px; height: 20px; }"
)


def heat_map(found: Diff, names: Sequence[str]) -> str:
    """A page of HTML that needs nothing else: interference and cosine, modules by layers."""
    at = places(m.module for m in found.modules)
    cells = {at.get(m.module, (OUTSIDE, m.module)): m for m in found.modules}
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    columns = sorted({layer for layer, _ in cells}, key=lambda n: (n == OUTSIDE, n))
    head = "".join(f"<th>{'outside' if c == OUTSIDE else c}</th>" for c in columns)
    tables = []
    for title, value, colour in (
        ("Interference", lambda m: m.interference, _heat),
        ("Cosine of the updates", lambda m: m.cosine, _signed),
        ("Share of entries of opposite sign", lambda m: m.sign_conflict, _heat),
    ):
        rows = []
        for kind in kinds:
            tds = [_cell(cells.get((c, kind)), value, colour) for c in columns]
            rows.append(f"<tr><th>{text(kind)}</th>{''.join(tds)}</tr>")
        drawn = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
        tables.append(f'<h2>{title}</h2><div class="scroll" tabindex="0">{drawn}</div>\n')
    title = " and ".join(text(n) for n in names)
    facts = (
        f"{len(found.modules)} common modules; overall interference {found.interference:.3f},"
        f" cosine {found.cosine:.3f}; only in the first {len(found.only_first)}, only in the second"
        f" {len(found.only_second)}"
    )
    return page(title, STYLE, f"<h1>{title}</h1><p>{facts}</p>{''.join(tables)}")


def _cell(module: Module | None, value: Any, colour: Any) -> str:
    if module is None:
        return "<td></td>"
    x = value(module)
    return f'<td style="background:{colour(x)}" title="{text(module.module)}: {x:.3g}"></td>'


def _heat(x: float) -> str:
    """White for 0 to dark red for 1 and more."""
    return f"hsl(8,80%,{100 - 60 * min(max(x, 0.0), 1.0):.0f}%)"


def _signed(x: float) -> str:
    """Red for -1, white for 0, blue for 1."""
    return f"hsl({215 if x > 0 else 8},80%,{100 - 55 * min(abs(x), 1.0):.0f}%)"
