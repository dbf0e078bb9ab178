"""The heat map of ``loraduct diff``: one page of HTML, or a picture (PNG, by matplotlib)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loraduct.errors import MissingExtra
from loraduct.modules import places
from loraduct.pages import page, text
from loraduct.text import printable

if TYPE_CHECKING:
    from loraduct.converters.diff import Diff, Module

Value = Callable[["Module"], float]
# title, value, colour of a cell of the page, matplotlib's name of a map that the colour-blind can
# read, and what its ends stand for
MAPS: tuple[tuple[str, Value, Callable[[float], str], str, tuple[float, float]], ...] = (
    ("Interference", lambda m: m.interference, lambda x: _heat(x), "Reds", (0.0, 1.0)),
    ("Cosine of the updates", lambda m: m.cosine, lambda x: _signed(x), "RdBu", (-1.0, 1.0)),
    ("Share of entries of opposite sign", lambda m: m.sign_conflict, lambda x: _heat(x), "Reds",
     (0.0, 1.0)),
)  # fmt: skip
OUTSIDE = -1  # the column of what is in no layer
# Of the picture: dots an inch; inches of a row, of a column, beside the cells, above and below them;
# inches of a panel's sides between which it is drawn, however many cells it has.
DPI, ROW, COLUMN, ASIDE, ABOVE = 120, 0.22, 0.26, 3.6, 1.15
LEAST, MOST = (4.6, 0.5), (24.0, 40.0)
LONGEST = 34  # characters of a name beside the cells
STYLE = (
    "th, td { padding: 1px 6px; } th { font-weight: normal; text-align: right; }"
    " td { min-width: 26px; height: 20px; }"
)


def heat_map(found: Diff, names: Sequence[str]) -> str:
    """A page of HTML that needs nothing else: interference and cosine, modules by layers."""
    cells, kinds, columns = _grid(found)
    head = "".join(f"<th>{_layer(c)}</th>" for c in columns)
    tables = []
    for title, value, colour, _, _ in MAPS:
        rows = []
        for kind in kinds:
            tds = [_cell(cells.get((c, kind)), value, colour) for c in columns]
            rows.append(f"<tr><th>{text(kind)}</th>{''.join(tds)}</tr>")
        drawn = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
        tables.append(f'<h2>{title}</h2><div class="scroll" tabindex="0">{drawn}</div>\n')
    title = " and ".join(text(n) for n in names)
    return page(title, STYLE, f"<h1>{title}</h1><p>{_facts(found)}</p>{''.join(tables)}")


def need_plots() -> None:
    """Raise MissingExtra where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("report", "a heat map as PNG") from None


def picture(found: Diff, names: Sequence[str]) -> bytes:
    """The same as PNG: a panel for each number, with the scale of its colours beside it."""
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells, kinds, columns = _grid(found)
    wide, high = (
        min(max(least, n * each), most)
        for n, each, least, most in zip(
            (len(columns), len(kinds)), (COLUMN, ROW), LEAST, MOST, strict=True
        )
    )
    out = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        matplotlib.rcdefaults()  # whatever a matplotlibrc of the user says
        matplotlib.rcParams.update({"text.parse_math": False, "font.size": 9.0})
        size = (wide + ASIDE, len(MAPS) * (high + ABOVE) + 0.9)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        whole = int(size[0] * 11)  # characters of the title's font that fit into a line
        heading = figure.suptitle(
            "\n".join(["A: {}", "B: {}", "{}"]).format(
                *(_short(n, whole) for n in names), _wrapped(_facts(found), whole)
            ),
            fontsize=9.5,
        )
        taken = heading.get_window_extent(canvas.get_renderer()).width / figure.bbox.width
        heading.set_fontsize(9.5 * min(1.0, 0.96 / taken))  # letters may be wider than most
        for axes, (title, value, _, colours, ends) in zip(
            figure.subplots(len(MAPS), squeeze=False)[:, 0], MAPS, strict=True
        ):
            grid = np.full((len(kinds), len(columns)), np.nan)
            for (column, kind), module in cells.items():
                grid[kinds.index(kind), columns.index(column)] = value(module)
            drawn = axes.pcolormesh(
                grid, cmap=colours, vmin=ends[0], vmax=ends[1], edgecolors="white", linewidth=0.4
            )
            axes.set_facecolor("#d9d9d9")  # where there is no such module
            axes.set_title(title, fontsize=10.5)
            axes.set_xlabel("layer")
            axes.set_ylabel("module")
            _ticks(axes.set_xticks, [_layer(c) for c in columns], wide / 0.32)
            _ticks(axes.set_yticks, [_short(k, LONGEST) for k in kinds], high / 0.16)
            axes.tick_params(length=0)
            axes.invert_yaxis()
            over = "max" if ends == (0.0, 1.0) and np.nanmax(grid) > 1 else "neither"
            figure.colorbar(drawn, ax=axes, extend=over, pad=0.02, aspect=max(20, high / 0.15))
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _ticks(put: Any, labels: Sequence[str], room: float) -> None:
    """Names in the middle of rows or columns, as many as there is room for."""
    every = -(-len(labels) // max(1, int(room)))
    put([i + 0.5 for i in range(0, len(labels), every)], labels[::every])


def _grid(found: Diff) -> tuple[dict[tuple[int, str], Module], list[str], list[int]]:
    """(module by layer and kind, the kinds, the layers with what is outside of them last)."""
    at = places(m.module for m in found.modules)
    cells = {at.get(m.module, (OUTSIDE, m.module)): m for m in found.modules}
    columns = sorted({layer for layer, _ in cells}, key=lambda n: (n == OUTSIDE, n))
    return cells, list(dict.fromkeys(kind for _, kind in cells)), columns


def _layer(column: int) -> str:
    return "outside" if column == OUTSIDE else str(column)


def _facts(found: Diff) -> str:
    return (
        f"{len(found.modules)} common modules; overall interference {found.interference:.3f},"
        f" cosine {found.cosine:.3f}; only in the first {len(found.only_first)}, only in the second"
        f" {len(found.only_second)}"
    )


def _short(name: str, most: int) -> str:
    """Printable, its middle left out where it is long."""
    name, half = printable(name, 10_000), (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def _wrapped(words: str, width: int) -> str:
    import textwrap

    return textwrap.fill(words, width)


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
