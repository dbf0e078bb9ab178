"""Measuring: what is counted and reported. No time is asserted, only that there is one."""

from __future__ import annotations

import io
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraduct.errors import MissingExtra, Refused
from loraduct.formats import base as base_folder
from loraduct.formats import read
from loraduct.formats.coreml import package as package_folder
from loraduct.formats.options import ReadOptions
from loraduct.validation import (
    coreml,
    devices,
    forecast,
    latency,
    latency_child,
    latency_coreml,
    latency_targets,
    mil,
    suites,
    workload,
)
from loraduct.validation.latency import Measured, Target
from loraduct.validation.runtimes import RuntimeFailed


def measured(targets: list[Target], **options: Any) -> tuple[list[Measured], list[latency.Ratio]]:
    return latency.measure(targets, options.pop("contexts", [8]), 3, 2, **options)


def test_an_adapter_and_its_base_in_turns(tied: Path, adapter: Path) -> None:
    said: list[str] = []
    targets = [
        latency_targets.target_of(adapter, tied),
        latency_targets.target_of(tied, None),
    ]
    assert [(t.runtime, t.dtype, t.vocabulary, t.most) for t in targets] == [
        ("torch", "float32", 160, 128)
    ] * 2
    done, ratios = measured(targets, contexts=[4, 16], progress=said.append)
    assert [(m.name, m.context) for m in done] == [
        (str(adapter), 4), (str(adapter), 16), (str(tied), 4), (str(tied), 16),
    ]  # fmt: skip
    for m in done:
        assert m.rounds == 2
        assert m.generate == 3
        assert m.ttft_ms > 0
        assert m.ms_per_prompt_token == pytest.approx(m.ttft_ms / m.context)
        low, high = m.spread["tokens_per_second"]
        assert 0 < low <= m.tokens_per_second <= high
        assert m.load_s > 0
        assert m.peak_bytes > 50_000_000  # a process with torch in it
        assert (m.swap_ms is not None) == (m.name == str(adapter))
        assert m.facts["dtype"] == "float32"
        assert set(m.as_json()) >= {"name", "runtime", "ttft_ms", "spread", "dtype", "versions"}
    assert [(r.context, r.what) for r in ratios] == [
        (4, "prompt"), (4, "decode"), (16, "prompt"), (16, "decode"),
    ]  # fmt: skip
    assert all(r.low <= r.median <= r.high for r in ratios)
    assert [s for s in said if s.startswith("round")] == ["round 1 of 2", "round 2 of 2"]
    json.dumps([m.as_json() for m in done], allow_nan=False)


def test_the_peak_is_the_childs_own(tied: Path) -> None:
    """A process that holds much itself must not be counted in what it starts."""
    held = bytearray(400_000_000)
    for i in range(0, len(held), 4096):
        held[i] = 1
    code = "from loraduct.validation.latency_child import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1_000_000 < int(done.stdout) < 200_000_000
    assert latency_child.peak_bytes() > 400_000_000
    del held


@pytest.mark.parametrize("dtype", ["stored", "float16"])
def test_a_swap_in_mlx_keeps_the_dtype(tied: Path, mlx_adapter: Path, dtype: str) -> None:
    import mlx.core as mx

    job = {"base": str(tied), "adapter": str(mlx_adapter), "dtype": dtype}
    model = latency_child.Mlx(job)
    layer = model.model.model.layers[0].self_attn.q_proj
    before, first = layer.lora_a.dtype, mx.array(layer.lora_a)
    assert before == (mx.float16 if dtype == "float16" else mx.float32)
    layer.lora_a = mx.zeros_like(layer.lora_a)
    assert model.swap() is not None
    assert layer.lora_a.dtype == before
    assert mx.array_equal(layer.lora_a, first)  # what is on disk, and in the model before


