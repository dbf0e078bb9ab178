"""What makes a tiny model of every type that has something of everything its big ones have.

Only what can't be left at its default is given: sizes small enough for unique tags,
both kinds of layer where a model has two, and for mlx-lm the keys its arguments demand and
transformers 5 doesn't write. Values that only matter in a forward pass are arbitrary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]

COMMON: Config = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Asked for by many of mlx-lm's arguments; taken only where transformers wrote nothing of that name.
MLX_COMMON: Config = {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.5}


@dataclass(frozen=True)
class Tiny:
    """How to build one model type."""

    hf: Config = field(default_factory=dict)  # laid over COMMON
    mlx: Config = field(default_factory=dict)  # laid over the config transformers made
    also: tuple[Config, ...] = ()  # laid over hf, one by one: variants that have other modules
    vision: Config | None = None  # not None: a text model (COMMON | hf) beside this vision model
    hub: Callable[[str, Any], tuple[str, Any]] | None = None  # name and tensor, saved -> on the hub
    fused: bool = False  # the hub's checkpoints have the experts fused, as in memory
    packed: bool = False  # experts as on the hub: packed in blocks, rows being outputs

    def config(self, variant: Config) -> Config:
        """Keyword arguments for transformers' config."""
        text = COMMON | self.hf | variant
        if self.vision is None:
            return text
        tied = text["tie_word_embeddings"]
        return {"tie_word_embeddings": tied, "text_config": text, "vision_config": self.vision}


# The names that models have for the same few numbers.
MOE: Config = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MLA: Config = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
NO_Q_LORA: Config = {"q_lora_rank": None}
INDEXER: Config = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
VISION: Config = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: Config = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "embed_dim": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
LINEAR: Config = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
GEMMA4: Config = {
    "vocab_size_per_layer_input": 131,
    "hidden_size_per_layer_input": 12,
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 16,
    "global_head_dim": 24,
}
GEMMA4_MOE: Config = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
}
HYBRID: Config = {
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
}
DENSE_THEN_MOE = ["dense", "sparse", "sparse"]

