"""Plans of `compress`: the best there are, with and without a text; and bad input, a line each."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("transformers")

import families

from loraduct.cli import main
from loraduct.converters import bits, compress_loss, compress_plan, palette, palettize
from loraduct.converters import coreml as builder
from loraduct.converters.compress_code import Way, stored_bytes
from loraduct.converters.compress_curve import page, thinned
from loraduct.converters.compress_package import compress
from loraduct.converters.compress_sites import NEW, OLD, Weight
from loraduct.converters.compress_wanted import Calibration, Wanted
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats.coreml import package as packages
from loraduct.validation import mil

SHAPES = {"one": (32, 96), "two": (16, 128), "three": (48, 48)}
RNG = np.random.default_rng(8)
VALUES = {n: (RNG.normal(size=s) * (i + 1)).astype(np.float16)
          for i, (n, s) in enumerate(SHAPES.items())}  # fmt: skip
MOMENTS = {n: RNG.gamma(0.3, 9.0, size=s[1]) for n, s in SHAPES.items()}
SHARE = {"one": 5.0, "two": 0.2, "three": 1.0}  # what the predictions lose per error


def held() -> list[Weight]:
    """Three weights, each of one operation of its name."""
    found = []
    for i, (name, shape) in enumerate(SHAPES.items()):
        op = SimpleNamespace(outputs=[SimpleNamespace(name=name)])
        found.append(Weight(i, name, "FLOAT16", shape, users=[("main", op)]))
    return found


def read(weight: Weight) -> Any:
    return VALUES[weight.name]


def output_error(name: str, made: Any) -> float:
    """sum_ij E[x_j^2] dW_ij^2, float64."""
    gap = made.astype(np.float64) - VALUES[name].astype(np.float64)
    return float(np.einsum("ij,j->", gap**2, MOMENTS[name]))


def loss(values: Any) -> float:
    return sum(SHARE[n] * output_error(n, v) for n, v in values.items())


def calibration() -> Calibration:
    return Calibration(lambda: MOMENTS, lambda: loss)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("per_weight", [2.8, 3.1, 3.7, 6.0])
def test_no_plan_is_better(per_weight: float, text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all combinations of widths and groups, with errors made and weighed in float64: of what
    the predictions lose by a text, else each to the mean square of its tensor."""
    monkeypatch.setattr(compress_plan, "PALETTES", (2, 3, 4))
    monkeypatch.setattr(compress_plan, "GROUPS", (0, 4))
    monkeypatch.setattr(compress_plan, "PROBE", 4)
    weights = held()
    own = [(0, True), *([(0, False), (4, False)] if text else [])]
    ways = [None, *(Way("lut", b, g, scaled) for g, scaled in own for b in (2, 3, 4))]
    errors = {}
    for w in weights:
        errors[w.name, None] = 0.0
        for way in ways[1:]:
            options = palette.Options(way.bits, group=way.group, scaled=way.scaled)
            counts = MOMENTS[w.name] if text else None
            dense = palette.expand(palettize.palettize(read(w), options, importance=counts))
            wide = read(w).astype(np.float64)
            share = ((dense - wide) ** 2).sum() / (wide**2).mean()
            weighed = SHARE[w.name] * output_error(w.name, dense)
            errors[w.name, way] = weighed if text else float(share)
    given = calibration() if text else None
    plan = compress_plan.budgeted(
        weights, Wanted(bits_per_weight=per_weight, calibration=given), NEW, read, 0
    )
    limit = bits.size_of({w.name: w.count for w in weights}, per_weight)

    def nbytes(chosen: Any) -> int:
        return sum(stored_bytes(w, way, NEW) for w, way in zip(weights, chosen, strict=True))

    def error(chosen: Any) -> float:
        return sum(errors[w.name, way] for w, way in zip(weights, chosen, strict=True))

    best = min(error(c) for c in itertools.product(ways, repeat=3) if nbytes(c) <= limit)
    got = [plan.ways.get(w.offset) for w in weights]
    assert plan.predicted is text
    assert plan.exact
    assert nbytes(got) <= limit
    # the plan knows small tensors' errors but for the quick search of tables
    assert error(got) <= best * 1.02 + 1e-12


