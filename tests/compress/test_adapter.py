"""Packed adapters: the doc's own reader, PEFT and mlx-lm against what compress wrote."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraduct.converters import compress_adapter

Cli = Callable[..., Any]


@pytest.fixture(scope="session")
def read_packed(repo: Path) -> Callable[[Path], dict[str, Any]]:
    """The reader of docs/packed.md."""
    code = re.search(r"```python\n(.*?)```", (repo / "docs/packed.md").read_text(), re.DOTALL)
    assert code
    assert len(code[1].strip().splitlines()) <= 25
    names: dict[str, Any] = {}
    exec(compile(code[1], "docs/packed.md", "exec"), names)  # noqa: S102
    return lambda folder: names["read_packed"](folder / "adapter_packed.safetensors")


def deltas(tensors: dict[str, Any]) -> dict[str, Any]:
    """b a of each module of a PEFT file, float64."""
    wide = {n: t.astype(np.float64) for n, t in tensors.items()}
    return {n: wide[n.replace("lora_A", "lora_B")] @ a for n, a in wide.items() if ".lora_A." in n}


def relative(before: dict[str, Any], after: dict[str, Any]) -> float:
    lost = sum(((after[n] - d) ** 2).sum() for n, d in before.items())
    return float(np.sqrt(lost / sum((d**2).sum() for d in before.values())))


WAYS = [
    ("--palettize", "4"), ("--palettize", "3", "--group-size", "3"), ("--palettize", "8"),
    ("--quantize", "int8"), ("--quantize", "int4", "--group-size", "8"),
    ("--bits-per-weight", "5.5"),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@pytest.mark.parametrize("dora", [False, True])
def test_decompress_gives_what_the_documented_reader_reads(
    cli: Cli, peft_folder: Any, read_packed: Any, tmp_path: Path, way: tuple[str, ...], dora: bool
) -> None:
    source = peft_folder(use_dora=dora, bias="none")
    done = cli("compress", source, "-o", tmp_path / "packed", *way, "--json")
    assert done.exit_code == 0, done.output
    assert cli("decompress", tmp_path / "packed", "-o", tmp_path / "back").exit_code == 0
    before = load_file(source / "adapter_model.safetensors")
    ours, theirs = load_file(tmp_path / "back/adapter_model.safetensors"), read_packed(
        tmp_path / "packed"
    )  # fmt: skip
    assert before.keys() == ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
        if "lora_magnitude" in name:
            np.testing.assert_array_equal(tensor, before[name])
        else:
            assert tensor.dtype == np.float16
    config = (source / "adapter_config.json").read_bytes()
    assert (tmp_path / "packed/adapter_config.json").read_bytes() == config
    said = json.loads(done.output)["error"]
    assert said == pytest.approx(relative(deltas(before), deltas(theirs)), rel=1e-3)


@pytest.mark.parametrize(("name", "cosine"), [("summary", 0.996), ("reply", 0.9945)])
def test_four_bits_of_a_trained_adapter(
    cli: Cli, repo: Path, read_packed: Any, tmp_path: Path, name: str, cosine: float
) -> None:
    source = repo / "examples" / name
    assert cli("compress", source, "-o", tmp_path / "p", "--palettize", "4").exit_code == 0
    file = source / "adapter_model.safetensors"
    assert (tmp_path / "p/adapter_packed.safetensors").stat().st_size <= 0.27 * file.stat().st_size
    one, two = deltas(load_file(file)), deltas(read_packed(tmp_path / "p"))
    inner = sum((one[n] * two[n]).sum() for n in one)
    norms = [np.sqrt(sum((d**2).sum() for d in x.values())) for x in (one, two)]
    assert inner / (norms[0] * norms[1]) >= cosine


def test_peft_computes_what_the_numbers_say(
    cli: Cli, tiny_base: Path, read_packed: Any, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "a")
    assert cli("compress", tmp_path / "a", "-o", tmp_path / "p", "--palettize", "4").exit_code == 0
    done = cli("convert", tmp_path / "p", "--to", "peft", "-o", tmp_path / "b")
    assert done.exit_code == 0, done.output
    ids = torch.arange(24).reshape(1, 24)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        plain = fresh(ids).logits
        got = PeftModel.from_pretrained(fresh, tmp_path / "b")(ids).logits
        by_hand = AutoModelForCausalLM.from_pretrained(tiny_base)
        weights = dict(by_hand.named_parameters())
        for name, delta in deltas(read_packed(tmp_path / "p")).items():
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{module}.weight"] += torch.tensor(2 * delta, dtype=torch.float32)
        wanted = by_hand(ids).logits
    assert (wanted - plain).abs().max() > 0.05
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    proof = cli("validate", tmp_path / "p", tmp_path / "b", "--base", tiny_base)
    assert proof.exit_code == 0, proof.output


def test_mlx_folders_keep_their_padding(
    cli: Cli, peft_folder: Any, read_packed: Any, tmp_path: Path
) -> None:
    source = peft_folder(
        ranks={"mlp.up_proj": 2}, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 3}
    )
    assert cli("convert", source, "--to", "mlx", "-o", tmp_path / "m").exit_code == 0
    done = cli("compress", tmp_path / "m", "-o", tmp_path / "p", "--palettize", "6")
    assert done.exit_code == 0, done.output
    assert cli("decompress", tmp_path / "p", "-o", tmp_path / "back").exit_code == 0
    theirs, ours = read_packed(tmp_path / "p"), load_file(tmp_path / "back/adapters.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    up = [n for n in theirs if "up_proj.lora_a" in n]
    assert up
    assert not any(theirs[n][:, 2:].any() for n in up)
    assert all(theirs[n][:, :2].all() for n in up)
    before = load_file(tmp_path / "m/adapters.safetensors")
    one, two = (
        {n: (t[n].astype("f8") @ t[n.replace("_a", "_b")]) for n in up} for t in (before, theirs)
    )
    assert relative(one, two) < 0.06
    said = json.loads(cli("inspect", tmp_path / "p", "--json").output)
    assert (said["format"], said["method"]) == ("packed", "lora")
    assert said["parameters"] == sum(t.size for t in before.values())
    assert cli("convert", tmp_path / "p", "--to", "peft", "-o", tmp_path / "hf").exit_code == 0


def test_ranks_that_do_nothing_and_updates_of_zero(
    cli: Cli, peft_folder: Any, read_packed: Any, tmp_path: Path
) -> None:
    source = peft_folder()
    tensors = load_file(source / "adapter_model.safetensors")
    for n, t in tensors.items():
        if "q_proj.lora_B" in n:
            t[:] = 0
    save_file(tensors, source / "adapter_model.safetensors", {"format": "pt"})
    assert cli("compress", source, "-o", tmp_path / "p", "--palettize", "4").exit_code == 0
    after = read_packed(tmp_path / "p")
    for name, delta in deltas(after).items():
        assert ("q_proj" in name) != delta.any()


@pytest.mark.parametrize("size", [4500, 6000, 9000])
def test_a_size_is_kept_to_and_used(cli: Cli, peft_folder: Any, tmp_path: Path, size: int) -> None:
    source = peft_folder(layers=4)
    done = cli("compress", source, "-o", tmp_path / "p", "--size", size, "--json")
    assert done.exit_code == 0, done.output
    written = (tmp_path / "p/adapter_packed.safetensors").stat().st_size
    assert written == json.loads(done.output)["bytes"]["after"] <= size
    smaller = cli("compress", source, "--plan", "--size", size - 700, "--json")
    if smaller.exit_code == 0:
        assert json.loads(smaller.output)["error"] > json.loads(done.output)["error"]
    assert written > size - 700


def test_a_plan_writes_nothing(cli: Cli, peft_folder: Any, tmp_path: Path) -> None:
    source = peft_folder()
    before = sorted(tmp_path.rglob("*"))
    done = cli("compress", source, "--plan", "--palettize", "4")
    assert done.exit_code == 0
    assert "nothing written" in done.output
    assert "6 modules in 4-bit tables" in done.output
    assert sorted(tmp_path.rglob("*")) == before


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _nan_behind(folder: Path) -> None:
    """In the last rank, which is not taken for padding."""
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[-1, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _scaled(a: float, b: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        factors = {
            n: t * np.float32(a if ".lora_A." in n else b) for n, t in load_file(file).items()
        }
        save_file(factors, file, {"format": "pt"})

    return edit


def _config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


def _nothing(folder: Path) -> None:
    save_file({}, folder / "adapter_model.safetensors", {"format": "pt"})


REFUSED: list[tuple[str, Callable[[Path], Any], list[str], str]] = [
    ("NaN", _nan, ["--palettize", "4"], "lora_A.weight: holds NaN or Inf"),
    ("too small", lambda _: None, ["--size", "900"], "the smallest possible is"),
    ("too few bits", lambda _: None, ["--bits-per-weight", "1"], "the smallest possible is"),
    ("empty", _nothing, ["--palettize", "4"], "holds no tensors"),
    ("moved base", _config(init_lora_weights="pissa"), ["--palettize", "4"], "moved the base"),
    ("none left", lambda _: None, ["--palettize", "4", "--include", "lm_head"],
     "holds no factors of LoRA to compress among those that --include 'lm_head' leaves"),
    ("NaN behind", _nan_behind, ["--palettize", "4"], "lora_A.weight: holds NaN or Inf"),
    ("NaN, int8", _nan_behind, ["--quantize", "int8"], "lora_A.weight: holds NaN or Inf"),
    ("NaN, budget", _nan, ["--bits-per-weight", "4"], "lora_A.weight: holds NaN or Inf"),
    ("too large", _scaled(1e6, 1e6), ["--palettize", "4"], "tables of float16 end before that"),
    ("too large, int8", _scaled(1e6, 1e6), ["--quantize", "int8"], "float16, as which it is read"),
    ("no base", lambda _: None, ["--palettize", "4", "--base", "nowhere"], "nowhere"),
    ("groups", lambda _: None, ["--quantize", "int4", "--group-size", "7"], "don't divide"),
    ("mlx4", lambda _: None, ["--quantize", "mlx4"], "has int8 and int4"),
    ("regex", lambda _: None, ["--palettize", "4", "--exclude", "("], "'('"),
    ("uniform", lambda _: None, ["--palettize", "4", "--lut", "uniform"], "--lut is for packages"),
    ("pairs", lambda _: None, ["--palettize", "4", "--cluster-dim", "2"], "--cluster-dim is for"),
    ("axis", lambda _: None, ["--palettize", "4", "--group-size", "4", "--axis", "1"], "--axis is for"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "options", "says"), [r[1:] for r in REFUSED],
                         ids=[r[0] for r in REFUSED])  # fmt: skip
def test_one_line_and_nothing_written(
    cli: Cli, peft_folder: Any, tmp_path: Path, damage: Any, options: list[str], says: str
) -> None:
    source = peft_folder()
    damage(source)
    done = cli("compress", source, "-o", tmp_path / "out", *options)
    assert done.exit_code == 1, done.output
    assert says in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]


@pytest.mark.parametrize("way", [["--palettize", "6"], ["--quantize", "int8"]], ids=" ".join)
def test_one_factor_beyond_float16(
    cli: Cli, peft_folder: Any, read_packed: Any, tmp_path: Path, way: list[str]
) -> None:
    """dW is not: another form of the factors holds it."""
    source = peft_folder()
    _scaled(9e-8, 3e7)(source)
    done = cli("compress", source, "-o", tmp_path / "p", *way)
    assert done.exit_code == 0, done.output
    before = deltas(load_file(source / "adapter_model.safetensors"))
    assert relative(before, deltas(read_packed(tmp_path / "p"))) < 0.05


@pytest.mark.parametrize("way", [["--palettize", "6"], ["--quantize", "int8"], ["--size", "6KB"]],
                         ids=" ".join)  # fmt: skip
@pytest.mark.parametrize(("module", "rank"), [("self_attn.v_proj", 12), ("mlp.up_proj", 20)])
def test_more_ranks_than_channels(
    cli: Cli,
    peft_folder: Any,
    read_packed: Any,
    tmp_path: Path,
    module: str,
    rank: int,
    way: list[str],
) -> None:
    """Of one side, or of both."""
    source = peft_folder(ranks={module: rank}, rank_pattern={module: rank})
    done = cli("compress", source, "-o", tmp_path / "p", *way)
    assert done.exit_code == 0, done.output
    before = deltas(load_file(source / "adapter_model.safetensors"))
    assert relative(before, deltas(read_packed(tmp_path / "p"))) < 0.3


@pytest.mark.parametrize(("option", "low"), [("--size", "900"), ("--bits-per-weight", "1")])
def test_the_least_is_said_before_the_search_and_is_enough(
    cli: Cli,
    peft_folder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    low: str,
) -> None:
    source = peft_folder()
    with monkeypatch.context() as patch:
        patch.setattr(compress_adapter, "best", None)
        done = cli("compress", source, "-o", tmp_path / "p", option, low)
    found = re.search(
        rf"{option} {low}: the smallest possible is ([0-9.]+) b\w+ \(12 tensors\)", done.output
    )
    assert (done.exit_code, bool(found)) == (1, True), done.output
    assert found
    done = cli("compress", source, "-o", tmp_path / "p", option, found[1])
    assert done.exit_code == 0, done.output
    if option == "--size":
        taken = (tmp_path / "p/adapter_packed.safetensors").stat().st_size
        assert int(found[1]) - 200 < taken <= int(found[1])


@pytest.mark.parametrize("where", ["-o", "--plan"])
def test_another_base_is_refused_before_anything_is_written(
    cli: Cli, peft_folder: Any, tiny_base: Path, tmp_path: Path, where: str
) -> None:
    out = [where, tmp_path / "p"] if where == "-o" else [where]
    done = cli("compress", peft_folder(), *out, "--palettize", "4", "--base", tiny_base)
    assert done.exit_code == 1
    assert "made for another base" in done.output
    assert done.output.count("\n") == 1
    assert "size mismatch" not in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["peft"]


def test_a_page_is_of_packages(cli: Cli, peft_folder: Any, tmp_path: Path) -> None:
    html = tmp_path / "x.html"
    done = cli("compress", peft_folder(), "--bits-per-weight", "4", "--plan", "--html", html)
    assert done.exit_code == 2
    assert "draws the curve of a package" in done.output
    assert not html.exists()


def test_twice_and_over_another(cli: Cli, peft_folder: Any, tmp_path: Path) -> None:
    source, out = peft_folder(), tmp_path / "p"
    assert cli("compress", source, "-o", out, "--palettize", "4").exit_code == 0
    kept = (out / "adapter_packed.safetensors").read_bytes()
    again = cli("compress", out, "-o", tmp_path / "q", "--palettize", "4")
    assert (again.exit_code, "compressed already" in again.output) == (1, True)
    over = cli("compress", source, "-o", out, "--palettize", "2")
    assert (over.exit_code, "exists" in over.output) == (1, True)
    assert (out / "adapter_packed.safetensors").read_bytes() == kept
    assert cli("compress", source, "-o", out, "--palettize", "4", "--force").exit_code == 0
    assert (out / "adapter_packed.safetensors").read_bytes() == kept
    plain = cli("decompress", source, "-o", tmp_path / "q")
    assert (plain.exit_code, "is not packed" in plain.output) == (1, True)


LAYOUTS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("version", lambda s: s.update(version=2), "version 1 is read"),
    ("source", lambda s: s.update(source="npz"), "not understood"),
    ("group", lambda s: s.update(group=-1), "not understood"),
    ("empty", lambda s: s.update(layout={}), "lists no tensors"),
    ("bits", lambda s: _first(s).__setitem__(0, 5), "not understood"),
    ("huge", lambda s: _first(s).__setitem__(1, [4, 1 << 39]), "is expected by the layout"),
    ("bomb", lambda s: s["layout"].update({_name(s): [4, [1 << 30, 16], 0, 4]}), "was trained"),
    ("axis", lambda s: _first(s).__setitem__(2, 2), "not understood"),
    ("rows", lambda s: _first(s).append(9), "not understood"),
    ("missing", lambda s: s["layout"].pop(_name(s)), "is expected by the layout"),
    ("bool", lambda s: _first(s).__setitem__(2, False), "not understood"),
]


def _name(said: dict[str, Any]) -> str:
    return next(iter(said["layout"]))


def _first(said: dict[str, Any]) -> list[Any]:
    found: list[Any] = said["layout"][_name(said)]
    return found


@pytest.mark.parametrize(("edit", "says"), [x[1:] for x in LAYOUTS], ids=[x[0] for x in LAYOUTS])
def test_broken_layouts_are_refused(
    cli: Cli, peft_folder: Any, tmp_path: Path, edit: Any, says: str
) -> None:
    from safetensors import safe_open

    assert cli("compress", peft_folder(), "-o", tmp_path / "p", "--palettize", "4").exit_code == 0
    file = tmp_path / "p/adapter_packed.safetensors"
    with safe_open(file, "np") as f:
        metadata = f.metadata()
    said = json.loads(metadata["packed"])
    edit(said)
    save_file(load_file(file), file, metadata | {"packed": json.dumps(said)})
    done = cli("inspect", tmp_path / "p")
    assert done.exit_code == 1, done.output
    assert says in done.output
    assert done.output.count("\n") == 1


def test_a_folder_of_two_formats_is_refused(cli: Cli, peft_folder: Any, tmp_path: Path) -> None:
    source = peft_folder()
    assert cli("compress", source, "-o", tmp_path / "p", "--palettize", "4").exit_code == 0
    shutil.copy(source / "adapter_model.safetensors", tmp_path / "p")
    done = cli("inspect", tmp_path / "p")
    assert (done.exit_code, "several formats" in done.output) == (1, True)
