"""The report's plots: matplotlib's SVG, made to fit a page in light and in dark.

Each plot is drawn in placeholder colours, which become the page's CSS variables; text stays text, in
the page's font. Equal numbers give equal bytes: no dates, no random ids.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from loraduct.errors import MissingExtra
from loraduct.text import printable

Number = float | None  # None: not measured
WIDTH = 420.0  # points: on a phone, 360 pixels wide, text of 11 points stays readable
LONGEST = 26  # characters of a name on an axis
MOST_ROWS, MOST_CELLS, MOST_POINTS = 24, 1200, 600
# Placeholders, which no colour map yields, and what they stand for in the page.
INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = [f"#0102{n:02x}" for n in range(0x10, 0x18)]
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--series-{n}" for n, colour in enumerate(SERIES, 1)
}
MARKERS = "osD^vPX*"  # series differ in shape too
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "loraduct",
    "text.parse_math": False,  # a name may hold dollars
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.size": 11.0,
    "axes.labelsize": 11.0,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
    "legend.fontsize": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 4.5,
}


def available() -> None:
    """Raise MissingExtra where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("report", "an HTML report") from None


def positions(values: Sequence[Number], bound: Number, unit: str) -> str:
    """A value for each position of the text, and the bound that it must stay below."""
    step = -(-len(values) // MOST_POINTS)  # of more positions than can be told apart, the largest
    groups = [values[i : i + step] for i in range(0, len(values), max(step, 1))]
    largest = [max((v for v in g if v is not None), default=math.nan) for g in groups]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        at = [1 + i * step for i in range(len(largest))]
        axes.plot(at, largest, "-", color=SERIES[0], marker="o", markersize=2.5, linewidth=1)
        if bound is not None:
            axes.axhline(bound, color=SERIES[1], linestyle="--", linewidth=1.4, label="bound")
            _legend(axes, 2)
        shown = [*largest, *([] if bound is None else [bound])]
        if all(v > 0 for v in shown if not math.isnan(v)):
            axes.set_yscale("log")
            _decades(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        _whole(axes.xaxis)
        axes.set_xlabel("position in the prompt (tokens)")
        axes.set_ylabel(unit)

    return _svg("positions", paint, 210)


def by_layer(
    series: Mapping[str, Sequence[tuple[int, float]]],
    unit: str,
    target: float,
    band: Number,
) -> str:
    """Points (layer, value), one series for each kind of module, around the value aimed at."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.axhline(target, color=MUTED, linewidth=1)
        if band is not None:
            axes.axhspan(target - band, target + band, color=GRID, alpha=0.6, label="bound")
        for n, (kind, points) in enumerate(series.items()):
            axes.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                linestyle="none",
                marker=MARKERS[n % len(MARKERS)],
                markerfacecolor="none" if n else SERIES[0],
                color=SERIES[n % len(SERIES)],
                label=_short(kind),
            )
        off = max((abs(p[1] - target) for ps in series.values() for p in ps), default=0.0)
        reach = 1.15 * max(off, band or 0.0, 1e-3 * abs(target))
        axes.set_ylim(target - reach, target + reach)
        axes.ticklabel_format(axis="y", useOffset=False)
        _whole(axes.xaxis)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        _legend(axes, 2, handletextpad=0.2)

    return _svg("layers", paint, 230 + 8 * len(series))


def heat(
    name: str,
    rows: Sequence[str],
    columns: Sequence[int],
    cells: Mapping[tuple[str, int], float],
    unit: str,
    top: Number = None,
) -> str:
    """A cell for each kind of module and layer; where there is no number the paper shows.

    With ``top`` the scale is logarithmic, four decades up to there (or to the largest value): what is
    below is as good as nothing, and has one colour.
    """
    import matplotlib
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in cells.items():
        grid[rows.index(row), columns.index(column)] = value
    fine = grid[np.isfinite(grid)]
    low, high = float(fine.min()), float(fine.max())
    log = top is not None and max(top, high) > 0
    same = low if low == high else None  # then the bar says which
    if log:
        high = max(top or 0.0, high)
        low = high * 1e-4
        grid = np.maximum(grid, low)
        norm: Any = LogNorm(low, high)
    else:
        norm = Normalize(low - 0.5, high + 0.5) if same is not None else Normalize(low, high)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(False)
        drawn = axes.pcolormesh(
            grid,
            cmap=matplotlib.colormaps["cividis"].resampled(24),
            norm=norm,
            edgecolors=PAPER,
            linewidth=0.4,
        )
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [_short(r) for r in rows])
        every = -(-len(columns) // 10)
        ticks = range(0, len(columns), every)
        axes.set_xticks([i + 0.5 for i in ticks], [str(columns[i]) for i in ticks])
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_xlabel("layer")
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(drawn, ax=axes, location="top", aspect=40, pad=0.04, label=unit)
        bar.outline.set_visible(False)
        if log:
            _decades(bar.ax.xaxis)
        elif same is not None:
            bar.set_ticks([same], labels=[f"{same:.4g}"])
        elif all(v == int(v) for v in fine):
            _whole(bar.ax.xaxis)

    return _svg(name, paint, 105 + 18 * len(rows))


def curve(points: Sequence[tuple[float, float, str]], x: str, y: str) -> str:
    """Labelled points (x, y), each label on the side where there is room."""
    ordered = sorted(points)
    middle = (ordered[0][0] + ordered[-1][0]) / 2

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([p[0] for p in ordered], [p[1] for p in ordered], "o", color=SERIES[0])
        for at, value, label in ordered:
            side, away = ("right", -6) if at > middle else ("left", 6)
            axes.annotate(
                _short(label, 20), (at, value), (away, 4), textcoords="offset points", ha=side
            )
        if ordered[0][1] > 0 and all(p[1] > 0 for p in ordered):
            axes.set_yscale("log")
            _decades(axes.yaxis)
        axes.margins(x=0.12, y=0.15)
        axes.set_xlabel(x)
        axes.set_ylabel(y)

    return _svg("curve", paint, 220)


def intervals(
    name: str,
    rows: Sequence[tuple[str, float, Number, Number]],
    unit: str,
    mark: tuple[float, str] | None = None,
) -> str:
    """A line for each (label, value, low, high): the value as a point, what it may be as a bar."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for n, (_, value, low, high) in enumerate(rows):
            if low is not None and high is not None:
                axes.plot([low, high], [n, n], "-", color=SERIES[0], linewidth=2)
                axes.plot([low, high], [n, n], "|", color=SERIES[0], markersize=9)
            axes.plot([value], [n], "o", color=SERIES[0], markersize=6)
        if mark is not None:
            axes.axvline(mark[0], color=SERIES[1], linestyle="--", linewidth=1.4, label=mark[1])
            _legend(axes, 2)
        axes.set_yticks(range(len(rows)), [_short(r[0]) for r in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel(unit)

    return _svg(name, paint, 75 + 20 * len(rows) + (20 if mark else 0))


def bars(name: str, rows: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> str:
    """A bar for each row, one beside the other for each series."""
    thick = 0.8 / len(series)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for n, (label, values) in enumerate(series.items()):
            at = [i + (n - (len(series) - 1) / 2) * thick for i in range(len(rows))]
            axes.barh(at, values, thick * 0.9, color=SERIES[n % len(SERIES)], label=label)
        if len(series) > 1:
            _legend(axes, len(series))
        axes.set_yticks(range(len(rows)), [_short(r) for r in rows])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel(unit)

    return _svg(name, paint, 75 + (14 + 8 * len(series)) * len(rows))


def _legend(axes: Any, columns: int, **more: float) -> None:
    """Above the plot, where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, **more)


def _short(name: str, most: int = LONGEST) -> str:
    """A name for an axis: printable, its middle left out where it is long."""
    name = printable(name, 10_000)
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def _whole(axis: Any) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _decades(axis: Any) -> None:
    """Ticks of a logarithmic axis, in plain numbers: also 2 and 5 where it spans little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    few = math.log10(high / low) < 2
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def _svg(name: str, paint: Callable[[Any], None], height: float) -> str:
    """What ``paint`` draws on a figure, as an <svg> element for a page of HTML."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font for measuring lacks
        matplotlib.rcdefaults()  # whatever a matplotlibrc of the user says
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        paint(figure)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        canvas.print_svg(out, metadata=nothing)
    return _for_page(name, out.getvalue())


def _for_page(name: str, svg: str) -> str:
    """Without names of namespaces and unused ids; ids that are used are made unique in the page."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        for key in [k for k in element.attrib if k.startswith("{")]:
            element.set(key.partition("}")[2], element.attrib.pop(key))
    used = set()
    for element in root.iter():
        for value in (element.get("href", ""), element.get("clip-path", "")):
            used |= set(re.findall(r"#([\w-]+)", value))
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.set("id", f"{name}-{identity}")
        if "href" in element.attrib:
            element.set("href", f"#{name}-{element.attrib['href'][1:]}")
        if "clip-path" in element.attrib:
            element.set("clip-path", f"url(#{name}-{element.attrib['clip-path'][5:]}")
        if "style" in element.attrib:
            element.set("style", _coloured(element.attrib["style"]))
        for key in ("d", "x", "y", "transform"):  # to a hundredth of a point
            if key in element.attrib:
                element.set(key, re.sub(r"(\.\d\d)\d+", r"\1", element.attrib[key]))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("class", "plot")
    root.set("role", "img")
    return ElementTree.tostring(root, encoding="unicode")


def _coloured(style: str) -> str:
    """A style attribute with the page's colours and the page's font."""
    style = re.sub(r"font-family: [^;]*;?|(?<=px) ('[^;]*|[\w-]+(, ?[^;]*)?)(?=;|$)", "", style)
    return re.sub(
        r"#[0-9a-f]{6}",
        lambda m: f"var({VARIABLES[m[0]]})" if m[0] in VARIABLES else m[0],
        style,
    )
