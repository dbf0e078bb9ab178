"""What is never compressed unless asked for, by names and shapes of real models and packages."""

from __future__ import annotations

import pytest

from loraduct.converters.compressible import left_alone


@pytest.mark.parametrize(("name", "shape"), [
    ("model.layers.0.self_attn.q_proj.weight", (576, 576)),
    ("model_layers_0_mlp_down_proj_weight_to_fp16", (576, 1536)),
    ("model.embed_tokens.weight", (49152, 576)),
    ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (8, 576)),
    ("model.layers.1.block_sparse_moe.experts.3.w1.weight", (512, 256)),
    ("conv.weight", (64, 32, 3, 3)),
    ("lm_head.weight", (1000, 64)),
    ("cosine_head.weight", (1000, 64)),  # the word is not "cos"
])  # fmt: skip
def test_matrices_are_compressed(name: str, shape: tuple[int, ...]) -> None:
    assert left_alone(name, shape) is None


@pytest.mark.parametrize(("name", "shape", "reason"), [
    ("model.layers.0.input_layernorm.weight", (4096,), "norm"),
    ("model.layers.0.self_attn.q_norm.weight", (16, 128), "norm"),
    ("encoder.layer_norm.weight", (1, 1, 4096), "norm"),
    ("rope_cos_to_fp16", (2048, 64), "rotation table"),
    ("model.rotary_emb.inv_freq", (32,), "rotation table"),
    ("sin", (2048, 64), "rotation table"),
    ("causalMask", (2048, 2048), "mask"),
    ("attn.mask", (1, 1, 2048, 2048), "mask"),
    ("position_ids", (1, 8192), "positions"),
    ("h.0.attn.c_attn.bias", (2304,), "bias"),
    ("scale", (5000,), "vector"),
    ("a.weight", (1, 5000, 1), "vector"),
    ("x.lora_A.weight", (4, 500), "small (2000 numbers, fewer than 2048)"),
    ("gate.weight", (), "vector"),
])  # fmt: skip
def test_the_rest_is_left_with_a_reason(name: str, shape: tuple[int, ...], reason: str) -> None:
    assert left_alone(name, shape) == reason
