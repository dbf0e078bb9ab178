"""PEFT's ``adapter_config.json``: which fields change numbers, and how (peft 0.21.2).

Patterns: `peft/utils/other.py:get_pattern_key`, the first key in file order that matches
``(.*\\.)?(key)$`` wins, and rank and alpha are looked up independently. Targets:
`peft/tuners/tuners_utils.py:check_target_module_exists`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraduct.errors import Refused
from loraduct.modules import kind_of_module
from loraduct.patterns import first_indices, first_matches
from loraduct.text import printable

# peft 0.21.2, utils/peft_types.py
_KINDS = """
    PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA ADAMSS BOFT
    ADAPTION_PROMPT IA3 BEFT LILY LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT GLORA
    XLORA HRA VBLORA UNILORA CPT MISS BONE RANDLORA ROAD TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT
    OSF DELORA GRALORA CARTRIDGE TINYLORA PSOFT PEANUT SHADOW SUPERTUNING DEFT
"""
KINDS = frozenset(_KINDS.split())

# Fields that turn plain-looking LoRA tensors into something else, and its name.
_OTHER_METHODS = {
    "arrow_config": "Arrow (a router over adapters)",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron's parallel layers",
}
# Fields that PEFT carries and no other format can: what each makes of the adapter.
PEFT_ONLY = {
    "alora_invocation_tokens": "aLoRA: it acts only after its invocation tokens, and elsewhere it"
    " would act always",
    "layer_replication": "layer_replication: its layers are counted in a base whose layers are"
    " repeated; repeat them in the base first",
}
# transformers 5 fused the experts of these models; PEFT 0.21.2 then takes targets by their old
# names for the experts' parameters (utils/transformers_weight_conversion.py), and a linear layer
# of that name, in a shared expert or a dense block, can't be targeted any more.
_OLD_EXPERTS = {
    ("gate", "w1", "w2", "w3"): "mixtral minimax minimax_m2",
    ("gate", "gate_proj", "up_proj", "down_proj"): "qwen2_moe qwen3_moe qwen3_next olmoe flex_olmo"
    " afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe"
    " glm4_moe glm4_moe_lite glm_moe_dsa glm4v_moe hunyuan_v1_moe longcat_flash mellum solar_open",
}
TAKEN_FOR_EXPERTS = {m: names for names, ms in _OLD_EXPERTS.items() for m in ms.split()}
# Initialisations that move the base weight; the file alone is relative to the moved base.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Those that only choose where the factors start (peft 0.21.2, tuners/lora/layer.py).
_LEAVES_BASE = ("gaussian", "eva", "orthogonal", "mica", "true", "false")

_NUMBERS = {
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "bias",
    "modules_to_save",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "qalora_group_size",
    "use_bdlora",
    "kasa_config",
}
_HARMLESS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "ensure_weight_tying",
    "use_dora_fast",
}
KNOWN = _NUMBERS | _HARMLESS | set(_OTHER_METHODS) | set(PEFT_ONLY)
MAX_RANK = 1 << 16


def _is_number(v: Any) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)


def _is_rank(v: Any) -> bool:
    return type(v) is int and 0 < v <= MAX_RANK


def _is_texts(v: Any) -> bool:
    return isinstance(v, list) and all(isinstance(x, str) for x in v)


def _is_indices(v: Any) -> bool:
    lists = list(v.values()) if isinstance(v, dict) else [v]
    return all(isinstance(x, list) and all(type(i) is int and i >= 0 for i in x) for x in lists)


def _is_ranges(v: Any) -> bool:
    return isinstance(v, list) and all(
        isinstance(x, list) and len(x) == 2 and all(type(i) is int for i in x) for x in v
    )


def _is_layers(v: Any) -> bool:
    return type(v) is int or (isinstance(v, list) and all(type(x) is int for x in v))


# field -> (test, what is expected); null passes where PEFT's default is null
_TYPES: dict[str, tuple[Any, str]] = {
    "r": (_is_rank, f"an integer from 1 to {MAX_RANK}"),
    "lora_alpha": (lambda v: _is_number(v) and abs(v) < 1e9, "a finite number below 1e9"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "use_qalora": (lambda v: isinstance(v, bool), "true or false"),
    "use_bdlora": (lambda v: isinstance(v, dict), "an object"),
    "kasa_config": (lambda v: isinstance(v, dict), "an object"),
    "use_dora": (lambda v: isinstance(v, bool), "true or false"),
    "lora_bias": (lambda v: isinstance(v, bool), "true or false"),
    "fan_in_fan_out": (lambda v: isinstance(v, bool), "true or false"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "rank_pattern": (
        lambda v: isinstance(v, dict) and all(_is_rank(x) for x in v.values()),
        "an object of patterns and positive integers",
    ),
    "alpha_pattern": (
        lambda v: isinstance(v, dict) and all(_is_number(x) for x in v.values()),
        "an object of patterns and numbers",
    ),
    "target_modules": (
        lambda v: isinstance(v, str) or _is_texts(v),
        "a list of names or one pattern",
    ),
    "exclude_modules": (
        lambda v: isinstance(v, str) or _is_texts(v),
        "a list of names or one pattern",
    ),
    "modules_to_save": (_is_texts, "a list of names"),
    "layer_replication": (_is_ranges, "a list of pairs of layer numbers"),
    "target_parameters": (_is_texts, "a list of names"),
    "trainable_token_indices": (_is_indices, "a list of token indices, or an object of such"),
    "alora_invocation_tokens": (_is_indices, "a list of token indices"),
    "layers_to_transform": (_is_layers, "an integer or a list of integers"),
    "layers_pattern": (lambda v: isinstance(v, str) or _is_texts(v), "a name or a list of names"),
    "init_lora_weights": (lambda v: isinstance(v, bool | str), "true, false or a name"),
    "base_model_name_or_path": (lambda v: isinstance(v, str), "a text"),
    "revision": (lambda v: isinstance(v, str), "a text"),
    "task_type": (lambda v: isinstance(v, str), "a text"),
    "lora_dropout": (_is_number, "a number"),
}
_NULL_IS_WRONG = ("r", "lora_alpha")
# Fields of _TYPES that mean the same for PEFT's other methods.
_SHARED = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "base_model_name_or_path",
    "revision",
    "task_type",
)


def kind_of(config: Mapping[str, Any], file: Path) -> str:
    """The config's peft_type, one of `KINDS`."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise Refused(file, f"peft_type is {printable(repr(kind), 60)}, which no PEFT method has")
    return kind


