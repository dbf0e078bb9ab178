"""Writing PEFT folders: a config that describes the updates exactly, and PEFT's key names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isclose
from typing import Any

from loraduct import architectures
from loraduct.account import Account
from loraduct.adapter import Adapter, LowRank, Replacement, Update
from loraduct.architectures import block_of
from loraduct.errors import Refused
from loraduct.formats import CONFIG, peft_config
from loraduct.formats.peft import PREFIX
from loraduct.formats.safetensors_file import ordered
from loraduct.tensor import Tensor
from loraduct.text import several

METADATA = {"format": "pt"}


def config_for(adapter: Adapter) -> tuple[dict[str, Any], dict[str, str]]:
    """A config that describes ``adapter`` exactly, and what became of its fields.

    The adapter's own PEFT config, or the one it had before a conversion, is kept whole when it
    still describes the updates; otherwise one is written from them.
    """
    past = [adapter.config] if adapter.format == "peft" else []
    for record in (adapter.origin, (adapter.origin or {}).get("before")):
        if record and record["format"] == "peft":
            past.append(record["config"])
    for config in past:
        if _describes(config, adapter):
            return dict(config), {"config": "kept as it was"}
    return _fresh(adapter, past[0] if past else {})


def _describes(config: Mapping[str, Any], adapter: Adapter) -> bool:
    updates, file = adapter.low_rank, adapter.path / CONFIG
    modules = list(updates)
    try:
        peft_config.check(config, file)
        scales = peft_config.scales(config, modules, file)
        wanted = peft_config.targeted(config, modules, file)
    except Refused:
        return False
    return (
        all(wanted)
        and all(
            scales[m][0] == u.rank and isclose(scales[m][1], u.scale, rel_tol=1e-12)
            for m, u in updates.items()
        )
        and bool(config.get("use_dora")) == (adapter.method == "dora")
        and bool(config.get("lora_bias")) == any(u.bias is not None for u in updates.values())
        and (
            not adapter.replacements
            or config.get("modules_to_save")
            or config.get("bias", "none") != "none"
        )
    )


def _fresh(adapter: Adapter, past: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A config from the updates alone; training fields of ``past`` are kept."""
    updates = adapter.low_rank
    pairs = Counter((u.rank, u.scale) for u in updates.values())
    (rank, scale), _ = pairs.most_common(1)[0]
    odd = {m: u for m, u in updates.items() if (u.rank, u.scale) != (rank, scale)}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "layers_pattern": None,
    }
    config |= {k: past[k] for k in config if k in past} | {
        "init_lora_weights": True,  # false would fill what PEFT misses with random numbers
        "r": rank,
        "lora_alpha": _alpha(rank, scale),
        "use_rslora": False,
        "use_dora": adapter.method == "dora",
        "lora_bias": any(u.bias is not None for u in updates.values()),
        "rank_pattern": {m: u.rank for m, u in odd.items() if u.rank != rank},
        "alpha_pattern": {
            m: _alpha(u.rank, u.scale)
            for m, u in odd.items()
            if _alpha(u.rank, u.scale) != _alpha(rank, scale)
        },
    }
    targets = targets_of(adapter)
    config |= targets
    if past.get("target_modules") is not None and not targets["layers_to_transform"]:
        kept = {
            k: past.get(k) for k in ("target_modules", "exclude_modules", "layers_to_transform")
        }
        modules = [*updates, *(set(adapter.base_modules) - set(updates))]
        exact = [True] * len(updates) + [False] * (len(modules) - len(updates))
        if peft_config.targeted(kept, modules, adapter.path) == exact:
            config |= kept
    fields = {
        "r": str(rank),
        "lora_alpha": f"{config['lora_alpha']} (scale {scale:.6g})",
        "target_modules": several(config["target_modules"], 8)
        if isinstance(config["target_modules"], list)
        else str(config["target_modules"]),
    }
    if odd:
        fields["rank_pattern, alpha_pattern"] = f"{len(odd)} of {len(updates)} modules"
    return config, fields


def _alpha(rank: int, scale: float) -> int | float:
    """lora_alpha such that PEFT's alpha / rank gives the scale back."""
    alpha = scale * rank
    return int(alpha) if alpha == int(alpha) and int(alpha) / rank == scale else alpha


