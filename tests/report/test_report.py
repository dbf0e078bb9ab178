"""The report: what the page holds, that its numbers are the document's, and that nothing escapes."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from document import HOSTILE, KINDS, LAYERS, check, document, modules, small, suite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraduct import pages
from loraduct.errors import MissingExtra, Refused
from loraduct.validation import report, report_style

STYLE = pages.STYLE + report_style.STYLE
VOID = {"meta", "br"}
PAGE = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "div"}
PAGE |= {"strong", "span", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "data"}
PAGE |= {"figure", "figcaption", "details", "summary", "pre", "code"}
SVG = {"svg", "g", "path", "defs", "use", "text", "clippath", "rect", "tspan"}


class Page(HTMLParser):
    """A page read strictly: every element is closed by its own end tag."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.declarations: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, tag  # HTML has no such thing
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((tuple(self.open), data))
        else:
            assert not data.strip()

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")

    def words(self, *within: str) -> str:
        """The text, or that within elements of these names."""
        return "".join(d for at, d in self.texts if set(within) <= set(at) and "style" not in at)

    def tags(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a name."""
        return [attrs for tag, attrs in self.elements if tag == name]


def harmless(html: str) -> Page:
    """The page, after checking that nothing in it can run, load or break out."""
    assert len(html.encode()) <= 2_000_000
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    page = Page(html)
    assert {tag for tag, _ in page.elements} <= PAGE | SVG
    ids = [str(a["id"]) for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "action", "srcdoc", "xlink:href")
            if name == "href":
                assert tag == "use"
                assert str(value)[1:] in ids, value
            if name in ("style", "clip-path"):
                assert set(re.findall(r"url\(([^)]*)\)", str(value))) <= {f"#{i}" for i in ids}
    assert "@import" not in html
    assert [a for a in page.tags("meta") if "default-src 'none'" in (a.get("content") or "")]
    return page


def once(draw: Callable[..., str]) -> Callable[..., str]:
    """What draws each plot once; that equal numbers give equal bytes is proven in another process."""
    drawn: dict[str, str] = {}

    def found(*args: Any) -> str:
        key = repr(args)
        if key not in drawn:
            drawn[key] = draw(*args)
        return drawn[key]

    return found


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("positions", "by_layer", "heat", "curve", "intervals", "bars"):
            patch.setattr(report.plots, name, once(getattr(report.plots, name)))
        yield


@pytest.fixture(scope="module")
def page() -> Page:
    return harmless(report.html(document()))


@pytest.fixture(scope="module")
def small_html() -> str:
    return report.html(small())


def test_verdict_is_on_top_and_everything_has_a_heading(page: Page) -> None:
    assert page.declarations == ["doctype html"]
    assert page.tags("html") == [{"lang": "en"}]
    assert len(page.tags("h1")) == 1
    assert page.words("h1") == "reply against reply-mlx"
    order = [tag if tag != "div" else str(a.get("class")) for tag, a in page.elements]
    assert order.index("verdict passed") < order.index("table") < order.index("svg")
    assert "Passed, in part" in page.words("strong")
    assert "swap was skipped: mlx is not installed" in page.words("li")
    for heading in ("Parity", "Quality", "Size", "Latency", "Provenance"):
        assert heading in page.words("h2")
    assert "Swap" not in page.words("h2")  # it has no numbers; the verdict says that it was skipped


def test_plots_have_titles_and_units(page: Page) -> None:
    titles = page.words("figcaption", "strong")
    for title in (
        "Logit difference per position",
        "Effect kept per layer",
        "Size of the update",
        "Rank",
        "Error of the update",
        "Perplexity on the text",
        "Gain kept",
        "Size by kind of module",
        "Bits, size and error",
        "Forecast: tokens per second",
        "Forecast: time per prompt token",
    ):
        assert title in titles
    drawn = page.words("svg")
    for unit in ("position in the prompt (tokens)", "layer", "size (MB)", "tokens per second"):
        assert unit in drawn
    for kind in KINDS:
        assert kind in drawn
    assert "mathdefault" not in drawn
    assert "$" not in drawn
    assert len(page.tags("figure")) == len(page.tags("svg")) == len(page.tags("figcaption")) == 11
    for attributes in page.tags("svg"):  # their size is the page's matter
        assert "width" not in attributes
        assert attributes["viewbox"]


def test_provenance_names_hashes_versions_and_command(page: Page) -> None:
    words = page.words()
    for part in ("ab" * 32, "cd" * 32, "loraduct validate examples/reply", "2.13.0", "2026-01-02"):
        assert part in words
    assert "least share of the gain kept" in words


def numbers_in(value: Any) -> Iterator[float]:
    """Every number of a document, and the length of every list (a count is of what is listed)."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers_in(inner)
    elif isinstance(value, list):
        yield len(value)
        for inner in value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_every_number_is_the_documents(page: Page) -> None:
    known = set(numbers_in(document()))
    shown = [
        (float(str(a["value"])), words)
        for a, words in zip(
            page.tags("data"), (d for at, d in page.texts if at[-1] == "data"), strict=True
        )
    ]
    assert len(shown) > 1000
    factors = {"": 1, "%": 0.01, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    for exact, words in shown:
        assert exact in known
        figure, _, unit = words.partition(" ")
        rounded = float(figure.replace(",", "")) * factors[unit]
        assert rounded == pytest.approx(exact, rel=6e-4 if unit in ("", "%") else 5e-2)
    # and none stands outside such an element, but in words that the document holds or we wrote
    said = json.dumps(document(), ensure_ascii=False)
    for at, words in page.texts:
        if set(at) & {"data", "style", "svg"}:
            continue
        for figure in re.findall(r"(?<![\w.])\d[\d.,]*\d|\b\d\b", words):
            where = figure in said or float(figure.replace(",", "")) in known
            assert where or "95 %" in words or "1: all" in words, (at, words)


def test_numbers_sit_to_the_right(small_html: str) -> None:
    for cell in re.findall(r"<td class=\"([^\"]*)\"><data", small_html):
        assert cell == "number"
    assert "td.number" in STYLE
    assert re.search(r"td\.number[^}]*text-align: right", STYLE)


def test_plotted_points_are_the_documents() -> None:
    """The forecast's plot read back: ticks give the axis, marks must lie at the values."""
    svg = report.plots.intervals("x", [("a", 120.5, 100.0, 150.0), ("b", 250.0, 220.0, None)], "u")
    ticks = [
        (float(words), float(x))
        for x, words in re.findall(
            r'<text [^>]*text-anchor: middle[^>]* x="([\d.]+)"[^>]*>(\d+)<', svg
        )
    ]
    (v0, x0), (v1, x1) = ticks[0], ticks[-1]
    marks = [
        v0 + (float(x) - x0) / (x1 - x0) * (v1 - v0)
        for x in re.findall(r'<use x="([\d.]+)"[^>]*--series-1', svg)
    ]
    assert sorted(marks) == pytest.approx([100.0, 120.5, 150.0, 250.0], rel=1e-4)


def test_positions_read_back() -> None:
    values = [1e-4, 2e-3, None, 5e-2, 1.0]
    svg = report.plots.positions(values, 0.3, "u")
    labels = re.findall(r"<text [^>]*text-anchor: end[^>]*>([\d.e-]+)<", svg)
    lines = re.findall(r'd="M [\d.]+ ([\d.]+)  L [\d.]+ \1  "[^>]*--grid', svg)
    v0, v1 = (math.log10(float(label)) for label in (labels[0], labels[-1]))
    assert len(labels) == len(lines)
    y0, y1 = float(lines[0]), float(lines[-1])
    marks = [
        10 ** (v0 + (float(y) - y0) / (y1 - y0) * (v1 - v0))
        for y in re.findall(r'<use x="[\d.]+" y="([\d.]+)"[^>]*--series-1', svg)
    ]
    assert marks == pytest.approx([v for v in values if v is not None], rel=2e-3)


def test_heat_map_has_a_cell_for_each_module() -> None:
    cells = {(kind, layer): layer + 0.5 for kind in KINDS for layer in range(LAYERS)}
    del cells["mlp.up_proj", 3]  # an adapter need not have all
    svg = report.plots.heat("h", list(KINDS), list(range(LAYERS)), cells, "u")
    colours = re.findall(
        r'clip-path="[^"]*" style="fill: #([0-9a-f]{6}); stroke: var\(--paper\)', svg
    )
    assert len(colours) == len(KINDS) * LAYERS - 1
    assert len(set(colours)) == 24  # cividis, in steps
    luminance = [contrast_to_black(c) for c in colours[:LAYERS]]
    assert luminance == sorted(luminance)  # more is lighter


def test_error_that_is_as_good_as_none_has_one_colour() -> None:
    """Rounding noise far below the bound must not look like a pattern; a breach of it must."""

    def colours(errors: list[float]) -> list[str]:
        rows = [
            {"module": f"model.layers.{n}.fc1", "error": e, "bound": 1e-3}
            for n, e in enumerate(errors)
        ]
        html = report.html(small() | {"suites": [suite("parity", [], {"modules": rows})]})
        svg = html[html.index("Error of the update") :].partition("</svg>")[0]
        return re.findall(r'style="fill: #([0-9a-f]{6}); stroke: var\(--paper\)', svg)

    assert len(set(colours([0.0, 1e-16, 5e-15, 1e-9]))) == 1
    at_bound, beyond = colours([1e-9, 1e-3]), colours([1e-9, 1e-3, 1e-1])
    assert at_bound[1] == beyond[2] != beyond[1]


@pytest.mark.parametrize("values", [[0.0], [1e-300, 1e200, 0.0], [-1.0, 2.0]])
def test_odd_values_are_drawn(values: list[float]) -> None:
    doc = small()
    numbers = doc["suites"][2]["numbers"]
    numbers["per_position"] = values
    for n, m in enumerate(numbers["modules"]):
        m["norm"] = m["gain"] = m["error"] = values[n % len(values)]
    numbers["bound"] = values[0]
    assert len(harmless(report.html(doc)).tags("svg")) == 11


def test_every_device_is_drawn_by_engine_and_spreads_are_shown() -> None:
    """All devices of a package's forecast, which has two engines; the two ends of what was measured."""
    doc = small()
    (latency,) = (x for x in doc["suites"] if x["name"] == "latency")
    row = latency["numbers"]["forecast"][0]
    devices = [f"M{n}" for n in range(32)]
    latency["numbers"]["forecast"] = [
        row | {"device": d, "engine": e} for d in devices for e in ("coreml-ane", "coreml-gpu")
    ]
    latency["numbers"]["targets"] = [{"name": "a", "spread": {"ttft_ms": [1.25, 3.5]}}]
    page = harmless(report.html(doc))
    titles = page.words("figcaption", "strong")
    for engine in ("coreml-ane", "coreml-gpu"):
        assert f"Forecast: tokens per second, {engine}" in titles
    drawn = [d for at, d in page.texts if "svg" in at]
    assert all(drawn.count(d) == 4 for d in devices)  # two engines, two plots
    assert "time to first token [ms] 1.25 to 3.5" in page.words("td")


def test_what_is_missing_is_left_out() -> None:
    doc = document()
    doc["suites"] = [suite("structure", [check("values", "passed", "fine")])]
    for key in ("inputs", "thresholds", "environment", "command", "created", "tool"):
        del doc[key]
    page = harmless(report.html(doc))
    assert not page.tags("svg")
    assert "✓ Passed" in page.words("strong")
    assert "in part" not in page.words("strong")


def test_nothing_measured_is_no_number() -> None:
    doc = small()
    quality = doc["suites"][3]["numbers"]
    quality.update(perplexities={"base": None, "source": math.inf, "result": math.nan})
    quality["gain_kept"] = None
    page = harmless(report.html(doc))
    assert "nan" not in page.words().lower().split()
    assert "inf" not in page.words("data").lower()
    assert [words for _, words in page.texts].count("–") >= 3
    assert "Gain kept" not in page.words("figcaption")
    assert "Perplexity" not in page.words("figcaption")


def test_failure_is_said_first_with_its_place() -> None:
    doc = small()
    doc.update(passed=False, verdict="FAILED: parity")
    parity = doc["suites"][2]
    parity["status"] = "failed"
    where = "model.layers.7.mlp.up_proj"
    parity["checks"].append(check("dW", "failed", "relative error 4e-2", module=where))
    page = harmless(report.html(doc))
    assert "✗ Failed" in page.words("strong")
    assert f"parity, dW, {where}: relative error 4e-2" in page.words("div", "li")
    assert page.words("table", "span").index("✗ failed") < page.words("table", "span").index(
        "! warning"
    )


def replaced(value: Any, texts: Iterator[str], at: tuple[str, ...] = ()) -> Any:
    """Every text of a document that a stranger may choose, and some keys, made hostile."""
    if isinstance(value, dict):
        return {
            (f"{k} {next(texts)}" if at and at[-1] in ("environment", "by_kind") else k): replaced(
                v, texts, (*at, k)
            )
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [replaced(v, texts, at) for v in value]
    if isinstance(value, str) and at[-1] not in ("status",) and at != ("suites", "name"):
        found = next(texts)
        return f"model.layers.{len(at)}.{found}" if at[-1] == "module" else found
    return value


@pytest.mark.parametrize("start", [0, 1])
def test_strangers_texts_are_inert(start: int) -> None:
    texts = itertools.cycle(HOSTILE[start:] + HOSTILE[:start])
    page = harmless(report.html(replaced(small(), texts)))
    assert len(page.tags("svg")) == 13  # two devices' engines are two names now: a plot for each
    for text in HOSTILE:
        if text.isascii() and text.isprintable() and len(text) < 100:  # it is shown as it is
            assert text in page.words("main")
    assert not [words for at, words in page.texts if at[-1] == "text" and len(words) > 60]


def test_ids_and_colours_of_a_plot_cannot_be_forged() -> None:
    label = '$x^2$ " id="y" style="fill: #010203" href="#evil"'
    svg = report.plots.intervals("n", [(label, 1.0, None, None)], label)
    page = Page(svg)
    assert label in page.words("text")
    assert "#evil" not in [a.get("href") for _, a in page.elements]


@pytest.mark.parametrize("schema", [1, 3, "2", True, None, 2.5])
def test_other_schemas_are_refused(schema: object) -> None:
    doc = document() | {"schema": schema}
    with pytest.raises(Refused, match=r"schema .* of schema 2; run") as e:
        report.html(doc, Path("old.json"))
    assert str(e.value).startswith("old.json: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suites": "x"}, "suites is not a list"),
        ({"suites": [1]}, r"suites\[0\] has no name"),
        ({"suites": [{"name": "a", "checks": [{"name": "b"}]}]}, "check without status"),
        ({"passed": "yes"}, "passed is not a bool"),
        ({"verdict": None}, "verdict is not a str"),
    ],
)
def test_damaged_documents_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        report.html(document() | change)