class Counting:
    """A model that writes down how it is used."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def prompt(self, ids: list[int]) -> int:
        self.calls.append(list(ids))
        return 7

    def step(self, token: int) -> int:
        self.calls.append(token)
        return token + 1

    def swap(self) -> float | None:
        self.calls.append("swap")
        return 0.25

    def facts(self) -> dict[str, Any]:
        return {}


def test_a_round() -> None:
    """Each context once, the same tokens every time, each generated token given to the next step."""
    model = Counting()
    found = latency_child.one_round(model, [3, 5], 2, 50)
    assert [len(c) if isinstance(c, list) else c for c in model.calls] == [3, 7, 8, 5, 7, 8, "swap"]
    assert all(0 <= t < 50 for t in model.calls[0])
    assert [r["context"] for r in found["contexts"]] == [3, 5]
    assert [len(r["token_ms"]) for r in found["contexts"]] == [2, 2]
    assert found["swap_ms"] == 250
    again = Counting()
    latency_child.one_round(again, [3, 5], 2, 50)
    assert again.calls == model.calls


def test_medians_and_ratios_by_hand() -> None:
    def row(ttft: float, token: list[float], swap: float | None) -> dict[str, Any]:
        return {"contexts": [{"context": 10, "ttft_ms": ttft, "token_ms": token}], "swap_ms": swap}

    child: Any = SimpleNamespace(target=Target("t", "torch", Path()), load_s=1.5, facts={})
    rows = [row(30, [1, 2, 9], 5), row(20, [4, 4, 4], 7), row(100, [3, 3, 3], 6)]
    m = latency._measured(child, rows, 99, 0, 10, 3)
    assert (m.ttft_ms, m.ms_per_prompt_token, m.swap_ms) == (30, 3, 6)
    assert m.tokens_per_second == pytest.approx(1e3 / 3)  # medians 2, 4, 3
    assert m.spread["tokens_per_second"] == (250, 500)
    assert m.spread["ttft_ms"] == (20, 100)
    other = [row(60, [4], None), row(60, [4], None), row(100, [9], None)]
    prompt, decode = latency._ratios([rows, other], [10])
    assert (prompt.median, prompt.low, prompt.high) == (2, 1, 3)
    assert (decode.median, decode.low, decode.high) == (2, 1, 3)
    assert statistics.median([60 / 30, 60 / 20, 100 / 100]) == 2


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_context_beyond_the_models(tied: Path) -> None:
    target = latency_targets.target_of(tied, None)
    with pytest.raises(Refused, match="made for 128") as e:
        latency.measure([target], [126], 3, 1)
    assert "\n" not in str(e.value)


def test_a_child_that_fails_says_why(tied: Path, tmp_path: Path) -> None:
    broken = tmp_path / "base"
    shutil.copytree(tied, broken)
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    target = Target("broken", "mlx", broken, None, "stored", "ALL", 160, 128)
    with pytest.raises(RuntimeFailed, match=r"mlx did not run broken: [A-Z]") as e:
        measured([target])
    assert "\n" not in str(e.value)


def test_a_child_that_dies_is_told_of(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "CHILD", "loraduct.no_such_module")
    with pytest.raises(RuntimeFailed, match=r"exit code 1: .*no_such_module"):
        measured([latency_targets.target_of(tied, None)])


def test_a_missing_extra_is_named(tied: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["x", json.dumps({"runtime": "torch", "adapter": None})])
    monkeypatch.setattr(latency_child.os, "dup", lambda _: 7)
    monkeypatch.setattr(latency_child.os, "dup2", lambda *_: None)
    out = io.StringIO()
    monkeypatch.setattr(latency_child.os, "fdopen", lambda *_, **__: out)
    latency_child.main()
    assert json.loads(out.getvalue()) == {"missing": "torch"}
    child: Any = object.__new__(latency.Child)
    child.target = Target("t", "torch", Path())
    child.process = SimpleNamespace(stdout=io.StringIO(out.getvalue()))
    with pytest.raises(MissingExtra, match=r"loraduct\[torch\]"):
        child._answer()


def test_targets_that_cannot_run_here(
    tied: Path, adapter: Path, mlx_adapter: Path, package: Path, tmp_path: Path
) -> None:
    def refused(what: str, *args: Any) -> None:
        with pytest.raises(Refused) as e:
            latency_targets.target_of(*args)
        assert what in str(e.value)
        assert "\n" not in str(e.value)

    refused("--base says", adapter, None)
    refused("convert --to mlx", adapter, tied, "mlx")
    refused("convert --to peft", mlx_adapter, tied, "torch")
    refused("is no package", tied, None, "coreml")
    refused("runs in coreml, not in torch", package, None, "torch")
    if sys.platform != "darwin":
        refused("Apple's systems only", package, None)
        refused("Apple's systems only", Path(f"{package}:a"), None)
    (tmp_path / "model.onnx").write_bytes(b"")
    refused("is an ONNX model", tmp_path, None)
    refused("is an ONNX model", tmp_path / "model.onnx", None)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tied / "config.json", bare)
    refused("holds no weights", bare, None)
    refused("holds no weights", adapter, bare)
    refused("does not exist", tmp_path / "nothing", tied)


# -- Core ML: only how Apple's plan is counted, by a stand-in for it ---------------------------------


@dataclass
class Operation:
    operator_name: str
    blocks: tuple[Any, ...] = ()


class MLCPUComputeDevice: ...


class MLNeuralEngineComputeDevice: ...


class Plan:
    """As coremltools 9.0 types MLComputePlan; which unit gets what is made up here."""

    def __init__(self) -> None:
        inner = SimpleNamespace(operations=[Operation("ios18.relu")])
        operations = [
            Operation("const"), Operation("ios18.linear"), Operation("ios18.gather"),
            Operation("ios18.linear"), Operation("cond", (inner,)),
        ]  # fmt: skip
        block = SimpleNamespace(operations=operations)
        functions = {"main": SimpleNamespace(block=block)}
        self.model_structure = SimpleNamespace(program=SimpleNamespace(functions=functions))

    def get_compute_device_usage_for_mlprogram_operation(self, op: Operation) -> Any:
        if op.operator_name == "const":
            return None
        on_engine = op.operator_name == "ios18.linear"
        device = MLNeuralEngineComputeDevice() if on_engine else MLCPUComputeDevice()
        return SimpleNamespace(preferred_compute_device=device)

    def get_estimated_cost_for_mlprogram_operation(self, op: Operation) -> Any:
        return SimpleNamespace(weight=0.4) if op.operator_name == "ios18.linear" else None


def test_placement_is_counted_with_nested_blocks() -> None:
    found = latency_coreml.placement(Plan(), "main")
    assert found["operations"] == {"Neural Engine": 2, "CPU": 3}
    assert found["cost_share"] == {"Neural Engine": 1.0, "CPU": 0.0}
    assert found["off_neural_engine"] == {"gather": 1, "cond": 1, "relu": 1}


FORMS = {"stateful": (), "fixed shapes": ("--shapes", "1,8"), "stateless": ("--stateless",)}


class Interpreted:
    """In place of coremltools' CompiledMLModel: our interpreter, with Apple's way of keeping states."""

    def __init__(self, path: str, compute_units: Any, function_name: str) -> None:
        self.machine = mil.load(package_folder.read(Path(path)), function_name)

    def make_state(self) -> Any:
        held = self.machine.new_state()

        def write(name: str, value: Any) -> None:
            held[name] = value

        return SimpleNamespace(held=held, read_state=held.__getitem__, write_state=write)

    def predict(self, inputs: dict[str, Any], state: Any) -> dict[str, Any]:
        return self.machine.run(inputs, state.held if state else None)


@pytest.mark.parametrize("form", FORMS)
def test_core_ml_is_fed_as_our_packages_want_it(
    form: str, tied: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, positions, masks and the hand-over of the cache: the tokens are the interpreter's own.

    It proves the calls, nothing of Core ML.
    """
    import coremltools as ct
    from click.testing import CliRunner

    from loraduct.cli import main

    out = tmp_path / "p.mlpackage"
    args = [
        "package",
        "--base",
        tied,
        "-a",
        f"a={adapter}",
        "--context",
        40,
        *FORMS[form],
        "-o",
        out,
    ]
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    monkeypatch.setattr(ct.models, "CompiledMLModel", Interpreted)
    monkeypatch.setattr(ct.models.utils, "compile_model", lambda path: path)
    made = latency_coreml.CoreML({"base": str(out), "adapter": "a", "units": "ALL"})
    ids = [5, 17, 101, 3, 44, 90, 8, 23, 77, 11, 60]
    session = coreml.session(package_folder.read(out), "a")
    wanted = coreml.greedy(session, ids, 6)
    for _ in range(2):  # a second conversation begins anew
        found = [made.prompt(ids)]
        while len(found) < 6:
            found.append(made.step(found[-1]))
        assert found == wanted
    assert made.swap() is not None