def targets_of(adapter: Adapter, dropped: Sequence[str] = ()) -> dict[str, Any]:
    """target_modules and layers_to_transform that select exactly the adapted modules.

    The shortest form that selects none of the other modules: those of the base when it is known,
    those of every architecture that fits when not, and those that were left out.
    """
    modules = list(adapter.low_rank)
    others = {*dropped, *(adapter.base_modules or architectures.siblings(modules))} - set(modules)
    names = [*modules, *others]
    exact = [True] * len(modules) + [False] * len(others)
    for form in _forms(modules, adapter.layers):
        if peft_config.targeted(form, names, adapter.path) == exact:
            return form
    return {"target_modules": sorted(modules), "layers_to_transform": None}


def _forms(modules: list[str], n_layers: int | None) -> Iterator[dict[str, Any]]:
    """Last names, then paths within the block; for all blocks, or for the blocks there are."""
    blocks = [b for m in modules if (b := block_of(m))]
    layers = sorted({b[1] for b in blocks})
    relative = sorted({b[2] for b in blocks})
    if len(blocks) < len(modules) or len(layers) * len(relative) != len(modules):
        return
    every = n_layers is not None and layers == list(range(n_layers))
    leaves = {r.rsplit(".", 1)[-1] for r in relative}
    for names in ([sorted(leaves)] if len(leaves) == len(relative) else []) + [relative]:
        yield {"target_modules": names, "layers_to_transform": None if every else layers}


def layout(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any], Account]:
    """Tensors by file name, config and account of ``adapter`` as a PEFT folder; reads no values."""
    if adapter.method == "full":
        raise Refused(
            adapter.path,
            "is a full fine-tune, not an adapter: it has no low-rank form to write for PEFT",
        )
    if not adapter.low_rank:
        raise Refused(adapter.path, "no low-rank update is left; PEFT needs at least one")
    account = Account()
    tensors: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            tensors[name] = tensor
            account.carry(name, tensor)

    for module, u in adapter.low_rank.items():
        put(f"{PREFIX}{module}.lora_A.weight", u.a)
        put(f"{PREFIX}{module}.lora_B.weight", u.b)
        put(f"{PREFIX}{module}.lora_magnitude_vector", u.magnitude)
        put(f"{PREFIX}{module}.lora_B.bias", u.bias)
    targeted = adapter.low_rank
    for name, replacement in adapter.replacements.items():
        module, _, leaf = name.rpartition(".")
        inner = ".base_layer" if replacement.origin == "bias" and module in targeted else ""
        put(f"{PREFIX}{module}{inner}.{leaf}", replacement.weight)
    config, account.fields = config_for(adapter)
    return ordered(tensors), config, account


def uniform_config(adapter: Adapter) -> Adapter:
    """The adapter's config rewritten for one rank and one alpha without patterns or rsLoRA."""
    update = next(iter(adapter.low_rank.values()))
    config = dict(adapter.config) if adapter.format == "peft" else config_for(adapter)[0]
    config |= {
        "r": update.rank,
        "lora_alpha": _alpha(update.rank, update.scale),
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return replace(adapter, config=config, format="peft", origin=None)


def narrowed(adapter: Adapter, dropped: Mapping[str, Update]) -> Adapter:
    """The adapter's config cut down to the updates that are left when ``dropped`` are not."""
    config = dict(adapter.config)
    gone = [n for n, u in dropped.items() if isinstance(u, LowRank)]
    config |= targets_of(adapter, gone)
    config["init_lora_weights"] = True  # false would fill what PEFT misses with random numbers
    saved = [n.rpartition(".")[0] for n, r in adapter.replacements.items() if r.origin != "bias"]
    lost = [n.rpartition(".")[0] for n, u in dropped.items() if isinstance(u, Replacement)]
    config["modules_to_save"] = _saving(config.get("modules_to_save") or [], saved, lost) or None
    if not any(r.origin == "bias" for r in adapter.replacements.values()):
        config["bias"] = "none"
    return replace(adapter, config=config, origin=None)


def _saving(names: list[str], kept: list[str], lost: list[str]) -> list[str]:
    """modules_to_save for ``kept``: an entry that covers lost ones too gives way to full names."""
    found: dict[str, None] = {}
    for name in names:
        covered = [m for m in kept if peft_config.saves([name], m)]
        if any(peft_config.saves([name], m) for m in lost):
            found |= dict.fromkeys(covered)
        elif covered:
            found[name] = None
    return list(found)
