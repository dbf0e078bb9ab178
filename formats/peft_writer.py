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
from loraduct.errors import Refused
from loraduct.formats import CONFIG, peft_config
from loraduct.formats.peft_keys import PREFIX
from loraduct.formats.peft_lora import flattened, key_of, matches, nested
from loraduct.formats.safetensors_file import ordered
from loraduct.modules import block_of
from loraduct.tensor import Tensor
from loraduct.text import several

METADATA = {"format": "pt"}
# What PEFT 0.21 can't adapt, by model type: names of linear layers, and why.
_OUT_PROJ = "PEFT refuses to load an adapter of it"  # tuners/tuners_utils.py
_PASSED_BY = "transformers takes its weight and passes PEFT's layer by, so that it has no effect"
_UNADAPTABLE: dict[str, dict[str, str]] = {
    **{m: {"out_proj": _OUT_PROJ, "dt_proj": _PASSED_BY} for m in ("mamba", "falcon_mamba")},
    **{m: {"out_proj": _OUT_PROJ} for m in ("mamba2", "nemotron_h", "falcon_h1")},
    "jamba": {"dt_proj": _PASSED_BY},
    "longcat_flash": {"router.classifier": _PASSED_BY},
    "laguna": dict.fromkeys(
        (f"shared_experts.{p}_proj" for p in ("gate", "up", "down")),
        "PEFT can save an adapter of it, and finds nothing in the file when it loads it",
    ),
}
_KEYS = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}


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
    keys = {m: key_of(m, u) for m, u in updates.items()}
    modules, parameters = _kinds(updates)
    named = config.get("target_parameters") or []
    try:
        peft_config.check(config, file)
        scales = peft_config.scales(config, list(keys.values()), file)
        wanted = peft_config.targeted(config, [keys[m] for m in modules], file)
    except Refused:
        return False
    return (
        all(wanted)
        and all(any(matches(t, keys[p]) for t in named) for p in parameters)
        and all(
            scales[keys[m]][0] == u.rank and isclose(scales[keys[m]][1], u.scale, rel_tol=1e-12)
            for m, u in updates.items()
        )
        and bool(config.get("use_dora")) == (adapter.method == "dora")
        and bool(config.get("lora_bias")) == any(u.bias is not None for u in updates.values())
        and (
            not adapter.replacements
            or config.get("modules_to_save")
            or config.get("trainable_token_indices")
            or config.get("bias", "none") != "none"
        )
    )


