"""Experts of a base model, by its config: how many, of which size, and updates that don't fit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraduct.adapter import Adapter, LowRank
from loraduct.errors import Refused

if TYPE_CHECKING:
    from loraduct.formats.base import Base

_NUMBER = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# mlx-lm's names of an expert's layers -> which axis of (experts, out, in) is the model's width
_WIDTH_AT = {"gate_proj": 2, "up_proj": 2, "down_proj": 1}


def number_of(config: Mapping[str, Any]) -> int | None:
    """How many experts a layer has; None when the config doesn't say."""
    return next((n for k in _NUMBER if type(n := config.get(k)) is int), None)


def zero_experts(config: Mapping[str, Any]) -> int:
    """How many experts do nothing: LongCat's, of which transformers has rows in one parameter."""
    count = config.get("zero_expert_num")
    return count if type(count) is int and count > 0 else 0


def wrong_experts(adapter: Adapter, base: Base) -> list[Refused]:
    """Updates of experts whose number is not the base's, or (by mlx-lm's names) whose size isn't."""
    found = []
    for module, u in adapter.low_rank.items():
        if u.layout == "experts" and (what := _unlike(module, u, adapter.naming, base)):
            found.append(Refused(adapter.weights, what, tensor=u.a.name))
    return found


def _unlike(module: str, u: LowRank, naming: str, base: Base) -> str | None:
    number, width = number_of(base.text_config), base.text_config.get("hidden_size")
    every = (number or 0) + (zero_experts(base.text_config) if naming == "hf" else 0)
    if number is not None and u.shape[0] not in (number, every):
        return f"has {u.shape[0]} experts, the base {base.path} has {number}"
    at = _WIDTH_AT.get(module.rpartition(".")[2]) if naming == "mlx" else None
    if at is not None and type(width) is int and u.shape[at] != width:
        return (
            f"updates experts of shape {list(u.shape[1:])}, the base {base.path} has a hidden_size of"
            f" {width}: made for another base, or by a PEFT that takes inputs for outputs"
        )
    return None