TINY: dict[str, Tiny] = {
    "afmoe": Tiny(
        MOE
        | {
            "num_dense_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    ),
    "apertus": Tiny(mlx={"mlp_bias": False, "post_norm": False, "qk_norm": True}),
    "bitnet": Tiny(),
    "cohere": Tiny(),
    "cohere2": Tiny(),
    "dbrx": Tiny(
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {
                "ffn_hidden_size": 48,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 64,
            },
        }
    ),
    "deepseek_v2": Tiny(
        MOE | MLA, {"rope_scaling": {"type": "yarn", "factor": 1.0}}, also=(NO_Q_LORA,)
    ),
    "deepseek_v3": Tiny(MOE | MLA, also=(NO_Q_LORA,)),
    "deepseek_v32": Tiny(MOE | MLA | INDEXER),
    "dots1": Tiny(MOE),
    "ernie4_5": Tiny(),
    "ernie4_5_moe": Tiny(
        MOE
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        }
    ),
    "exaone4": Tiny(
        {"sliding_window_pattern": 3}, {"head_dim": 16, "sliding_window_pattern": "LLG"}
    ),
    "exaone_moe": Tiny(
        MOE | {"mlp_layer_types": DENSE_THEN_MOE},
        {"head_dim": 16, "is_moe_layer": [False, True, True]},
    ),
    "falcon_h1": Tiny(
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 16,
            "head_dim": 16,
            "embedding_multiplier": 2.0,  # with powers of two, tags stay whole
            "lm_head_multiplier": 4.0,
            "attention_in_multiplier": 2.0,
            "attention_out_multiplier": 4.0,
            "key_multiplier": 2.0,
            "mlp_multipliers": [2.0, 4.0],
            "ssm_in_multiplier": 2.0,
            "ssm_out_multiplier": 4.0,
            "ssm_multipliers": [2.0, 4.0, 2.0, 8.0, 4.0],
        }
    ),
    "falcon_mamba": Tiny(),
    "gemma": Tiny(),
    "gemma2": Tiny(),
    "gemma3": Tiny(mlx={"vocab_size": 131}, vision=VISION),
    "gemma3_text": Tiny(),
    "gemma4": Tiny(
        GEMMA4 | {"tie_word_embeddings": True},
        {"vocab_size": 131, "global_head_dim": 24},
        also=(GEMMA4_MOE,),
        vision=VISION,
    ),
    "gemma4_text": Tiny(GEMMA4, {"global_head_dim": 24}, also=(GEMMA4_MOE,)),
    "glm": Tiny(),
    "glm4": Tiny(),
    "glm4_moe": Tiny(MOE, {"head_dim": 16}),
    "glm4_moe_lite": Tiny(MOE | MLA | {"mlp_layer_types": DENSE_THEN_MOE}),
    "glm_moe_dsa": Tiny(
        MOE | MLA | INDEXER,
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    ),
    "gpt2": Tiny(
        {"n_embd": 64, "n_head": 4, "n_layer": 2},
        {"n_ctx": 256},
        hub=lambda n, v: (n.removeprefix("transformer."), v),
    ),
    "gpt_bigcode": Tiny({"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 112}),
    "gpt_neox": Tiny({"intermediate_size": 256}, {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
    "gpt_oss": Tiny(MOE | {"intermediate_size": 96, "head_dim": 24}, packed=True),
    "gptj": Tiny({"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}),
    "granite": Tiny(),
    "granitemoe": Tiny(MOE),
    "granitemoehybrid": Tiny(
        MOE | HYBRID | {"shared_intermediate_size": 40}, {"layer_types": HYBRID["layer_types"]}
    ),
    # its shared expert has other names in mlx-lm where there are no experts beside it
    "granitemoehybrid without experts": Tiny(
        HYBRID | {"num_local_experts": 0, "shared_intermediate_size": 112},
        {"layer_types": HYBRID["layer_types"]},
    ),
    "helium": Tiny({"head_dim": 16}),
    "hunyuan_v1_dense": Tiny({"head_dim": 16}),
    "internlm3": Tiny({"head_dim": 16}),
    "iquestcoder": Tiny(),
    "jamba": Tiny(
        MOE
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        }
    ),
    "kimi_k25": Tiny(
        MOE | MLA, vision=VISION, hub=lambda n, v: (n.replace("model.blocks.", "model.layers."), v)
    ),
    "kimi_linear": Tiny(
        MOE
        | MLA
        | NO_Q_LORA
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_heads": 4,
            "linear_head_dim": 12,
        },
        {
            "linear_attn_config": {
                "kda_layers": [1, 3],
                "full_attn_layers": [2],
                "num_heads": 4,
                "head_dim": 12,
                "short_conv_kernel_size": 4,
            }
        },
        hub=lambda n, v: (re.sub(r"block_sparse_moe\.(\w+_proj)", r"mlp.\1", n), v),
    ),
    "laguna": Tiny(
        MOE | {"mlp_layer_types": DENSE_THEN_MOE, "shared_expert_intermediate_size": 40}
    ),
    "lfm2": Tiny({"layer_types": ["conv", "full_attention", "conv"]}, {"block_dim": 64}),
    "lfm2_moe": Tiny(
        MOE | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1}
    ),
    "llama": Tiny(),
    "llama4": Tiny(
        MOE
        | {
            "num_experts_per_tok": 1,
            "moe_layers": [1],
            "intermediate_size_mlp": 80,
            "head_dim": 24,
        },
        {"interleave_moe_layer_step": 2},
        vision=VISION
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        hub=lambda n, v: (re.sub(r"^(model|lm_head)\b", r"language_model.\1", n), v),
    ),
    "llama4_text": Tiny(
        {
            "interleave_moe_layer_step": 4,
            "moe_layers": [],
            "intermediate_size_mlp": 80,
            "tie_word_embeddings": True,
        }
    ),
    "llava": Tiny(vision=VISION),
    "longcat_flash": Tiny(
        MOE
        | MLA
        | {
            "num_layers": 2,
            "ffn_hidden_size": 112,
            "expert_ffn_hidden_size": 48,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
        {
            "attention_method": "MLA",
            "zero_expert_type": "identity",
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
        },
    ),
    "mamba": Tiny(),
    "mamba2": Tiny({"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}),
    "mellum": Tiny(MOE, {"num_experts": 4}),
    "mimo_v2_flash": Tiny(
        MOE | {"head_dim": 24, "v_head_dim": 12},
        {
            "hybrid_layer_pattern": [0, 1, 1],
            "moe_layer_freq": [0, 1, 1],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": 64,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "layernorm_epsilon": 1e-5,
            "swa_rope_theta": 1e4,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 24,
            "swa_v_head_dim": 12,
            "n_shared_experts": None,
        },
    ),
    "minicpm3": Tiny(
        MLA | {"v_head_dim": 16}, {"rope_scaling": {"original_max_position_embeddings": 64}}
    ),
    "minimax_m2": Tiny(MOE, {"shared_intermediate_size": 0, "rotary_dim": 8}),
    "minimax_m3_vl": Tiny(MOE, vision=VISION),
    "ministral3": Tiny(),
    "mistral": Tiny(),
    "mistral3": Tiny(vision=VISION),
    "mistral4": Tiny(MOE | MLA),
    "mixtral": Tiny(MOE),
    "nemotron": Tiny(),
    "nemotron_h": Tiny(MOE),
    "olmo2": Tiny(),
    "olmo3": Tiny({"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "olmo_hybrid": Tiny({"linear_key_head_dim": 12, "linear_value_head_dim": 24}),
    "olmoe": Tiny(MOE),
    "phi": Tiny(),
    "phi3": Tiny(),
    "phimoe": Tiny(MOE),
    "qwen2": Tiny(),
    "qwen2_5_vl": Tiny(vision=QWEN_VISION),
    "qwen2_moe": Tiny(MOE | {"shared_expert_intermediate_size": 40}),
    "qwen2_vl": Tiny(vision=QWEN_VISION),
    "qwen3": Tiny(),
    "qwen3_5": Tiny(LINEAR, vision=QWEN_VISION),
    "qwen3_5_moe": Tiny(
        MOE | LINEAR | {"shared_expert_intermediate_size": 40}, vision=QWEN_VISION, fused=True
    ),
    "qwen3_moe": Tiny(MOE | {"mlp_only_layers": [0]}, {"num_experts": 4, "head_dim": 16}),
    "qwen3_next": Tiny(
        MOE | LINEAR | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}
    ),
    "qwen3_vl": Tiny(mlx={"tie_word_embeddings": False}, vision=QWEN_VISION),
    "qwen3_vl_moe": Tiny(
        MOE,
        {"num_experts": 4, "norm_topk_prob": True, "tie_word_embeddings": False},
        vision=QWEN_VISION,
        hub=lambda n, v: (n, v.swapaxes(1, 2) if ".mlp.experts." in n else v),
    ),
    "recurrent_gemma": Tiny({"num_key_value_heads": 1}),
    "seed_oss": Tiny(),
    "smollm3": Tiny(),
    "solar_open": Tiny(MOE, {"first_k_dense_replace": 0}),
    "stablelm": Tiny(),
    "starcoder2": Tiny(),
}

# What both libraries know by name and the table leaves out, so that it is refused.
LEFT_OUT: dict[str, str] = {
    "bailing_hybrid": "transformers has another kind of linear attention than mlx-lm's file",
    "gemma3n": "its vision part can't be built without the package timm",
    "minimax": "mlx-lm's file is that of minimax_m2, without lightning attention",
    "nanochat": "mlx-lm has the names of the original checkpoints, which transformers can't load",
}
