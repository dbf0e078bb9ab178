"""Adapters of mlx-lm whose leaves are lists: a pair of factors for each part of a fused layer.

Only Apple's model has them: in mlx-lm 0.32.2, models/afm7.py, qkv_proj is a FusedLoRALinear whose
lora_a and lora_b are lists over q, k and v, so that tensors are called X.lora_a.0, X.lora_b.2. Each
part is an update of its own here, X[0], X[1], X[2]: the parts have unlike sizes and factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from loraduct.adapter import LowRank, Note
from loraduct.errors import Refused
from loraduct.text import printable

_TENSOR = re.compile(r"(.+)\.(lora_[ab])\.(\d{1,3})")
_PART = re.compile(r"(.+)\[(\d{1,3})\]")


def split(tensor: str) -> tuple[str, str]:
    """(module, leaf) of a tensor's name; a part of a list is a module X[i]."""
    if match := _TENSOR.fullmatch(tensor):
        return f"{match[1]}[{int(match[3])}]", match[2]
    module, _, leaf = tensor.rpartition(".")
    return module, leaf


def tensor_name(module: str, leaf: str) -> str:
    """The name in an MLX file of a module's leaf, lists as mlx-lm flattens them."""
    match = _PART.fullmatch(module)
    return f"{match[1]}.{leaf}.{match[2]}" if match else f"{module}.{leaf}"


def whole(module: str) -> str:
    """The layer that mlx-lm knows: X for X[i]."""
    match = _PART.fullmatch(module)
    return match[1] if match else module


def parts(modules: Iterable[str]) -> dict[str, list[int]]:
    """The layers that come in parts, and which parts of them there are."""
    found: dict[str, list[int]] = {}
    for module in modules:
        if match := _PART.fullmatch(module):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def check_complete(updates: Mapping[str, LowRank], file: Path) -> None:
    """Refuse a list with a gap: mlx-lm would fill it with something, or shift what follows."""
    for layer, there in parts(updates).items():
        absent = sorted(set(range(max(there) + 1)) - set(there))
        if absent or len(there) == 1:
            what = (
                f"is part {max(there)} of {printable(layer)}, whose part {absent[0]} is not there;"
                if absent
                else f"is part 0 of {printable(layer)}, and no other part is there;"
            )
            raise Refused(
                file,
                f"{what} mlx-lm has one list for all: keep all parts, or leave all out",
                tensor=updates[f"{layer}[{max(there)}]"].a.name,
            )


def shapes(updates: Mapping[str, LowRank]) -> dict[str, tuple[tuple[int, int], str]]:
    """Of each layer that comes in parts: the shape of the whole dW, and a tensor to name it by."""
    found = {}
    for layer, there in parts(updates).items():
        first = updates[f"{layer}[{there[0]}]"]
        rows = sum(updates[f"{layer}[{i}]"].shape[0] for i in there)
        found[layer] = ((rows, first.shape[1]), first.a.name)
    return found


def notes(updates: Iterable[str]) -> list[Note]:
    """What a person should know of such an adapter."""
    layers = parts(updates)
    if not layers:
        return []
    count = max(len(p) for p in layers.values())
    return [
        Note(
            "list-leaves",
            f"{len(layers)} fused layers have factors in {count} parts (Apple's model, afm7): mlx-lm"
            " 0.32.2 trains and saves them, but its load_adapters refuses them; load_weights after"
            " linear_to_lora_layers takes them",
        )
    ]
