"""PEFT adapters, converted, must make stock mlx-lm answer what stock PEFT answers."""

from __future__ import annotations

import json
import math
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


def test_bases_agree(
    architecture: str, tiny: Tiny, base_logits: Logits, zoo: ModuleType, peers: ModuleType
) -> None:
    """Without this, a difference further down would say nothing about the adapter."""
    expected = base_logits(architecture)
    found = peers.mlx_logits(tiny(architecture).path, None, zoo.TOKENS)
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    assert 0.3 < np.abs(expected).max() < 20


def test_logits(
    trained: Any, base_logits: Logits, convert: Convert, zoo: ModuleType, peers: ModuleType
) -> None:
    """Every linear projection of every block is adapted; the output loads strictly."""
    result = convert(trained.path, "mlx", "--base", trained.base.path)
    found = peers.mlx_logits(trained.base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, trained.logits, base_logits(trained.base.name))


def test_module_deltas(
    variant: str,
    peft_adapter: Callable[[str, str], Any],
    convert: Convert,
    peers: ModuleType,
) -> None:
    """Per module, PEFT's merged weight and mlx-lm's fused weight differ by rounding alone."""
    source = peft_adapter("llama", variant)
    result = convert(source.path, "mlx", "--base", source.base.path)
    expected = peers.peft_deltas(source.base.path, source.path)
    assert len(expected) == 7 * source.base.layers
    peers.assert_same_deltas(peers.mlx_deltas(source.base.path, result), expected)


