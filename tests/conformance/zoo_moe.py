"""Tiny mixture-of-experts models, by model type: what the plain zoo has no place for.

Each has a config for transformers, the fields mlx-lm wants to read by other names, and what an
adapter targets: linear layers, the router, and the experts' parameters as transformers 5 has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
COMMON: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Moe:
    """One architecture; ``router``: the parameter or module of the router, if it can be adapted."""

    config: dict[str, Any]
    modules: list[str] = field(default_factory=lambda: list(ATTENTION))
    parameters: list[str] = field(default_factory=lambda: list(EXPERTS))
    mlx_config: dict[str, Any] = field(default_factory=dict)


ROUTER = [*EXPERTS, "mlp.gate.weight"]
MOE: dict[str, Moe] = {
    "mixtral": Moe({"num_local_experts": 4, "sliding_window": None}, parameters=ROUTER),
    "qwen3_moe": Moe(
        COMMON | {"head_dim": 24, "decoder_sparse_step": 1, "norm_topk_prob": True},
        parameters=ROUTER,
        mlx_config={"mlp_only_layers": [], "num_experts": 4},
    ),
    "qwen2_moe": Moe(
        COMMON | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
        [*ATTENTION, "shared_expert.up_proj", "shared_expert_gate"],
        ROUTER,
    ),
    "olmoe": Moe({"num_experts": 4, "num_experts_per_tok": 2}, parameters=ROUTER),
    "phimoe": Moe(
        {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
        parameters=[*EXPERTS, "mlp.router.weight"],
    ),
    "deepseek_v3": Moe(
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
    ),
    "gpt_oss": Moe(
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        parameters=[*EXPERTS, "mlp.router.weight"],
    ),
    "dots1": Moe(
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
        }
    ),
    "glm4_moe": Moe(
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "use_qk_norm": True,
            "attention_bias": False,
            "head_dim": 16,
        }
    ),
    "granitemoe": Moe(
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        parameters=[
            "block_sparse_moe.experts.gate_up_proj",
            "block_sparse_moe.experts.down_proj",
            "block_sparse_moe.router.weight",
        ],
    ),
    "lfm2_moe": Moe(
        COMMON
        | {
            "tie_word_embeddings": True,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "full_attention"],
        },
        ["q_proj", "out_proj", "w1", "w2"],
        ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    ),
}
