"""Tiny models with a tag in every number, as transformers has them and as mlx-lm takes them."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_configs import MLX_COMMON, Config, Tiny

Array = npt.NDArray[np.int64]
Tensors = dict[str, Array]
FIRST = 4096  # the smallest tag; buffers keep their small numbers
LIMIT = 1 << 24  # float32 holds integers up to here


@dataclass
class Source:
    """The transformers side: tagged parameters in memory, and the same numbers as saved."""

    config: Config
    live: dict[str, Array] = field(default_factory=dict)  # by module path, or parameter's path
    kinds: dict[str, str] = field(default_factory=dict)  # its class, or "parameter"
    told: set[str] = field(default_factory=set)  # of parameters: those PEFT is told are (in, out)
    saved: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass
class Target:
    """mlx-lm's side: what its modules are, and the weights as ``sanitize`` leaves them."""

    kinds: dict[str, str]
    adaptable: set[str]
    weights: dict[str, Array]


def pattern_of(path: str) -> str:
    """The path with every index replaced by ``{}``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", path)


def indices(path: str) -> list[int]:
    """The indices in a path, outermost first."""
    return [int(i) for i in re.findall(r"(?<=\.)\d+(?=\.|$)", path)]


def model_classes(config: Any) -> list[Any]:
    """The classes transformers has for this config: for text alone, and with the vision part."""
    import transformers

    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    mappings = [a._model_mapping for a in autos if type(config) in a._model_mapping]
    return list(dict.fromkeys(mapping[type(config)] for mapping in mappings))


def kind_of(module: Any) -> str:
    """What a transformers module with a weight is, as far as PEFT treats it differently.

    A router may be a linear layer by class and yet return more than one tensor, to which PEFT
    can't add anything; so a linear layer is one whose forward is that of ``nn.Linear``.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = {"linear": nn.Linear, "embedding": nn.Embedding, "conv1d": Conv1D}
    kinds["convolution"] = nn.modules.conv._ConvNd
    kind = next((name for name, cls in kinds.items() if isinstance(module, cls)), "bare")
    plain = kind != "linear" or type(module).forward is nn.Linear.forward
    return kind if plain else "bare"


def transformers_side(model_class: Any, config: Any, tiny: Tiny) -> Source:
    """Build the model, tag it, save it, and read what was saved."""
    import torch
    from safetensors.numpy import load_file

    text_only = model_class.config_class is config.sub_configs.get("text_config")
    own_config = config.get_text_config() if text_only else config
    model = model_class._from_config(own_config, dtype=torch.float32)
    source = Source(config.to_dict())
    modules = dict(model.named_modules())
    tag = FIRST
    for name, parameter in model.named_parameters():
        tags = np.arange(tag, tag + parameter.numel()).reshape(tuple(parameter.shape))
        parameter.data = torch.from_numpy(tags.astype(np.float32))
        tag += tags.size
        parent, _, leaf = name.rpartition(".")
        if tags.ndim > 1 and not leaf.endswith("bias"):
            path = parent if leaf == "weight" else name
            source.live[path] = tags
            source.kinds[path] = kind_of(modules[parent]) if leaf == "weight" else "parameter"
            if getattr(modules[parent], "is_transposed", False):
                source.told.add(pattern_of(path))
    if tag > LIMIT:
        raise ValueError(f"{tag} numbers are too many for unique tags in float32")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for file in sorted(Path(folder).glob("*.safetensors")):
            source.saved |= load_file(file)
    if tiny.fused:
        source.saved = {k: v.numpy() for k, v in model.state_dict().items()}
    if tiny.packed:
        _pack_experts(source)
    if tiny.hub:
        source.saved = dict(tiny.hub(name, value) for name, value in source.saved.items())
    return source


def _pack_experts(source: Source) -> None:
    """Store experts as the hub does: outputs as rows, eight 4-bit inputs to a 32-bit word.

    One tag stands for a word, so of the inputs in memory every eighth is compared.
    """
    for name in [n for n in source.saved if ".experts." in n and source.saved[n].ndim == 3]:
        words = np.ascontiguousarray(source.saved.pop(name).swapaxes(1, 2)[..., ::8], np.uint32)
        source.saved[f"{name}_blocks"] = words.view(np.uint8).reshape(*words.shape[:2], -1, 16)
        source.saved[f"{name}_scales"] = np.zeros((*words.shape[:2], words.shape[2] // 4), np.uint8)
        source.live[name] = source.live[name][:, ::8]


def mlx_side(source: Source, tiny: Tiny) -> Target:
    """Let mlx-lm rename and rearrange what was saved, and keep what its model takes."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.utils import _get_classes

    config = MLX_COMMON | source.config | tiny.mlx
    if "text_config" in config:
        config["text_config"] = MLX_COMMON | config["text_config"] | tiny.mlx
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    weights = {name: mx.array(value) for name, value in source.saved.items()}
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    layers = (nn.Linear, nn.Embedding, SwitchLinear)
    target = Target({}, set(), {})
    for path, module in model.named_modules():
        target.kinds[path] = type(module).__name__
        if isinstance(module, layers) or hasattr(module, "to_lora"):
            target.adaptable.add(path)
    shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}
    for name, value in weights.items():
        path = name.removesuffix(".weight")
        if name not in shapes or value.ndim < 2:
            continue
        if value.shape != shapes[name] and path in target.adaptable and not tiny.packed:
            raise ValueError(f"{name} is {value.shape}, mlx-lm's model wants {shapes[name]}")
        target.weights[path] = np.array(value).astype(np.int64)
    if missing := sorted(target.adaptable - target.weights.keys()):
        raise ValueError(f"nothing arrived in mlx-lm's {missing[0]} ({len(missing)} such modules)")
    return target
