"""Kinds of adapters that can't be carried yet: refused by name, with nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Refused = Callable[..., str]
VARIANTS = [
    ({"alora_invocation_tokens": [5, 6]}, "alora"),
    ({"trainable_token_indices": [5, 9]}, "token"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
]


@pytest.mark.parametrize(("options", "word"), VARIANTS)
def test_lora_with_something_more(
    options: dict[str, Any],
    word: str,
    tiny: Tiny,
    refused: Refused,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """LoRA by type and by tensors, and yet not what MLX computes."""
    base = tiny("llama").path
    options = {"target_modules": ["q_proj"], "lora_dropout": 0.0} | options
    config = peers.lora(options.pop("target_modules"), **options)
    peers.save_peft(base, tmp_path / "peft", config, zoo.TOKENS)
    refused(tmp_path / "peft", "mlx", "--base", base, saying=word)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("velora_config", {"num_groups": 64}),
        ("monteclora_config", {"num_samples": 4}),
        ("arrow_config", {"top_k": 3}),
    ],
)
def test_fields_that_change_the_numbers(
    field: str,
    value: Any,
    peft_adapter: Callable[[str, str], Any],
    attempt: Callable[..., Any],
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """A field that alters training or routing is at least named, or the adapter refused."""
    path = peers.copy_adapter(peft_adapter("llama", "lora").path, tmp_path / "peft")
    peers.edit_json(path / peers.CONFIG, **{field: value})
    outcome = attempt(path, "mlx")
    assert field in outcome.text
    assert outcome.code in (0, 1)
    if field == "arrow_config":
        assert outcome.code == 1


def test_full_fine_tuning_from_mlx(
    tiny: Tiny, refused: Refused, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """fine_tune_type "full" holds weights of the model, not updates to them."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    base = tiny("llama").path
    source = tmp_path / "mlx"
    peers.save_mlx(base, source, zoo.TOKENS, num_layers=1)
    weights = dict(tree_flatten(peers.mlx_base(base).layers[-1].parameters()))
    whole = {f"model.layers.2.{name}": value for name, value in weights.items()}
    mx.save_safetensors(str(source / peers.MLX_WEIGHTS), whole)
    peers.edit_json(source / peers.CONFIG, fine_tune_type="full", lora_parameters=None)
    peers.mlx_model(base, source)  # stock mlx-lm takes it
    refused(source, "peft", "--base", base, saying="full")


def test_tensors_mlx_lm_would_refuse(
    tiny: Tiny, refused: Refused, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """A tensor that is no adapter parameter is never dropped in silence."""
    import torch

    source = tmp_path / "mlx"
    peers.save_mlx(tiny("llama").path, source, zoo.TOKENS, num_layers=1)
    path = source / peers.MLX_WEIGHTS
    extra = {"model.norm.weight": torch.ones(64)}
    peers.rewrite_tensors(path, peers.load_file(path) | extra)
    refused(source, "peft", saying="model.norm.weight")