@pytest.mark.parametrize("variant_name", ["lora", "patterns", "dora-patterns"])
def test_base_is_not_needed(
    variant_name: str,
    peft_adapter: Callable[[str, str], Any],
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Names that are the same on both sides convert where nobody has the base at hand."""
    source = peft_adapter("llama", variant_name)
    alone = peers.copy_adapter(source.path, tmp_path / "alone")
    peers.edit_json(alone / peers.CONFIG, base_model_name_or_path="nobody/has-this")
    result = convert(alone, "mlx")
    found = peers.mlx_logits(source.base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, source.logits, base_logits("llama"))


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        pytest.param("llama", {"layers_to_transform": [0, 2]}, id="layers-0-and-2"),
        pytest.param("llama", {"layers_to_transform": [1, 2]}, id="last-two-layers"),
        pytest.param("llama", {"layers_to_transform": 0}, id="first-layer"),
        pytest.param("llama", {"exclude_modules": ["k_proj", "up_proj"]}, id="exclude-modules"),
        pytest.param(r".*\.(0|2)\.(self_attn\.[qv]|mlp\.up)_proj", {}, id="regex"),
        pytest.param("all-linear", {}, id="all-linear"),
        pytest.param(
            ["model.layers.0.self_attn.q_proj", "mlp.down_proj"],
            {"layers_to_transform": [2]},
            id="full-path-bypasses-layers",
        ),
    ],
)
def test_target_selection(
    targets: Any,
    options: dict[str, Any],
    tiny: Tiny,
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """However PEFT was told what to adapt, MLX adapts the same modules and no others."""
    base = tiny("llama")
    config = peers.lora(base.targets if targets == "llama" else targets, **options)
    expected = peers.save_peft(base.path, tmp_path / "peft", config, zoo.TOKENS)
    result = convert(tmp_path / "peft", "mlx", "--base", base.path)
    found = peers.mlx_logits(base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base_logits("llama"))
    adapted = set(peers.peft_modules(peers.load_peft(base.path, tmp_path / "peft")))
    assert set(peers.mlx_modules(peers.mlx_model(base.path, result))) == adapted


def test_adapter_with_a_name_of_its_own(
    tiny: Tiny,
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """PEFT saves an adapter that isn't called "default" into a folder of that name."""
    base = tiny("llama")
    config = peers.lora(base.targets)
    expected = peers.save_peft(base.path, tmp_path / "peft", config, zoo.TOKENS, name="style")
    assert not (tmp_path / "peft" / peers.CONFIG).exists()
    result = convert(tmp_path / "peft" / "style", "mlx", "--base", base.path)
    found = peers.mlx_logits(base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base_logits("llama"))


@pytest.mark.parametrize("variant_name", ["lora", "rslora", "patterns"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_kept_exactly(
    dtype: str,
    variant_name: str,
    peft_adapter: Callable[[str, str], Any],
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Both runtimes widen 16-bit adapters, so nothing but the fold may touch the numbers.

    Where a fold isn't a power of two the result is stored wider, else logits would be off by
    more than 1e-5; what needn't be touched must stay as narrow as it came.
    """
    import torch

    source = peft_adapter("llama", variant_name)
    half = peers.copy_adapter(source.path, tmp_path / "half")
    peers.cast_tensors(half / peers.PEFT_WEIGHTS, getattr(torch, dtype))
    expected = peers.peft_logits(source.base.path, half, zoo.TOKENS)
    result = convert(half, "mlx", "--base", source.base.path)
    found = peers.mlx_logits(source.base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base_logits("llama"))
    narrow = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    stored = {name: kind for name, (kind, _, _) in _written(peers, result).items()}
    assert {kind for name, kind in stored.items() if name.endswith("lora_a")} == {narrow}
    if "patterns" not in variant_name:
        assert set(stored.values()) == {narrow}
    else:
        assert "F32" in {kind for name, kind in stored.items() if name.endswith("lora_b")}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dora_in_half_precision(
    dtype: str,
    peft_adapter: Callable[[str, str], Any],
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """mlx-lm multiplies B and A in their own dtype for the norm: 16 bits there cost accuracy.

    So kept tensors must be exact as such, and widened ones must give equal logits.
    """
    import torch

    source = peft_adapter("llama", "dora")
    half = peers.copy_adapter(source.path, tmp_path / "half")
    peers.cast_tensors(half / peers.PEFT_WEIGHTS, getattr(torch, dtype))
    kept = peers.load_file(convert(half, "mlx") / peers.MLX_WEIGHTS)
    for name, tensor in peers.load_file(half / peers.PEFT_WEIGHTS).items():
        path, leaf = peers.mlx_name(name)
        assert torch.equal(kept[f"{path}.{leaf}"], tensor.T if leaf != "m" else tensor)
    wide = convert(half, "mlx", "--dtype", "f32")
    expected = peers.peft_logits(source.base.path, half, zoo.TOKENS)
    found = peers.mlx_logits(source.base.path, wide, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base_logits("llama"))


@pytest.mark.parametrize(("option", "kind"), [("f16", "F16"), ("bf16", "BF16"), ("f32", "F32")])
def test_dtype_on_request(
    option: str,
    kind: str,
    peft_adapter: Callable[[str, str], Any],
    convert: Convert,
    peers: ModuleType,
) -> None:
    """--dtype rounds once, to the nearest, and touches nothing else."""
    import torch

    source = peft_adapter("llama", "lora")
    result = convert(source.path, "mlx", "--base", source.base.path, "--dtype", option)
    written = _written(peers, result)
    assert {entry[0] for entry in written.values()} == {kind}
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
    for name, tensor in peers.load_file(source.path / peers.PEFT_WEIGHTS).items():
        rounded = tensor.to(dtype).T.contiguous()
        _, shape, data = written[".".join(peers.mlx_name(name))]
        assert shape == tuple(rounded.shape)
        assert data == rounded.view(torch.uint8).numpy().tobytes()


def test_config_is_one_mlx_lm_could_have_written(
    peft_adapter: Callable[[str, str], Any], convert: Convert, peers: ModuleType
) -> None:
    """Rank, scale and dropout are mandatory for the loader; alpha means nothing to it."""
    source = peft_adapter("llama", "rslora")
    config = peers.read_json(convert(source.path, "mlx") / peers.CONFIG)
    assert config["fine_tune_type"] == "lora"
    parameters = config["lora_parameters"]
    assert parameters["rank"] == 4
    assert math.isclose(parameters["scale"], 10 / 4**0.5, rel_tol=1e-15)
    assert 0 <= parameters["dropout"] < 1
    assert "peft_type" not in json.dumps(config)


def _written(peers: ModuleType, folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return dict(peers.raw_tensors(folder / peers.MLX_WEIGHTS))
