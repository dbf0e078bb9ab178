"""Adapters of mlx-lm whose leaves are lists: a pair of factors for each part of a fused layer.

Only Apple's model has them: in mlx-lm 0.32.2, models/afm7.py, qkv_proj is a FusedLoRALinear whose
lora_a and lora_b are lists over q, k and v, so that tensors are called X.lora_a.0, X.lora_b.2. Each
part is an update of its own here, X[0], X[1], X[2]: the parts have unlike sizes and factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraduct.adapter import LowRank, Note
from loraduct.errors import Refused
from loraduct.text import printable

if TYPE_CHECKING:
    from loraduct.formats.base import Base

PARTS = 3  # q, k and v
_TENSOR = re.compile(r"(.+)\.(lora_[ab])\.([0-2])")
_PART = re.compile(r"(.+)\[([0-2])\]")


def split(tensor: str) -> tuple[str, str]:
    """(module, leaf) of a tensor's name; a part of a list is a module X[i]."""
    if match := _TENSOR.fullmatch(tensor):
        return f"{match[1]}[{match[3]}]", match[2]
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


def check_gaps(updates: Mapping[str, LowRank], file: Path) -> None:
    """Refuse a list with a gap: mlx-lm loads it, and fails when it runs. One that ends early is fine."""
    for layer, there in parts(updates).items():
        if absent := sorted(set(range(max(there))) - set(there)):
            raise Refused(
                file,
                f"is part {max(there)} of {printable(layer)}, whose part {absent[0]} is not there: mlx-lm"
                " can't run such a list; keep that part, or leave out those behind it",
                tensor=updates[f"{layer}[{max(there)}]"].a.name,
            )


def misfits(updates: Mapping[str, LowRank], base: Base, file: Path) -> list[Refused]:
    """Layers in parts whose sizes are not those of the base's fused weight.

    A part that is not there is not moved, as mlx-lm leaves it at its start.
    """
    found = []
    for layer, there in parts(updates).items():
        members = [updates[f"{layer}[{i}]"] for i in there]
        rows, columns = sum(u.shape[0] for u in members), members[0].shape[1]
        shape = base.shape_of(layer)
        whole_fits = shape == (rows, columns)
        part_fits = shape is not None and shape[1] == columns and rows < shape[0]
        if whole_fits or (part_fits and len(there) < PARTS):
            continue
        has = list(shape) if shape else f"no weight {layer}.weight"
        what = (
            f"updates a weight of shape {[rows, columns]} in parts, the base {base.path} has {has}"
        )
        what += ": made for another base"
        found.append(Refused(file, what, tensor=members[0].a.name))
    return found


def notes(updates: Iterable[str]) -> list[Note]:
    """What a person should know of such an adapter."""
    layers = parts(updates)
    if not layers:
        return []
    return [
        Note(
            "list-leaves",
            f"{len(layers)} fused layers have factors for q, k and v (Apple's model, afm7): mlx-lm"
            " 0.32.2 trains and saves them, but its load_adapters refuses them; load_weights after"
            " linear_to_lora_layers takes them",
        )
    ]
