"""There and back again: the same bytes, the same configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Convert = Callable[..., Path]


def _folded(peers: ModuleType, base: Any, peft: Path, mlx: Path) -> set[str]:
    """B tensors whose scale relative to MLX's single one isn't a power of two."""
    shared = peers.read_json(mlx / peers.CONFIG)["lora_parameters"]["scale"]
    modules = peers.peft_modules(peers.load_peft(base.path, peft))
    return {
        f"{peers.PEFT_PREFIX}{name}.lora_B.weight"
        for name, module in modules.items()
        if math.frexp(module.scaling["default"] / shared)[0] != 0.5
    }


def _assert_same_peft(peers: ModuleType, base: Any, before: Path, mlx: Path, after: Path) -> None:
    """Byte-equal, but float32 B tensors with an awkward fold may be one step off."""
    old, new = before / peers.PEFT_WEIGHTS, after / peers.PEFT_WEIGHTS
    changed = peers.changed_tensors(old, new)
    if changed:
        allowed = _folded(peers, base, before, mlx)
        assert set(changed) <= allowed, changed
        assert peers.ulps_apart(old, new, changed) <= 1
    _assert_same_config(peers, before, after)


def _assert_same_config(peers: ModuleType, before: Path, after: Path) -> None:
    """Field by field; of patterns the order counts too, as the first match wins."""
    old, new = peers.read_json(before / peers.CONFIG), peers.read_json(after / peers.CONFIG)
    assert new == old
    for field in ("rank_pattern", "alpha_pattern"):
        assert list(new.get(field) or ()) == list(old.get(field) or ())


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "starcoder2"])
def test_peft_to_mlx_to_peft(
    name: str,
    variant: str,
    peft_adapter: Callable[[str, str], Any],
    convert: Convert,
    peers: ModuleType,
) -> None:
    source = peft_adapter(name, variant)
    mlx = convert(source.path, "mlx", "--base", source.base.path)
    back = convert(mlx, "peft", "--base", source.base.path)
    _assert_same_peft(peers, source.base, source.path, mlx, back)
    if "patterns" not in variant:
        weights = peers.PEFT_WEIGHTS
        assert peers.changed_tensors(source.path / weights, back / weights) == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_peft_in_half_precision_comes_back_exactly(
    dtype: str,
    variant: str,
    peft_adapter: Callable[[str, str], Any],
    convert: Convert,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """16-bit tensors have no exception: what was widened for a fold rounds back to itself."""
    import torch

    source = peft_adapter("llama", variant)
    half = peers.copy_adapter(source.path, tmp_path / "half")
    peers.cast_tensors(half / peers.PEFT_WEIGHTS, getattr(torch, dtype))
    back = convert(convert(half, "mlx"), "peft")
    assert peers.changed_tensors(half / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS) == {}
    _assert_same_config(peers, half, back)


@pytest.mark.parametrize("variant_name", ["lora", "dora", "patterns"])
def test_peft_in_mixed_precision_comes_back_exactly(
    variant_name: str,
    peft_adapter: Callable[[str, str], Any],
    convert: Convert,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """A file with several dtypes keeps each tensor's own."""
    import torch

    source = peft_adapter("llama", variant_name)
    mixed = peers.copy_adapter(source.path, tmp_path / "mixed")
    kinds = [torch.float16, torch.bfloat16]
    path = mixed / peers.PEFT_WEIGHTS
    tensors = peers.load_file(path)
    peers.rewrite_tensors(
        path, {name: t.to(kinds[i % 2]) for i, (name, t) in enumerate(sorted(tensors.items()))}
    )
    back = convert(convert(mixed, "mlx"), "peft")
    assert peers.changed_tensors(path, back / peers.PEFT_WEIGHTS) == {}
    _assert_same_config(peers, mixed, back)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"layers_to_transform": [0, 2]}, id="layers"),
        pytest.param({"layers_to_transform": 1}, id="one-layer"),
        pytest.param({"target_modules": r".*\.[02]\..*\.(q|down)_proj"}, id="regex"),
        pytest.param({"lora_alpha": 7.25, "r": 3}, id="float-alpha"),
        pytest.param({"init_lora_weights": "gaussian"}, id="gaussian-init"),
        pytest.param({"layers_to_transform": [1, 2], "layers_pattern": "layers"}, id="pattern"),
    ],
)
def test_peft_config_comes_back(
    options: dict[str, Any],
    tiny: Tiny,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Fields MLX has no word for travel in the file's metadata."""
    base = tiny("llama")
    options = {"targets": base.targets} | options
    config = peers.lora(options.pop("target_modules", options.pop("targets")), **options)
    source = tmp_path / "peft"
    peers.save_peft(base.path, source, config, zoo.TOKENS)
    peers.edit_json(source / peers.CONFIG, revision="a1b2c3", auto_mapping={"any": "thing"})
    mlx = convert(source, "mlx", "--base", base.path)
    _assert_same_peft(peers, base, source, mlx, convert(mlx, "peft"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    ("keys", "num_layers"),
    [
        (None, -1),
        (None, 2),
        (["self_attn.q_proj", "mlp.down_proj"], 2),
        (["self_attn.q_proj", "mlp.down_proj"], 16),
        (["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"], 2),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mlx_to_peft_to_mlx(
    dtype: str,
    keys: list[str] | None,
    num_layers: int,
    kind: str,
    tiny: Tiny,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Every training argument in MLX's configuration survives, and every bit of the tensors."""
    base = tiny("llama")
    source = tmp_path / "mlx"
    options = {"kind": kind, "keys": keys, "num_layers": num_layers}
    peers.save_mlx(base.path, source, zoo.TOKENS, **options)
    peers.cast_mlx(source, getattr(peers.mx, dtype))
    peers.edit_json(source / peers.CONFIG, a_field_of_tomorrow={"nested": [1, 2.5, None]})
    back = convert(convert(source, "peft", "--base", base.path), "mlx", "--base", base.path)
    assert peers.changed_tensors(source / peers.MLX_WEIGHTS, back / peers.MLX_WEIGHTS) == {}
    assert peers.read_json(back / peers.CONFIG) == peers.read_json(source / peers.CONFIG)
    peers.mlx_model(base.path, back)


def test_twice_there_and_back(
    peft_adapter: Callable[[str, str], Any], convert: Convert, peers: ModuleType
) -> None:
    """Rounding doesn't add up: the second trip returns what the first one returned."""
    source = peft_adapter("llama", "rslora-patterns")
    once = convert(convert(source.path, "mlx"), "peft")
    twice = convert(convert(once, "mlx"), "peft")
    weights = peers.PEFT_WEIGHTS
    assert peers.changed_tensors(once / weights, twice / weights) == {}
    _assert_same_config(peers, source.path, twice)


def test_patterns_come_back_in_their_order(
    peft_adapter: Callable[[str, str], Any], convert: Convert, peers: ModuleType, tmp_path: Path
) -> None:
    """Sorting them, as PEFT does when it saves, would change which one wins."""
    source = peers.copy_adapter(peft_adapter("llama", "lora").path, tmp_path / "peft")
    patterns = {"q_proj": 15, "layers.0.self_attn.q_proj": 64, "down_proj": 3}
    peers.edit_json(source / peers.CONFIG, alpha_pattern=patterns)
    _assert_same_config(peers, source, convert(convert(source, "mlx"), "peft"))


def test_same_input_same_bytes(
    peft_adapter: Callable[[str, str], Any], convert: Convert, peers: ModuleType
) -> None:
    """Reproducible to the byte, metadata and all."""
    source = peft_adapter("llama", "patterns")
    one, two = convert(source.path, "mlx"), convert(source.path, "mlx")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_an_edited_result_is_not_undone_by_stale_metadata(
    peft_adapter: Callable[[str, str], Any],
    base_logits: Callable[[str], Any],
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
) -> None:
    """Whoever trains on, or turns the scale, after converting gets *that* back.

    The remembered origin may give back words, never numbers that no longer hold.
    """
    source = peft_adapter("llama", "patterns")
    mlx = convert(source.path, "mlx", "--base", source.base.path)
    config = peers.read_json(mlx / peers.CONFIG)
    config["lora_parameters"]["scale"] *= 1.7
    peers.edit_json(mlx / peers.CONFIG, lora_parameters=config["lora_parameters"])
    expected = peers.mlx_logits(source.base.path, mlx, zoo.TOKENS)
    back = convert(mlx, "peft", "--base", source.base.path)
    found = peers.peft_logits(source.base.path, back, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base_logits("llama"))


@pytest.mark.parametrize("metadata_kept", [False, True])
def test_training_on_after_converting(
    metadata_kept: bool,
    peft_adapter: Callable[[str, str], Any],
    base_logits: Callable[[str], Any],
    attempt: Callable[..., Any],
    zoo: ModuleType,
    peers: ModuleType,
) -> None:
    """Training in MLX moves the padded columns too; the old, smaller ranks no longer hold.

    mlx-lm drops the metadata when it saves. Where some tool keeps it, an error is fine, old
    numbers are not.
    """
    import mlx.core as mx

    source = peft_adapter("llama", "patterns")
    mlx = attempt(source.path, "mlx", "--base", source.base.path).path
    path = str(mlx / peers.MLX_WEIGHTS)
    tensors, metadata = mx.load(path, return_metadata=True)
    moved = {name: value + 0.02 for name, value in tensors.items()}
    if metadata_kept:
        mx.save_safetensors(path, moved, metadata=metadata)
    else:
        mx.save_safetensors(path, moved)
    expected = peers.mlx_logits(source.base.path, mlx, zoo.TOKENS)
    outcome = attempt(mlx, "peft", "--base", source.base.path)
    if outcome.code == 1 and metadata_kept:
        assert "model.layers." in outcome.err
        return
    assert outcome.code == 0, outcome.text
    found = peers.peft_logits(source.base.path, outcome.path, zoo.TOKENS)
    peers.assert_same_logits(found, expected, base_logits("llama"))
