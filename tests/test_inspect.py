"""What `inspect` says: of the file as it is, of everything in it, on one screen."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

Folder = Callable[..., Path]
Cli = Callable[..., Any]
STEM = "base_model.model."
QUERY = {"ranks": {"self_attn.q_proj": 2}, "rank_pattern": {"q_proj": 2}}


def document(cli: Cli, *args: object) -> Any:
    result = cli("inspect", *args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def text(cli: Cli, *args: object) -> str:
    result = cli("inspect", *args)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


def full_fine_tune(tmp_path: Path) -> Path:
    """An MLX folder with whole parameters: two layers, and the norm behind them."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": np.full((4, 3), i + 1.0) for i in (0, 1)}
    tensors["model.norm.weight"] = np.array([3.0, 4.0])
    folder = tmp_path / "full"
    folder.mkdir()
    save_file(
        {k: v.astype(np.float32) for k, v in tensors.items()}, folder / "adapters.safetensors"
    )
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "full", "num_layers": 2}')
    return folder


def test_our_own_output_is_described_as_it_is(
    peft_folder: Folder, cli: Cli, tmp_path: Path
) -> None:
    """Padded and folded on the way to MLX: the file's rank, scale and bytes, not the source's."""
    out = tmp_path / "mlx"
    cli("convert", peft_folder(**QUERY), "--to", "mlx", "-o", out)
    found, stored = document(cli, out), load_file(out / "adapters.safetensors")
    assert (found["ranks"], len(found["scales"])) == ({"4": 6}, 1)
    assert found["parameters"] == sum(t.size for t in stored.values())
    assert found["bytes"] == sum(t.nbytes for t in stored.values())
    assert found["origin"]["changed_modules"] in (2, 4)  # whose scale became the common one
    assert found["origin"]["still_holds"]
    shown = text(cli, out)
    assert "converted from PEFT by loraduct" in shown
    assert "restores its config and the rank and scale of" in shown


