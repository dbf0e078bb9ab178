"""Faults put into conversions of SmolLM2's adapters: none passes, and each is called by its name.

Every model that stays the same is run once for all of them, on one short prompt.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Judge, edited

from loraduct.validation import suites

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]
pytest.importorskip("peft")
pytest.importorskip("mlx_lm")

ROOT = Path(__file__).resolve().parents[2]
SMOL = ROOT / ".cache" / "smollm2-135m-instruct"
REPLY = ROOT / "examples" / "reply"
Q, DOWN = "model.layers.7.self_attn.q_proj", "model.layers.7.mlp.down_proj"
Cli = Callable[..., Any]
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sound conversion, and a package with the adapter and a twin of it."""
    if not (SMOL / "model.safetensors").exists():
        pytest.skip("make heavy downloads the model")
    here = tmp_path_factory.mktemp("faults")
    convert(REPLY, here / "mlx")
    return here


def convert(source: Path, to: Path, *more: object) -> Path:
    """With the command line."""
    run("convert", source, "--to", "mlx", "-o", to, "--base", SMOL, *more)
    return to


def run(*words: object) -> None:
    from click.testing import CliRunner

    from loraduct.cli import main

    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def judge(room: Path) -> Judge:
    return Judge(SMOL, ["Write a reply: see you on"])


def guilty(found: dict[str, suites.Suite], suite: str, name: str) -> Any:
    """The failed check of that name; the suite has failed with it, and so has all."""
    assert found[suite].status == "failed"
    assert not suites.all_passed(list(found.values()))
    assert suites.verdict(list(found.values())).startswith("FAILED")
    return next(c for c in found[suite].checks if c.name == name and c.status == "failed")


def rows(module: str, change: Callable[[Any], None]) -> Edit:
    """A change of a module's lora_b (r, out) as MLX stores it."""
    return lambda tensors: change(tensors[f"{module}.lora_b"])


def flip(b: Any) -> None:
    b[:, 5] *= -1


def scale(b: Any) -> None:
    b *= b.dtype.type(1.01)


def permute(b: Any) -> None:
    """llama.cpp's order of a rotary head's halves."""
    heads = b.reshape(b.shape[0], -1, 2, 32)
    b[...] = heads.swapaxes(2, 3).reshape(b.shape)


def swap_layers(tensors: dict[str, Any]) -> None:
    for part in ("lora_a", "lora_b"):
        one, two = f"{DOWN}.{part}", f"{DOWN.replace('.7.', '.8.')}.{part}"
        tensors[one], tensors[two] = tensors[two].copy(), tensors[one].copy()


def test_the_sound_conversion_passes(room: Path, judge: Judge) -> None:
    found = judge(REPLY, room / "mlx")
    assert suites.all_passed(list(found.values())), [s.checks for s in found.values()]


@pytest.mark.parametrize(
    ("edit", "module"),
    [
        pytest.param(rows(DOWN, flip), DOWN, id="one-row-flipped"),
        pytest.param(rows(DOWN, scale), DOWN, id="scale-off-by-1-percent"),
        pytest.param(swap_layers, DOWN, id="two-layers-swapped"),
        pytest.param(rows(Q, permute), Q, id="q-rows-permuted"),
        pytest.param(
            rows(Q.replace("q_proj", "k_proj"), permute), Q.replace("q_proj", "k_proj"),
            id="k-rows-permuted",
        ),
    ],
)  # fmt: skip
def test_tensors(room: Path, judge: Judge, tmp_path: Path, edit: Edit, module: str) -> None:
    found = judge(REPLY, edited(room / "mlx", tmp_path / "wrong", edit))
    assert guilty(found, "parity", "dW").module == module


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_small_row_flipped(room: Path, judge: Judge, tmp_path: Path, dtype: str) -> None:
    """Of the whole matrix it is less than its dtype rounds; the smallest row of all is taken."""
    import torch
    from safetensors.torch import load_file, save_file

    def stored(name: str, edit: Callable[[dict[str, Any]], None]) -> Path:
        folder = shutil.copytree(REPLY, tmp_path / name)
        file = folder / "adapter_model.safetensors"
        tensors = {n: t.to(getattr(torch, dtype)) for n, t in load_file(file).items()}
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})
        return folder

    sizes = {}
    sound = stored("sound", lambda t: sizes.update(row_sizes(t)))
    name, row = min(sizes, key=lambda k: sizes[k])

    def flip_it(tensors: dict[str, Any]) -> None:
        tensors[name][row] *= -1

    wrong = convert(stored("wrong", flip_it), tmp_path / "wrong-mlx")
    check = guilty(judge(sound, wrong), "parity", "dW")
    assert f"row {row} is off by" in check.detail
    assert check.module == name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    found = judge(sound, convert(sound, tmp_path / "sound-mlx"))
    assert suites.all_passed(list(found.values()))


