"""The curve of a budget, to look at: bits per weight against what they cost, as text and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraduct import pages
from loraduct.text import size, table

if TYPE_CHECKING:
    from loraduct.converters.compress_report import Report

# bytes of the tensors, bits per weight, bytes of the package, error
Point = tuple[int, float, int, float]
MOST = 64  # points that are kept
_BAR = 40
_STYLE = (
    "td, th { padding: 2px 12px; text-align: right; font-weight: normal; }"
    " svg { width: 100%; height: auto; } text { font-size: 12px; fill: currentColor; }"
    " .axis { stroke: var(--grid); } .dot { fill: var(--series-2); }"
    " .line { fill: none; stroke: var(--series-1); stroke-width: 2; }"
)
_WIDE, _HIGH, _LEFT, _BELOW, _EDGE = 720, 400, 70, 50, 20  # of the drawing, pixels


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most ``most`` of them, about evenly spread over the bits, both ends among them."""
    if len(points) <= most:
        return list(points)
    low, high = points[0][1], points[-1][1]
    kept: dict[int, Point] = {}
    for point in points[:-1]:
        kept.setdefault(int((most - 1) * (point[1] - low) / (high - low or 1)), point)
    return [*kept.values(), points[-1]]


def lines(points: Sequence[Point], what: str) -> list[str]:
    """A row per half bit or so, with a bar: as long as the error's logarithm."""
    some = [p for p in thinned(points, 20) if p[3] > 0]
    if not some:
        return []
    low, high = math.log(min(p[3] for p in some)), math.log(max(p[3] for p in some))
    rows = [["bits per weight", "package", what, "(logarithmic)"]]
    for _, bits, nbytes, error in some:
        part = (math.log(error) - low) / (high - low) if high > low else 1.0
        rows.append([f"{bits:.2f}", size(nbytes), f"{error:.3g}", "#" * (1 + int(_BAR * part))])
    return table(rows)


def page(report: Report) -> str:
    """A page of HTML that needs nothing else: the curve, and the point that was chosen."""
    points = [p for p in report.curve if p[3] > 0]
    what = "predicted KL, nats" if report.predicted else "sum of squared errors"
    title = f"Bits, size and error: {pages.text(report.source)}"
    rows = "".join(
        f"<tr><td>{b:.2f}</td><td>{size(n)}</td><td>{e:.4g}</td></tr>\n"
        for _, b, n, e in thinned(points, 24)
    )
    return pages.page(
        title,
        _STYLE,
        f"<h1>{title}</h1><p>Each point is the plan of least error of its size: a width for every tensor."
        f" Chosen: {report.bits:.2f} bits per weight, {size(report.after)}.</p>\n"
        f"{_drawn(points, report.bits, what)}\n"
        f"<table><tr><th>bits per weight</th><th>package</th><th>{what}</th></tr>\n{rows}</table>\n",
    )


def _drawn(points: Sequence[Point], chosen: float, what: str) -> str:
    """The curve as SVG; errors on a logarithmic axis, a line per power of ten."""
    if len(points) < 2:
        return "<p>There is one plan only.</p>"
    first, last = points[0][1], points[-1][1]
    low = math.floor(math.log10(min(p[3] for p in points)))
    high = math.ceil(math.log10(max(p[3] for p in points)))

    def x(bits: float) -> float:
        return _LEFT + (_WIDE - _LEFT - _EDGE) * (bits - first) / (last - first or 1)

    def y(error: float) -> float:
        return _EDGE + (_HIGH - _BELOW - _EDGE) * (high - math.log10(error)) / (high - low or 1)

    bottom, right = _HIGH - _BELOW, _WIDE - _EDGE
    parts = []
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    for whole in range(math.ceil(first), math.floor(last) + 1):
        at = x(whole)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{_EDGE}" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{whole}</text>')
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HIGH - 8}" text-anchor="middle">bits per weight</text>'
    )
    parts.append(
        f'<text transform="translate(16 {bottom / 2:.0f}) rotate(-90)" text-anchor="middle">{what}</text>'
    )
    path = " ".join(f"{x(b):.1f},{y(e):.1f}" for _, b, _, e in points)
    parts.append(f'<polyline class="line" points="{path}"/>')
    near = min(points, key=lambda p: abs(p[1] - chosen)) if math.isfinite(chosen) else None
    if near is not None:
        parts.append(
            f'<circle class="dot" cx="{x(near[1]):.1f}" cy="{y(near[3]):.1f}" r="6">'
            f"<title>{near[1]:.2f} bits: {near[3]:.4g}</title></circle>"
        )
    return f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{what} by bits">{"".join(parts)}</svg>'
