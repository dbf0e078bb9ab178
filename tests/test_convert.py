"""Conversions on small files, against arithmetic done here with numpy on the raw files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

Folder = Callable[..., Path]
Cli = Callable[..., Any]


def peft_deltas(folder: Path, scale_of: Callable[[str, int], float]) -> dict[str, Any]:
    """dW per module from the raw PEFT file, in float64."""
    raw = {
        k: v.astype(np.float64) for k, v in load_file(folder / "adapter_model.safetensors").items()
    }
    stems = {k.removesuffix(".lora_A.weight") for k in raw if k.endswith(".lora_A.weight")}
    out = {}
    for stem in stems:
        a, b = raw[f"{stem}.lora_A.weight"], raw[f"{stem}.lora_B.weight"]
        module = stem.removeprefix("base_model.model.")
        out[module] = scale_of(module, a.shape[0]) * b @ a
    return out


def mlx_deltas(folder: Path) -> dict[str, Any]:
    """dW per module from the raw MLX file by mlx-lm's formula, in float64."""
    raw = {k: v.astype(np.float64) for k, v in load_file(folder / "adapters.safetensors").items()}
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    stems = {k.removesuffix(".lora_a") for k in raw if k.endswith(".lora_a")}
    return {s: scale * (raw[f"{s}.lora_a"] @ raw[f"{s}.lora_b"]).T for s in stems}


