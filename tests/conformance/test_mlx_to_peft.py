"""MLX adapters, converted, must make stock PEFT answer what stock mlx-lm answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Logits = Callable[[str], np.ndarray]
Convert = Callable[..., Path]


def _keys(style: str, base: Any) -> list[str] | None:
    """Training keys in each of the three ways mlx-lm knows."""
    inside = {"q_proj": "self_attn", "qkv_proj": "self_attn"}
    first, last = base.targets[0], base.targets[-1]
    relative = [f"{inside[first]}.{first}", f"mlp.{last}"]
    if style == "none":
        return None
    if style == "relative":
        return relative
    # full paths ignore num_layers: one module here, another there
    return [f"model.layers.0.{relative[0]}", f"model.layers.{base.layers - 1}.{relative[1]}"]


@pytest.mark.parametrize(
    ("kind", "style", "num_layers"),
    [("lora", "none", -1), ("dora", "relative", 2), ("lora", "full", 1)],
)
def test_logits(
    architecture: str,
    kind: str,
    style: str,
    num_layers: int,
    tiny: Tiny,
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Trained in MLX on every architecture, in the layouts mlx-lm writes."""
    base = tiny(architecture)
    keys = _keys(style, base)
    options = {"kind": kind, "keys": keys, "num_layers": num_layers}
    expected = peers.save_mlx(base.path, tmp_path / "mlx", zoo.TOKENS, **options)
    result = convert(tmp_path / "mlx", "peft", "--base", base.path)
    found = peers.peft_logits(base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base_logits(architecture))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("style", ["none", "relative", "full"])
@pytest.mark.parametrize("num_layers", [1, 2, 16])
def test_layouts(
    kind: str,
    style: str,
    num_layers: int,
    tiny: Tiny,
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Keys and num_layers in all combinations, without a base to look at, module by module."""
    base = tiny("llama")
    options = {"kind": kind, "keys": _keys(style, base), "num_layers": num_layers}
    expected = peers.save_mlx(base.path, tmp_path / "mlx", zoo.TOKENS, **options)
    result = convert(tmp_path / "mlx", "peft")
    found = peers.peft_logits(base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base_logits("llama"))
    deltas = peers.mlx_deltas(base.path, tmp_path / "mlx")
    peers.assert_same_deltas(peers.peft_deltas(base.path, result), deltas)
    assert set(peers.peft_modules(peers.load_peft(base.path, result))) == set(deltas)


@pytest.mark.parametrize(
    ("rank", "scale"), [(8, 20.0), (4, 2.5), (3, 0.1), (7, 1 / 3), (16, 0.0625), (1, 10)]
)
def test_alpha_over_r_is_the_scale(
    rank: int,
    scale: float,
    tiny: Tiny,
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """MLX multiplies by `scale`; PEFT by lora_alpha / r, which need not be a whole number."""
    base = tiny("llama")
    path = tmp_path / "mlx"
    expected = peers.save_mlx(base.path, path, zoo.TOKENS, num_layers=-1, rank=rank, scale=scale)
    result = convert(path, "peft")
    config = peers.read_json(result / peers.CONFIG)
    assert config["r"] == rank
    assert config["lora_alpha"] / config["r"] == pytest.approx(scale, rel=4e-16)
    assert not config.get("use_rslora")
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    found = peers.peft_logits(base.path, result, zoo.TOKENS)
    effect = np.abs(expected - base_logits("llama")).max()
    assert np.abs(found - expected).max() <= min(1e-5 * np.abs(expected).max(), 1e-3 * effect)


def test_config_is_one_peft_could_have_written(
    tiny: Tiny, convert: Convert, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """Serving engines read these fields without PEFT's help."""
    base = tiny("llama")
    peers.save_mlx(base.path, tmp_path / "mlx", zoo.TOKENS, kind="dora", num_layers=2)
    config = peers.read_json(convert(tmp_path / "mlx", "peft") / peers.CONFIG)
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["bias"] == "none"
    assert config["use_dora"] is True
    assert config["base_model_name_or_path"] == str(base.path)
    assert config.get("init_lora_weights", True) is True
    assert "lora_parameters" not in config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_half_precision_is_kept_exactly(
    kind: str,
    dtype: str,
    tiny: Tiny,
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """An adapter trained in MLX on a 16-bit base: no fold, so not one bit may change.

    DoRA's logits are no measure here: mlx-lm computes its norm in the tensors' own dtype.
    """
    import torch

    base = tiny("llama")
    path = tmp_path / "mlx"
    peers.save_mlx(base.path, path, zoo.TOKENS, kind=kind, num_layers=-1)
    peers.cast_mlx(path, getattr(peers.mx, dtype))
    result = convert(path, "peft")
    before = peers.load_file(path / peers.MLX_WEIGHTS)
    after = peers.load_file(result / peers.PEFT_WEIGHTS)
    assert len(after) == len(before)
    for name, tensor in after.items():
        module, leaf = peers.mlx_name(name)
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor.T if leaf != "m" else tensor, before[f"{module}.{leaf}"])
    if kind == "lora":
        expected = peers.mlx_logits(base.path, path, zoo.TOKENS)
        found = peers.peft_logits(base.path, result, zoo.TOKENS)
        peers.assert_same_logits(found, expected, base_logits("llama"))


def test_checkpoints_beside_the_adapter_change_nothing(
    tiny: Tiny,
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """mlx-lm leaves numbered checkpoints in the folder and itself never loads them."""
    base = tiny("llama")
    path = tmp_path / "mlx"
    peers.save_mlx(base.path, path, zoo.TOKENS, num_layers=2)
    (path / peers.MLX_WEIGHTS).rename(path / "0000100_adapters.safetensors")
    final = tmp_path / "final"
    expected = peers.save_mlx(base.path, final, zoo.TOKENS, num_layers=2, scale=3.0)
    (final / peers.MLX_WEIGHTS).rename(path / peers.MLX_WEIGHTS)
    (final / peers.CONFIG).rename(path / peers.CONFIG)
    result = convert(path, "peft")
    found = peers.peft_logits(base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base_logits("llama"))
