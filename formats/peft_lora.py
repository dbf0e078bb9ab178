"""The low-rank updates of a PEFT folder: which layout, which rank and scale, checked shapes.

Layouts (peft 0.21.2, measured against its merged weights): linear layers and Conv1D (r, in) and
(out, r); embeddings, see `peft_keys`; convolutions A (r, in, *kernel), B (out, r, 1, ...);
parameters of experts (`tuners/lora/layer.py:ParamWrapper`): A (experts * r, in), experts slowest,
B (out, r * experts), experts FASTEST.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraduct.adapter import LowRank
from loraduct.computed import reshaped
from loraduct.errors import Refused
from loraduct.formats import CONFIG, peft_config
from loraduct.tensor import Tensor
from loraduct.text import several

Parts = Mapping[str, Mapping[str, Tensor]]
# In which order modules of transformers 5 declare their bare parameters: PEFT wraps the first one
# innermost. Only what is listed can be told apart where several are adapted.
_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "v1", "down_proj", "w2")


def low_rank(
    parts: Parts, config: Mapping[str, Any], config_file: Path, weights: Path
) -> dict[str, LowRank]:
    """The updates by module (by ``module.parameter`` for parameters), checked against the config."""
    parts, parameters = _named(parts, config, config_file, weights)
    modules = list(parts)
    keys = [parameters.get(m) or _owner(m) for m in modules]
    scales = peft_config.scales(config, keys, config_file)
    targeted = peft_config.targeted(config, keys, config_file)
    for module, wanted in zip(modules, targeted, strict=True):
        if not wanted and module not in parameters:
            raise Refused(
                weights,
                f"the config's target_modules, exclude_modules or layers_to_transform in"
                f" {CONFIG} leave this module out: PEFT would drop its tensors in silence",
                tensor=module,
            )
    kinds = {m: "weight" if key != m else "parameter" for m, key in parameters.items()}
    return {
        module: _update(parts[module], *scales[key], kinds.get(module), config, weights)
        for module, key in zip(modules, keys, strict=True)
    }


def _owner(module: str) -> str:
    """The module PEFT looks up: attention wraps its own output projection as a base layer."""
    return module.partition(".base_layer.")[0]


def _named(
    parts: Parts, config: Mapping[str, Any], config_file: Path, weights: Path
) -> tuple[Parts, dict[str, str]]:
    """Parts with parameters under ``module.parameter``, and these names -> PEFT's name of them.

    The key does not say which parameter it is of: target_parameters does, and the nesting.
    """
    targets = config.get("target_parameters") or []
    if not targets:
        return parts, {}
    levels: dict[str, list[str]] = {}
    for module in parts:
        root = module
        while root.endswith(".base_layer"):
            root = root.removesuffix(".base_layer")
        levels.setdefault(root, []).append(module)
    modules_only = {**config, "target_parameters": None}
    linear = peft_config.targeted(modules_only, list(levels), config_file)
    found: dict[str, Mapping[str, Tensor]] = {}
    names: dict[str, str] = {}
    for (root, nested), is_module in zip(levels.items(), linear, strict=True):
        leaves = {
            t.rpartition(".")[2] for t in targets if matches(t, f"{root}.{t.rpartition('.')[2]}")
        }
        if not leaves or (is_module and config.get("target_modules") is not None):
            found |= {m: parts[m] for m in nested}
            continue
        depths = sorted(m.count(".base_layer") for m in nested)
        known = len(leaves) == 1 or leaves <= set(_DECLARED)
        if len(leaves) != len(nested) or depths != list(range(len(nested))) or not known:
            raise Refused(
                weights,
                f"{len(nested)} adapted parameters, where target_parameters in {CONFIG} name"
                f" {several(sorted(leaves))}: which one is which can't be told",
                tensor=next(iter(parts[nested[0]].values())).name,
            )
        order = sorted(
            leaves, key=lambda leaf: _DECLARED.index(leaf) if known and len(leaves) > 1 else 0
        )
        for module in nested:
            leaf = order[len(nested) - 1 - module.count(".base_layer")]
            name = root if leaf == "weight" else f"{root}.{leaf}"
            found[name] = parts[module]
            names[name] = f"{root}.{leaf}"
    return found, names


def matches(target: str, path: str) -> bool:
    """PEFT's rule for target_parameters: the whole path, or its end."""
    return path == target or path.endswith(f".{target}")


