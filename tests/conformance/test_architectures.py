"""The table of module names against the libraries: derived again, type by type, it is the same.

What scripts/architectures.py does for the table is done here for each model type: build a tiny
model, run mlx-lm's ``sanitize`` on it, follow every tensor. No type is skipped: what the table has
is built, and what is left out is listed with its reason.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = _load("architectures")
TABLE: dict[str, dict[str, Any]] = script.read_table()
PLACES = {
    "same": 0,
    "halves": 0,
    "interleaved": 0,
    "stack": -1,
    "rows": 1,
}  # {} in mlx more than hf


@pytest.mark.parametrize("model_type", sorted(script.TINY))
def test_derived_again_it_is_the_same(model_type: str) -> None:
    assert script.differences(TABLE.get(model_type, {}), script.derive(model_type)) == []


def test_every_type_of_the_table_is_built_and_the_others_are_listed() -> None:
    assert TABLE.keys() == script.TINY.keys()
    assert len({name.split()[0] for name in TABLE}) == 88
    assert sorted(script.LEFT_OUT) == ["bailing_hybrid", "gemma3n", "minimax", "nanochat"]
    assert not TABLE.keys() & script.LEFT_OUT.keys()


@pytest.mark.parametrize("model_type", sorted(TABLE))
def test_each_module_has_one_answer(model_type: str) -> None:
    entry = TABLE[model_type]
    rules = entry.get("rules", [])
    named = [*entry.get("equal", []), *(rule[0] for rule in rules), *entry.get("blocked", {})]
    assert len(named) == len(set(named))
    assert entry.get("router") in {None, *entry.get("equal", []), *(rule[0] for rule in rules)}
    for hf, mlx, how, *more in rules:
        names = [mlx] if isinstance(mlx, str) else mlx
        assert len(names) == (2 if how in ("halves", "interleaved") else 1)
        assert {name.count("{}") - hf.count("{}") for name in names} == {PLACES[how]}
        assert more in ([], ["transposed"] if how == "rows" else ["turned"], ["zero experts"])


OLD = np.arange(4096, 4096 + 4 * 6 * 5).reshape(4, 6, 5)  # four experts, six outputs, five inputs
PATH, NAME = "m.0.new", "m.0.old"


@pytest.mark.parametrize(
    ("new", "how", "part", "transposed"),
    [
        (OLD, "same", 0, False),
        (OLD.swapaxes(1, 2), "same", 0, True),
        (OLD[:, :3], "halves", 0, False),
        (OLD[:, 3:], "halves", 1, False),
        (OLD[:, 1::2], "interleaved", 1, False),
        (OLD.swapaxes(1, 2)[:, :2], "halves", 0, True),
    ],
)
def test_how_a_tensor_came_about(new: Any, how: str, part: int, transposed: bool) -> None:
    expected = script.Fact("m.{}.new", how, part, transposed)
    assert script.fact_of_one(PATH, new, NAME, OLD) == expected


def test_experts_in_rows_and_in_stacks_are_matched_one_by_one() -> None:
    flat = OLD.reshape(24, 5)
    assert script.fact_of_one("m.0.e.2", OLD[2], NAME, flat).how == "rows"
    assert script.fact_of_one("m.0.e.1", OLD[2], NAME, flat) is None
    single = {f"m.0.e.{i}": OLD[i] for i in range(4)}
    assert script.fact_of_many(PATH, OLD, list(single), single).how == "stack"
    assert script.fact_of_many(PATH, OLD[::-1], list(single), single) is None


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (PATH, OLD[:, ::-1]),  # every number is there, in another order
        (PATH, OLD[:, :2]),
        ("m.1.new", OLD),  # the right numbers in the wrong layer
    ],
)
def test_what_no_rule_describes_is_not_described(path: str, new: Any) -> None:
    assert script.fact_of_one(path, new, NAME, OLD) is None


def test_a_multiplier_folded_into_a_weight_is_noticed() -> None:
    """Under a weight that mlx-lm has multiplied, the same factors would be another update."""
    rows = np.array([2, 2, 4, 4, 2, 8])[:, None]
    assert script.is_multiple(4 * OLD, OLD)
    assert script.is_multiple(rows * OLD, OLD)
    assert not script.is_multiple(OLD[:, ::-1], OLD)
    blocked = TABLE["falcon_h1"]["blocked"]
    assert blocked["model.layers.{}.self_attn.q_proj"] == script.SCALED


def test_a_wrong_table_is_noticed() -> None:
    right = TABLE["mixtral"]
    halves = next(rule for rule in right["rules"] if rule[2] == "halves")
    wrong = [[halves[0], halves[1][::-1], "halves"] if r is halves else r for r in right["rules"]]
    assert len(script.differences(right | {"rules": wrong}, right)) == 2
    assert script.differences(right | {"rules": right["rules"][::-1]}, right) == [
        "~ the order differs"
    ]
