"""Tiny bases, adapters of stock PEFT on them, and float64 oracles for fusing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "head_dim": 16, "decoder_sparse_step": 1, "norm_topk_prob": True},
}  # fmt: skip
BASES["qwen3_next"] = {
    **BASES["qwen3_moe"], "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32,
}  # fmt: skip
IDS = torch.tensor([[5, 17, 3, 44, 60, 9, 2, 71]])


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A random model of this type, its values those of ``dtype``."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(name, **{**COMMON, **BASES[name]})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if p.ndim == 1 else 0.1 * torch.randn_like(p))
    model.to(dtype).save_pretrained(folder, **more)
    return folder


def loaded(folder: Path) -> Any:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def trained(base: Path, folder: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter with random values, saved by PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(loaded(base), LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name or ("modules_to_save" in name and p.ndim == 1):
                p.mul_(1 + 0.2 * torch.randn_like(p))
            elif "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                p.copy_(0.1 * torch.randn_like(p))
            elif p.requires_grad and name.endswith(".bias"):
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> np.ndarray:
    """Of the fixed tokens."""
    with torch.no_grad():
        return model(IDS).logits[0].double().numpy()


def unfused(base: Path, *adapters: tuple[Path, float]) -> np.ndarray:
    """Stock PEFT's logits, adapters active together, each with its weight."""
    model = PeftModel.from_pretrained(loaded(base), adapters[0][0], adapter_name="a0")
    for i, (folder, _) in enumerate(adapters[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{i}")
    model.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        for i, (_, weight) in enumerate(adapters):
            if isinstance(scaling, dict) and f"a{i}" in scaling:
                scaling[f"a{i}"] *= weight
    return logits(model.eval())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All stored tensors, shards included."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def factors(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module -> (a, b) of a plain PEFT folder, float64."""
    stored = tensors(folder)
    ends = ".lora_A.weight", ".lora_B.weight"
    return {
        key.removeprefix("base_model.model.").removesuffix(ends[0]): (
            stored[key].double().numpy(),
            stored[key.replace(*ends)].double().numpy(),
        )
        for key in stored
        if key.endswith(ends[0])
    }


def edited(folder: Path, **fields: Any) -> None:
    """Change a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
