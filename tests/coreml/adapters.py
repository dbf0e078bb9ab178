"""Adapters as stock PEFT makes and runs them, on the tiny models of families.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np


def config(targets: Any, **options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets} | options)


def trained(model: Any, given: Any, seed: int) -> Any:
    """A PEFT model whose trainable values are random, FLOAT16's, and of an order that shows."""
    import torch
    from peft import get_peft_model

    made = get_peft_model(copy.deepcopy(model), given).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn_like(parameter)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif "lora_" in name:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.1 * noise)
            parameter.copy_(parameter.half().float())
    return made


def save(made: Any, folder: Path, dtype: str = "float16", copies: Any = "auto") -> Path:
    """The adapter's folder, its tensors in that dtype.

    ``copies``: whether PEFT saves the whole weight of an adapted embedding too.
    """
    from safetensors.torch import load_file, save_file

    made.save_pretrained(folder, save_embedding_layers=copies)
    weights = folder / "adapter_model.safetensors"
    import torch

    tensors = {k: v.to(getattr(torch, dtype)) for k, v in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    return folder


def tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Name -> (dtype and shape, bytes), from the file's own header."""
    blob = (folder / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__", None)
    data = blob[8 + size :]
    return {
        n: (f"{e['dtype']} {e['shape']}", data[slice(*e["data_offsets"])])
        for n, e in header.items()
    }


def snapshot(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def logits(path: Path, name: str, ids: np.ndarray, **options: Any) -> np.ndarray:
    """A function of a package, run by the reference interpreter."""
    from loraduct.formats.coreml import package
    from loraduct.validation import coreml

    made = coreml.session(package.read(path), name, **options)
    cut = 0 if made.stateless else ids.shape[1] - 3
    ids_ = ids[0].tolist()
    parts = (
        [made.feed(ids_[:cut]), *(made.feed([t]) for t in ids_[cut:])] if cut else [made.feed(ids_)]
    )
    return np.concatenate(parts)
