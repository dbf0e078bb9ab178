"""Rules of MLX folders: keys, num_layers, defaults, and what is written for which reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from loraduct.formats import mlx_keys

Cli = Callable[..., Any]
MODULES = [f"model.layers.{i}.{m}" for i in range(6) for m in ("self_attn.q_proj", "mlp.up_proj")]


def stock_selection(modules: list[str], n_layers: int, last: int, keys: list[str]) -> set[str]:
    """What mlx-lm's linear_to_lora_layers adapts, written out with slices as it does it."""
    blocks = [[m for m in modules if m.startswith(f"model.layers.{i}.")] for i in range(n_layers)]
    found = set()
    for i, block in list(enumerate(blocks))[-max(last, 0) :]:
        found |= {m for m in block if m.removeprefix(f"model.layers.{i}.") in keys}
    return found | {m for m in modules if m in keys}


@given(
    chosen=st.sets(st.sampled_from(MODULES), min_size=1),
    known=st.booleans(),
)
def test_written_keys_select_exactly_the_modules(chosen: set[str], known: bool) -> None:
    keys, last, relative = mlx_keys.keys_for(sorted(chosen), 6 if known else None)
    assert stock_selection(MODULES, 6, last, keys) == chosen
    assert relative <= known


@given(
    last=st.integers(-2, 8),
    keys=st.sets(st.sampled_from(["self_attn.q_proj", "mlp.up_proj", "q_proj", MODULES[3]])),
)
def test_selects_is_stock_mlx_lms_rule(last: int, keys: set[str]) -> None:
    config = {"num_layers": last, "lora_parameters": {"keys": sorted(keys)}}
    ours = {m for m, hit in mlx_keys.selects(config, MODULES, 6).items() if hit}
    assert ours == stock_selection(MODULES, 6, last, sorted(keys))


@pytest.fixture
def mlx_folder(tmp_path: Path) -> Callable[..., Path]:
    """``mlx_folder(config=..., modules=...)`` writes an MLX folder of rank 4."""

    def make(
        config: dict[str, Any], modules: list[str], name: str = "mlx", dora: bool = False
    ) -> Path:
        rng = np.random.default_rng(3)
        tensors = {}
        for module in modules:
            tensors[f"{module}.lora_a"] = rng.normal(size=(16, 4)).astype(np.float32)
            tensors[f"{module}.lora_b"] = rng.normal(size=(4, 24)).astype(np.float32)
            if dora:
                tensors[f"{module}.m"] = rng.uniform(1, 2, 24).astype(np.float32)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapters.safetensors")
        full = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 2, "model": "some/base",
                "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(full | config))
        return folder

    return make


def test_folder_without_keys_explains_itself(mlx_folder: Callable[..., Path], cli: Cli) -> None:
    old = [f"model.layers.{i}.self_attn.{p}_proj" for i in (2, 3) for p in "qv"]
    traps = json.loads(cli("inspect", mlx_folder({}, old), "--json").stdout)["traps"]
    assert "before 2025-09-30" in next(t["text"] for t in traps if t["kind"] == "default-keys")
    more = [*old, "model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj"]
    traps = json.loads(cli("inspect", mlx_folder({}, more, "new"), "--json").stdout)["traps"]
    assert "before 2025-09-30" not in next(t["text"] for t in traps if t["kind"] == "default-keys")


def test_old_default_keys_match_the_table_of_the_time() -> None:
    """Spot values of the table, as mlx-lm had it until 2025-09-30."""
    assert set(mlx_keys.OLD_DEFAULTS["qwen2_moe"]) == {
        "self_attn.q_proj", "self_attn.v_proj", "mlp.gate", "mlp.shared_expert_gate",
    }  # fmt: skip
    assert mlx_keys.OLD_DEFAULTS["dbrx"] == ("norm_attn_norm.attn.Wqkv", "ffn.router.layer")
    assert len(mlx_keys.OLD_DEFAULTS) == 19


def test_layers_to_transform_for_an_upper_part(
    mlx_folder: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    """MLX adapts the last N layers; PEFT must be told which, or it adapts all."""
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in (4, 5)]
    source = mlx_folder({}, modules)
    assert cli("convert", source, "--to", "peft", "-o", tmp_path / "o").exit_code == 0
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    # not q_proj alone: a hybrid has one in its linear attention too, and the base is not known
    assert config["target_modules"] == ["self_attn.q_proj"]
    assert config["layers_to_transform"] == [4, 5]
    assert config["lora_alpha"] / config["r"] == 20.0


def test_uneven_modules_get_full_paths(
    mlx_folder: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    modules = ["model.layers.1.self_attn.q_proj", "model.layers.3.mlp.up_proj"]
    source = mlx_folder(
        {
            "num_layers": 4,
            "lora_parameters": {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": modules},
        },
        modules,
    )
    assert cli("convert", source, "--to", "peft", "-o", tmp_path / "p").exit_code == 0
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["target_modules"] == modules
    assert cli("convert", tmp_path / "p", "--to", "mlx", "-o", tmp_path / "m").exit_code == 0
    assert json.loads((tmp_path / "m" / "adapter_config.json").read_text()) == json.loads(
        (source / "adapter_config.json").read_text()
    )
    before, after = (load_file(f / "adapters.safetensors") for f in (source, tmp_path / "m"))
    assert all(after[k].tobytes() == v.tobytes() for k, v in before.items())


def test_checkpoint_files_are_read_with_the_folders_config(
    mlx_folder: Callable[..., Path], cli: Cli
) -> None:
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in (2, 3)]
    folder = mlx_folder({}, modules)
    checkpoint = folder / "0000100_adapters.safetensors"
    checkpoint.write_bytes((folder / "adapters.safetensors").read_bytes())
    (folder / "adapters.safetensors").unlink()
    result = cli("inspect", checkpoint, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["modules"] == 2


def test_full_fine_tune_is_said_and_not_taken_for_an_adapter(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    save_file({"model.norm.weight": np.ones(16, np.float32)}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "full", "num_layers": 2}')
    assert "full fine-tune" in cli("inspect", folder).stdout
    result = cli("convert", folder, "--to", "peft", "-o", tmp_path / "o")
    assert result.exit_code == 1
    assert "full fine-tune" in result.stderr
    assert cli("convert", folder, "--to", "mlx", "-o", tmp_path / "o").exit_code == 0
    assert (
        load_file(tmp_path / "o" / "adapters.safetensors")["model.norm.weight"].tolist()
        == [1.0] * 16
    )