def test_sensitivity_is_what_was_measured_over_the_error() -> None:
    weights = held()
    ways = compress_plan.candidates(Wanted(calibration=calibration()), NEW)
    plan = compress_plan.estimated(weights, ways, NEW, read, MOMENTS)
    found = compress_plan.sensitivities(weights, plan, NEW, read, loss)
    for weight in weights:
        assert found[weight.offset] == pytest.approx(SHARE[weight.name], rel=1e-3)
    found = compress_plan.sensitivities(
        weights, plan, NEW, read, lambda v: None if "two" in v else loss(v)
    )
    assert sorted(found) == [0, 2]
    counts = compress_loss.damped(found, dict.fromkeys(range(3), 1.0), 1.0)
    assert counts[1] in (found[0], found[2])  # the median of the others


@pytest.mark.parametrize("best", [0, 1, 2])
def test_of_several_plans_the_one_that_loses_least_is_taken(best: int) -> None:
    """Each is measured with all its tensors changed at once, to what they will be."""
    weights, seen = held(), []

    def lost(values: Any) -> float:
        if len(values) == 1:  # a tensor alone
            return loss(values)
        seen.append({n: output_error(n, v) for n, v in values.items()})
        return 0.5 if len(seen) - 1 == best else 1.0

    given = Calibration(lambda: MOMENTS, lambda: lost)
    wanted = Wanted(bits_per_weight=3.1, calibration=given)
    plan = compress_plan.budgeted(weights, wanted, NEW, read, 0)
    assert len(seen) == len(compress_loss.DAMPED)
    for w in weights:
        way = plan.ways[w.offset]
        options = palette.Options(way.bits, group=way.group, scaled=way.scaled)
        made = palette.expand(palettize.palettize(read(w), options, importance=MOMENTS[w.name]))
        assert seen[best][w.name] == pytest.approx(output_error(w.name, made), rel=0.02)


def test_estimates_of_ways_are_the_errors_made() -> None:
    weights = held()
    ways = [Way("lut", b, g, s) for b in (2, 4) for g in (0, 4, 16) for s in (False, True)]
    plan = compress_plan.estimated(weights, ways, NEW, read, MOMENTS)
    for weight in weights:
        for way in ways:
            options = palette.Options(way.bits, group=way.group, scaled=way.scaled)
            made = palettize.palettize(read(weight), options, importance=MOMENTS[weight.name])
            wanted = output_error(weight.name, palette.expand(made))
            assert plan.errors[weight.offset][way] == pytest.approx(wanted, rel=0.02), way
        wide = VALUES[weight.name].astype(np.float64)
        norm = np.einsum("ij,j->", wide**2, MOMENTS[weight.name])
        assert plan.norms[weight.offset] == pytest.approx(norm, rel=1e-5)