def test_the_swift_program_writes_what_is_read(repo: Path, tmp_path: Path) -> None:
    """Its names are those of our packages and of the file; that it compiles is not tested."""
    text = (repo / "docs/measure.swift").read_text()
    for name in (coreml.IDS, coreml.MASK, coreml.POSITION):
        assert f'"{name}":' in text
    assert '_q\\(q)"' in text
    point = {
        "context": 128,
        "prompt_tokens": 64,
        "ms_per_prompt_token": 0.6,
        "tokens_per_second": 30.0,
    }
    assert all(f"{key}:" in text for key in (*point, "schema", "device", "engine", "points"))
    engines = re.findall(r'"(coreml-[a-z]+)"', text)
    assert set(engines) == {forecast.COREML_GPU, forecast.ANE}
    file = tmp_path / "measured.json"
    value = {"schema": 1, "device": "iPhone16,1", "engine": engines[0], "points": [point]}
    file.write_text(json.dumps(value))
    load = workload.Workload("m", 10**9, 10**9, 20)
    assert forecast.measured(file, load, devices.built_in())[1][0].device.chip == "A17 Pro"


# -- the suite of validate -------------------------------------------------------------------------


def context(base: Path, *adapters: Path, **options: Any) -> suites.Context:
    model = base_folder.read(base)
    found = tuple(read(a, ReadOptions(base=model, restore=False)) for a in adapters)
    runs: Any = SimpleNamespace(progress=lambda what: None)
    return suites.Context(found, model, runs, **options)