def _update(
    part: Mapping[str, Tensor],
    rank: int,
    scale: float,
    bare: str | None,
    config: Mapping[str, Any],
    weights: Path,
) -> LowRank:
    """One module's update, or a refusal naming the tensor that does not fit."""
    embedding = "embedding_a" in part or "embedding_b" in part
    names = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    for name, mark in zip(names, ("lora_A", "lora_B"), strict=True):
        if name not in part:
            other = next(iter(part.values())).name
            what = f"has no {mark} to go with it; the adapter is incomplete"
            raise Refused(weights, what, tensor=other)
    a, b = part[names[0]], part[names[1]]
    magnitude, bias = part.get("magnitude"), part.get("bias")
    _check_config(part, a, b, config, weights)
    if len(a.shape) < 2 or len(a.shape) != len(b.shape):
        _expect(False, weights, b, f"as many axes as {a.name} {list(a.shape)}")
    if bare and a.shape[0] != rank and a.shape[0] % rank == 0:
        return _experts(a, b, rank, scale, weights)
    if a.shape[0] != rank:
        what = f"rank {a.shape[0]} (shape {list(a.shape)}), the config says {rank}"
        raise Refused(weights, what, tensor=a.name)
    ones = (1,) * (len(b.shape) - 2)
    grouped = bool(ones) and b.shape[1] < rank and rank % b.shape[1] == 0
    what = f"(out, {rank}{', 1' * len(ones)})"
    what += "; LoRA on a convolution with groups isn't carried" if grouped else ""
    _expect(b.shape[1:] == (rank, *ones), weights, b, what)
    out = b.shape[0]
    if magnitude is not None:
        wanted = (1, out, *ones) if ones else (out,)
        _expect(magnitude.shape == wanted, weights, magnitude, str(list(wanted)))
    if bias is not None:
        _expect(bias.shape == (out,), weights, bias, f"[{out}]")
    layout = bare or ("embedding" if embedding else "conv" if ones else "linear")
    return LowRank(a, b, scale, magnitude, bias, layout)


def _check_config(
    part: Mapping[str, Tensor], a: Tensor, b: Tensor, config: Mapping[str, Any], weights: Path
) -> None:
    """use_dora and lora_bias say which tensors a module has."""
    dora, magnitude = bool(config.get("use_dora")), part.get("magnitude")
    if dora != (magnitude is not None):
        what = (
            "use_dora is true in the config but this module has no lora_magnitude_vector"
            if dora
            else "a DoRA magnitude, but use_dora is not set: PEFT would drop it in silence"
        )
        raise Refused(weights, what, tensor=(magnitude or a).name)
    bias = part.get("bias")
    if bool(config.get("lora_bias")) != (bias is not None):
        what = f"lora_bias is {bool(config.get('lora_bias'))} in the config, which does not fit"
        raise Refused(weights, what, tensor=(bias or b).name)


def _experts(a: Tensor, b: Tensor, rank: int, scale: float, weights: Path) -> LowRank:
    """A (experts * r, in) and B (out, r * experts) as one pair an expert."""
    count = a.shape[0] // rank
    _expect(len(a.shape) == 2 and b.shape[1] == a.shape[0], weights, b, f"(out, {a.shape[0]})")
    out = b.shape[0]
    a3 = reshaped(a, count, rank, a.shape[1])
    b3 = reshaped(b, out, rank, count, axes=(2, 0, 1))
    return LowRank(a3, b3, scale, layout="experts")


def flattened(update: LowRank) -> LowRank:
    """An update of experts as PEFT's file has it: the reverse of reading."""
    experts, rank, inner = update.a.shape
    out = update.b.shape[1]
    a = reshaped(update.a, experts * rank, inner)
    b = reshaped(reshaped(update.b, experts, out, rank, axes=(1, 2, 0)), out, rank * experts)
    return replace(update, a=a, b=b, layout="linear")


def key_of(module: str, update: LowRank) -> str:
    """What PEFT calls it in patterns and targets: a bare parameter by its own name."""
    if update.layout == "weight":
        return f"{module}.weight"
    return module if update.layout in ("parameter", "experts") else _owner(module)


def nested(parameters: Iterable[str]) -> dict[str, str]:
    """``module.parameter`` -> the path in keys, with PEFT's nesting of several in one module."""
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        module, _, leaf = name.rpartition(".")
        by_module.setdefault(module, []).append(leaf)
    return {
        f"{module}.{leaf}": module + ".base_layer" * (len(leaves) - 1 - i)
        for module, leaves in by_module.items()
        for i, leaf in enumerate(sorted(leaves, key=_declared))
    }


def _declared(leaf: str) -> int:
    return _DECLARED.index(leaf) if leaf in _DECLARED else len(_DECLARED)


def _expect(fits: bool, file: Path, tensor: Tensor, expected: str) -> None:
    if not fits:
        raise Refused(file, f"shape {list(tensor.shape)}, expected {expected}", tensor=tensor.name)
