"""PEFT's methods other than LoRA: what we make of them is what PEFT merges into the weights.

The oracle is stock PEFT: the adapter it saved, loaded and merged in float64, less the base.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tuners import (
    CASES,
    DENSE,
    EVERY,
    EXACT,
    REFUSED,
    assert_same,
    merged,
    options_for,
)

from loraduct.formats import peft_config
from loraduct.formats.peft_tuners import TUNERS


def test_every_method_of_peft_is_known() -> None:
    """A new PEFT brings new methods: the table, and the cases here, must say what they are."""
    from peft.utils.peft_types import PeftType

    assert {t.value for t in PeftType} - {"LORA"} <= set(TUNERS)
    assert set(TUNERS) == peft_config.KINDS - {"LORA"}
    assert set(TUNERS) - set(REFUSED) - {"LN_TUNING", "TRAINABLE_TOKENS"} == set(CASES)


@pytest.mark.parametrize(("kind", "number"), [c for c in EXACT if c[0] != "BEFT"])
def test_exact_form(kind: str, number: int, saved: Any, convert: Any, peers: ModuleType) -> None:
    """Without any flag, the LoRA is what the method did."""
    source, base = saved(kind, number)
    made = convert(source, "peft", *options_for(kind, base, number))
    assert peers.read_json(made / "adapter_config.json")["peft_type"] == "LORA"
    assert_same(merged(peers, base, made), merged(peers, base, source))


@pytest.mark.parametrize(("kind", "number"), DENSE)
def test_dense_at_full_rank(
    kind: str, number: int, saved: Any, convert: Any, peers: ModuleType
) -> None:
    """At the rank that leaves nothing out, the approximation is the update."""
    source, base = saved(kind, number)
    flags = ["--rank", 112, "--allow-approximate"]
    made = convert(source, "peft", *options_for(kind, base, number), *flags)
    # OSF: PEFT takes the parts it replaces from an SVD in float32
    tolerance = 1e-4 if kind == "OSF" else 1e-5
    assert_same(merged(peers, base, made), merged(peers, base, source), tolerance)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in DENSE}))
def test_dense_at_low_rank(
    kind: str, saved: Any, run: Any, tmp_path: Path, peers: ModuleType
) -> None:
    """The residual in the account is the optimum, and the written adapter has it."""
    number = next(i for k, i in DENSE if k == kind)
    source, base = saved(kind, number)
    words = ["convert", source, "--to", "peft", "-o", tmp_path / "out", "--json"]
    words += [*options_for(kind, base, number), "--rank", 5, "--allow-approximate"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    account = json.loads(done.stdout)
    expected, found = merged(peers, base, source), merged(peers, base, tmp_path / "out")
    weights = {n.removesuffix(".weight"): d for n, d in expected.items() if n.endswith(".weight")}
    assert account["residuals"].keys() == weights.keys()
    for module, delta in weights.items():
        norm = np.linalg.norm(delta)
        best = np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[5:]) / norm
        error = np.linalg.norm(found[f"{module}.weight"] - delta) / norm
        assert account["residuals"][module] == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert error == pytest.approx(best, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("kind", "number"), EVERY)
def test_every_tensor_is_accounted_for(
    kind: str, number: int, saved: Any, run: Any, peers: ModuleType
) -> None:
    source, base = saved(kind, number)
    words = ["convert", source, "--to", "peft", "--dry-run", "--json"]
    words += options_for(kind, base, number)
    words += ["--rank", 3, "--allow-approximate"] if (kind, number) in DENSE else []
    done = run(*words)
    assert done.exit_code == 0, done.output
    sources = {t["source"] for t in json.loads(done.stdout)["tensors"]}
    assert sources == peers.raw_tensors(source / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("kind", [k for k in CASES if TUNERS[k].base])
def test_needs_the_base(kind: str, saved: Any, refused: Callable[..., str]) -> None:
    source, _ = saved(kind)
    said = refused(source, "peft", saying=f"is a {TUNERS[kind].name} adapter")
    assert "--base" in said


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in DENSE}))
def test_full_rank_is_refused_unless_allowed(
    kind: str, saved: Any, refused: Callable[..., str]
) -> None:
    number = next(i for k, i in DENSE if k == kind)
    source, base = saved(kind, number)
    known = options_for(kind, base, number)
    said = refused(source, "peft", *known, saying=TUNERS[kind].name)
    assert "full rank" in said
    assert "--allow-approximate" in said
    refused(source, "peft", *known, "--rank", 4, saying="--allow-approximate")
    refused(source, "peft", *known, "--allow-approximate", saying="--rank N")


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "source" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    said = refused(folder, "mlx", saying=TUNERS[kind].name)
    assert TUNERS[kind].why[:40] in said


@pytest.mark.parametrize("kind", CASES)
def test_a_cut_tensor_is_refused_by_name(
    kind: str, saved: Any, refused: Callable[..., str], peers: ModuleType
) -> None:
    """Every tensor of a module, one column short: never a crash, never converted."""
    from safetensors.torch import load_file

    source, base = saved(kind)
    file = source / "adapter_model.safetensors"
    whole = load_file(file)
    first = next(k for k in whole if ".layers.0." in k).split(".layers.0.")[1].split(".")[:2]
    for key, tensor in whole.items():
        of_module = f".layers.0.{'.'.join(first)}." in key
        idle = any(f".{leaf}" in key for leaf in TUNERS[kind].aside)
        if not of_module or idle or tensor.shape[-1] < 2:
            continue
        peers.rewrite_tensors(file, {**whole, key: tensor[..., :-1]})
        flags = ["--rank", 3, "--allow-approximate"] if TUNERS[kind].form == "dense" else []
        refused(source, "peft", "--base", base, *flags, saying=".".join(first))


def test_the_page_says_what_the_table_says(repo: Path) -> None:
    """docs/tuners.md is written by scripts/tuners_table.py: run it when the table changes."""
    lines = (repo / "docs" / "tuners.md").read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line]
    said = {row[1]: row for row in cells if row[1] in TUNERS}
    forms = {"low-rank": "exact", "dense": "full rank", "replacement": "replaced", "rows": "kept"}
    assert said.keys() == TUNERS.keys()
    for kind, tuner in TUNERS.items():
        expected = [forms.get(tuner.form, tuner.why), tuner.base or "no"]
        assert said[kind][0] == tuner.name
        assert said[kind][2:4] == (expected if tuner.form in forms else expected[:1])
