"""Which of a suite's numbers the report draws: suite -> figures, each where its numbers are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loraduct.modules import places
from loraduct.pages import text
from loraduct.validation import report_plots as plots
from loraduct.validation.report_html import figure, is_interval, is_number, listed, mapped

Numbers = Mapping[str, Any]
Placed = tuple[int, str, Numbers]  # layer, path within it, the module's numbers
MOST_DEVICES, MOST_ENGINES = 40, 4  # of a forecast; the table of devices has 32
HEATS = (
    ("norm", "Size of the update", "norm of dW (Frobenius)"),
    ("rank", "Rank", "rank"),
    ("error", "Error of the update", "‖dW(B) − dW(A)‖ / ‖dW(A)‖"),
)


def _parity(numbers: Numbers, thresholds: Numbers) -> list[str]:
    modules = listed(numbers, "modules")
    placed = _placed(modules)
    outside = len(modules) - len(placed)
    more = f"; {outside:,} outside the layers: in the table" if outside else ""
    figures = _positions(numbers)
    if gains := _series(placed, "gain"):
        bands = [m["gain_bound"] for _, _, m in placed if is_number(m.get("gain_bound"))]
        svg = plots.by_layer(gains, "gain", 1.0, max(bands, default=None))
        explained = f"B's dW measured along A's: at 1 nothing is lost{more}"
        figures.append(figure("Effect kept per layer", explained, svg))
    bounds = [float(m["bound"]) for _, _, m in placed if is_number(m.get("bound"))]
    for key, title, unit in HEATS:
        cells = {(kind, n): float(m[key]) for n, kind, m in placed if is_number(m.get(key))}
        if cells:
            top = max(bounds, default=0.0) if key == "error" else None
            figures.append(_heat(key, title, cells, unit, more, top))
    return figures


def _positions(numbers: Numbers) -> list[str]:
    """The largest difference at each position."""
    values = [v if is_number(v) else None for v in listed(numbers, "per_position")]
    if all(v is None for v in values):
        return []
    bound = numbers.get("bound")
    svg = plots.positions(values, bound if is_number(bound) else None, "largest |Δ logit|")
    explained = "A's logits against B's, the largest of all prompts; no unit"
    return [figure("Logit difference per position", explained, svg)]


def _placed(modules: Sequence[Any]) -> list[Placed]:
    """The modules within blocks."""
    rows = [(str(m.get("module")), m) for m in modules if isinstance(m, Mapping)]
    at = places(name for name, _ in rows)
    return [(*at[name], m) for name, m in rows if name in at]


def _series(placed: Sequence[Placed], key: str) -> dict[str, list[tuple[int, float]]]:
    """Points (layer, value) by kind of module; where there are too many kinds, the rarest as one.

    Of several points at one layer, the lowest and the highest.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for layer, kind, m in placed:
        if is_number(m.get(key)):
            found.setdefault(kind, []).append((layer, float(m[key])))
    most = len(plots.SERIES)
    if len(found) <= most:
        return found
    ranked = sorted(found, key=lambda k: -len(found[k]))
    each: dict[int, list[float]] = {}
    for layer, value in (p for k in ranked[most - 1 :] for p in found[k]):
        each.setdefault(layer, []).append(value)
    rest = [(layer, end) for layer, values in each.items() for end in {min(values), max(values)}]
    return {k: found[k] for k in ranked[: most - 1]} | {"other": rest}