def check_common(config: Mapping[str, Any], file: Path) -> None:
    """Refuse odd values of the fields that other methods than LoRA share with it."""
    for field in _SHARED:
        test, expected = _TYPES[field]
        value = config.get(field)
        if value is not None and not test(value):
            raise Refused(file, f"{field} is {printable(repr(value), 80)}, expected {expected}")


def check(config: Mapping[str, Any], file: Path) -> list[str]:
    """Refuse a config that isn't of LoRA's family; returns names of unknown fields in use."""
    if (kind := kind_of(config, file)) != "LORA":
        raise Refused(file, f"is a {kind} adapter, not LORA")
    for field, (test, expected) in _TYPES.items():
        value = config.get(field)
        if (
            field in config
            and not (value is None and field not in _NULL_IS_WRONG)
            and not test(value)
        ):
            raise Refused(file, f"{field} is {printable(repr(value), 80)}, expected {expected}")
    for field, name in _OTHER_METHODS.items():
        value = config.get(field)
        # PEFT asks whether these are None: an empty one counts
        if value or (value is not None and field.endswith("_config")):
            raise Refused(file, f"{field} is set: {name}; this version doesn't carry it")
    init = config.get("init_lora_weights")
    if config.get("kasa_config") is not None and (_begun(config) or config.get("use_dora")):
        what = "kasa_config is set beside another way to move the base, which PEFT doesn't combine"
        raise Refused(file, what)
    if isinstance(init, str) and not _begun(config) and init.lower() not in _LEAVES_BASE:
        raise Refused(
            file,
            f"init_lora_weights is {printable(init, 40)!r}, which no PEFT up to 0.21.2 has: whether it"
            " moves the base weight can't be told; set it to true if it does not",
        )
    return sorted(k for k, v in config.items() if k not in KNOWN and v not in (None, False, {}, []))


def moves_base(config: Mapping[str, Any]) -> bool:
    """Whether training began by moving the base weight: the factors alone are not the update."""
    return config.get("kasa_config") is not None or _begun(config)


def began(config: Mapping[str, Any]) -> str:
    """By which way the base weight was moved, in lower case."""
    if config.get("kasa_config") is None:
        return str(config["init_lora_weights"]).lower()
    return "kasa"


