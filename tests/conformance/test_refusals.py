"""Kinds of adapters that can't be carried yet: refused by name, with nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Refused = Callable[..., str]
Q = {"target_modules": ["q_proj"]}

# PEFT's class, its arguments, and the word that names the kind in the refusal
OTHER_TUNERS = [
    ("AdaLoraConfig", {"total_step": 10, "init_r": 6, **Q}, "adalora"),
    ("BOFTConfig", {"boft_block_size": 4, **Q}, "boft"),
    ("FourierFTConfig", {"n_frequency": 10, **Q}, "fourierft"),
    ("HRAConfig", {"r": 4, **Q}, "hra"),
    ("IA3Config", {"feedforward_modules": [], **Q}, "ia3"),
    ("LNTuningConfig", {"target_modules": ["norm"]}, "ln_tuning"),
    ("LoHaConfig", {"r": 4, **Q}, "loha"),
    ("LoKrConfig", {"r": 4, **Q}, "lokr"),
    ("MissConfig", {"r": 4, **Q}, "miss"),
    ("OFTConfig", {"oft_block_size": 8, "r": 0, **Q}, "oft"),
    ("PromptTuningConfig", {"num_virtual_tokens": 3}, "prompt"),
    ("TrainableTokensConfig", {"token_indices": [1, 2]}, "trainable_tokens"),
    ("VeraConfig", {"r": 4, **Q}, "vera"),
]
VARIANTS = [
    ({"alora_invocation_tokens": [5, 6]}, "alora"),
    ({"trainable_token_indices": [5, 9]}, "token"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
]


@pytest.mark.parametrize(("name", "arguments", "word"), OTHER_TUNERS)
def test_other_tuners(
    name: str,
    arguments: dict[str, Any],
    word: str,
    tiny: Tiny,
    refused: Refused,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Most have lora-like tensors or none at all; only peft_type tells what they mean."""
    import peft

    base = tiny("llama").path
    config = getattr(peft, name)(task_type="CAUSAL_LM", **arguments)
    model = peft.get_peft_model(peers.hf_base(base), config)
    peers.randomise_peft(model)
    model.save_pretrained(tmp_path / "peft")
    refused(tmp_path / "peft", "mlx", "--base", base, saying=word)


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
        ("use_qalora", True),
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
    if field in ("use_qalora", "arrow_config"):
        assert outcome.code == 1


def test_experts_from_peft(
    refused: Refused, zoo: ModuleType, peers: ModuleType, moe: Path, tmp_path: Path
) -> None:
    """target_parameters flattens the experts' axis in two different ways for A and for B."""
    config = peers.lora(
        ["q_proj"],
        lora_dropout=0.0,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    peers.save_peft(moe, tmp_path / "peft", config, zoo.TOKENS)
    refused(tmp_path / "peft", "mlx", "--base", moe, saying="expert")


def test_experts_from_mlx(
    refused: Refused, zoo: ModuleType, peers: ModuleType, moe: Path, tmp_path: Path
) -> None:
    """SwitchLinear's factors are 3-D and lie the other way round than Linear's."""
    peers.save_mlx(moe, tmp_path / "mlx", zoo.TOKENS, num_layers=-1)
    tensors = peers.raw_tensors(tmp_path / "mlx" / peers.MLX_WEIGHTS)
    assert any(len(shape) == 3 for _, shape, _ in tensors.values())
    refused(tmp_path / "mlx", "peft", "--base", moe, saying="switch_mlp")


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


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral in a form both runtimes read."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=112,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        num_local_experts=4,
        vocab_size=131,
        max_position_embeddings=256,
        sliding_window=None,
    )
    folder = tmp_path_factory.mktemp("moe")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 10000.0}))
    return folder