def row_sizes(tensors: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Of each row of dW, as a share of the whole."""
    found = {}
    for name, b in tensors.items():
        if ".lora_B." in name:
            dw = b.double() @ tensors[name.replace("lora_B", "lora_A")].double()
            shares = (dw.norm(dim=1) / dw.norm()).tolist()
            found |= {(name, n): share for n, share in enumerate(shares)}
    return found


def test_a_scale_that_is_off_everywhere(room: Path, judge: Judge, tmp_path: Path) -> None:
    """In the config alone: the gain says by how much, whatever the tensors say."""
    config = json.loads((room / "mlx" / "adapter_config.json").read_text())
    config["lora_parameters"]["scale"] *= 1.01
    wrong = edited(room / "mlx", tmp_path / "wrong", lambda _: None, **config)
    found = judge(REPLY, wrong)
    assert "gain 1.01" in guilty(found, "parity", "dW").detail
    modules = found["parity"].numbers["modules"]
    assert [m["gain"] for m in modules] == pytest.approx([1.01] * len(modules), rel=1e-4)


def peft(to: Path, modules: dict[str, tuple[int, int, int]], **config: Any) -> Path:
    """An adapter with random values: module -> (rank, in, out)."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(3)
    tensors = {}
    for name, (r, inner, out) in modules.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(r, inner)).astype("f4") * 0.05
        tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(out, r)).astype("f4") * 0.05
        if config.get("use_dora"):
            m = rng.uniform(1, 4, out).astype("f4")
            tensors[f"{stem}.lora_magnitude_vector"] = m
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors", {"format": "pt"})
    ranks = {n: r for n, (r, _, _) in modules.items()}
    full = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16,
        "target_modules": list(modules), "base_model_name_or_path": SMOL.name, "bias": "none",
        "rank_pattern": ranks, "alpha_pattern": {}, "init_lora_weights": True,
    } | config  # fmt: skip
    (to / "adapter_config.json").write_text(json.dumps(full))
    return to


def test_a_transposed_square_a(judge: Judge, room: Path, tmp_path: Path) -> None:
    source = peft(tmp_path / "square", {Q: (576, 576, 576)})

    def edit(tensors: dict[str, Any]) -> None:
        tensors[f"{Q}.lora_a"] = np.ascontiguousarray(tensors[f"{Q}.lora_a"].T)

    wrong = edited(convert(source, tmp_path / "mlx"), tmp_path / "wrong", edit)
    assert guilty(judge(source, wrong), "parity", "dW").module == Q


