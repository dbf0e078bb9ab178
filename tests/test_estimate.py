"""`inspect --estimate`: every module once, and nothing left out without saying so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

Cli = Callable[..., Any]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 131,
    "pad_token_id": None,
}
Q, KV, FEED = 64 + 64, 64 + 32, 64 + 112  # out + in of a matrix
ATTENTION = 3 * 16 * (2 * Q + 2 * KV)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    def make(model_type: str, **more: Any) -> Path:
        (tmp_path / "base").mkdir(exist_ok=True)
        file = tmp_path / "base" / "config.json"
        file.write_text(json.dumps(SIZES | {"model_type": model_type} | more))
        return file

    return make


def estimate(cli: Cli, file: Path, *args: str) -> Any:
    result = cli("inspect", "--estimate", file, "--json", *args)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def rows(found: Any) -> dict[str, int]:
    return {r["target"]: r["modules"] for r in found["targets"]}


def test_every_module_counts_once(config: Callable[..., Path], cli: Cli) -> None:
    file = config("llama")
    once = estimate(cli, file, "--targets", "q_proj")
    more = estimate(cli, file, "--targets", "q_proj,q_proj,self_attn.q_proj")
    assert rows(more) == rows(once) == {"q_proj": 3}
    assert more["parameters"] == once["parameters"] == 3 * 16 * Q


@pytest.mark.parametrize("targets", ["", ",", " , "])
def test_empty_targets_are_a_usage_error(
    targets: str, config: Callable[..., Path], cli: Cli
) -> None:
    result = cli("inspect", "--estimate", config("llama"), "--targets", targets)
    assert result.exit_code == 2
    assert not result.stdout


def test_an_absent_target_is_refused(config: Callable[..., Path], cli: Cli) -> None:
    result = cli("inspect", "--estimate", config("phi3"), "--targets", "q_proj,o_proj")
    assert result.exit_code == 1
    assert "q_proj" in result.stderr
    assert "qkv_proj" in result.stderr  # what it has instead


def test_defaults_are_the_architectures_own(config: Callable[..., Path], cli: Cli) -> None:
    found = estimate(cli, config("phi3"))
    assert set(rows(found)) == {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }
    assert found["not_counted"] == []
    assert estimate(cli, config("phi3"), "--targets", "all-linear") == found


def test_experts_are_said_not_to_be_counted(config: Callable[..., Path], cli: Cli) -> None:
    file = config("mixtral", num_local_experts=8)
    found = estimate(cli, file)
    assert found["parameters"] == ATTENTION
    assert "experts" in found["not_counted"]
    assert "not counted: experts" in cli("inspect", "--estimate", file).stdout


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("deepseek_v3", {}),  # latent attention
        ("falcon_h1", {}),  # mixers beside the attention
        ("minimax", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}),
        ("never_heard_of", {}),
    ],
)
def test_what_a_config_does_not_tell_is_refused(
    model_type: str, more: dict[str, Any], config: Callable[..., Path], cli: Cli
) -> None:
    result = cli("inspect", "--estimate", config(model_type, **more))
    assert result.exit_code == 1
    assert "give the base's folder with its weights" in result.stderr


def test_with_weights_experts_router_and_head_stay_out(
    config: Callable[..., Path], cli: Cli
) -> None:
    file = config("mixtral")
    shapes = {
        "model.embed_tokens.weight": (9, 6),
        "lm_head.weight": (9, 6),
        "model.layers.0.self_attn.q_proj.weight": (8, 6),
        "model.layers.0.input_layernorm.weight": (6,),
        "model.layers.0.block_sparse_moe.gate.weight": (2, 6),
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": (10, 6),
        "model.layers.0.mlp.experts.gate_up_proj": (2, 10, 6),
    }
    tensors = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    save_file(tensors, file.parent / "model.safetensors")
    found = estimate(cli, file.parent, "--rank", "2")
    assert (rows(found), found["parameters"]) == ({"self_attn.q_proj": 1}, 2 * 14)
    assert "experts" in found["not_counted"]
    asked = estimate(cli, file.parent, "--rank", "2", "--targets", "q_proj,w1")
    assert asked["parameters"] == 2 * (14 + 16)


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "phi", "phi3", "glm4", "starcoder2", "qwen3_moe", "gpt_oss"]
)
def test_parameters_equal_pefts(model_type: str, cli: Cli, tmp_path: Path) -> None:
    """PEFT's own all-linear on a model of this config has as many, but for what is not counted."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SIZES)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trained = {
            n: p for n, p in peft.get_peft_model(model, lora).named_parameters() if "lora_" in n
        }
    found = estimate(cli, tmp_path / "config.json")
    uncounted = {n for n in trained for o in found["not_counted"] if f".{o}." in n}
    assert found["parameters"] == sum(p.numel() for n, p in trained.items() if n not in uncounted)
    assert not uncounted or model_type == "qwen3_moe"
