"""Tiny random models of every family that packages are built for, and how to run their packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, CONTEXT = 96, 48
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# family and variant -> what its config says beyond COMMON
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama llama3": {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True},
    "llama yarn": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                            "original_max_position_embeddings": 16},
    },
    "mistral": {"sliding_window": 7, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 sliding": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7,
               "attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0,
               "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7,
                    "tie_word_embeddings": True, "num_hidden_layers": 7,
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "phi3": {"sliding_window": 9, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "phi3 longrope": {
        "original_max_position_embeddings": 64, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                            "short_factor": [1.0, 1.1, 1.3, 1.4], "long_factor": [4.0] * 4,
                            "factor": 4.0, "original_max_position_embeddings": 64}},
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
}  # fmt: skip


def model(name: str) -> Any:
    """A tiny model in float32 whose values are FLOAT16's, every parameter random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = name.partition(" ")[0]
    torch.manual_seed(sum(map(ord, name)))
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[name])
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if parameter.dim() == 1:  # norms, around what they begin with, and biases
                offset = 0.0 if "bias" in key or "gemma" in family else 1.0
                parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0 if "embed" not in key else 30.0)
    return made.half().float()


def saved(name: str, folder: Path) -> tuple[Any, Path]:
    """The model and its folder."""
    made = model(name)
    made.save_pretrained(folder)
    return made, folder


def tokens(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(3, VOCABULARY, (1, count)).astype(np.int32)


def reference(made: Any, ids: np.ndarray) -> np.ndarray:
    """transformers' logits (tokens, vocabulary) in float32."""
    import torch

    with torch.no_grad():
        return made(torch.from_numpy(ids).long()).logits[0].float().numpy()


def run(path: Path, ids: np.ndarray, precision: str = "fp16-storage", **options: Any) -> np.ndarray:
    """A package's logits (tokens, vocabulary): most tokens at once, the last ones singly."""
    from loraduct.formats.coreml import package
    from loraduct.validation import coreml

    made = coreml.session(package.read(path), precision=precision, **options)
    tokens = ids[0].tolist()
    if made.stateless:
        return made.feed(tokens)
    cut = len(tokens) - 6
    return np.concatenate([made.feed(tokens[:cut]), *(made.feed([t]) for t in tokens[cut:])])


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error, as a share of the logits' scale."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def causal(count: int, end: int) -> np.ndarray:
    """The mask of ``count`` tokens that end at position ``end``."""
    rows = np.arange(end - count, end)[:, None]
    return np.where(np.arange(end) <= rows, 0, -np.inf).astype(np.float16)[None, None]