def test_a_pattern_that_was_ignored(judge: Judge, room: Path, tmp_path: Path) -> None:
    """The source has one module with another alpha; its conversion was made as if it had not."""
    source = tmp_path / "pattern"
    shutil.copytree(REPLY, source)
    config = json.loads((source / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"layers.7.mlp.down_proj": 24}
    (source / "adapter_config.json").write_text(json.dumps(config))
    check = guilty(judge(source, room / "mlx"), "parity", "dW")
    assert check.module == DOWN
    assert "1 of" in check.detail


def test_a_magnitude_that_was_dropped(judge: Judge, room: Path, tmp_path: Path) -> None:
    source = peft(tmp_path / "dora", {Q: (8, 576, 576), DOWN: (8, 1536, 576)}, use_dora=True)
    there = convert(source, tmp_path / "mlx")

    def drop(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith(".m")]:
            del tensors[name]

    wrong = edited(there, tmp_path / "wrong", drop, fine_tune_type="lora")
    check = guilty(judge(source, wrong), "parity", "dW")
    assert "one is DoRA, the other is not" in check.detail
    assert check.module in (Q, DOWN)


def test_a_nan_that_attention_hides(judge: Judge, room: Path, tmp_path: Path) -> None:
    """torch's fused attention kernel gives finite logits with it: the file is looked at."""
    name = f"base_model.model.{Q}.lora_A.weight"

    def edit(tensors: dict[str, Any]) -> None:
        tensors[name][2, 11] = np.nan

    wrong = edited(REPLY, tmp_path / "nan", edit)
    found = judge(wrong, room / "mlx")
    assert guilty(found, "structure", "values").module == name
    assert found["parity"].status == "skipped"


def test_another_base(room: Path, tmp_path: Path) -> None:
    """Of the same shapes and name; a tenth of noise in each weight."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / SMOL.name
    folder.mkdir()
    for file in SMOL.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    rng = np.random.default_rng(0)
    weights = load_file(SMOL / "model.safetensors")
    for name, w in weights.items():
        if w.ndim == 2 and "embed" not in name:
            noise = rng.standard_normal(w.shape, np.float32) * (0.3 * float(w.std()))
            weights[name] = (w + noise).astype(w.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    check = guilty(Judge(folder, [])(REPLY, room / "mlx"), "base", "identity")
    assert check.adapter == "B"
    assert "correlate 0.9" in check.detail


def test_a_base_with_an_adapter_fused_in(room: Path, tmp_path: Path) -> None:
    """Its weights correlate with the base's by more than 0.9999."""
    fused = tmp_path / SMOL.name
    run("fuse", ROOT / "examples" / "summary", "--base", SMOL, "-o", fused)
    check = guilty(Judge(fused, [])(REPLY, room / "mlx"), "base", "identity")
    assert check.adapter == "B"
    assert "off by more than storing them in another dtype explains" in check.detail


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_base_in_another_dtype(room: Path, tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from loraduct.validation.base_model import identity

    (tmp_path / "base").mkdir()
    shutil.copy(SMOL / "config.json", tmp_path / "base")
    tensors = load_file(SMOL / "model.safetensors")
    cast = {n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}
    save_file(cast, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    other = Judge(tmp_path / "base", [])
    assert identity(other.fresh(room / "mlx"), other.base).status == "passed"


@pytest.fixture(scope="module")
def package(room: Path) -> Path:
    """Base, `reply` and `other` (its twin with other values of the same shapes)."""

    def edit(tensors: dict[str, Any]) -> None:
        for n, t in tensors.items():
            tensors[n] = -t if "lora_B" in n else t

    other = edited(REPLY, room / "other", edit)
    path = room / "x.mlpackage"
    words = ("-a", f"reply={REPLY}", "-a", f"other={other}", "--context", 64, "-o", path)
    run("package", "--base", SMOL, *words)
    return path


def blobs(function: Any) -> list[Any]:
    """Values in the weight file, in the program's order."""
    (block,) = function.block_specializations.values()
    values = [op.attributes["val"] for op in block.operations if "val" in op.attributes]
    return [v.blobFileValue for v in values if v.WhichOneof("value") == "blobFileValue"]


def test_a_function_that_points_at_another_adapters_weights(
    package: Path, tmp_path: Path, cli: Cli
) -> None:
    from loraduct.formats.coreml.package import read as read_package

    path = tmp_path / "x.mlpackage"
    shutil.copytree(package, path)
    prompts = tmp_path / "p.txt"
    prompts.write_text("See you on\n")
    words = ("--base", SMOL, "--prompts", prompts)
    sound = cli("validate", REPLY, f"{path}:reply", *words)
    assert sound.exit_code == 0, sound.output
    found = read_package(path)
    mine, others = (blobs(found.functions[n]) for n in ("reply", "other"))
    pairs = [(a, b) for a, b in zip(mine, others, strict=True) if a.offset != b.offset]
    assert len(pairs) >= 7
    for a, b in pairs:
        a.offset = b.offset
    found.spec_path.write_bytes(found.model.SerializeToString())
    result = cli("validate", REPLY, f"{path}:reply", *words)
    assert result.exit_code in (1, 3), result.output
    assert "model.layers." in result.output


def test_shifted_indices_of_a_table(package: Path, tmp_path: Path, cli: Cli) -> None:
    """Each index one higher in a matrix of the base: the sizes are right, the values aren't."""
    from loraduct.formats.coreml.package import read as read_package

    path = tmp_path / "lut.mlpackage"
    include = r"layers[._]7[._]mlp[._]down_proj"
    run("compress", package, "-o", path, "--palettize", 4, "--include", include)
    prompts = tmp_path / "p.txt"
    prompts.write_text("See you on\n")
    words = ("validate", REPLY, f"{path}:reply", "--base", SMOL, "--prompts", prompts)
    sound = cli(*words)
    assert sound.exit_code == 0, sound.output
    found = read_package(path)
    (block,) = found.functions["base"].block_specializations.values()
    (op,) = (o for o in block.operations if o.type == "constexpr_lut_to_dense")
    value = op.inputs["indices"].arguments[0].value.blobFileValue
    start, end = found.blobs.span(value.offset, "indices")
    assert end - start == 576 * 1536 // 2
    file = found.blobs.path
    raw = bytearray(file.read_bytes())
    codes = np.frombuffer(raw, np.uint8, end - start, start)
    low, high = (codes & 15) + 1 & 15, (codes >> 4) + 1 & 15
    codes[...] = low | high << 4
    file.write_bytes(raw)
    result = cli(*words, "--json")
    assert result.exit_code == 3, result.output
    wrong = [c for c in json.loads(result.stdout)["checks"] if c["status"] == "failed"]
    assert any("layers.7.mlp.down_proj" in c.get("module", "") for c in wrong), wrong
