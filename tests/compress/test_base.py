"""Bases packed for mlx-lm, byte for byte against mlx_lm.convert, and expanded copies."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

Cli = Callable[..., Any]
WEIGHTS = "model.safetensors"
IDS = list(range(3, 40))


def logits(folder: Path) -> Any:
    """Of stock mlx-lm's model, strictly loaded."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return np.array(model(mx.array([IDS])).astype(mx.float32))[0]


@pytest.fixture
def recast(tiny_base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The tiny base in another dtype."""

    def make(dtype: str) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=getattr(torch, dtype))
        model.save_pretrained(tmp_path / dtype)
        return tmp_path / dtype

    return make


@pytest.mark.parametrize(("dtype", "bits", "group"), [
    ("float16", 4, 64), ("bfloat16", 3, 32), ("float32", 2, 64), ("bfloat16", 8, 64),
])  # fmt: skip
def test_plain_is_what_mlx_lm_converts_to(
    cli: Cli, recast: Any, tmp_path: Path, dtype: str, bits: int, group: int
) -> None:
    convert = importlib.import_module("mlx_lm.convert")
    utils = importlib.import_module("mlx_lm.utils")
    mx = importlib.import_module("mlx.core")
    source = recast(dtype)
    options = ["--quantize", f"mlx{bits}", "--group-size", group, "--plain"]
    done = cli("compress", source, "-o", tmp_path / "ours", *options)
    assert done.exit_code == 0, done.output
    model, config = utils.load_model(source)
    model, config = utils.quantize_model(model, config, group, bits)
    utils.save_model(tmp_path / "theirs", model)
    assert convert
    ours, theirs = (mx.load(str(tmp_path / n / WEIGHTS)) for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert bool((ours[name] == tensor).all()), name
    ours_config = json.loads((tmp_path / "ours/config.json").read_text())
    source_config = json.loads((source / "config.json").read_text())
    assert ours_config.pop("quantization") == config["quantization"]
    assert ours_config.pop("quantization_config") == config["quantization_config"]
    assert ours_config == source_config


@pytest.mark.parametrize("options", [["--quantize", "mlx6"], ["--bits-per-weight", "4"]], ids=str)
def test_mlx_lm_computes_what_the_dequantised_weights_do(
    cli: Cli, tiny_base: Path, tmp_path: Path, options: list[str]
) -> None:
    mx = importlib.import_module("mlx.core")
    done = cli("compress", tiny_base, "-o", tmp_path / "q", "--group-size", 32, *options, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert (tmp_path / "q/LICENSE").read_text() == "free"
    back = cli("decompress", tmp_path / "q", "-o", tmp_path / "dense")
    assert back.exit_code == 0, back.output
    packed, dense = mx.load(str(tmp_path / "q" / WEIGHTS)), load_file(tmp_path / "dense" / WEIGHTS)
    before = load_file(tiny_base / WEIGHTS)
    assert dense.keys() == before.keys()
    for module, of in said["modules"].items():
        theirs = mx.dequantize(
            *(packed[f"{module}.{p}"] for p in ("weight", "scales", "biases")),
            group_size=32, bits=of["bits"],
        )  # fmt: skip
        ours, was = dense[f"{module}.weight"], before[f"{module}.weight"]
        np.testing.assert_array_equal(ours, np.array(theirs))
        error = np.linalg.norm(ours - was) / np.linalg.norm(was)
        assert of["error"] == pytest.approx(error, rel=1e-3)
    assert "quantization" not in json.loads((tmp_path / "dense/config.json").read_text())
    one, two, plain = (logits(f) for f in (tmp_path / "q", tmp_path / "dense", tiny_base))
    assert np.abs(one - two).max() < 1e-3 * np.abs(two).max()
    assert np.abs(one - plain).max() > 0.01 * np.abs(plain).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_unpacked_is_what_mlx_dequantises(
    cli: Cli, recast: Any, tmp_path: Path, dtype: str
) -> None:
    mx = importlib.import_module("mlx.core")
    packed, dense = tmp_path / "q", tmp_path / "dense"
    assert cli("compress", recast(dtype), "-o", packed, "--quantize", "mlx4").exit_code == 0
    done = cli("decompress", packed, "-o", dense)
    assert done.exit_code == 0, done.output
    bits = 32 if dtype == "float32" else 16
    assert f"modules at {bits} bits" in done.output
    assert f"{bits}.00 bits per weight" in done.output
    ours, theirs = (mx.load(str(folder / WEIGHTS)) for folder in (dense, packed))
    before = mx.load(str(tmp_path / dtype / WEIGHTS))
    assert ours.keys() == before.keys()
    modules = [n.removesuffix(".scales") for n in theirs if n.endswith(".scales")]
    assert len(modules) > 10
    for name in ours.keys() - {f"{m}.weight" for m in modules}:
        assert bool((ours[name] == before[name]).all()), name
    for module in modules:
        parts = (theirs[f"{module}.{p}"] for p in ("weight", "scales", "biases"))
        wanted = mx.dequantize(*parts, group_size=64, bits=4)
        assert ours[f"{module}.weight"].dtype == wanted.dtype == before[f"{module}.weight"].dtype
        assert bool((ours[f"{module}.weight"] == wanted).all()), module


def test_other_packings_are_for_mlx_lm(cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    assert cli("compress", tiny_base, "-o", tmp_path / "q", *MLX).exit_code == 0
    _edit(tmp_path / "q", quantization={"bits": 4, "group_size": 32, "mode": "mxfp4"})
    done = cli("decompress", tmp_path / "q", "-o", tmp_path / "dense")
    assert (done.exit_code, "mlx_lm.convert --dequantize" in done.output) == (1, True), done.output
    assert "fuse" not in done.output
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(("option", "low"), [
    ("--size", "2KB"), ("--size", "0"), ("--bits-per-weight", "2.1"),
])  # fmt: skip
def test_the_least_that_is_said_is_enough(
    cli: Cli, tiny_base: Path, tmp_path: Path, option: str, low: str
) -> None:
    done = cli("compress", tiny_base, "-o", tmp_path / "q", option, low)
    assert done.exit_code == 1
    found = re.search(rf"{option} [0-9.]+: the smallest possible is ([0-9.]+) b", done.output)
    assert found, done.output
    done = cli("compress", tiny_base, "-o", tmp_path / "q", option, found[1])
    assert done.exit_code == 0, done.output
    if option == "--size":
        assert (tmp_path / "q" / WEIGHTS).stat().st_size <= int(found[1])


@pytest.mark.parametrize("plan", [True, False])
def test_scales_that_do_not_divide_leave_a_tensor(
    cli: Cli, tiny_base: Path, tmp_path: Path, plan: bool
) -> None:
    """As in packages: what inner channels no multiple of the group are is left, with the reason."""
    before = load_file(tiny_base / WEIGHTS)
    wide = max(t.shape[1] for t in before.values() if t.ndim == 2)
    assert {t.shape[1] % wide for t in before.values() if t.ndim == 2} != {0}
    where = ["--plan"] if plan else ["-o", tmp_path / "q"]
    options = ["--expanded", "--quantize", "int4", "--group-size", wide, "--json"]
    done = cli("compress", tiny_base, *where, *options)
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    for name, tensor in before.items():
        if tensor.ndim == 2 and tensor.size >= 2048:
            assert (name in said["modules"]) == (tensor.shape[1] == wide), name
            if tensor.shape[1] != wide:
                assert f"no multiple of {wide}" in said["kept"][name]
    if not plan:
        after = load_file(tmp_path / "q" / WEIGHTS)
        assert all((after[n] == before[n]).all() for n in said["kept"])
    done = cli("compress", tiny_base, *where, "--force", *options[:4], wide + 1)
    assert (done.exit_code, "holds nothing to compress" in done.output) == (1, True), done.output


def test_the_plan_of_widths_is_kept_to(cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    found = {}
    for each in (3.5, 4.5, 6.3):
        out = tmp_path / str(each)
        done = cli("compress", tiny_base, "-o", out, "--bits-per-weight", each, "--json")
        assert done.exit_code == 0, done.output
        said = json.loads(done.output)
        file = load_file(out / WEIGHTS)
        taken = sum(
            file[f"{m}.{p}"].nbytes for m in said["modules"] for p in ("weight", "scales", "biases")
        )
        before = load_file(tiny_base / WEIGHTS)
        weights = sum(before[f"{m}.weight"].size for m in said["modules"])
        assert 8 * taken / weights == said["bits_per_weight"] <= each
        assert 8 * taken / weights > each - 0.5
        squares = {m: float((before[f"{m}.weight"] ** 2).sum()) for m in said["modules"]}
        lost = sum(v["error"] ** 2 * squares[m] for m, v in said["modules"].items())
        found[each] = lost / sum(squares.values())
        setting = json.loads((out / "config.json").read_text())["quantization"]
        own = {m: setting.get(m, setting)["bits"] for m in said["modules"]}
        assert own == {m: v["bits"] for m, v in said["modules"].items()}
    assert len({v["bits"] for v in said["modules"].values()}) > 1
    assert found[3.5] > 2 * found[4.5] > 4 * found[6.3]


def test_searched_scales_err_less(cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    errors = []
    for extra in ([], ["--plain"]):
        out = tmp_path / f"o{len(errors)}"
        done = cli("compress", tiny_base, "-o", out, "--quantize", "mlx3", *extra, "--json")
        errors.append([v["error"] for v in json.loads(done.output)["modules"].values()])
    assert all(a < 0.97 * b for a, b in zip(*errors, strict=True))


@pytest.mark.parametrize("options", [
    ["--palettize", "3"], ["--quantize", "int8"], ["--bits-per-weight", "3.2"],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_expanded_copies_hold_few_values(
    cli: Cli, recast: Any, tmp_path: Path, options: list[str], dtype: str
) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from transformers import AutoModelForCausalLM

    source = recast(dtype)
    out = tmp_path / "out"
    done = cli("compress", source, "-o", out, "--expanded", *options, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    before, after = load_torch(source / WEIGHTS), load_torch(out / WEIGHTS)
    assert before.keys() == after.keys()
    assert len(said["modules"]) == 15
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if name not in said["modules"]:
            assert torch.equal(after[name], tensor)
            continue
        width = said["modules"][name]["bits"]
        # integers have a scale per row, and so have tables that a budget chose
        rows = after[name] if "--palettize" not in options else after[name].reshape(1, -1)
        values = 2 ** int(str(width).removeprefix("int"))
        assert max(len(row.unique()) for row in rows) <= values
        gap = (after[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert said["modules"][name]["error"] == pytest.approx(float(gap), rel=1e-3)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.tensor([IDS])).logits).all()


def test_shards_are_read(cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(
        tmp_path / "s", max_shard_size="100KB"
    )
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    for source, name in ((tiny_base, "a"), (tmp_path / "s", "b")):
        done = cli("compress", source, "-o", tmp_path / name, "--quantize", "mlx4")
        assert done.exit_code == 0, done.output
    one, two = (load_file(tmp_path / n / WEIGHTS) for n in "ab")
    assert one.keys() == two.keys()
    assert all((one[n] == two[n]).all() for n in one)


def _edit(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = np.inf
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _as(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, **fields)


MLX = ["--quantize", "mlx4"]
REFUSED: list[tuple[str, Callable[[Path], Any], list[str], str]] = [
    ("packed", _as(quantization={"bits": 4, "group_size": 64}), MLX, "packed already"),
    ("gptq", _as(quantization_config={"quant_method": "gptq"}), MLX, "is quantised by gptq"),
    ("names differ", _as(model_type="gpt2"), MLX, "is a gpt2 model"),
    ("unknown", _as(model_type="nobody"), MLX, "no verified names"),
    ("NaN", _nan, MLX, "down_proj.weight: holds NaN or Inf"),
    ("NaN, expanded", _nan, ["--palettize", "4", "--expanded"], "holds NaN or Inf"),
    ("too few bits", _as(), ["--bits-per-weight", "2.2"], "the smallest possible is"),
    ("too small", _as(), ["--size", "2KB"], "the smallest possible is"),
    ("tables", _as(), ["--palettize", "4"], "--palettize is for packages"),
    ("int8", _as(), ["--quantize", "int8"], "--quantize mlx4 packs it"),
    ("both", _as(), [*MLX, "--expanded"], "--expanded"),
    ("groups", _as(), [*MLX, "--group-size", "48"], "groups of 32, 64, 128"),
    ("no weights", lambda f: (f / WEIGHTS).unlink(), MLX, "holds no model*.safetensors"),
    ("none left", _as(), [*MLX, "--include", "nothing"], "among those that --include 'nothing' leaves"),
    ("uniform", _as(), ["--palettize", "4", "--expanded", "--lut", "uniform"], "--lut is for packages"),
    ("pairs", _as(), [*MLX, "--cluster-dim", "2"], "--cluster-dim is for packages"),
    ("regex", _as(), [*MLX, "--include", "x", "--exclude", "("], "is no regular expression"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "options", "says"), [r[1:] for r in REFUSED],
                         ids=[r[0] for r in REFUSED])  # fmt: skip
def test_one_line_and_nothing_written(
    cli: Cli, tiny_base: Path, tmp_path: Path, damage: Any, options: list[str], says: str
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    damage(tmp_path / "base")
    done = cli("compress", tmp_path / "base", "-o", tmp_path / "out", *options)
    assert done.exit_code == 1, done.output
    assert says in done.output
    assert done.output.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_what_exists_is_replaced_on_request(cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    assert cli("compress", tiny_base, "-o", out, *MLX).exit_code == 0
    kept = (out / WEIGHTS).read_bytes()
    over = cli("compress", tiny_base, "-o", out, "--quantize", "mlx2")
    assert (over.exit_code, "exists" in over.output) == (1, True)
    assert (out / WEIGHTS).read_bytes() == kept
    assert cli("compress", tiny_base, "-o", out, "--quantize", "mlx2", "--force").exit_code == 0
    assert (out / WEIGHTS).stat().st_size < len(kept)
    same = cli("compress", tiny_base, "--plan", *MLX)
    assert (same.exit_code, "nothing written" in same.output) == (0, True)