def test_something_else_is_refused() -> None:
    with pytest.raises(Refused, match="no document of `loraduct validate"):
        report.html({"schema": 2, "forecast": []})


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=30)
    | st.sampled_from(HOSTILE),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["module", "gain"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (key,)
        if isinstance(inner, dict | list):
            yield from ((key, *rest) for rest in places(inner))


PLACES = sorted(places(small()), key=str)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(PLACES), ODD), min_size=1, max_size=6))
def test_whatever_is_in_it_the_page_is_whole_or_refused(
    changes: list[tuple[tuple[Any, ...], Any]],
) -> None:
    doc = small()
    for place, value in changes:
        at: Any = doc
        try:
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    before = copy.deepcopy(doc)
    with contextlib.suppress(Refused):
        harmless(report.html(doc))
    assert json.dumps(before, default=str) == json.dumps(doc, default=str)


def test_a_huge_document_stays_small() -> None:
    doc = document()
    long = "x" * 3000
    doc["suites"][2]["numbers"]["modules"] = [
        m | {"module": f"model.layers.{layer}.{m['kind']}.{n}", "note": long}
        for layer in range(200)
        for n, m in enumerate(modules()[:40])
    ]
    doc["suites"][2]["numbers"]["per_position"] = [1e-4 + i * 1e-7 for i in range(100_000)]
    doc["suites"][0]["checks"] = [check(f"c{n}", "failed", long) for n in range(5000)]
    doc["passed"] = False
    page = harmless(report.html(doc))
    assert "of 8,000; all are in the JSON" in page.words("p")
    assert re.search(r"and 4,9\d\d more", page.words("li"))
    assert "more kinds: in the table" in page.words("figcaption")


