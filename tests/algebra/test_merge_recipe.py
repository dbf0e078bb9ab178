"""Recipes: what they say is what is merged, and what they can't say is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraduct.converters import recipe
from loraduct.errors import Refused
from loraduct.formats import read

Folders = Callable[..., Path]
RECIPE = """
merge_method: linear
models:
  - model: one
    parameters:
      weight:
        - filter: self_attn\\.q
          value: [0.0, 1.0]
        - filter: mlp
          value: 0.25
        - value: 2
  - model: two
    parameters: {weight: -0.3}
"""


def test_weights_by_module_and_by_layer(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    one, two = peft_folder("one", layers=3), peft_folder("two", layers=3)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = cli("merge", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found, a, b = (read(f).low_rank for f in (tmp_path / "out", one, two))
    for module, u in found.items():
        layer = int(module.split(".")[2])
        weight = layer / 2 if "q_proj" in module else 0.25 if "mlp" in module else 2.0
        wanted = sum(
            w * x[module].scale * (x[module].b.read().astype(np.float64) @ x[module].a.read())
            for x, w in ((a, weight), (b, -0.3))
        )
        got = u.scale * (u.b.read().astype(np.float64) @ u.a.read())
        assert np.linalg.norm(got - wanted) < 1e-6 * np.linalg.norm(wanted)


def test_options_go_before_the_recipe(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    peft_folder("one")
    file = tmp_path / "r.yaml"
    file.write_text(
        "models: [{model: one}]\nmerge_method: ties\nparameters: {rank: 2, density: 0.5}"
    )
    done = cli("merge", "--recipe", file, "--rank", 1, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert {u.rank for u in read(tmp_path / "out").low_rank.values()} == {1}


def test_json_is_yaml(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text('{"models": [{"model": "a", "parameters": {"weight": [1, 0.5]}}]}')
    assert recipe.read(file).weights == ((1.0, 0.5),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "no mapping"),
        ("models: []", "models"),
        ("models: [{}]", r"models\[0\]"),
        ("models: [{model: a}]\nslices: 1", "slices"),
        ("models: [{model: a, parameters: {weight: .nan}}]", "finite"),
        ("models: [{model: a, parameters: {weight: yes}}]", "finite"),
        (f"models: [{{model: a, parameters: {{weight: 1{'0' * 400}}}}}]", "finite"),
        ("models: [{model: a, parameters: {weight: []}}]", "empty"),
        ("models: [{model: a, parameters: {weight: [{filter: q}]}}]", "value"),
        ("models: [{model: a, parameters: {wait: 1}}]", "wait"),
        ("models: [{model: a}]\nparameters: {rank: x}", "rank"),
        ("models: [{model: a}]\nparameters: {rank: true}", "rank"),
        ("models: [{model: a}]\nmodels: [{model: b}]", "twice"),
        ("a: &x [1]\nb: *x", "alias"),
        ("models: !!python/object/apply:os.system [ls]", "not YAML"),
        ("models: [", "not YAML"),
        ("1: 2", "expected text"),
        ("\xff", "mapping|UTF-8|YAML"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(Refused, match=says):
        recipe.read(file)


def test_modules_without_a_weight_and_slow_patterns_are_refused(tmp_path: Path) -> None:
    modules = ["model.layers.0.q_proj", "lm_head"]
    with pytest.raises(Refused, match="lm_head: no weight of one is given"):
        recipe.weights_of((("q_proj", 1.0),), modules, 2, tmp_path, "one")
    with pytest.raises(Refused, match="lm_head: is in no layer"):
        recipe.weights_of((0.1, 0.9), modules, 2, tmp_path, "one")
    with pytest.raises(Refused, match="invalid pattern"):
        recipe.weights_of((("(", 1.0),), modules, 2, tmp_path, "one")
    with pytest.raises(Refused, match="took over"):
        recipe.weights_of((("(a+)+$", 1.0),), ["a" * 60 + "b"], 2, tmp_path, "one")


def test_errors_and_idle_filters_name_the_recipe(
    cli: Any, peft_folder: Folders, tmp_path: Path
) -> None:
    peft_folder("one")
    file = tmp_path / "r.yaml"

    def merged(weight: str) -> Any:
        file.write_text(f"models: [{{model: one, parameters: {{weight: {weight}}}}}]")
        return cli("merge", "--recipe", file, "-o", tmp_path / "out", "--force")

    done = merged("[{filter: 'q_(', value: 1}, {value: 2}]")
    assert done.exit_code == 1
    where = f"{file}: models[0].parameters.weight[0].filter holds an invalid pattern"
    assert where in done.stderr
    with pytest.raises(re.error) as plain:
        re.compile("q_(")
    assert str(plain.value) in done.stderr  # the position is that in the recipe
    done = merged("[{filter: q_proj, value: 1}]")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {file}: model.layers.0.")
    assert "no weight of one is given for it" in done.stderr
    done = merged("[{filter: q_pruj, value: 0.5}, {filter: q_proj, value: 1}, {value: 2}]")
    assert done.exit_code == 0, done.output
    assert "r.yaml: the filter 'q_pruj' of one matches no module" in done.stdout
    assert "'q_proj'" not in done.stdout
    done = merged("[{filter: proj, value: 1}, {filter: q_proj, value: 0.5}, {value: 2}]")
    assert "the filter 'q_proj' of one matches no module that no filter before it" in done.stdout


def test_unknown_method_in_a_recipe(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    peft_folder("one")
    (tmp_path / "r.yaml").write_text("models: [{model: one}]\nmerge_method: magic")
    done = cli("merge", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert re.search("merge_method is 'magic'", done.stderr)
    assert not (tmp_path / "out").exists()