def _begun(config: Mapping[str, Any]) -> bool:
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(_MOVES_BASE)


def scales(
    config: Mapping[str, Any], modules: Sequence[str], file: Path
) -> dict[str, tuple[int, float]]:
    """(rank, scale) of every module as PEFT computes them: alpha/r, or alpha/sqrt(r) for rsLoRA."""
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks = looked_up(config.get("rank_pattern") or {}, modules, rank, file, "rank_pattern")
    alphas = looked_up(config.get("alpha_pattern") or {}, modules, alpha, file, "alpha_pattern")
    rooted = config.get("use_rslora")
    return {
        m: (r, a / math.sqrt(r) if rooted else a / r)
        for m, r, a in zip(modules, ranks, alphas, strict=True)
    }


def looked_up(
    pattern: Mapping[str, Any], modules: Sequence[str], default: Any, file: Path, what: str
) -> list[Any]:
    if not pattern:
        return [default] * len(modules)
    values = list(pattern.values())
    hits = first_matches(list(pattern), modules, full=False, file=file, what=what)
    return [values[i] if i >= 0 else default for i in hits]


def unused_patterns(config: Mapping[str, Any], modules: Sequence[str], file: Path) -> list[str]:
    """Keys of rank_pattern and alpha_pattern that no module matches: PEFT ignores them."""
    found = []
    for field in ("rank_pattern", "alpha_pattern"):
        for key in config.get(field) or {}:
            hits = first_matches([key], modules, full=False, file=file, what=field)
            if max(hits, default=-1) < 0:
                found.append(f"{field} key {key!r}")
    return found


def _named(names: str | Sequence[str], modules: Sequence[str], file: Path, what: str) -> list[bool]:
    """One pattern for the whole path, or names that end the path."""
    if isinstance(names, str):
        return [i >= 0 for i in first_matches([names], modules, full=True, file=file, what=what)]
    exact = set(names)
    return [m in exact or any(m.endswith(f".{n}") for n in exact) for m in modules]


def saves(names: Sequence[str], module: str) -> str | None:
    """Which of modules_to_save covers ``module``: itself or a parent, whose path ends with the name.

    PEFT (0.21.2, `utils/other.py:_set_trainable`) compares ends of paths without a dot: ``norm``
    covers ``input_layernorm`` too.
    """
    parts = module.split(".")
    parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((n for n in names if any(p.endswith(n) for p in parents)), None)


def targeted(config: Mapping[str, Any], modules: Sequence[str], file: Path) -> list[bool]:
    """Which modules PEFT gives an adapter to when it loads this config."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        wanted = [True] * len(modules)
    else:
        wanted = _named(targets, modules, file, "target_modules")
        layers = config.get("layers_to_transform")
        if isinstance(targets, list) and layers is not None and layers != []:
            chosen = {layers} if isinstance(layers, int) else set(layers)
            prefixes = config.get("layers_pattern") or []
            prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
            exact = set(targets)
            wanted = [
                w and (m in exact or i in chosen)
                for w, m, i in zip(wanted, modules, _layers(modules, prefixes, file), strict=True)
            ]
    if excluded := config.get("exclude_modules"):
        out = _named(excluded, modules, file, "exclude_modules")
        wanted = [w and not o for w, o in zip(wanted, out, strict=True)]
    if config.get("ensure_weight_tying"):  # lora/model.py: a tied head gets the embedding's adapter
        pairs = zip(wanted, modules, strict=True)
        tied = any(w and kind_of_module(m) == "embedding" for w, m in pairs)
        wanted = [w or (tied and m == "lm_head") for w, m in zip(wanted, modules, strict=True)]
    # peft 0.21.2, tuners_utils.py: what lies within a module to save gets no adapter
    saved = config.get("modules_to_save") or []
    return [
        w and not any(f".{s}." in f".{m}." for s in saved)
        for w, m in zip(wanted, modules, strict=True)
    ]


def _layers(modules: Sequence[str], patterns: Sequence[str], file: Path) -> list[int | None]:
    """The layer index PEFT reads from each path: the first number, behind a pattern if given."""
    if not patterns:
        found = [re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", m) for m in modules]
        return [int(m["idx"]) if m else None for m in found]
    indices = first_indices(patterns, modules, file=file, what="layers_pattern")
    return [i if i >= 0 else None for i in indices]
