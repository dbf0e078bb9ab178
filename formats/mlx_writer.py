"""Writing MLX folders: keys that select exactly the adapted modules in stock mlx-lm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from typing import Any

from loraduct.account import Account
from loraduct.adapter import Adapter, LowRank, Update
from loraduct.errors import Refused
from loraduct.formats import CONFIG, mlx_keys, mlx_lists, peft_config
from loraduct.formats.mlx import check_config
from loraduct.formats.safetensors_file import ordered
from loraduct.tensor import Tensor
from loraduct.text import number

METADATA = {"format": "mlx"}


def layout(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any], Account]:
    """Tensors by file name, config and account of ``adapter`` as an MLX folder; reads no values.

    The adapter must be uniform (one rank, one scale) and have mlx-lm's names; see
    :mod:`loraduct.converters.convert`.
    """
    account = Account()
    if adapter.method == "full":
        tensors = {n: r.weight for n, r in adapter.replacements.items()}
        for name, tensor in tensors.items():
            account.carry(name, tensor)
        if adapter.format == "mlx":
            return ordered(tensors), dict(adapter.config), account
        config: dict[str, Any] = {"fine_tune_type": "full", "num_layers": adapter.layers or -1}
        if adapter.base.name:
            config["model"] = adapter.base.name
        return ordered(tensors), config, account
    check_expressible(adapter)
    tensors = {}
    for module, u in adapter.low_rank.items():
        expert = u.layout == "experts"
        parts = {
            "lora_a": u.a if expert else u.a.T,
            "lora_b": u.b if expert else u.b.T,
            "m": u.magnitude,
        }
        for leaf, part in parts.items():
            if part is not None:
                name = mlx_lists.tensor_name(module, leaf)
                tensors[name] = part
                account.carry(name, part)
    config, account.fields = _config_for(adapter)
    return ordered(tensors), config, account


def check_expressible(adapter: Adapter) -> None:
    """Refuse by name what the MLX format has no place for."""
    out = "; fuse it into the base, or leave it out with --exclude"
    for name, replacement in adapter.replacements.items():
        raise Refused(
            adapter.weights,
            f"{name} is a replaced parameter ({replacement.origin}), which an MLX LoRA adapter can't hold{out}",
            tensor=replacement.weight.name,
        )
    if not adapter.low_rank:
        raise Refused(adapter.path, "no low-rank update is left to write")
    mlx_lists.check_gaps(adapter.low_rank, adapter.weights)
    for field, what in peft_config.PEFT_ONLY.items():
        if adapter.format == "peft" and adapter.config.get(field) not in (None, []):
            raise Refused(adapter.path / CONFIG, f"{field} is set: {what}")
    for module, u in adapter.low_rank.items():
        if u.layout == "conv" or ".base_layer." in module:
            what = (
                "LoRA on a convolution"
                if u.layout == "conv"
                else "LoRA inside nn.MultiheadAttention"
            )
            raise Refused(adapter.weights, f"{what}, which mlx-lm doesn't have", tensor=u.a.name)
        if u.magnitude is not None and u.layout != "linear":
            raise Refused(
                adapter.weights,
                "is DoRA on an embedding, whose magnitude is per dimension in PEFT and per token in"
                " mlx-lm: neither can say what the other does",
                tensor=u.magnitude.name,
            )
        if u.bias is not None:
            raise Refused(
                adapter.weights,
                f"lora_bias, which an MLX adapter can't hold{out}",
                tensor=u.bias.name,
            )


def _config_for(adapter: Adapter) -> tuple[dict[str, Any], dict[str, str]]:
    """A config that selects exactly the adapter's modules; an earlier MLX config is kept whole."""
    updates = adapter.low_rank
    update = next(iter(updates.values()))
    assert all((u.rank, u.scale) == (update.rank, update.scale) for u in updates.values())
    past = [adapter.config] if adapter.format == "mlx" else []
    for record in (adapter.origin, (adapter.origin or {}).get("before")):
        if record and record["format"] == "mlx":
            past.append(record["config"])
    for config in past:
        if _describes(config, adapter, update):
            return dict(config), {"config": "kept as it was"}
    keys, last, relative = mlx_keys.keys_for(list(updates), adapter.layers)
    dropout = adapter.config.get("lora_dropout", 0.0)  # PEFT's
    config = {
        "fine_tune_type": adapter.method,
        "num_layers": last,
        "lora_parameters": {
            "rank": update.rank,
            "scale": update.scale,
            "dropout": dropout,
            "keys": keys,
        },
    }
    if adapter.base.name:
        config["model"] = adapter.base.name
    sure = "" if adapter.base_modules else f" of the {adapter.layers} that the adapter implies"
    how = (
        f"{len(keys)} relative to the last {last} blocks{sure} (mlx-swift reads them too)"
        if relative
        else f"{len(keys)} full paths (mlx-lm in Python reads them; mlx-swift does not)"
    )
    return config, {"rank": str(update.rank), "scale": number(update.scale), "keys": how}


def _describes(config: Mapping[str, Any], adapter: Adapter, update: LowRank) -> bool:
    try:
        check_config(dict(config), adapter.path / CONFIG)
    except Refused:
        return False
    if config.get("fine_tune_type", "lora") != adapter.method:
        return False
    parameters = config["lora_parameters"]
    if parameters["rank"] != update.rank or not isclose(
        parameters["scale"], update.scale, rel_tol=1e-12
    ):
        return False
    chosen = mlx_keys.selects(config, adapter.low_rank, adapter.layers)
    return all(chosen.values())


def narrowed(adapter: Adapter, dropped: Mapping[str, Update]) -> Adapter:
    """The adapter's config cut down to the updates that are left (full paths need no ``dropped``)."""
    del dropped
    config = dict(adapter.config)
    if adapter.low_rank:
        keys, last, _ = mlx_keys.keys_for(list(adapter.low_rank), adapter.layers)
        config |= {
            "num_layers": last,
            "lora_parameters": config["lora_parameters"] | {"keys": keys},
        }
    return replace(adapter, config=config, origin=None)