def close(ours: dict[str, Any], theirs: dict[str, Any], bound: float) -> None:
    """Same modules, and each dW within a relative bound."""
    assert ours.keys() == theirs.keys()
    for module, delta in theirs.items():
        assert np.linalg.norm(ours[module] - delta) <= bound * np.linalg.norm(delta), module


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ranks=st.fixed_dictionaries({}, optional={"self_attn.q_proj": st.integers(1, 9), "mlp.up_proj": st.integers(1, 9)}),
    alphas=st.fixed_dictionaries({}, optional={"self_attn.v_proj": st.integers(1, 40)}),
    alpha=st.integers(1, 40),
    rooted=st.booleans(),
)  # fmt: skip
def test_scales_ranks_and_patterns_survive(
    peft_folder: Folder, cli: Cli, tmp_path_factory: pytest.TempPathFactory,
    ranks: dict[str, int], alphas: dict[str, int], alpha: int, rooted: bool,
) -> None:  # fmt: skip
    """PEFT -> MLX -> PEFT and -> uniform PEFT, for any mix of ranks and scales."""
    here = tmp_path_factory.mktemp("c")
    source = peft_folder(
        str(here / "source"), ranks=ranks, r=4, lora_alpha=alpha, use_rslora=rooted,
        rank_pattern={k.split(".")[-1]: r for k, r in ranks.items()},
        alpha_pattern={k.split(".")[-1]: a for k, a in alphas.items()},
    )  # fmt: skip

    def scale_of(module: str, r: int) -> float:
        a = next((v for k, v in alphas.items() if module.endswith(k)), alpha)
        return a / np.sqrt(r) if rooted else a / r

    truth = peft_deltas(source, scale_of)
    assert cli("convert", source, "--to", "mlx", "-o", here / "mlx").exit_code == 0
    close(mlx_deltas(here / "mlx"), truth, 2e-7)
    assert cli("convert", here / "mlx", "--to", "peft", "-o", here / "back").exit_code == 0
    before, after = (load_file(p / "adapter_model.safetensors") for p in (source, here / "back"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_max_ulp(after[key], value, maxulp=1)
    config = (source / "adapter_config.json").read_text()
    assert json.loads((here / "back" / "adapter_config.json").read_text()) == json.loads(config)
    result = cli("convert", source, "--to", "peft", "--uniform", "-o", here / "uniform")
    assert result.exit_code == 0, result.stderr
    flat = json.loads((here / "uniform" / "adapter_config.json").read_text())
    assert (flat["rank_pattern"], flat["alpha_pattern"], flat["use_rslora"]) == ({}, {}, False)
    close(peft_deltas(here / "uniform", lambda _, r: flat["lora_alpha"] / flat["r"]), truth, 2e-7)
    shapes = {
        v.shape[0]
        for k, v in load_file(here / "uniform" / "adapter_model.safetensors").items()
        if "lora_A" in k
    }
    assert shapes == {flat["r"]}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dora", [False, True])
def test_round_trip_is_byte_equal(
    peft_folder: Folder, cli: Cli, tmp_path: Path, dtype: str, dora: bool
) -> None:
    source = peft_folder(dtype=dtype, use_dora=dora)
    assert cli("convert", source, "--to", "mlx", "-o", tmp_path / "mlx").exit_code == 0
    assert cli("convert", tmp_path / "mlx", "--to", "peft", "-o", tmp_path / "back").exit_code == 0
    for key, value in load_file(source / "adapter_model.safetensors").items():
        back = load_file(tmp_path / "back" / "adapter_model.safetensors")[key]
        assert back.dtype == value.dtype
        assert back.tobytes() == value.tobytes(), key
    before = json.loads((source / "adapter_config.json").read_text())
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == before


def test_fold_in_sixteen_bits_widens_and_comes_back(
    peft_folder: Folder, cli: Cli, tmp_path: Path
) -> None:
    """sqrt(2) between two scales: b is stored in float32, and the way back gives the same float16."""
    source = peft_folder(
        dtype="float16", use_rslora=True, ranks={"self_attn.q_proj": 8}, rank_pattern={"q_proj": 8}
    )
    result = cli("convert", source, "--to", "mlx", "-o", tmp_path / "mlx", "--json")
    actions = [a for t in json.loads(result.stdout)["tensors"] for a in t["actions"]]
    assert actions.count("widened") == 2
    assert cli("convert", tmp_path / "mlx", "--to", "peft", "-o", tmp_path / "back").exit_code == 0
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    for key, value in load_file(source / "adapter_model.safetensors").items():
        assert back[key].tobytes() == value.tobytes(), key


def test_a_changed_file_is_not_restored(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    """Once somebody edits the scale, the record of the origin must not undo it."""
    source = peft_folder(ranks={"self_attn.q_proj": 8}, rank_pattern={"q_proj": 8})
    cli("convert", source, "--to", "mlx", "-o", tmp_path / "mlx")
    file = tmp_path / "mlx" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["scale"] *= 3
    file.write_text(json.dumps(config))
    truth = mlx_deltas(tmp_path / "mlx")
    result = cli("convert", tmp_path / "mlx", "--to", "peft", "-o", tmp_path / "back")
    assert result.exit_code == 0, result.stderr
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    close(
        peft_deltas(tmp_path / "back", lambda _, r: written["lora_alpha"] / written["r"]),
        truth,
        1e-6,
    )
    assert "changed since" in cli("inspect", tmp_path / "mlx").stdout


def test_same_input_same_bytes(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    source = peft_folder()
    for name in ("one", "two"):
        assert cli("convert", source, "--to", "mlx", "-o", tmp_path / name).exit_code == 0
    for file in ("adapters.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_every_tensor_is_in_the_account(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    source = peft_folder()
    result = cli("convert", source, "--to", "mlx", "-o", tmp_path / "o", "-e", "up_proj", "--json")
    account = json.loads(result.stdout)
    assert {t["source"] for t in account["tensors"]} == set(
        load_file(source / "adapter_model.safetensors")
    )
    dropped = [t for t in account["tensors"] if t["actions"] == ["dropped"]]
    assert len(dropped) == 4
    assert all("up_proj" in t["source"] and t["target"] is None for t in dropped)
    assert not any("up_proj" in k for k in load_file(tmp_path / "o" / "adapters.safetensors"))


def test_what_is_left_out_leaves_the_config_too(
    peft_folder: Folder, cli: Cli, tmp_path: Path
) -> None:
    """Otherwise PEFT and mlx-lm would look for tensors that are not there."""
    source = peft_folder()
    assert cli("convert", source, "--to", "mlx", "-o", tmp_path / "all").exit_code == 0
    for name, path in (("peft", source), ("mlx", tmp_path / "all")):
        for to in ("peft", "mlx"):
            out = tmp_path / f"{name}-{to}"
            result = cli("convert", path, "--to", to, "-o", out, "-i", "layers.1.self_attn")
            assert result.exit_code == 0, result.stderr
            config = json.loads((out / "adapter_config.json").read_text())
            if to == "peft":
                assert config["target_modules"] == ["self_attn.q_proj", "self_attn.v_proj"]
                assert config["layers_to_transform"] == [1]
            else:
                assert config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
                assert config["num_layers"] == 1


def test_dry_run_refuses_what_a_run_refuses(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    bad = np.full((4, 16), np.nan, np.float32)
    source = peft_folder(
        extra={"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": bad}
    )
    for flags in (["--dry-run"], ["-o", tmp_path / "o"]):
        result = cli("convert", source, "--to", "mlx", *flags)
        assert result.exit_code == 1
        assert "layers.0.self_attn.q_proj.lora_A.weight" in result.stderr
    assert not (tmp_path / "o").exists()
    assert cli("convert", peft_folder("good"), "--to", "mlx", "--dry-run").exit_code == 0


def test_values_too_small_for_f16(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    tiny = np.full((24, 4), 1e-7, np.float32)
    source = peft_folder(
        extra={"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": tiny}
    )
    args = ["convert", source, "--to", "mlx", "--dtype", "f16", "-o", tmp_path / "o"]
    result = cli(*args)
    assert result.exit_code == 1
    assert "--allow-approximate" in result.stderr
    assert not (tmp_path / "o").exists()
    result = cli(*args, "--allow-approximate", "--json")
    assert result.exit_code == 0
    assert 0.01 < json.loads(result.stdout)["largest_relative_error"] < 1


def test_dora_magnitudes_are_never_narrowed(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    source = peft_folder(use_dora=True)
    cli("convert", source, "--to", "mlx", "--dtype", "bf16", "-o", tmp_path / "o")
    with safe_open(tmp_path / "o" / "adapters.safetensors", "numpy") as f:
        dtypes = {k.rsplit(".", 1)[-1]: f.get_slice(k).get_dtype() for k in f.keys()}  # noqa: SIM118
    assert dtypes == {"lora_a": "BF16", "lora_b": "BF16", "m": "F32"}


def test_annotate_travels(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    source = peft_folder()
    before = load_file(source / "adapter_model.safetensors")
    result = cli(
        "annotate", source, "--name", "mail", "--license", "apache-2.0", "--task", "summaries"
    )
    assert result.exit_code == 0, result.stderr
    after = load_file(source / "adapter_model.safetensors")
    assert all(after[k].tobytes() == v.tobytes() for k, v in before.items())
    cli("convert", source, "--to", "mlx", "-o", tmp_path / "mlx")
    assert (
        json.loads(cli("inspect", tmp_path / "mlx", "--json").stdout)["metadata"]["name"] == "mail"
    )
    assert 'license: "apache-2.0"' in (tmp_path / "mlx" / "README.md").read_text()
    cli("annotate", source, "--name", "")
    assert "name" not in json.loads(cli("inspect", source, "--json").stdout)["metadata"]


def test_name_map(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    source = peft_folder()
    names = {
        f"model.layers.{{}}.{m}": f"lm.blocks.{{}}.{m}"
        for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    }
    file = tmp_path / "names.json"
    file.write_text(json.dumps(names))
    result = cli("convert", source, "--to", "mlx", "-o", tmp_path / "o", "--name-map", file)
    assert result.exit_code == 0, result.stderr
    assert "lm.blocks.1.mlp.up_proj.lora_a" in load_file(tmp_path / "o" / "adapters.safetensors")
    cli("convert", tmp_path / "o", "--to", "peft", "-o", tmp_path / "back", "--name-map", file)
    before, after = (
        load_file(p / "adapter_model.safetensors") for p in (source, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    for change, word in (
        ({"nowhere": "x"}, "matches no module"),
        ({"model.layers.{}.mlp.up_proj": "lm.blocks.{}.self_attn.q_proj"}, "same name"),
        ({"model.layers.{}.mlp.up_proj": None}, "no entry for it"),
    ):
        file.write_text(json.dumps({k: v for k, v in (names | change).items() if v is not None}))
        result = cli("convert", source, "--to", "mlx", "-o", tmp_path / "p", "--name-map", file)
        assert result.exit_code == 1
        assert word in result.stderr


def test_old_npz_and_its_scale(cli: Cli, tmp_path: Path) -> None:
    """mlx-examples' adapters.npz: no config, scale 20 unless told, said aloud."""
    folder = tmp_path / "old"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in (2, 3):
        for module in ("self_attn.q_proj", "self_attn.v_proj"):
            tensors[f"model.layers.{layer}.{module}.lora_a"] = rng.normal(size=(16, 8)).astype(
                np.float32
            )
            tensors[f"model.layers.{layer}.{module}.lora_b"] = rng.normal(size=(8, 12)).astype(
                np.float32
            )
    np.savez(folder / "adapters.npz", **tensors)
    for flags, scale in (([], 20.0), (["--scale", "2"], 2.0)):
        out = tmp_path / f"peft{scale}"
        result = cli("convert", folder, "--to", "peft", "-o", out, *flags)
        assert result.exit_code == 0, result.stderr
        assert f"scale {scale:g}" in result.stdout
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["lora_alpha"] / config["r"] == scale
        truth = {s: scale * (tensors[f"{s}.lora_a"] @ tensors[f"{s}.lora_b"]).T.astype(np.float64)
                 for s in {k.rsplit(".", 1)[0] for k in tensors}}  # fmt: skip
        close(peft_deltas(out, lambda *_: scale), truth, 1e-6)  # noqa: B023
    assert "self_attn.q_proj" in cli("inspect", folder).stdout


def test_pickle_is_refused_and_read_on_request(
    peft_folder: Folder, cli: Cli, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    source = peft_folder()
    weights = source / "adapter_model.safetensors"
    truth = load_file(weights)
    torch.save({k: torch.from_numpy(v) for k, v in truth.items()}, source / "adapter_model.bin")
    weights.unlink()
    result = cli("convert", source, "--to", "mlx", "-o", tmp_path / "o")
    assert result.exit_code == 1
    assert "--allow-pickle" in result.stderr
    result = cli("convert", source, "--to", "peft", "-o", tmp_path / "o", "--allow-pickle")
    assert result.exit_code == 0, result.stderr
    back = load_file(tmp_path / "o" / "adapter_model.safetensors")
    assert all(back[k].tobytes() == v.tobytes() for k, v in truth.items())
