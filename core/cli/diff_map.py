"""The heat map of ``loraduct diff``: one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from loraduct.modules import block_of

if TYPE_CHECKING:
    from loraduct.converters.diff import Diff, Module


def heat_map(found: Diff, names: Sequence[str]) -> str:
    """A page of HTML that needs nothing else: interference and cosine, modules by layers."""
    places = {m.module: block_of(m.module) for m in found.modules}
    kinds = list(dict.fromkeys(b[2] if b else m for m, b in places.items()))
    layers = sorted({b[1] for b in places.values() if b})
    cells = {
        ((b[2], b[1]) if (b := places[m.module]) else (m.module, -1)): m for m in found.modules
    }
    columns = layers + ([-1] if any(b is None for b in places.values()) else [])
    tables = []
    for title, value, colour in (
        ("Interference", lambda m: m.interference, _heat),
        ("Cosine of the updates", lambda m: m.cosine, _signed),
        ("Share of entries of opposite sign", lambda m: m.sign_conflict, _heat),
    ):
        head = "".join(f"<th>{c if c >= 0 else 'outside'}</th>" for c in columns)
        rows = []
        for kind in kinds:
            tds = [_cell(cells.get((kind, c)), value, colour) for c in columns]
            rows.append(f"<tr><th>{escape(kind)}</th>{''.join(tds)}</tr>")
        tables.append(f"<h2>{title}</h2><table><tr><th></th>{head}</tr>{''.join(rows)}</table>")
    title = " and ".join(escape(n) for n in names)
    facts = (
        f"{len(found.modules)} common modules; overall interference {found.interference:.3f},"
        f" cosine {found.cosine:.3f}; only in the first {len(found.only_first)}, only in the second"
        f" {len(found.only_second)}"
    )
    style = (
        "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}"
        "th{font-weight:normal;text-align:right;padding:1px 6px}td{min-width:26px;height:20px}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style><h1>{title}</h1><p>{facts}</p>{''.join(tables)}</html>\n"
    )


def _cell(module: Module | None, value: Any, colour: Any) -> str:
    if module is None:
        return "<td></td>"
    x = value(module)
    return f'<td style="background:{colour(x)}" title="{escape(module.module)}: {x:.3g}"></td>'


def _heat(x: float) -> str:
    """White for 0 to dark red for 1 and more."""
    return f"hsl(8,80%,{100 - 60 * min(max(x, 0.0), 1.0):.0f}%)"


def _signed(x: float) -> str:
    """Red for -1, white for 0, blue for 1."""
    return f"hsl({215 if x > 0 else 8},80%,{100 - 55 * min(abs(x), 1.0):.0f}%)"