def test_towers_and_outsiders() -> None:
    """Two lists of blocks don't share a row; what is outside them is counted."""
    doc = small()
    doc["suites"][2]["numbers"]["modules"] = [
        modules()[0] | {"module": f"{tower}.layers.{n}.fc1"}
        for tower in ("vision", "language")
        for n in range(4)
    ] + [modules()[0] | {"module": "lm_head"}]
    page = harmless(report.html(doc))
    assert "vision.layers.fc1" in page.words("svg")
    assert "language.layers.fc1" in page.words("svg")
    assert "1 outside the layers: in the table" in page.words("figcaption")


CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from document import small
from loraduct.validation import report
sys.stdout.buffer.write(report.html(small()).encode())
"""


def test_same_bytes_whatever_the_users_settings(tmp_path: Path, small_html: str) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 40\nsvg.fonttype: path\ntext.usetex: True\n")
    env = {"PYTHONHASHSEED": "7", "MPLCONFIGDIR": str(tmp_path), "LC_ALL": "C", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(Path(__file__).parent)],
        capture_output=True,
        env=env,
        check=True,
    )
    assert done.stdout.decode() == small_html


def test_matplotlib_is_loaded_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import loraduct.validation.report, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'loraduct\[report\]'"):
        report.html(document())


# The palette.


def linear(colour: str) -> list[float]:
    """Linear light of red, green and blue (IEC 61966-2-1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def luminance(rgb: list[float]) -> float:
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def contrast_to_black(colour: str) -> float:
    return (luminance(linear(colour)) + 0.05) / 0.05


def contrast(one: str, two: str) -> float:
    """WCAG 2.2's contrast ratio."""
    low, high = sorted((contrast_to_black(one), contrast_to_black(two)))
    return high / low


def themes() -> dict[str, dict[str, str]]:
    """The colours of either scheme, by variable."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)[:2]
    )
    return {"light": light, "dark": dark}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_stand_out(theme: str) -> None:
    colours = themes()[theme]
    assert colours.keys() == themes()["light"].keys()
    for ground in ("paper", "card"):
        assert contrast(colours["ink"], colours[ground]) >= 7
        for name in ("muted", "good", "bad", "warn"):
            assert contrast(colours[name], colours[ground]) >= 4.5, name
    for n in range(1, 9):
        assert contrast(colours[f"series-{n}"], colours["paper"]) >= 3, n


# What the colour-blind see, of linear light, at full severity: Machado, Oliveira and Fernandes 2009.
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


def lab(rgb: list[float]) -> list[float]:
    """CIE L*a*b* of linear sRGB under D65."""
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    xyz = [
        sum(m * c for m, c in zip(row, rgb, strict=True)) / w
        for row, w in zip(rows, white, strict=True)
    ]
    f = [c ** (1 / 3) if c > 0.008856 else 7.787 * c + 16 / 116 for c in xyz]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", BLIND)
def test_first_series_differ_for_the_colour_blind(theme: str, kind: str) -> None:
    seen = []
    for n in (1, 2, 3, 4):
        rgb = linear(themes()[theme][f"series-{n}"])
        rows = BLIND[kind]
        seen.append(lab([max(0.0, sum(m * c for m, c in zip(r, rgb, strict=True))) for r in rows]))
    for i, one in enumerate(seen):
        for two in seen[:i]:
            assert math.dist(one, two) > 10


def test_page_scrolls_in_its_boxes_and_prints(page: Page) -> None:
    assert ".scroll { overflow-x: auto" in STYLE
    boxes = [a for a in page.tags("div") if a.get("class") == "scroll"]
    assert len(boxes) == len(page.tags("table"))
    assert all(a.get("tabindex") == "0" for a in boxes)  # reached by keys, too
    assert "@media print" in STYLE
    assert "prefers-color-scheme: dark" in STYLE
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.tags(
        "meta"
    )


# The verb.


def test_verb_writes_the_page(cli: Callable[..., Any], tmp_path: Path) -> None:
    file, out = tmp_path / "v.json", tmp_path / "v.html"
    doc = small() | {"passed": False}
    file.write_text(json.dumps(doc))
    done = cli("report", file, "-o", out)
    assert done.exit_code == 0, done.output
    again = cli("report", file, "-o", out)
    assert again.exit_code == 1
    assert "exists; use --force" in again.output
    assert out.read_text() == report.html(doc)
    file.write_text(json.dumps(doc | {"suites": []}))
    assert cli("report", file, "-o", out, "--force").exit_code == 0
    assert "<svg" not in out.read_text()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"schema": 1, "checks": []}',
        b'{"schema": 2}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_verb_refuses_in_one_line(cli: Callable[..., Any], tmp_path: Path, content: bytes) -> None:
    file, out = tmp_path / "v.json", tmp_path / "v.html"
    file.write_bytes(content)
    done = cli("report", file, "-o", out)
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert done.output.count("\n") == 1
    assert not out.exists()


@pytest.mark.heavy
def test_pictures_fit_their_windows(repo: Path, tmp_path: Path) -> None:
    """In a real browser, also with hostile names: nothing sticks out, loads, or logs an error."""
    sys.path.insert(0, str(repo / "scripts"))
    from screenshots import VIEWS, find

    if find() is None:
        pytest.skip("no Chromium here")
    documents = {"good": document(), "hostile": replaced(small(), itertools.cycle(HOSTILE))}
    for name, doc in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(doc))
    files = [tmp_path / f"{name}.json" for name in documents]
    script = repo / "scripts" / "screenshots.py"
    done = subprocess.run(
        [sys.executable, script, *files, "-o", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in documents:
        for view, (width, scale, _) in VIEWS.items():
            head = (tmp_path / f"{name}-{view}.png").read_bytes()[:24]
            assert head[:8] == b"\x89PNG\r\n\x1a\n"
            assert int.from_bytes(head[16:20], "big") == width * scale
        assert (tmp_path / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"


@pytest.mark.heavy
def test_what_sticks_out_is_seen(repo: Path, tmp_path: Path) -> None:
    """The check above can fail: a page that is too wide, or asks for a picture, is told."""
    sys.path.insert(0, str(repo / "scripts"))
    from screenshots import find, opened, take

    chromium = find()
    if chromium is None:
        pytest.skip("no Chromium here")
    page = tmp_path / "wide.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<div style="width: 900px">x</div><img src="no.png">'
    )
    with opened(chromium) as browser:
        wrong = "\n".join(take(browser, page, tmp_path))
    assert "phone: 908 pixels wide of 390" in wrong  # and the margin
    assert "desktop: asks for file://" in wrong
    assert "desktop: 9" not in wrong