def _heat(
    key: str,
    title: str,
    cells: Mapping[tuple[str, int], float],
    unit: str,
    more: str,
    top: float | None,
) -> str:
    every = list(dict.fromkeys(kind for kind, _ in cells))
    columns = sorted({layer for _, layer in cells})[: plots.MOST_CELLS]
    rows = every[: max(1, min(plots.MOST_ROWS, plots.MOST_CELLS // len(columns)))]
    left = len(every) - len(rows)
    known = set(columns)
    cells = {at: v for at, v in cells.items() if at[0] in rows and at[1] in known}
    svg = plots.heat(f"heat-{key}", rows, columns, cells, unit, top)
    scale = (
        "" if top is None else "; the scale ends at the bound, or at the largest error beyond it"
    )
    kinds = f"; {left:,} more kinds: in the table" if left > 0 else ""
    return figure(title, f"modules by layers{scale}{kinds}{more}", svg)


def _quality(numbers: Numbers, thresholds: Numbers) -> list[str]:
    figures = []
    sides = {"base": "base", "source": "A", "result": "B"}
    found = mapped(numbers, "perplexities")
    rows = [
        (label, float(found[side]), None, None)
        for side, label in sides.items()
        if is_number(found.get(side))
    ]
    if rows:
        svg = plots.intervals("perplexity", rows, "perplexity (lower is better)")
        figures.append(figure("Perplexity on the text", "of the base, and with each adapter", svg))
    kept = numbers.get("gain_kept")
    if is_interval(kept) and isinstance(kept, Mapping) and is_number(kept["value"]):
        ends = [float(kept[k]) if is_number(kept[k]) else None for k in ("low", "high")]
        least = _threshold(thresholds, "min_gain_kept")
        mark = None if least is None else (least, "least allowed")
        row = ("B", float(kept["value"]), ends[0], ends[1])
        svg = plots.intervals("gain", [row], "share of A's gain (1 = all)", mark)
        explained = "with its bootstrap interval, 95 %"
        figures.append(figure("Gain kept", explained, svg))
    return figures


def _threshold(thresholds: Numbers, name: str) -> float | None:
    """A threshold by its name, where it is set."""
    return float(thresholds[name]) if is_number(thresholds.get(name)) else None


def _size(numbers: Numbers, thresholds: Numbers) -> list[str]:
    figures = []
    sides = {s: mapped(mapped(numbers, s), "by_kind") for s in ("a", "b")}
    kinds = list(dict.fromkeys(k for side in sides.values() for k in side))[: plots.MOST_ROWS]
    bars = {
        s.upper(): [side[k] / 1e6 if is_number(side.get(k)) else 0.0 for k in kinds]
        for s, side in sides.items()
        if side
    }
    if kinds:
        svg = plots.bars("kinds", kinds, bars, "size (MB)")
        figures.append(figure("Size by kind of module", "powers of 1000", svg))
    points = [
        (float(p["bits"]), float(p["error"]), _point(p))
        for p in listed(numbers, "curve")
        if isinstance(p, Mapping) and all(is_number(p.get(k)) for k in ("bits", "error", "bytes"))
    ]
    if shown := [p for p in points if p[1] > 0]:  # what lost nothing has no place on a logarithm
        svg = plots.curve(shown, "bits per value, tables and scales included", "relative error")
        exact = len(points) - len(shown)
        more = f"; {exact} without error: in the table" if exact else ""
        explained = f"what is stored in one width together, with its size in MB{more}"
        figures.append(figure("Bits, size and error", explained, svg))
    return figures


def _point(found: Numbers) -> str:
    """What a point of the curve is: whose, how stored, how large."""
    words = " ".join(str(found[k]) for k in ("of", "way") if found.get(k))
    return f"{words} {found['bytes'] / 1e6:.3g}".strip()


def _latency(numbers: Numbers, thresholds: Numbers) -> list[str]:
    """The forecast by device, against the gates; engines apart, or half of the devices have no room."""
    rows = [r for r in listed(numbers, "forecast") if isinstance(r, Mapping)]
    engines = list(dict.fromkeys(str(r.get("engine")) for r in rows))[:MOST_ENGINES]
    figures = []
    for key, low, high, title, unit, gate, word in (
        ("tokens_per_second", "low", "high", "Forecast: tokens per second", "tokens per second",
         "min_tokens_per_second", "least allowed"),
        ("ms_per_prompt_token", "prompt_low", "prompt_high", "Forecast: time per prompt token",
         "milliseconds per prompt token", "max_ms_per_prompt_token", "most allowed"),
    ):  # fmt: skip
        limit = _threshold(thresholds, gate)
        mark = None if limit is None else (limit, word)
        for n, engine in enumerate(engines):
            own = [r for r in rows if str(r.get("engine")) == engine]
            drawn = _forecasts(own, key, low, high)
            if not drawn:
                continue
            of = f", {text(engine, 40)}" if len(engines) > 1 else ""
            name = f"{key.replace('_', '-')}-{n}"
            svg = plots.intervals(name, drawn[:MOST_DEVICES], unit, mark)
            left = len(drawn) - MOST_DEVICES
            more = f"; {left:,} more: in the table" if left > 0 else ""
            figures.append(figure(title + of, f"with the interval of the forecast{more}", svg))
    return figures


def _forecasts(
    rows: Sequence[Numbers], key: str, low: str, high: str
) -> list[tuple[str, float, float | None, float | None]]:
    """(device and what else differs, value, ends of its interval)."""
    several = [k for k in ("context", "target") if len({str(r.get(k)) for r in rows}) > 1]
    return [
        (
            ", ".join(str(r.get(k)) for k in ("device", *several)),
            float(r[key]),
            float(r[low]) if is_number(r.get(low)) else None,
            float(r[high]) if is_number(r.get(high)) else None,
        )
        for r in rows
        if is_number(r.get(key))
    ]


FIGURES: dict[str, Callable[[Numbers, Numbers], list[str]]] = {
    "parity": _parity,
    "quality": _quality,
    "size": _size,
    "latency": _latency,
}