def test_a_sample_of_rows_tells_the_error_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(5).normal(size=(512, 96)).astype(np.float16)
    options = [palette.Options(3, group=g) for g in (4, 16)]
    whole = [palettize.palettize(w, o).error for o in options]
    monkeypatch.setattr(bits, "SAMPLE", w.size // 8)
    assert bits.sampled(w, options) == pytest.approx(whole, rel=0.05)


def test_older_systems_have_one_table_and_no_three_bits() -> None:
    ways = compress_plan.candidates(Wanted(calibration=calibration()), OLD)
    assert ways == [Way("lut", b) for b in (1, 2, 4, 6, 8)]
    assert {w.group for w in compress_plan.candidates(Wanted(), NEW)} == {0}
    assert {w.group for w in compress_plan.candidates(Wanted(group_size=8), NEW)} == {8}


def test_a_curve_is_thinned_and_drawn() -> None:
    points = [(i, i / 100, 1000 + i, 1.0 / (i + 1)) for i in range(1000)]
    few = thinned(points, 20)
    assert len(few) <= 20
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert [p[1] for p in few] == sorted(p[1] for p in few)
    report = SimpleNamespace(
        source=Path("<b>.mlpackage"), curve=few, predicted=True, bits=3.7, after=5000
    )
    drawn = page(report)  # type: ignore[arg-type]
    assert "<b>" not in drawn
    assert "http" not in drawn
    assert drawn.count("<polyline") == 1
    assert drawn.count("<circle") == 1


# -- the command, on a tiny package ------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package, the same compressed, and texts in token numbers."""
    room = tmp_path_factory.mktemp("plans")
    _, folder = families.saved("llama llama3", room / "base")
    base = base_folder.read(folder)
    builder.build(base, room / "x.mlpackage", builder.Options(context=48))
    compress(room / "x.mlpackage", room / "small.mlpackage", Wanted(palettize=4))
    rows = [families.tokens(n)[0].tolist() for n in (30, 31, 29)]
    (room / "ids.jsonl").write_text("".join(json.dumps({"ids": r}) + "\n" for r in rows))
    (room / "text.txt").write_text("A page of text.\nIn two lines.\n")
    (room / "empty.txt").write_text(" \n\n")
    (room / "latin.txt").write_bytes(b"caf\xe9")
    (room / "short.jsonl").write_text('{"ids": [3, 4]}\n')
    (room / "beyond.jsonl").write_text(json.dumps({"ids": [9999] * 20}) + "\n")
    (room / "odd.jsonl").write_text('{"ids": [3]}\n{"name": 1}\n')
    (room / "long.jsonl").write_text(json.dumps({"ids": [5] * 400}) + "\n")
    (room / "there.html").write_text("mine")
    return room


def run(*words: Any) -> Any:
    return CliRunner().invoke(main, ["compress", *map(str, words)])


BAD: dict[str, tuple[str, int]] = {
    "x.mlpackage --bits-per-weight 0.5": ("the smallest possible is", 1),
    "x.mlpackage --bits-per-weight nan": ("nan is not a finite number", 2),
    "x.mlpackage --size 1KB": ("the smallest possible is", 1),
    "x.mlpackage --size huge": ("is no size", 1),
    "x.mlpackage --palettize 4 --size 1MB": ("give one of", 2),
    "x.mlpackage": ("how?", 2),
    "x.mlpackage --quantize int8 --per-channel-scale": ("leave --per-channel-scale out", 2),
    "x.mlpackage --quantize int8 --lut uniform": ("--lut goes with --palettize", 1),
    "x.mlpackage --size 1MB --cluster-dim 2": ("--cluster-dim goes with --palettize", 1),
    "x.mlpackage --palettize 4 --axis 1": ("give --group-size too", 1),
    "x.mlpackage --palettize 4 --base base": ("--base is for the tokenizer", 2),
    "x.mlpackage --palettize 4 --html y.html": ("--html draws the curve", 2),
    "x.mlpackage --size 1MB --html there.html": ("exists; use --force", 1),
    "x.mlpackage --palettize 4 --include nothing": ("holds nothing to compress (not in --include)", 1),
    "x.mlpackage --palettize 4 --include (": ("is no regular expression", 1),
    "x.mlpackage --palettize 4 --adapter-bits 4": ("holds no adapter", 1),
    "small.mlpackage --palettize 4": ("is compressed already", 1),
    "small.mlpackage --size 1MB --calibrate ids.jsonl": ("is compressed already", 1),
    "x.mlpackage --palettize 4 --calibrate empty.txt": ("holds no text", 1),
    "x.mlpackage --palettize 4 --calibrate none.txt": ("none.txt", 1),
    "x.mlpackage --palettize 4 --calibrate latin.txt": ("is not UTF-8", 1),
    "x.mlpackage --palettize 4 --calibrate text.txt": ("holds no tokenizer", 1),
    "x.mlpackage --palettize 4 --calibrate short.jsonl": ("holds 2 tokens; 12 is the least", 1),
    "x.mlpackage --palettize 4 --calibrate beyond.jsonl": ("holds token 9999", 1),
    "x.mlpackage --palettize 4 --calibrate odd.jsonl": ("line 2 is no object", 1),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what, code = BAD[words]
    monkeypatch.chdir(room)
    found = run(*words.split(), "-o", "out.mlpackage")
    assert found.exit_code == code, found.output
    assert what in found.output
    errors = [line for line in found.output.splitlines() if line.lower().startswith("error")]
    assert len(errors) == 1
    assert "Traceback" not in found.output
    assert not (room / "out.mlpackage").exists()
    assert (room / "there.html").read_text() == "mine"


def test_a_text_lessens_the_error_that_it_counts_and_the_loss_is_said(
    room: Path, tmp_path: Path
) -> None:
    """Output errors of the packages' own weights, in float64, by the moments that were measured."""
    from loraduct.validation import calibrate

    made = {}
    for name, more in {"plain": [], "with": ["--calibrate", room / "ids.jsonl"]}.items():
        out = tmp_path / f"{name}.mlpackage"
        words = ["--palettize", "3", "--group-size", "4", "--include", "_proj_weight", "--json"]
        found = run(room / "x.mlpackage", *words, *more, "-o", out)
        assert found.exit_code == 0, found.output
        made[name] = json.loads(found.output)
    runner = calibrate.Runner(packages.read(room / "x.mlpackage"))
    rows = [json.loads(line)["ids"] for line in (room / "ids.jsonl").read_text().splitlines()]
    moments = calibrate.second_moments(runner, rows[:2])
    exact, tuned, plain = (
        weights_of(p)
        for p in (
            room / "x.mlpackage",
            tmp_path / "with.mlpackage",
            tmp_path / "plain.mlpackage",
        )
    )
    total = {"with": 0.0, "plain": 0.0}
    for name in exact:
        if name.endswith("_proj_weight"):
            for kind, held in (("with", tuned), ("plain", plain)):
                gap = held[name].astype(np.float64) - exact[name]
                total[kind] += float((gap**2 @ moments[name]).sum())
    assert total["with"] < total["plain"]
    (quality,) = made["with"]["quality"]
    assert quality["tokens"] == 29
    ids = rows[2:]
    before = runner.logits(ids)
    after = calibrate.Runner(packages.read(tmp_path / "with.mlpackage")).logits(ids)
    assert quality["kl"] == pytest.approx(calibrate.divergence(before, after))
    assert made["plain"]["quality"] == []
    assert any("--calibrate" in n for n in made["plain"]["notes"])


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """The matrices of a package's linear layers, by name."""
    weights = mil.Weights(packages.read(path))
    machine = mil.load(weights.package, None, weights)
    return {
        given.name: weights.get(given)
        for step in machine.program.steps
        if step.kind == "linear"
        for given in [step.arguments["weight"]]
    }


def test_a_plan_shows_its_table_and_curve_and_writes_nothing(room: Path, tmp_path: Path) -> None:
    words = [room / "x.mlpackage", "--bits-per-weight", "3", "--calibrate", room / "ids.jsonl"]
    html = tmp_path / "curve.html"
    before = sorted(room.rglob("*"))
    found = run(*words, "--plan", "--html", html)
    assert found.exit_code == 0, found.output
    assert "bits per weight" in found.output
    assert "predicted KL" in found.output
    assert "chosen" in found.output
    assert html.read_text().startswith("<!doctype html>")
    said = json.loads(run(*words, "--plan", "--json").output)
    curve = said["curve"]
    assert said["curve_error"] == "predicted KL"
    assert all(
        a["bytes"] < b["bytes"] and a["error"] >= b["error"] for a, b in itertools.pairwise(curve)
    )
    assert said["output"] is None
    assert sorted(room.rglob("*")) == before


def test_a_text_beyond_the_context_is_cut_and_said(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mlpackage"
    found = run(
        room / "x.mlpackage", "--palettize", 4, "--calibrate", room / "long.jsonl", "-o", out
    )
    assert found.exit_code == 0, found.output
    assert "96 of the text's 400 tokens are used" in found.output
    assert "on 48 held-out tokens KL" in found.output


@pytest.mark.parametrize("words", [
    ["--lut", "uniform"], ["--cluster-dim", "2", "--group-size", "8"], ["--axis", "1", "--group-size", "8"],
])  # fmt: skip
def test_other_tables_are_what_the_engine_makes(words: Any, room: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mlpackage"
    found = run(room / "x.mlpackage", "--palettize", 4, *words, "--include", "mlp", "-o", out)
    assert found.exit_code == 0, found.output
    given = dict(zip(words[::2], words[1::2], strict=True))
    options = palette.Options(
        4, given.get("--lut", "kmeans"), int(given.get("--group-size", 0)),
        int(given.get("--axis", 0)), vector=int(given.get("--cluster-dim", 1)),
    )  # fmt: skip
    exact, made = weights_of(room / "x.mlpackage"), weights_of(out)
    for name, value in exact.items():
        wanted = value
        if "mlp" in name:
            wanted = palette.expand(palettize.palettize(value.astype(np.float16), options))
        assert np.array_equal(made[name], wanted.astype(np.float32)), name


def test_an_adapter_alone_is_not_calibrated(room: Path, tmp_path: Path) -> None:
    adapter = Path(__file__).parents[2] / "examples" / "reply"
    found = run(adapter, "--palettize", 4, "--calibrate", room / "ids.jsonl", "-o", tmp_path / "a")
    assert found.exit_code == 2
    assert "--calibrate is for packages" in found.output


def test_a_budget_is_refused_with_what_is_least() -> None:
    with pytest.raises(Refused, match="the smallest possible is"):
        compress_plan.budgeted(held(), Wanted(bits_per_weight=0.2), NEW, read, 0)


def test_many_tensors_are_changed_by_kind_and_neighbourhood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six layers of two kinds in four runs: all tensors of a run share what was measured."""
    monkeypatch.setattr(compress_loss, "PROBES", 4)
    names = [f"layers_{i}_{kind}" for kind in ("up", "down") for i in range(6)]
    weights = [Weight(i, n, "FLOAT16", (32, 64)) for i, n in enumerate(names)]
    values = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float16)
    seen: list[list[str]] = []

    def loss(changed: Any) -> float:
        seen.append(list(changed))
        return float(len(seen))

    plan = compress_plan.Plan()
    found = compress_plan.sensitivities(weights, plan, NEW, lambda _: values, loss)
    assert seen == [names[at : at + 3] for at in (0, 3, 6, 9)]
    one = palettize.palettize(values, palette.Options(4, group=16)).error
    wanted = [run / (3 * one) for run in (1, 2, 3, 4) for _ in range(3)]
    assert [found[i] for i in range(12)] == pytest.approx(wanted)


@pytest.mark.heavy
def test_smollm2_mixed_is_better_than_uniform_of_the_same_size(tmp_path: Path) -> None:
    """On a page that was not calibrated with; and 4 bits fit into 70 MB, still a language model."""
    from loraduct.validation import calibrate

    root = Path(__file__).parents[2]
    folder = root / ".cache" / "smollm2-135m-instruct"
    if not (folder / "config.json").exists():
        pytest.skip("needs the base that `make demo` makes")
    base = base_folder.read(folder)
    target = tmp_path / "x.mlpackage"
    builder.build(base, target, builder.Options(context=512))
    data = root / "examples" / "data"
    common = ["--calibrate", data / "calibration.txt", "--json"]
    uniform, mixed = tmp_path / "uniform.mlpackage", tmp_path / "mixed.mlpackage"
    found = run(target, "--palettize", 4, "--group-size", 16, *common, "-o", uniform)
    assert found.exit_code == 0, found.output
    size = json.loads(found.output)["bytes_after"]
    assert size <= 70_000_000
    found = run(target, "--size", size, *common, "-o", mixed)
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["bytes_after"] <= size
    ids = [calibrate.tokenized(folder, [(data / "page.txt").read_text()])[0][:128]]
    before = calibrate.Runner(packages.read(target)).logits(ids)
    quality = {
        p.stem: calibrate.quality(
            p.stem, ids, before, calibrate.Runner(packages.read(p)).logits(ids)
        )
        for p in (uniform, mixed)
    }
    assert quality["mixed"].kl < quality["uniform"].kl
    assert quality["mixed"].after < quality["uniform"].after
    assert quality["mixed"].kl < 0.5