def _kinds(updates: Mapping[str, LowRank]) -> tuple[list[str], list[str]]:
    """Modules, and bare parameters (experts, routers)."""
    bare = [m for m, u in updates.items() if u.layout in ("experts", "parameter", "weight")]
    return [m for m in updates if m not in set(bare)], bare


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
        "peft_type": "LORA",
        "bias": _bias(adapter, past),
        "init_lora_weights": True,  # false would fill what PEFT misses with random numbers
        "r": rank,
        "lora_alpha": _alpha(rank, scale),
        "use_rslora": False,
        "use_dora": adapter.method == "dora",
        "lora_bias": any(u.bias is not None for u in updates.values()),
        "rank_pattern": {key_of(m, u): u.rank for m, u in odd.items() if u.rank != rank},
        "alpha_pattern": {
            key_of(m, u): _alpha(u.rank, u.scale)
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
        if not _kinds(updates)[1] and peft_config.targeted(kept, modules, adapter.path) == exact:
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


def _bias(adapter: Adapter, past: Mapping[str, Any]) -> str:
    """Which biases are trained, in LoRA's words; other methods say ``vera_only``, or nothing."""
    bias = str(past.get("bias") or "none")
    trained = any(r.origin == "bias" for r in adapter.replacements.values())
    return "lora_only" if bias.endswith("_only") or (bias == "none" and trained) else bias


def _alpha(rank: int, scale: float) -> int | float:
    """lora_alpha such that PEFT's alpha / rank gives the scale back."""
    alpha = scale * rank
    return int(alpha) if alpha == int(alpha) and int(alpha) / rank == scale else alpha


def targets_of(adapter: Adapter, dropped: Sequence[str] = ()) -> dict[str, Any]:
    """target_modules, layers_to_transform and target_parameters that select exactly what is adapted.

    The shortest form that selects none of the other modules: those of the base when it is known,
    those of every architecture that fits when not, and those that were left out.
    """
    modules, bare = _kinds(adapter.low_rank)
    parameters = _parameters([key_of(m, adapter.low_rank[m]) for m in bare], adapter.layers)
    modules = sorted({key_of(m, adapter.low_rank[m]) for m in modules})
    others = {*dropped, *(adapter.base_modules or architectures.siblings(modules))} - set(modules)
    names = [*modules, *others]
    exact = [True] * len(modules) + [False] * len(others)
    for form in _forms(modules, adapter.layers):
        if peft_config.targeted(form, names, adapter.path) == exact:
            return form | parameters
    return {"target_modules": sorted(modules), "layers_to_transform": None} | parameters


def _parameters(names: list[str], n_layers: int | None) -> dict[str, Any]:
    """target_parameters: ends of paths where every block has them, else whole paths."""
    if not names:
        return {}
    blocks = [b for n in names if (b := block_of(n))]
    layers, relative = {b[1] for b in blocks}, {b[2] for b in blocks}
    every = len(blocks) == len(names) == len(layers) * len(relative)
    if every and n_layers is not None and len(layers) == n_layers:
        return {"target_parameters": sorted(relative)}
    return {"target_parameters": sorted(names)}


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
            f"is {adapter.technique or 'a full fine-tune, not an adapter'}: it replaces whole"
            " parameters and has no low-rank form to write for PEFT",
        )
    rows = _is_rows(adapter)
    if not adapter.low_rank and not (rows and adapter.replacements):
        raise Refused(adapter.path, "no low-rank update is left; PEFT needs at least one")
    account = Account()
    tensors: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            tensors[name] = tensor
            account.carry(name, tensor)

    _, bare = _kinds(adapter.low_rank)
    paths = nested(key_of(m, adapter.low_rank[m]) for m in bare)
    for module, u in adapter.low_rank.items():
        stem = PREFIX + paths.get(key_of(module, u), module)
        a, b = _KEYS.get(u.layout, _KEYS["linear"])
        flat = flattened(u) if u.layout == "experts" else u
        put(stem + a, flat.a)
        put(stem + b, flat.b)
        put(f"{stem}.lora_magnitude_vector", u.magnitude)
        put(f"{stem}.lora_B.bias", u.bias)
    targeted = adapter.low_rank
    for name, replacement in adapter.replacements.items():
        module, _, leaf = name.rpartition(".")
        inner = ".base_layer" if replacement.origin == "bias" and module in targeted else ""
        put(f"{PREFIX}{module}{inner}.{leaf}", replacement.weight)
    if rows:
        return ordered(tensors), dict(adapter.config), account
    config, account.fields = config_for(adapter)
    if bare and (config.get("rank_pattern") or config.get("alpha_pattern")):
        account.notes.append(
            "PEFT 0.21 warns that patterns for bare parameters (experts, routers) match no module and"
            " are ignored: it uses them all the same"
        )
    return ordered(tensors), config, account


def _is_rows(adapter: Adapter) -> bool:
    """PEFT's trainable tokens as a method of their own: what is read is what is written."""
    return adapter.format == "peft" and adapter.config.get("peft_type") == "TRAINABLE_TOKENS"


def reachable(adapter: Adapter) -> Adapter:
    """Linear layers whose names PEFT takes for something else, as weights of their modules.

    Raises Refused for those it can't adapt at all.
    """
    taken = peft_config.TAKEN_FOR_EXPERTS.get(adapter.model_type or "", ())
    done: dict[str, Update] = dict(adapter.updates)
    for module, u in adapter.low_rank.items():
        for name, why in _UNADAPTABLE.get(adapter.model_type or "", {}).items():
            if module.endswith(f".{name}"):
                what = f"can't be adapted in a {adapter.model_type} model by PEFT 0.21: {why}"
                raise Refused(
                    adapter.weights, f"{what}; leave it out with --exclude", tensor=module
                )
        if u.layout == "linear" and module.rpartition(".")[2] in taken:
            if u.magnitude is not None:
                raise Refused(
                    adapter.weights,
                    f"is DoRA on a linear layer of a {adapter.model_type} model whose name PEFT 0.21"
                    " takes for the experts' parameters: it can't target it; leave it out with"
                    " --exclude",
                    tensor=module,
                )
            done[module] = replace(u, layout="weight")
    return replace(adapter, updates=done)


def uniform_config(adapter: Adapter) -> Adapter:
    """The adapter's config rewritten for one rank and one alpha without patterns or rsLoRA."""
    update = next(iter(adapter.low_rank.values()))
    own = adapter.format == "peft" and adapter.technique is None
    config = dict(adapter.config) if own else config_for(adapter)[0]
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
    if _is_rows(adapter):
        left = [n.rpartition(".")[0] for n in adapter.replacements]
        return replace(adapter, config=config | {"target_modules": left}, origin=None)
    gone = [n for n, u in dropped.items() if not isinstance(u, Replacement)]
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
