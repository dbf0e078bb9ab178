"""Merging of what can't be merged, or is odd: one line, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as st

from loraduct.formats import read

Folders = Callable[..., Path]


def dense(folder: Path) -> dict[str, np.ndarray]:
    return {
        m: u.scale * (u.b.read().astype(np.float64) @ u.a.read())
        for m, u in read(folder).low_rank.items()
    }


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--weights", "1,2,3"], 2, "gives 3, for 2 adapters"),
        (["--weights", "1,nan"], 2, "finite"),
        (["--weights", "1,x"], 2, "numbers"),
        (["--weights", "0,0"], 1, "every weight is 0"),
        (["--weights", "1,1e300"], 1, "times the weight 1e+300 is beyond float32"),
        (["--rank", "2", "--energy", "nan"], 2, "nan is not a finite number"),
        (["--method", "ties", "--rank", "2", "--density", "nan"], 2, "nan is not a finite number"),
        (["--method", "ties", "--density", "0.5"], 2, "needs --rank"),
        (["--method", "ties", "--rank", "4"], 2, "needs --density"),
        (["--method", "svd"], 2, "needs --rank"),
        (["--method", "cat", "--rank", "4"], 2, "keeps every rank"),
        (["--method", "linear", "--density", "0.4"], 2, "no use for --density"),
        (["--method", "ties", "--density", "0.4", "--rank", "2", "--seed", "3"], 2, "no use for --seed"),
        (["--rank", "2", "--energy", "0.5"], 2, "give one"),
        (["--method", "nonsense"], 2, "nonsense"),
    ],
)  # fmt: skip
def test_bad_options(
    cli: Any, peft_folder: Folders, tmp_path: Path, args: list[str], code: int, says: str
) -> None:
    done = cli("merge", peft_folder("a"), peft_folder("b"), *args, "-o", tmp_path / "out")
    assert (done.exit_code, says in done.stderr) == (code, True), done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_another_base(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    one = peft_folder("one")
    other = peft_folder("other", base_model_name_or_path="other/model")
    done = cli("merge", one, other, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "is for the base other/model" in done.stderr
    copy = peft_folder("copy", base_model_name_or_path="elsewhere/Base-bnb-4bit")
    assert cli("merge", one, copy, "-o", tmp_path / "ok").exit_code == 0
    wide = peft_folder("wide")
    file = wide / "adapter_model.safetensors"
    tensors = st.load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    st.save_file(tensors | {name: np.ones((26, 4), np.float32)}, file)
    done = cli("merge", one, wide, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "made for another base" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_kind(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    """None of the modules is in it, by any name: said by every verb that takes one."""
    pytest.importorskip("transformers")
    import fusing

    one, two, base = peft_folder("one"), peft_folder("two"), fusing.saved("gpt2", tmp_path / "base")
    out = ["-o", tmp_path / "out"]
    for words in (
        ["merge", one, two, *out],
        ["stack", one, two, *out],
        ["diff", one, two],
        ["resize", one, "--rank", 2, *out],
        ["fuse", one, *out],
    ):
        done = cli(*words, "--base", base)
        assert done.exit_code == 1, words
        assert done.stderr.count("\n") == 1
        assert str(base) in done.stderr
        assert "made for another base" in done.stderr
        assert not (tmp_path / "out").exists()


def test_what_is_odd_is_explained(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    one, two = peft_folder("one"), peft_folder("two")
    done = cli("merge", one, two, "--weights", "1,0", "-o", tmp_path / "zero")
    assert "two: has weight 0" in done.stdout
    for module, wanted in dense(one).items():
        assert off(dense(tmp_path / "zero")[module], wanted) < 1e-6
    done = cli("merge", one, two, "--method", "svd", "--rank", 60, "-o", tmp_path / "high")
    assert "rank 60 is more than" in done.stdout
    apart = peft_folder("apart", layers=1)
    file = apart / "adapter_model.safetensors"
    moved = {k.replace("layers.0", "layers.7"): v for k, v in st.load_file(file).items()}
    st.save_file(moved, file)
    done = cli("merge", one, apart, "-o", tmp_path / "apart-out")
    assert "no module is adapted by more than one" in done.stdout


def test_peft_formulas_refuse_what_peft_gets_wrong(
    cli: Any, peft_folder: Folders, tmp_path: Path
) -> None:
    one, two = peft_folder("one"), peft_folder("two", use_rslora=True)
    done = cli("merge", one, two, "--method", "peft-cat", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "rsLoRA" in done.stderr
    done = cli("merge", one, peft_folder("r8", r=8), "--method", "peft-linear", "--dry-run")
    assert "needs equal ranks" in done.stderr


def test_dora_needs_its_base(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    folder = peft_folder(use_dora=True)
    done = cli("merge", folder, folder, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "give --base" in done.stderr
    assert not (tmp_path / "out").exists()


def test_nan_in_an_adapter_writes_nothing(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    one, bad = peft_folder("one"), peft_folder("bad")
    file = bad / "adapter_model.safetensors"
    tensors = st.load_file(file)
    next(iter(tensors.values()))[0, 0] = np.nan
    st.save_file(tensors, file)
    for args in (["cat"], ["svd", "--rank", 2], ["ties", "--rank", 2, "--density", 0.5]):
        done = cli("merge", one, bad, "-o", tmp_path / "out", "--method", *args)
        assert done.exit_code == 1, args
        assert "NaN" in done.stderr, args
        assert not (tmp_path / "out").exists()


NESTED = {
    "in a saved parent": ({"target_modules": ["up_proj"]}, "mlp", "layers.0.mlp.up_proj"),
    "the module itself": ({"target_modules": ["lm_head"]}, "lm_head", "lm_head"),
}


@pytest.mark.parametrize("case", NESTED)
@pytest.mark.parametrize("verb", ["merge", "stack"])
def test_adapted_and_replaced_as_a_whole(cli: Any, tmp_path: Path, verb: str, case: str) -> None:
    """PEFT loads such a config without a word, and gives the module no adapter."""
    pytest.importorskip("peft")
    import fusing

    config, saved, module = NESTED[case]
    base = fusing.saved("llama", tmp_path / "base")
    one = fusing.trained(base, tmp_path / "one", **config)
    whole = {"target_modules": ["q_proj"], "modules_to_save": [saved]}
    two = fusing.trained(base, tmp_path / "two", **whole)
    for order in ((one, two), (two, one)):
        done = cli(verb, *order, "-o", tmp_path / "out")
        assert done.exit_code == 1, done.output
        assert f"{module}: is adapted, and replaced with its whole module" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
    apart = fusing.trained(base, tmp_path / "apart", target_modules=["v_proj"])
    done = cli(verb, apart, two, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    wanted = fusing.unfused(base, (apart, 1.0), (two, 1.0))
    found = fusing.unfused(base, (tmp_path / "out", 1.0))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_what_weight_0_leaves_out_is_not_saved(cli: Any, tmp_path: Path) -> None:
    """Its name in modules_to_save would keep PEFT from adapting what the other adapter does."""
    pytest.importorskip("peft")
    import fusing

    base = fusing.saved("llama", tmp_path / "base")
    one = fusing.trained(base, tmp_path / "one", target_modules=["up_proj"])
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}
    two = fusing.trained(base, tmp_path / "two", **whole)
    done = cli("merge", one, two, "--weights", "1,0", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    wanted = fusing.unfused(base, (one, 1.0))
    found = fusing.unfused(base, (tmp_path / "out", 1.0))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("weights", "words", "gone"),
    [
        ("1,-1", [], "all"),
        ("1,-1", ["--method", "svd", "--rank", "2"], "all"),
        ("1,-1", ["--method", "cat", "--dtype", "f16"], "all"),
        ("1,-0.9", [], "none"),
        ("1,1", ["--method", "magnitude", "--density", "1e-12", "--rank", "2"], "all"),
        ("1,1", ["--method", "magnitude", "--density", "0.5", "--rank", "2"], "none"),
    ],
)
def test_merged_to_nothing_is_said(
    cli: Any, peft_folder: Folders, tmp_path: Path, weights: str, words: list[str], gone: str
) -> None:
    one = peft_folder("one")
    done = cli("merge", one, one, "--weights", weights, *words, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    sizes = [np.linalg.norm(d) for d in dense(tmp_path / "out").values()]
    whole = [np.linalg.norm(d) for d in dense(one).values()]
    assert (max(sizes) < 1e-5 * min(whole)) == (gone == "all")
    count = len(sizes)
    assert (f"nothing is left of {count} of {count} modules" in done.stdout) == (gone == "all")
