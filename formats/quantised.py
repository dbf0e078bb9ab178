"""Bases that others than MLX have quantised: by which method, and the way out.

The method is told by the config, by a file of its own beside it, or by the tensors:

* transformers' config has ``quantization_config`` with ``quant_method``; bitsandbytes' older ones
  only ``load_in_4bit`` or ``load_in_8bit`` (transformers 5.23, ``quantizers/auto.py``);
* AutoGPTQ has ``quantize_config.json`` beside ``gptq_model-*.safetensors`` or ``model.safetensors``,
  older AutoAWQ ``quant_config.json``, and neither need say anything in the config;
* both hold ``qweight``, ``qzeros`` and ``scales`` (groups, out): GPTQ's qweight is packed along the
  inputs, (in * bits / 32, out), AWQ's along the outputs, (in, out * bits / 32). bitsandbytes has
  ``weight.quant_state.bitsandbytes__nf4`` (or fp4) beside 4 bits, ``SCB`` beside 8.
"""

from __future__ import annotations

from pathlib import Path

from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.text import printable

_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_BNB = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
_STATE = ".quant_state.bitsandbytes__"


def check_plain(base: Base) -> None:
    """Raise Refused for weights that something else than MLX has quantised."""
    file, method = method_of(base)
    if method is None:
        return
    way = "give the unquantised model that it was made from, and quantise what comes of it again"
    if method in _BNB:
        way += "; or unpack it first (transformers: model.dequantize(), then save_pretrained)"
    raise Refused(file, f"is quantised by {printable(method, 40)}: {way}")


def method_of(base: Base) -> tuple[Path, str | None]:
    """(the file that says so, the method), or (config.json, None)."""
    config = base.path / "config.json"
    for part in (base.config, base.text_config):
        settings = part.get("quantization_config")
        if not isinstance(settings, dict):
            continue
        method = settings.get("quant_method")
        if method is not None:
            return config, str(method)
        if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            return config, "bitsandbytes"
    held = _by_tensors(base)
    if base.has_weights and held is None:
        return config, None  # a file that lies there speaks of other weights
    for name, method in _FILES.items():
        if (base.path / name).exists():
            return base.path / name, method
    return held or (config, None)


def _by_tensors(base: Base) -> tuple[Path, str] | None:
    held = base.tensors if base.has_weights else {}
    for name, tensor in held.items():
        stem = name.removesuffix(".qweight")
        if stem != name and (scales := held.get(f"{stem}.scales")) is not None:
            method = "gptq" if tensor.shape[-1] == scales.shape[-1] else "awq"
        elif _STATE in name or name.endswith(".SCB"):
            method = "bitsandbytes"
        else:
            continue
        return tensor.path or base.path, method
    return None
