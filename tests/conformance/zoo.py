"""Tiny random models whose base logits agree in transformers and in mlx-lm.

Every size differs from every other one wherever the architecture allows it, and there are fewer
key/value heads than query heads, so that a transposition or a swapped module can't hide. The
weights are drawn so that logits are of order one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

VOCABULARY = 131
TOKENS = np.random.default_rng(1).integers(3, VOCABULARY, (2, 12))

GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
ATTENTION_AND_FUSED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
UNGATED = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
PHI = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
STARCODER = ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")


@dataclass(frozen=True)
class Architecture:
    """A model type: config values that differ from COMMON, and its blocks' linear modules."""

    config: dict[str, Any]
    targets: tuple[str, ...] = GATED
    mlx_config: dict[str, Any] | None = None  # keys mlx-lm wants and transformers 5 doesn't write


@dataclass(frozen=True)
class Tiny:
    """A base model saved on disk."""

    name: str
    path: Path
    targets: tuple[str, ...]
    layers: int


COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WIDE = {"head_dim": 24}  # q_proj (96, 64) and o_proj (64, 96) are then not square either


def rope(kind: str = "default", **values: Any) -> dict[str, Any]:
    """A rope base that no library has as its default: a lost value shows."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}}


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
HALF = rope(partial_rotary_factor=0.5)
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 64}
GELU = {"hidden_act": "gelu"}
PERIOD3 = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}

ARCHITECTURES: dict[str, Architecture] = {
    "apertus": Architecture(
        LLAMA3, UNGATED, {"mlp_bias": False, "post_norm": False, "qk_norm": True}
    ),
    "cohere": Architecture(rope() | TIED | {"logit_scale": 0.5}),
    "cohere2": Architecture(rope() | TIED | WINDOW | {"logit_scale": 0.5, "num_hidden_layers": 4}),
    "ernie4_5": Architecture(WIDE | rope() | TIED | {"use_bias": False}),
    "exaone4": Architecture(
        WIDE | rope() | WINDOW | {"sliding_window_pattern": 3},
        mlx_config={"sliding_window_pattern": "LLG", "rope_scaling": None},
    ),
    # mlx-lm uses the exact GELU; transformers turns "gelu" into the tanh form for this model
    "gemma": Architecture(WIDE | rope() | TIED | {"hidden_act": "gelu_python"}),
    "gemma2": Architecture(
        WIDE | rope() | TIED | WINDOW | {"query_pre_attn_scalar": 24, "num_hidden_layers": 4}
    ),
    "gemma3_text": Architecture(
        WIDE | TIED | WINDOW | PERIOD3 | {"query_pre_attn_scalar": 24},
        mlx_config={
            "sliding_window_pattern": 3,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    ),
    "glm": Architecture(WIDE | rope(partial_rotary_factor=1.0), ATTENTION_AND_FUSED),
    "glm4": Architecture(WIDE | HALF, ATTENTION_AND_FUSED),
    "granite": Architecture(
        rope()
        | {
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
        }
    ),
    "helium": Architecture({"head_dim": 16} | rope()),
    "llama": Architecture(WIDE | LLAMA3),
    "ministral3": Architecture(
        WIDE | rope(llama_4_scaling_beta=0.1, original_max_position_embeddings=256)
    ),
    "mistral": Architecture(WIDE | rope() | {"sliding_window": None}),
    "nemotron": Architecture(WIDE | HALF, UNGATED),
    "olmo2": Architecture(WIDE | rope()),
    "olmo3": Architecture(WINDOW | PERIOD3, mlx_config={"rope_theta": 500_000.0}),
    "phi": Architecture(HALF, PHI),
    "phi3": Architecture(rope() | {"original_max_position_embeddings": 256}, FUSED),
    "qwen2": Architecture(rope() | TIED),
    "qwen3": Architecture(WIDE | rope()),
    "seed_oss": Architecture(WIDE | rope()),
    "smollm3": Architecture(rope() | TIED | {"num_hidden_layers": 4}),
    "stablelm": Architecture(rope(partial_rotary_factor=0.25) | {"use_qkv_bias": True}),
    "starcoder2": Architecture(
        rope() | TIED | GELU | {"sliding_window": None, "use_bias": True}, STARCODER
    ),
}


def build(name: str, folder: Path, architecture: Architecture | None = None) -> Tiny:
    """Write a tiny model of this type in a form both runtimes read alike."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = architecture or ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(COMMON | architecture.config))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model)
    model.save_pretrained(folder)
    _add_old_keys(folder / "config.json", architecture.mlx_config or {})
    return Tiny(name, folder, architecture.targets, config.num_hidden_layers)


def _randomise(model: torch.nn.Module) -> None:
    """Matrices that keep the variance; norms and biases a little off what they start with."""
    import torch

    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def _add_old_keys(path: Path, extra: dict[str, Any]) -> None:
    """Most mlx-lm models read rope values only where transformers 4 wrote them."""
    config = json.loads(path.read_text())
    rope = dict(config.get("rope_parameters") or {})
    if theta := rope.pop("rope_theta", None):
        config["rope_theta"] = theta
        config["rope_scaling"] = rope if rope["rope_type"] not in ("default",) else None
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    path.write_text(json.dumps(config | extra, indent=2))
