"""Adapters that stock PEFT makes on a tiny model, and what PEFT computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def trained(model: Any, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter of ``model`` with random values, saved by PEFT; the model stays as it was."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                if "magnitude" in name or "layernorm" in name:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
                parameter.copy_(parameter.half().float())
    adapted.save_pretrained(folder)
    adapted.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return folder


def logits(model_folder: Path, adapters: list[tuple[Path, float]], ids: np.ndarray) -> np.ndarray:
    """PEFT's logits with adapters active together, each with its weight."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for i, (folder, _) in enumerate(adapters):
        if i == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name="a0")
        else:
            model.load_adapter(folder, adapter_name=f"a{i}")
    if adapters:
        model.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
        for module in model.modules():
            scaling = getattr(module, "scaling", None)
            for i, (_, weight) in enumerate(adapters):
                if isinstance(scaling, dict) and f"a{i}" in scaling:
                    scaling[f"a{i}"] *= weight
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long()).logits[0].numpy()