def test_a_changed_file_restores_nothing(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    cli("convert", peft_folder(**QUERY), "--to", "mlx", "-o", out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["lora_parameters"]["scale"] *= 2
    (out / "adapter_config.json").write_text(json.dumps(config))
    assert not document(cli, out)["origin"]["still_holds"]
    shown = text(cli, out)
    assert "changed since" in shown
    assert "restores its config" not in shown


def test_dora_norms_are_not_called_dw(peft_folder: Folder, cli: Cli) -> None:
    """s * ||BA|| is not the change of the weight where magnitudes scale it."""
    plain, dora = peft_folder("plain"), peft_folder("dora", use_dora=True)
    assert "||dW||_F" in text(cli, plain, "--stats")
    shown = text(cli, dora, "--stats")
    assert "low-rank part" in shown
    assert "||dW||" not in shown
    assert document(cli, plain, "--stats")["stats"]["norm_of"] == "dW"
    assert document(cli, dora, "--stats")["stats"]["norm_of"] == "low-rank part"


def test_full_fine_tune_is_listed_and_measured(cli: Cli, tmp_path: Path) -> None:
    folder = full_fine_tune(tmp_path)
    found = document(cli, folder, "--stats")
    rows = {r["module"]: r for r in found["replaced"]}
    up = rows["mlp.up_proj.weight"]
    assert (up["layers"], up["shape"], up["parameters"]) == ([0, 1], [4, 3], 24)
    assert rows["model.norm.weight"]["layers"] == []
    norms = {r["parameter"]: r["norm"] for r in found["stats"]["replaced"]}
    assert norms["model.norm.weight"] == pytest.approx(5)
    assert norms["model.layers.1.mlp.up_proj.weight"] == pytest.approx(math.sqrt(48))
    shown = text(cli, folder, "--stats")
    for words in ("mlp.up_proj.weight", "0-1", "||W||_F", "no NaN"):
        assert words in shown
    assert "effective rank" not in shown


def test_stats_name_a_broken_replaced_weight(cli: Cli, tmp_path: Path) -> None:
    folder = full_fine_tune(tmp_path)
    tensors = load_file(folder / "adapters.safetensors")
    tensors["model.norm.weight"][1] = np.nan
    save_file(tensors, folder / "adapters.safetensors")
    stats = document(cli, folder, "--stats")["stats"]
    assert stats["not_finite"] == ["model.norm.weight"]
    assert "model.norm.weight" not in [r["parameter"] for r in stats["replaced"]]


def test_replaced_parameters_are_named(peft_folder: Folder, cli: Cli) -> None:
    extra = {f"{STEM}lm_head.weight": np.ones((5, 16), np.float32)}
    for i in (0, 1):
        extra[f"{STEM}model.layers.{i}.self_attn.q_proj.base_layer.bias"] = np.ones(24, np.float32)
    folder = peft_folder(extra=extra, modules_to_save=["lm_head"], bias="lora_only")
    rows = {r["module"]: r for r in document(cli, folder)["replaced"]}
    assert rows["lm_head.weight"]["origins"] == ["modules_to_save"]
    assert rows["self_attn.q_proj.bias"]["layers"] == [0, 1]
    assert rows["self_attn.q_proj.bias"]["origins"] == ["bias"]
    shown = text(cli, folder)
    for words in ("lm_head.weight", "modules_to_save", "self_attn.q_proj.bias", "5 x 16"):
        assert words in shown


def test_scales_shown_alike_are_counted_together(peft_folder: Folder, cli: Cli) -> None:
    """Two scales that differ in the ninth digit share a key; no module may be lost to it."""
    folder = peft_folder(lora_alpha=8, alpha_pattern={"q_proj": 8.00000004})
    scales = document(cli, folder)["scales"]
    assert scales == {"2": 6}


def test_modules_of_one_name_and_two_shapes_are_two_rows(cli: Cli, tmp_path: Path) -> None:
    tensors = {}
    for layer, out in ((0, 8), (1, 12)):
        stem = f"{STEM}model.layers.{layer}.mlp.up_proj"
        tensors[f"{stem}.lora_A.weight"] = np.ones((2, 6), np.float32)
        tensors[f"{stem}.lora_B.weight"] = np.ones((out, 2), np.float32)
    folder = tmp_path / "two"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rows = document(cli, folder)["targets"]
    assert [(r["layers"], r["shape"]) for r in rows] == [([0], [8, 6]), ([1], [12, 6])]


def test_flags_reach_every_adapter_of_a_folder(
    peft_folder: Folder, cli: Cli, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        shutil.move(peft_folder(name), tmp_path / "all" / name)
    found = document(cli, tmp_path / "all", "--stats", "--tensors")["adapters"]
    assert [len(d["stats"]["modules"]) for d in found] == [6, 6]
    assert [len(d["tensors"]) for d in found] == [12, 12]
    shown = text(cli, tmp_path / "all", "--stats", "--tensors")
    assert shown.count("no NaN") == 2


@pytest.mark.parametrize(
    "args",
    [
        ["A", "--rank", "3"],
        ["A", "--targets", "foo"],
        ["A", "--estimate", "B"],
        ["--estimate", "B", "--stats"],
        ["--estimate", "B", "--tensors"],
        ["--estimate", "B", "--trained-on", "nf4"],
        ["--estimate", "B", "--targets", ","],
        ["--rank", "3"],
        [],
    ],
)
def test_options_that_do_not_go_together(args: list[str], cli: Cli) -> None:
    result = cli("inspect", *args)
    assert result.exit_code == 2, result.stdout
    assert not result.stdout


def test_uniform_mlx_is_a_usage_error(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("convert", peft_folder(), "--to", "mlx", "--uniform", "-o", out)
    assert result.exit_code == 2
    assert "always uniform" in result.stderr
    assert not out.exists()


def test_checkpoints_are_named_and_counted(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    cli("convert", peft_folder(), "--to", "mlx", "-o", out)
    assert "weights" not in text(cli, out)
    for step in ("0000100", "0000200", "0000300"):
        shutil.copy(out / "adapters.safetensors", out / f"{step}_adapters.safetensors")
    shown = text(cli, out / "0000100_adapters.safetensors")
    assert "weights     0000100_adapters.safetensors" in shown
    assert "2 more: 0000200_adapters.safetensors" in shown
    found = document(cli, out)
    assert (found["weights"], len(found["checkpoints"])) == ("adapters.safetensors", 3)


def test_unsaid_precision_is_no_trap_on_the_screen(peft_folder: Folder, cli: Cli) -> None:
    """It holds for nearly every PEFT adapter: one remark in the base's line, not an alarm."""
    folder = peft_folder()
    shown = text(cli, folder)
    assert "  !" not in shown
    assert "some/base (precision in training not said; --trained-on says it)" in shown
    assert [t["kind"] for t in document(cli, folder)["traps"]] == ["base-precision-unknown"]
    assert "some/base (nf4)" in text(cli, folder, "--trained-on", "nf4")


def test_many_ranks_stay_on_one_line(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    """rsLoRA with a rank for every layer: counted, cut, and every cut is shown as one."""
    ranks = {f"layers.{i}.self_attn.q_proj": i + 1 for i in range(12)}
    folder = peft_folder(layers=12, use_rslora=True, rank_pattern=ranks)
    file = folder / "adapter_model.safetensors"
    with safe_open(file, "numpy") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    for key in tensors:
        if "q_proj" in key:
            r = int(key.split("layers.")[1].split(".")[0]) + 1
            axis = 0 if "lora_A" in key else 1
            tensors[key] = np.ascontiguousarray(
                np.resize(tensors[key], (r, 16) if not axis else (24, r))
            )
    save_file(tensors, file)
    shown = text(cli, folder)
    assert "rsLoRA, ranks per module" in shown
    assert "1, 2, 3, 4, 5, 6, ..." in shown
    assert max(map(len, shown.splitlines())) <= 110


def test_an_untrained_adapter_is_said_to_change_nothing(
    peft_folder: Folder, cli: Cli, tmp_path: Path
) -> None:
    """Zeros of either sign, in both formats; one number in the last b is enough to be trained."""
    folder = peft_folder(**QUERY)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    lasts = [n for n in tensors if "lora_B" in n]
    for n in lasts:
        tensors[n][...] *= 0  # -0.0 where it was negative
    assert any(np.signbit(tensors[n]).any() for n in lasts)
    save_file(tensors, file, {"format": "pt"})
    assert "the adapter changes nothing" in text(cli, folder)
    there = tmp_path / "mlx"
    assert (
        "the adapter changes nothing" in cli("convert", folder, "--to", "mlx", "-o", there).stdout
    )
    assert [t["kind"] for t in document(cli, there)["traps"] if t["kind"] == "zero"] == ["zero"]
    tensors[lasts[-1]].flat[-1] = np.finfo(tensors[lasts[-1]].dtype).tiny
    save_file(tensors, file, {"format": "pt"})
    assert "the adapter changes nothing" not in text(cli, folder)
