"""The forecast against arithmetic by hand, its constants against a fit, and what must always hold."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraduct.errors import Refused
from loraduct.validation import forecast as fc
from loraduct.validation.devices import Device, built_in
from loraduct.validation.workload import Workload

BOARD = Device("board", "board", 50e9, 2e12, 30e12, memory=8e9)
LOAD = Workload("m", 1_000_000_000, 500_000_000, 20, cache_bytes=100_000, width=2048)
GPU = fc.ENGINES[fc.GPU]


@pytest.fixture(scope="module")
def published(repo: Path) -> Any:
    """benchmarks/forecast.py, which knows the published points."""
    sys.path.insert(0, str(repo / "benchmarks"))
    try:
        import importlib.util

        spec = importlib.util.spec_from_file_location("points", repo / "benchmarks/forecast.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(repo / "benchmarks"))


def engine(**constants: float) -> fc.Engine:
    return replace(GPU, **constants)


# -- by hand ---------------------------------------------------------------------------------------


def test_a_token_by_hand() -> None:
    # 1 GB at 50 GB/s is 20 ms, times 1.25; 100 kB x 1000 tokens at 50 GB/s are 2 ms, times 2;
    # 20 blocks of 0.1 ms are 2 ms
    e = engine(read=1.25, cache=2.0, block=1e-4)
    assert fc.decode_seconds(LOAD, BOARD, e, 1000) == pytest.approx(0.025 + 0.004 + 0.002)
    row = fc.forecast(LOAD, BOARD, e, 1000)
    assert row.tokens_per_second == pytest.approx(1 / 0.031)
    assert row.memory_bytes == 100_000_000  # the cache; this load says nothing of stored weights


def test_a_prompt_by_hand() -> None:
    # 100 tokens: 2 x 0.5 G operations and 2 x 100 x 20 x 2048 of attention each, at half of 2 T/s:
    # 100 x 1.008192e9 / 1e12 = 0.1008192 s; reading once is 0.025 s and so hidden; blocks 2 ms
    e = engine(read=1.25, compute=0.5, block=1e-4)
    assert fc.prompt_seconds(LOAD, BOARD, e, 100) == pytest.approx(0.1008192 + 0.002)
    # one token is bound by reading
    assert fc.prompt_seconds(LOAD, BOARD, e, 1) == pytest.approx(0.025 + 0.002)
    row = fc.forecast(LOAD, BOARD, e, 100)
    assert row.ms_per_prompt_token == pytest.approx(1.028192)


def test_a_fixed_cache_is_read_whole() -> None:
    e = engine(read=0.0, cache=1.0, block=0.0)
    fixed = replace(LOAD, buffer_bytes=500_000_000, buffer_tokens=5000)
    assert fc.decode_seconds(fixed, BOARD, e, 1) == pytest.approx(0.01)
    assert fc.decode_seconds(fixed, BOARD, e, 4000) == pytest.approx(0.01)


def test_an_adapter_beside_its_base_by_hand() -> None:
    e = engine(read=1.0, cache=0.0, block=1.5e-4)
    beside = replace(LOAD, adapter_bytes=50_000_000, adapter_macs=1, adapter_ops=300)
    # 50 MB more are 1 ms, 300 operations are 20 blocks of 15: 3 ms
    more = fc.decode_seconds(beside, BOARD, e, 1) - fc.decode_seconds(LOAD, BOARD, e, 1)
    assert more == pytest.approx(0.004)


def test_apples_published_figures_are_met() -> None:
    """The calibration of the Neural Engine: 3 B at 3.7 bits on an iPhone 15 Pro, 30/s and 0.6 ms."""
    afm = Workload("AFM", round(2.73e9 * 3.7 / 8), round(2.73e9), 35)
    row = fc.forecast(afm, built_in()["iPhone 15 Pro"], fc.ENGINES[fc.ANE], 512)
    assert row.tokens_per_second == pytest.approx(30, rel=2e-3)
    assert row.ms_per_prompt_token == pytest.approx(0.6, rel=2e-3)
    assert "Apple" in row.source
    assert "calibrated" in row.source
    assert row.low < 20 < 45 < row.high


# -- published points ------------------------------------------------------------------------------


def test_constants_are_those_of_the_fit(published: Any) -> None:
    for name, made in published.fitted().items():
        ours = fc.ENGINES[name]
        if name == fc.ANE:  # its a is the share of the memory's bandwidth
            assert made.read == pytest.approx(fc.ANE_SHARE, rel=1e-3)
        else:
            assert (made.read, made.cache, made.block) == pytest.approx(
                (ours.read, ours.cache, ours.block), rel=1e-3
            )
        assert made.compute == pytest.approx(ours.compute, rel=1e-3)


def test_fit_minimises_relative_errors(published: Any) -> None:
    """Against the normal equations, solved here: sum((a x + d L)/t - 1)^2."""
    rows = [(3.82e9 / published.KNOWN[r[0]].bandwidth, 32.0, 1 / r[3]) for r in published.FITTED]
    x = np.array([[r[0] / r[2], r[1] / r[2]] for r in rows])
    a, d = np.linalg.solve(x.T @ x, x.T @ np.ones(len(rows)))
    made = published.fitted()[fc.GPU]
    assert (made.read, made.block) == pytest.approx((a, d), rel=1e-9)


def test_points_that_were_not_fitted(published: Any) -> None:
    """Decoding within 10 % in the median, and the interval holds 8 of 10; from the tables alone."""
    ratios = []
    for chip, _, model, tg, *_ in published.TESTED:
        read, _, layers, _ = published.MODELS[model]
        bandwidth = json.loads((Path(fc.__file__).parent.parent / "devices.json").read_text())[
            "chips"
        ][chip]["bandwidth_gb_s"][0]
        t = GPU.read * read / (bandwidth * 1e9) + GPU.block * layers
        ratios.append(1 / t / tg)
    assert len(ratios) >= 20
    assert statistics.median(abs(r - 1) for r in ratios) <= 0.10
    inside = sum(1 / GPU.decode - 1e-3 <= r <= GPU.decode + 1e-3 for r in ratios)
    assert inside >= 0.8 * len(ratios) - 1
    assert not set(published.TESTED) & set(published.FITTED)


def test_the_benchmark_meets_its_targets(published: Any) -> None:
    import measure  # benchmarks/measure.py, which `published` has loaded

    tables, targets = published.measure_all()
    assert all(measure.is_met(t) for t in targets), targets
    text = "\n".join(measure.table_text(t) for t in tables)
    assert "+76%" in text  # the worst case is shown


# -- what must always hold -------------------------------------------------------------------------

loads = st.builds(
    Workload,
    st.just("m"),
    st.integers(1, 10**11),
    st.integers(1, 10**11),
    st.integers(1, 200),
    cache_bytes=st.integers(0, 10**6),
    width=st.integers(0, 16384),
    stored_bytes=st.integers(0, 10**11),
    adapter_bytes=st.integers(0, 10**9),
    adapter_macs=st.integers(0, 10**9),
    adapter_ops=st.integers(0, 5000),
)
engines = st.sampled_from(list(fc.ENGINES.values()))
devices = st.sampled_from(list(built_in().values()))
contexts = st.integers(1, 10**5)


@settings(deadline=None)
@given(loads, devices, engines, contexts, st.integers(1, 10**9))
def test_more_work_is_never_faster(
    load: Workload, device: Device, e: fc.Engine, context: int, more: int
) -> None:
    base = fc.decode_seconds(load, device, e, context)
    prompt = fc.prompt_seconds(load, device, e, context)
    assert math.isfinite(base)
    assert base > 0
    for field in ("weight_bytes", "macs", "layers", "cache_bytes", "adapter_bytes", "adapter_ops"):
        heavier = replace(load, **{field: getattr(load, field) + more})
        assert fc.decode_seconds(heavier, device, e, context) >= base
        assert fc.prompt_seconds(heavier, device, e, context) >= prompt
    assert fc.decode_seconds(load, device, e, context + 1) >= base
    assert fc.prompt_seconds(load, device, e, context + 1) >= prompt


@settings(deadline=None)
@given(loads, devices, engines, contexts, st.floats(1, 100))
def test_a_better_device_is_never_slower(
    load: Workload, device: Device, e: fc.Engine, context: int, times: float
) -> None:
    better = replace(
        device,
        bandwidth=device.bandwidth * times,
        flops=device.flops * times,
        ane_ops=device.ane_ops * times,
        ane_bandwidth=None if device.ane_bandwidth is None else device.ane_bandwidth * times,
    )
    assert fc.decode_seconds(load, better, e, context) <= fc.decode_seconds(
        load, device, e, context
    )
    assert fc.prompt_seconds(load, better, e, context) <= fc.prompt_seconds(
        load, device, e, context
    )


@settings(deadline=None)
@given(loads, devices, engines, contexts)
def test_a_fused_adapter_costs_nothing_and_intervals_hold(
    load: Workload, device: Device, e: fc.Engine, context: int
) -> None:
    fused = replace(load, adapter_bytes=0, adapter_macs=0, adapter_ops=0)
    row, bare = (fc.forecast(x, device, e, context) for x in (load, fused))
    assert bare.tokens_per_second >= row.tokens_per_second
    assert row.low <= row.tokens_per_second <= row.high
    assert row.prompt_low <= row.ms_per_prompt_token <= row.prompt_high


# -- fitting ---------------------------------------------------------------------------------------


def synthetic(a: float, c: float, d: float, e: float) -> list[fc.Point]:
    """Exact times of a device with these constants, computed here."""
    points = []
    for size, layers, context in ((1e9, 16, 128), (1e9, 16, 4096), (4e9, 32, 128), (2e8, 30, 1024)):
        load = Workload("m", int(size), int(size / 2), layers, cache_bytes=50_000, width=1024)
        t = a * size / 50e9 + c * 50_000 * context / 50e9 + d * layers
        prompt = context * (size + 2 * context * layers * 1024) / (e * 2e12) + d * layers
        points.append(fc.Point(load, BOARD, context, context, 1 / t, 1e3 * prompt / context))
    return points


def test_a_refit_finds_the_constants_of_what_was_measured() -> None:
    made = fc.refit(GPU, synthetic(1.7, 4.0, 3e-4, 0.31), "mine")
    assert (made.read, made.cache, made.block) == pytest.approx((1.7, 4.0, 3e-4), rel=1e-6)
    assert made.compute == pytest.approx(0.31, rel=1e-6)
    assert made.decode == fc.LEAST
    assert made.source == "mine"


def test_a_refit_counts_the_products_of_an_adapter() -> None:
    """A prompt of 100 tokens on a base of 0.5 G products and an adapter of 0.1 G more."""
    load = replace(LOAD, width=0, adapter_macs=100_000_000)
    seconds = 100 * 2 * 0.6e9 / (0.4 * 2e12)  # at 0.4 of 2 T/s; the blocks cost nothing here
    point = fc.Point(load, BOARD, 100, 100, None, 1e3 * seconds / 100)
    made = fc.refit(engine(block=0.0), [point], "mine")
    assert made.compute == pytest.approx(0.4)


def test_what_reads_nothing_has_no_forecast() -> None:
    bare = replace(LOAD, weight_bytes=0, cache_bytes=0)
    with pytest.raises(Refused, match="nothing to forecast"):
        fc.forecast(bare, BOARD, fc.ENGINES[fc.ANE], 1)


def test_a_refit_through_one_point() -> None:
    point = fc.Point(LOAD, BOARD, 128, 128, 7.0, 5.0)
    made = fc.refit(fc.ENGINES[fc.COREML_GPU], [point], "mine")
    row = fc.forecast(LOAD, BOARD, made, 128)
    assert row.tokens_per_second == pytest.approx(7.0)
    assert row.ms_per_prompt_token == pytest.approx(5.0)


def test_a_prompt_that_took_less_than_a_token() -> None:
    """At 20 tokens a second reading once takes nearly 50 ms; the prompt of 64 is said to take 19.2."""
    point = fc.Point(LOAD, BOARD, 128, 64, 20.0, 0.3)
    with pytest.raises(Refused, match=r"64 tokens took 19\.2 ms.* by tokens_per_second, 49\.\d ms"):
        fc.refit(GPU, [point], "mine")
    # 64 tokens in 50 ms and more can be, and are met
    made = fc.refit(GPU, [replace(point, ms_per_prompt_token=0.9)], "mine")
    row = fc.forecast(LOAD, BOARD, made, 64)
    assert row.ms_per_prompt_token == pytest.approx(0.9)
    # by the cache: a token that reads much of it takes longer than a prompt does
    wide = replace(LOAD, buffer_bytes=4_000_000_000)
    made = fc.refit(GPU, [replace(point, load=wide)], "mine")
    assert fc.forecast(wide, BOARD, made, 64).ms_per_prompt_token == pytest.approx(0.3)
    # three points: those that can't be are in the interval, as long as one tells
    several = [
        fc.Point(LOAD, BOARD, n, 64, 20.0, ms) for n, ms in ((1, 0.3), (999, 0.9), (9999, 0.9))
    ]
    assert fc.refit(GPU, several, "mine").prompt > 2


def test_fits_never_have_negative_constants() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        points = [replace(p, tokens_per_second=p.tokens_per_second * rng.uniform(0.3, 3))
                  for p in synthetic(1.0, 1.0, 1e-4, 0.5)]  # fmt: skip
        made = fc.refit(GPU, points, "noise")
        assert min(made.read, made.cache, made.block) >= 0
        assert max(made.read, made.cache, made.block) > 0


def test_the_factor_holds_the_share_it_names() -> None:
    found = [0.0, 0.1, -0.1, 0.2, 3.0]
    assert fc.factor(found, 0.8) == pytest.approx(1.2)  # four of five, the fifth is off by 4
    assert fc.factor([]) == 1.0


# -- files of measurements -------------------------------------------------------------------------


def document(**changes: Any) -> dict[str, Any]:
    point = {
        "context": 128,
        "prompt_tokens": 64,
        "tokens_per_second": 20.0,
        "ms_per_prompt_token": 2.0,
    }
    return {
        "schema": 1,
        "device": "iPhone16,1",
        "engine": "coreml-ane",
        "points": [point],
    } | changes


def with_load(**changes: Any) -> dict[str, Any]:
    """A point of another target than the one that is forecast."""
    return {"points": [{"context": 1, "tokens_per_second": 3, "load": LOAD.as_json() | changes}]}


def test_a_point_brings_its_own_load(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text(json.dumps(document(**with_load(context=64))))
    _, (point,) = fc.measured(file, None, built_in())
    assert point.load == replace(LOAD, context=64)


def test_a_file_of_measurements_is_read(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text(json.dumps(document()))
    name, (point,) = fc.measured(file, LOAD, built_in())
    assert (name, point.device.name) == ("coreml-ane", "iPhone 15 Pro")
    assert (point.load, point.context, point.prompt) == (LOAD, 128, 64)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"schema": 0}, "schema 0, expected 1"),
        ({"schema": None}, "expected 1"),
        ({"schema": True}, "schema True, expected 1"),
        ({"engine": ["gpu"]}, "expected gpu, coreml-gpu, coreml-ane"),
        ({"engine": "cuda"}, "'cuda', expected gpu, coreml-gpu, coreml-ane"),
        ({"device": 3}, "names no device"),
        ({"device": "iPhone 15 Prp"}, "'iPhone 15 Pro'"),
        ({"device": "all"}, "say the one it was measured on"),
        ({"points": []}, "holds no points"),
        ({"points": [3]}, "point 0: is not an object"),
        ({"points": [{"context": 0, "tokens_per_second": 3}]}, "context is 0"),
        ({"points": [{"context": 128}]}, "neither"),
        ({"points": [{"context": 128, "tokens_per_second": -1}]}, "above 0"),
        ({"points": [{"context": 128, "tokens_per_second": True}]}, "above 0"),
        # 1 GB at 0.7398 x 51.2 GB/s is 37.9 tokens a second; 1 G operations at 35 T/s are 1/35 ms
        ({"points": [{"context": 128, "tokens_per_second": 380}]}, "10 times what iPhone 15 Pro's"),
        ({"points": [{"context": 128, "tokens_per_second": 1e17}]}, "check the number and its unit"),
        ({"points": [{"context": 128, "tokens_per_second": 5e-324}]}, "check the number and its unit"),
        ({"points": [{"context": 128, "ms_per_prompt_token": 1e-30}]}, "check the number and its"),
        ({"points": [{"context": 128, "ms_per_prompt_token": 0.0028}]}, "times what iPhone 15 Pro's"),
        ({"points": [{"context": 1, "tokens_per_second": 3, "load": {"x": 1}}]}, "other fields"),
        ({"points": [{"context": 10**400, "tokens_per_second": 3}]}, "above 0"),
        ({"points": [{"context": 1.5, "tokens_per_second": 3}]}, "context is 1.5"),
        (with_load(weight_bytes="big"), "weight_bytes is 'big', expected a count"),
        (with_load(layers=None), "layers is None"),
        (with_load(macs=-1), "macs is -1"),
        (with_load(width=True), "width is True"),
        (with_load(weight_bytes=0), "reads or computes nothing"),
    ],
)  # fmt: skip
def test_broken_measurements_are_refused(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    file = tmp_path / "m.json"
    file.write_text(json.dumps(document(**changes)))
    with pytest.raises(Refused, match=r"m\.json") as e:
        fc.measured(file, LOAD, built_in())
    assert what in str(e.value)
    assert "\n" not in str(e.value)


def test_measurements_of_what_reads_nothing(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text(json.dumps(document()))
    with pytest.raises(Refused, match="nothing to forecast"):
        fc.measured(file, replace(LOAD, weight_bytes=0), built_in())


def test_measurements_need_a_load(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text(json.dumps(document()))
    with pytest.raises(Refused, match="has no load"):
        fc.measured(file, None, built_in())
    file.write_text("{")
    with pytest.raises(Refused, match="is not JSON"):
        fc.measured(file, LOAD, built_in())
