"""PEFT to PEFT: one rank and one alpha for serving engines, other dtypes, nothing lost.

MLX has no place for biases and whole modules; PEFT has, so there they must come through whole
and unscaled, and towards MLX they must be refused.
"""

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

# what MLX can't hold: base, options, the word a refusal must contain
BEYOND_MLX = [
    pytest.param("llama", {"modules_to_save": ["lm_head"]}, "modules_to_save", id="head"),
    pytest.param("llama", {"modules_to_save": ["norm"]}, "modules_to_save", id="norms"),
    pytest.param("starcoder2", {"lora_bias": True}, "bias", id="lora-bias"),
    pytest.param("starcoder2", {"bias": "lora_only"}, "bias", id="bias-of-targets"),
    pytest.param("starcoder2", {"bias": "all"}, "bias", id="all-biases"),
]
PATTERNS = {
    "rank_pattern": {".*q_proj": 5, "layers.0.self_attn.q_proj": 16, "v_proj": 7},
    "alpha_pattern": {".*layers.1.*q_proj": 3, "v_proj": 21},
}


def _train(
    peers: ModuleType, zoo: ModuleType, base: Any, folder: Path, options: dict[str, Any]
) -> np.ndarray:
    config = peers.lora(["q_proj", "k_proj", "v_proj"], **options)
    logits: np.ndarray = peers.save_peft(base.path, folder, config, zoo.TOKENS)
    return logits


def _assert_uniform(peers: ModuleType, folder: Path) -> None:
    """What an engine that reads two numbers needs: they hold for every tensor of the file."""
    config = peers.read_json(folder / peers.CONFIG)
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert not config.get("use_rslora")
    shapes = {name: shape for name, (_, shape, _) in _tensors(peers, folder).items()}
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith("lora_A.weight")}
    ranks |= {shape[1] for name, shape in shapes.items() if name.endswith("lora_B.weight")}
    assert ranks == {config["r"]}


def _tensors(peers: ModuleType, folder: Path) -> dict[str, Any]:
    return dict(peers.raw_tensors(folder / peers.PEFT_WEIGHTS))


def test_uniform(
    variant: str,
    peft_adapter: Callable[[str, str], Any],
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
) -> None:
    """Padded ranks and folded scales: same logits, same module deltas."""
    source = peft_adapter("llama", variant)
    result = convert(source.path, "peft", "--uniform", "--base", source.base.path)
    _assert_uniform(peers, result)
    found = peers.peft_logits(source.base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, source.logits, base_logits("llama"))
    expected = peers.peft_deltas(source.base.path, source.path)
    peers.assert_same_deltas(peers.peft_deltas(source.base.path, result), expected)


def test_uniform_by_the_naive_formula(
    peft_adapter: Callable[[str, str], Any], convert: Convert, peers: ModuleType
) -> None:
    """vLLM, LoRAX, Olive and llama.cpp compute lora_alpha / r * B @ A for every module."""
    source = peft_adapter("llama", "rslora-patterns")
    result = convert(source.path, "peft", "--uniform")
    config = peers.read_json(result / peers.CONFIG)
    tensors = peers.float64_tensors(result / peers.PEFT_WEIGHTS)
    naive = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            b = tensors[f"{path}.lora_B.weight"]
            naive[path.removeprefix(peers.PEFT_PREFIX)] = config["lora_alpha"] / config["r"] * b @ a
    peers.assert_same_deltas(naive, peers.peft_deltas(source.base.path, source.path))


@pytest.mark.parametrize("options", [["--uniform"], ["--dtype", "f32"], []])
@pytest.mark.parametrize(("name", "config", "word"), BEYOND_MLX)
def test_biases_and_whole_modules(
    name: str,
    config: dict[str, Any],
    word: str,
    options: list[str],
    tiny: Tiny,
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Absolute values stay what they are; only the low-rank part (and its own bias) is scaled."""
    base = tiny(name)
    source = tmp_path / "peft"
    expected = _train(peers, zoo, base, source, config | PATTERNS)
    plain = base_logits(name)
    peers.assert_same_logits(peers.peft_logits(base.path, source, zoo.TOKENS), expected, plain)
    result = convert(source, "peft", "--base", base.path, *options)
    if "--uniform" in options:
        _assert_uniform(peers, result)
    assert set(_tensors(peers, result)) == set(_tensors(peers, source))
    found = peers.peft_logits(base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, expected, plain)


@pytest.mark.parametrize(("name", "config", "word"), BEYOND_MLX)
def test_what_mlx_cannot_hold_is_refused(
    name: str,
    config: dict[str, Any],
    word: str,
    tiny: Tiny,
    refused: Callable[..., str],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Never a folder that computes something near to it."""
    base = tiny(name)
    _train(peers, zoo, base, tmp_path / "peft", dict(config))
    refused(tmp_path / "peft", "mlx", "--base", base.path, saying=word)


@pytest.mark.parametrize(("option", "kind"), [("f16", "F16"), ("bf16", "BF16"), ("f32", "F32")])
def test_dtype(
    option: str,
    kind: str,
    peft_adapter: Callable[[str, str], Any],
    convert: Convert,
    peers: ModuleType,
) -> None:
    """One rounding to the nearest; patterns, alphas and every other field stay."""
    import torch

    source = peft_adapter("llama", "rslora-patterns")
    result = convert(source.path, "peft", "--dtype", option)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
    found = peers.load_file(result / peers.PEFT_WEIGHTS)
    for name, tensor in peers.load_file(source.path / peers.PEFT_WEIGHTS).items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype))
    before = peers.read_json(source.path / peers.CONFIG)
    assert peers.read_json(result / peers.CONFIG) == before


def test_nothing_asked_nothing_changed(
    variant: str, peft_adapter: Callable[[str, str], Any], convert: Convert, peers: ModuleType
) -> None:
    """Peft to peft without options is a copy in content."""
    source = peft_adapter("qwen2", variant)
    result = convert(source.path, "peft")
    weights = peers.PEFT_WEIGHTS
    assert peers.changed_tensors(source.path / weights, result / weights) == {}
    before = peers.read_json(source.path / peers.CONFIG)
    assert peers.read_json(result / peers.CONFIG) == before


def test_uniform_then_mlx(
    peft_adapter: Callable[[str, str], Any],
    base_logits: Logits,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
) -> None:
    """What --uniform wrote is an ordinary adapter: it converts like any other."""
    source = peft_adapter("llama", "dora-patterns")
    result = convert(convert(source.path, "peft", "--uniform"), "mlx")
    found = peers.mlx_logits(source.base.path, result, zoo.TOKENS)
    peers.assert_same_logits(found, source.logits, base_logits("llama"))
