"""Every operation against coremltools' own inference, or torch, or its documentation in loops."""

from __future__ import annotations

from typing import Any

import mil_build as build
import numpy as np
import pytest
from mil_cases import CASES

from loraduct.formats.coreml import package as packages
from loraduct.validation import mil

HALF_AWARE = [
    c for c in CASES
    if all(a.dtype == np.float32 for a in build.flat(c.inputs).values())
    and c.op not in ("cast", "range_1d", "quantize", "argsort", "topk", "dequantize")
    and "_int" not in c.name
]  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """One package per opset, a function per case."""
    found = {}
    for ios in {c.ios for c in CASES}:
        path = tmp_path_factory.mktemp("ops") / f"ios{ios}.mlpackage"
        found[ios] = packages.read(build.package([c for c in CASES if c.ios == ios], path, ios))
    return found


def expected(case: Any) -> list[np.ndarray]:
    """What the oracle says."""
    if case.oracle:
        return case.oracle(case.inputs, case.params)
    return build.quietly(build.by_coremltools, case)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.ios}")
def test_operation(case: Any, made: dict[int, Any]) -> None:
    inputs = build.flat(case.inputs)
    found = list(mil.run(made[case.ios], case.name, inputs).values())
    wanted = expected(case)
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        if mine.dtype.kind == "f":
            np.testing.assert_allclose(
                mine.astype(np.float32), theirs.astype(np.float32), rtol=2e-5, atol=2e-6
            )
        else:
            np.testing.assert_array_equal(mine, theirs)


def halved(value: Any) -> Any:
    """float32 arrays as float16, in dicts and tuples too."""
    if isinstance(value, dict):
        return {k: halved(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(halved(v) for v in value)
    is_float = isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float32
    return value.astype(np.float16) if is_float else value


def widened(value: Any) -> Any:
    """The other way."""
    if isinstance(value, dict):
        return {k: widened(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(widened(v) for v in value)
    is_half = isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float16
    return value.astype(np.float32) if is_half else value


@pytest.fixture(scope="session")
def made_half(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The same in half precision."""
    found = {}
    for ios in {c.ios for c in HALF_AWARE}:
        path = tmp_path_factory.mktemp("half") / f"ios{ios}.mlpackage"
        cases = [
            build.Case(c.op, halved(c.inputs), halved(c.params), c.oracle, ios, c.label)
            for c in HALF_AWARE
            if c.ios == ios
        ]
        found[ios] = packages.read(build.package(cases, path, ios))
    return found


@pytest.mark.parametrize("case", HALF_AWARE, ids=lambda c: f"{c.name}-{c.ios}")
def test_operation_in_half_precision(case: Any, made_half: dict[int, Any]) -> None:
    """Computed wide and rounded once: what the oracle yields on the same values, rounded."""
    half = halved(case.inputs)
    wide = build.Case(
        case.op, widened(half), widened(halved(case.params)), case.oracle, case.ios, case.label
    )
    machine = mil.load(made_half[case.ios], case.name)
    given = build.flat(half)
    found = list(machine.run(given).values())
    strict = list(machine.run(given, precision=mil.STRICT).values())
    for mine, tight, theirs in zip(found, strict, expected(wide), strict=True):
        if mine.dtype.kind != "f":
            np.testing.assert_array_equal(mine, theirs)
            continue
        assert mine.dtype == np.float16
        # 1 unit in the last place: float32 sums in another order may fall to the other side
        np.testing.assert_allclose(
            mine.astype(np.float32), theirs.astype(np.float32), rtol=2**-10, atol=2e-5
        )
        scale = np.abs(theirs.astype(np.float32)).max() + 1
        assert np.abs(tight.astype(np.float32) - theirs.astype(np.float32)).max() <= 0.02 * scale


def test_the_table_covers_what_is_supported() -> None:
    states = {"read_state", "write_state", "coreml_update_state"}
    constexpr = {op for op in mil.supported() if op.startswith("constexpr_")}
    tested = {c.op for c in CASES}
    assert tested | states | constexpr | {"const"} == mil.supported()
    assert len(constexpr) == 7  # each in test_mil_constexpr.py