def test_the_suite(tied: Path, adapter: Path, mlx_adapter: Path) -> None:
    done = latency.run(
        context(tied, adapter, mlx_adapter, wanted=frozenset({"latency"}),
                options={"context": 8, "generate": 2})
    )  # fmt: skip
    assert done.status == "passed"
    n = done.numbers
    assert [t["runtime"] for t in n["targets"]] == ["torch", "mlx"]
    ships = n["targets"][1]
    assert n["ms_per_prompt_token"] == ships["ms_per_prompt_token"]
    assert n["peak_memory_bytes"] == ships["peak_bytes"]
    assert ships["swap_ms"] > 0
    assert ships["dtype"] == "stored"
    assert ships["versions"]["mlx-lm"]
    assert n["tokens_per_second"] > 0
    assert n["first_token_ms"] > 0
    assert n["load_seconds"] > 0
    assert {r["device"] for r in n["forecast"]} == set(devices.built_in())
    json.dumps(dict(n), allow_nan=False)


def test_the_suite_measures_within_what_the_model_was_made_for(tied: Path, adapter: Path) -> None:
    """128 positions, and the usual prompt alone has as many."""
    (row,) = latency.run(context(tied, adapter)).numbers["targets"]
    assert (row["context"], row["generate"]) == (128 - latency.GENERATE, latency.GENERATE)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs there")
def test_the_suite_of_a_package_forecasts_only(tied: Path, package: Path) -> None:
    path = Path(f"{package}:a")
    done = latency.run(context(tied, path, given=frozenset({"max_memory"})))
    assert done.status == "skipped"
    assert "Apple's systems only" in done.reason
    assert {r["engine"] for r in done.numbers["forecast"]} == {"coreml-ane", "coreml-gpu"}
    assert "tokens_per_second" not in done.numbers


def test_gates_hold_for_a_package_that_ships(
    tied: Path, adapter: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac, with made-up times: the numbers are those of the second, a package's function."""

    def measure(targets: list[Target], *_: Any) -> tuple[list[Measured], list[latency.Ratio]]:
        return [
            Measured(t.name, t.runtime, 8, 2, 1.0, 0.125, 9.0, 1.0, None, n, 2, {})
            for n, t in enumerate(targets, 1)
        ], []

    monkeypatch.setattr(latency_targets.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(latency, "measure", measure)
    pair = context(tied, adapter, Path(f"{package}:a"), wanted=frozenset({"latency"}))
    numbers = latency.run(pair).numbers
    assert [t["runtime"] for t in numbers["targets"]] == ["torch", "coreml"]
    assert numbers["targets"][1]["name"] == f"{package}:a"
    assert numbers["peak_memory_bytes"] == 2


def test_the_stand_in_has_coremltools_names() -> None:
    """What `placement` reads exists under these names in the installed coremltools."""
    import contextlib
    import dataclasses

    with contextlib.redirect_stderr(io.StringIO()):
        from coremltools.models import compute_device, compute_plan
    plan = compute_plan.MLComputePlan
    for name in (
        "get_compute_device_usage_for_mlprogram_operation",
        "get_estimated_cost_for_mlprogram_operation",
        "load_from_path",
        "model_structure",
    ):
        assert hasattr(plan, name)
    assert all(hasattr(compute_device, n) for n in latency_coreml._NAMES)

    def fields(kind: Any) -> set[str]:
        return {f.name for f in dataclasses.fields(kind)}

    assert "functions" in fields(compute_plan.MLModelStructureProgram)
    assert "block" in fields(compute_plan.MLModelStructureProgramFunction)
    assert "operations" in fields(compute_plan.MLModelStructureProgramBlock)
    assert {"operator_name", "blocks"} <= fields(compute_plan.MLModelStructureProgramOperation)
    assert "preferred_compute_device" in fields(compute_plan.MLComputePlanDeviceUsage)
    assert "weight" in fields(compute_plan.MLComputePlanCost)


@pytest.mark.heavy
def test_smollm2_with_its_adapter_beside_and_without(repo: Path) -> None:
    """The real base and a trained adapter, in torch, in turns; and what it costs is forecast."""
    base = repo / ".cache/smollm2-135m-instruct"
    adapter = repo / "examples/reply"
    targets = [latency_targets.target_of(p, base) for p in (base, adapter)]
    done, ratios = latency.measure(targets, [64], 8, 2)
    assert [m.swap_ms is not None for m in done] == [False, True]
    # float32 of 134.5 M values, and no second copy of them
    assert all(538_000_000 < m.peak_bytes < 3_000_000_000 for m in done)
    assert len(ratios) == 2
    load = workload.of_base(base_folder.read(base))
    assert load.macs == 134_515_008 - (2 * 30 + 1) * 576
    assert load.weight_bytes == 2 * 134_515_008
