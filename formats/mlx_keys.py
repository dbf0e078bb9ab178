"""Which modules an MLX adapter config selects (mlx-lm 0.32.2, tuner/utils.py), and why.

``keys`` match exactly: relative to a block within the last ``num_layers`` blocks (0 or negative:
all), or as full paths anywhere. Without ``keys``, every linear layer of those blocks; in
mlx-lm before 2025-09-30, a fixed list per architecture. For reading, the tensors decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loraduct.formats.mlx_lists import parts, whole
from loraduct.modules import block_of

_QV = ("self_attn.q_proj", "self_attn.v_proj")
# mlx-lm up to 2025-09-30, tuner/utils.py:linear_to_lora_layers, by model_type
OLD_DEFAULTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "mistral",
            "llama",
            "phi",
            "stablelm",
            "qwen2",
            "gemma",
            "starcoder2",
            "cohere",
            "minicpm",
        ),
        _QV,
    ),
    "mixtral": (*_QV, "block_sparse_moe.gate"),
    "qwen2_moe": (*_QV, "mlp.gate", "mlp.shared_expert_gate"),
    "gpt_bigcode": ("attn.c_attn",),
    "gpt2": ("attn.c_attn",),
    "olmo": ("att_proj",),
    "openelm": ("attn.qkv_proj",),
    "phi3": ("self_attn.qkv_proj",),
    "phi-msft": ("mixer.Wqkv", "moe.gate"),
    "dbrx": ("norm_attn_norm.attn.Wqkv", "ffn.router.layer"),
    "internlm2": ("attention.wqkv", "attention.wo"),
}


def selects(
    config: Mapping[str, Any], modules: Iterable[str], n_layers: int | None
) -> dict[str, bool]:
    """For each module whether the config selects it. Without ``n_layers`` the last blocks can't be
    told, and a relative key is taken to apply."""
    keys = config["lora_parameters"].get("keys")
    last = config["num_layers"]
    found = {}
    for module in modules:
        layer = whole(module)
        block = block_of(layer)
        if keys is not None and layer in keys:
            found[module] = True
        elif block is None:
            found[module] = False
        else:
            within = n_layers is None or last <= 0 or block[1] >= n_layers - last
            found[module] = within and (keys is None or block[2] in keys)
    return found


def explain_defaults(modules: Sequence[str]) -> str:
    """In words, which default targets a folder without ``keys`` was trained with."""
    relative = {b[2] for m in modules if (b := block_of(m))}
    matching = [model for model, keys in OLD_DEFAULTS.items() if relative == set(keys)]
    if matching:
        return (
            f"no keys in the config: the tensors are the default targets of mlx-lm before 2025-09-30"
            f" ({', '.join(sorted(relative))})"
        )
    return "no keys in the config: the tensors say which modules are adapted"


def keys_for(modules: Sequence[str], n_layers: int | None) -> tuple[list[str], int, bool]:
    """(keys, num_layers, relative?) that select exactly ``modules`` in stock mlx-lm.

    Relative keys need the same targets in the last N blocks and the number of blocks; they also
    load in mlx-swift, which knows no full paths. Full paths are exact for any set.
    """
    if parts(modules):  # of a model that has two lists of blocks: the last ones can't be told
        return sorted({whole(m) for m in modules}), n_layers or -1, False
    blocks = [block_of(m) for m in modules]
    inside = [b for b in blocks if b]
    layers = sorted({b[1] for b in inside})
    relative = sorted({b[2] for b in inside})
    count = layers[-1] + 1 if layers else 0
    if (
        n_layers is not None
        and len(inside) == len(blocks)
        and len({b[0] for b in inside}) == 1
        and len(relative) * len(layers) == len(modules)
        and layers == list(range(n_layers - len(layers), n_layers))
    ):
        return relative, len(layers), True
    return sorted(modules), n_layers or count, False
