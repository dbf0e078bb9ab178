"""PEFT adapter folders: ``adapter_config.json`` + ``adapter_model.safetensors`` (peft 0.21.2).

Key names (measured): ``base_model.model.`` + module + ``.lora_A.weight`` (r, in),
``.lora_B.weight`` (out, r), ``.lora_magnitude_vector`` (out,) for DoRA, ``.lora_B.bias`` for
lora_bias; raw dumps carry the adapter's name before ``.weight``. Weights of modules_to_save and
biases stand under their plain names, with ``.base_layer.bias`` for targeted modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraduct import origin
from loraduct.adapter import Adapter, BaseRef, LowRank, Note, Replacement, Update
from loraduct.architectures import block_of, kind_of_module
from loraduct.errors import Refused
from loraduct.formats import CONFIG, companions, peft_config
from loraduct.formats.base import quantization_in_name
from loraduct.formats.json_file import read_object
from loraduct.formats.options import ReadOptions
from loraduct.formats.peft_notes import notes_on
from loraduct.formats.safetensors_file import check_floats, read_header
from loraduct.tensor import Tensor
from loraduct.text import printable, several

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_MARKS = ("lora_A", "lora_B", "lora_magnitude_vector")
# Marks of other methods inside a key, to refuse them by name.
_OTHER_MARKS = {
    "lora_embedding_A": "LoRA on an embedding",
    "lora_embedding_B": "LoRA on an embedding",
    "lora_E": "AdaLoRA",
    "lora_diag": "KaSA",
    "token_adapter": "trainable tokens",
    "hada_w1_a": "LoHa",
    "hada_w1_b": "LoHa",
    "hada_w2_a": "LoHa",
    "hada_w2_b": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w2": "LoKr",
    "lokr_w1_a": "LoKr",
    "lokr_w2_a": "LoKr",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "vera_A": "VeRA",
    "vera_B": "VeRA",
    "ia3_l": "IA3",
    "oft_R": "OFT",
    "oft_r": "OFT",
    "boft_R": "BOFT",
    "hra_u": "HRA",
    "fourierft_spectrum": "FourierFT",
    "prompt_embeddings": "prompt tuning",
}


def read(folder: Path, options: ReadOptions) -> Adapter:
    """The adapter in ``folder``; every tensor is accounted for or refused by name."""
    config_file = folder / CONFIG
    config = read_object(config_file)
    if options.scale is not None:
        raise Refused(
            config_file,
            "has a scale of its own; --scale is for an old adapters.npz without a config",
        )
    unknown = peft_config.check(config, config_file)
    weights, tensors, metadata = _weights(folder, options)
    check_floats(tensors.values(), weights)
    parts, plain = _sorted_by_module(tensors, weights, options.adapter)
    if not parts and not plain:
        raise Refused(weights, "holds no tensors; an adapter without weights does nothing")
    updates: dict[str, Update] = dict(_low_rank(parts, config, config_file, weights))
    replaced, copies = _replacements(plain, parts, config, weights)
    updates |= replaced
    record = None
    if options.restore:
        updates, record = origin.restore(updates, metadata)
    files, odd = companions.find(folder)
    notes = [Note("companion", text) for text in odd]
    notes += notes_on(config, updates, unknown, config_file)
    base, base_notes = _base(config, metadata, options)
    return Adapter(
        path=folder,
        weights=weights,
        format="peft",
        method="dora" if config.get("use_dora") else "lora",
        updates=updates,
        config=config,
        base=base,
        naming="hf",
        metadata=metadata,
        origin=record,
        companions=files,
        notes=tuple(notes + base_notes),
        layers=_layers(config, updates),
        set_aside=copies,
    )


def _weights(folder: Path, options: ReadOptions) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    weights = options.weights or folder / WEIGHTS
    pickle = folder / PICKLE
    if weights.exists() or weights.is_symlink() or not pickle.exists():
        return weights, *read_header(weights)
    if not options.allow_pickle:
        raise Refused(
            pickle,
            "is a pickle, which can run code when opened; save it as safetensors, or read it with"
            " --allow-pickle (in a child process, weights only)",
        )
    from loraduct.formats import pickled

    return pickle, pickled.read(pickle), {}


def _sorted_by_module(
    tensors: Mapping[str, Tensor], file: Path, chosen: str | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module -> part -> tensor) of the low-rank tensors, and the plain parameters by name."""
    low_rank: list[tuple[str, str, str | None, Tensor]] = []
    plain: list[tuple[str, str | None, Tensor]] = []
    for key, tensor in tensors.items():
        words = _words(key, file)
        mark = next((i for i, w in enumerate(words) if w in _MARKS), None)
        if mark is not None:
            low_rank.append((*_part(words, mark, file, key), tensor))
        elif "modules_to_save" in words[:-2]:  # a raw dump: module.modules_to_save.NAME.weight
            plain.append((key, words[words.index("modules_to_save") + 1], tensor))
        else:
            plain.append((key, None, tensor))
    name = _choose([n for *_, n, _ in low_rank if n] + [n for _, n, _ in plain if n], chosen, file)
    parts: dict[str, dict[str, Tensor]] = {}
    for module, part, own, tensor in low_rank:
        if own not in (None, name):
            continue
        slot = parts.setdefault(module, {})
        if part in slot:
            raise Refused(
                file,
                f"is there twice, also as {printable(slot[part].name)}; PEFT takes either",
                tensor=tensor.name,
            )
        slot[part] = tensor
    return parts, {key: tensor for key, own, tensor in plain if own in (None, name)}


def _words(key: str, file: Path) -> list[str]:
    """The parts of a key behind PEFT's prefix; keys of other methods are refused by name."""
    if not key.startswith(PREFIX):
        mlx = ".lora_a" in key or ".lora_b" in key
        raise Refused(
            file,
            f"key does not begin with {PREFIX!r}: "
            + ("these are MLX names" if mlx else "PEFT would silently load none of it")
            + "; save it with PEFT's save_pretrained",
            tensor=key,
        )
    words = key[len(PREFIX) :].split(".")
    if other := next((w for w in words if w in _OTHER_MARKS), None):
        raise Refused(
            file, f"is of {_OTHER_MARKS[other]}, which this version doesn't carry", tensor=key
        )
    return words


def _choose(names: list[str], chosen: str | None, file: Path) -> str | None:
    """Which adapter of a file is meant, by the names inside its keys."""
    known = list(dict.fromkeys(names))
    if chosen is None and len(known) > 1:
        raise Refused(
            file, f"holds several adapters ({several(known)}); choose one with --adapter NAME"
        )
    if chosen is not None and chosen not in (known or ["default"]):
        raise Refused(
            file,
            f"holds no adapter {printable(chosen, 80)!r}, only {several(known or ['default'])}",
        )
    return chosen or (known[0] if known else None)


def _part(words: list[str], mark: int, file: Path, key: str) -> tuple[str, str, str | None]:
    """(module, part, adapter's name or None) of a low-rank key."""
    module, what, tail = ".".join(words[:mark]), words[mark], words[mark + 1 :]
    vector = what == "lora_magnitude_vector"
    leaf = "weight" if vector else None
    if tail and tail[-1] in ("weight", "bias"):
        leaf, tail = tail[-1], tail[:-1]
    allowed = {"lora_A": ("weight",), "lora_B": ("weight", "bias")}.get(what, ("weight",))
    if leaf not in allowed or len(tail) > 1 or not module:
        raise Refused(file, "is not a name that PEFT's LoRA has", tensor=key)
    part = {"lora_A": "a", "lora_B": "b" if leaf == "weight" else "bias"}.get(what, "magnitude")
    return module, part, tail[0] if tail else None


def _low_rank(
    parts: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    config_file: Path,
    weights: Path,
) -> dict[str, LowRank]:
    """The low-rank updates, their shapes checked against each other and the config."""
    modules = list(parts)
    scales = peft_config.scales(config, modules, config_file)
    for module, wanted in zip(
        modules, peft_config.targeted(config, modules, config_file), strict=True
    ):
        if not wanted:
            raise Refused(
                weights,
                f"the config's target_modules, exclude_modules or layers_to_transform in"
                f" {CONFIG} leave this module out: PEFT would drop its tensors in silence",
                tensor=module,
            )
    found = {}
    for module, part in parts.items():
        for name, mark in (("a", "lora_A"), ("b", "lora_B")):
            if name not in part:
                other = next(iter(part.values())).name
                raise Refused(
                    weights, f"has no {mark} to go with it; the adapter is incomplete", tensor=other
                )
        rank, scale = scales[module]
        a, b, magnitude, bias = part["a"], part["b"], part.get("magnitude"), part.get("bias")
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise Refused(
                weights,
                f"shape {list(a.shape)}: LoRA on a convolution or experts, which this version doesn't carry",
                tensor=a.name,
            )
        if a.shape[0] != rank:
            raise Refused(
                weights,
                f"rank {a.shape[0]} (shape {list(a.shape)}), the config says {rank}",
                tensor=a.name,
            )
        _expect(b.shape[1] == rank, weights, b, f"(out, {rank})")
        dora = bool(config.get("use_dora"))
        if dora != (magnitude is not None):
            there = magnitude or a
            what = (
                "use_dora is true in the config but this module has no lora_magnitude_vector"
                if dora
                else "a DoRA magnitude, but use_dora is not set: PEFT would drop it in silence"
            )
            raise Refused(weights, what, tensor=there.name)
        if magnitude is not None:
            _expect(magnitude.shape == (b.shape[0],), weights, magnitude, f"[{b.shape[0]}]")
        if bool(config.get("lora_bias")) != (bias is not None):
            there = bias or b
            raise Refused(
                weights,
                f"lora_bias is {bool(config.get('lora_bias'))} in the config, which does not fit",
                tensor=there.name,
            )
        if bias is not None:
            _expect(bias.shape == (b.shape[0],), weights, bias, f"[{b.shape[0]}]")
        found[module] = LowRank(a, b, scale, magnitude, bias)
    return found


def _expect(fits: bool, file: Path, tensor: Tensor, expected: str) -> None:
    if not fits:
        raise Refused(file, f"shape {list(tensor.shape)}, expected {expected}", tensor=tensor.name)


def _replacements(
    plain: Mapping[str, Tensor],
    parts: Mapping[str, Any],
    config: Mapping[str, Any],
    weights: Path,
) -> tuple[dict[str, Replacement], tuple[Tensor, ...]]:
    """Plain parameters: biases and modules_to_save, and the copies that say nothing of their own.

    Anything else would overwrite the base, and is refused.
    """
    saved = config.get("modules_to_save") or []
    bias = config.get("bias", "none")
    found: dict[str, Replacement] = {}
    copies: list[Tensor] = []
    for key, tensor in plain.items():
        words = key[len(PREFIX) :].split(".")
        if "modules_to_save" in words:  # a raw dump: module.modules_to_save[.name].weight
            at = words.index("modules_to_save")
            words = words[:at] + words[-1:]
        module, _, leaf = ".".join(words).rpartition(".")
        target = module.removesuffix(".base_layer")
        inside = module != target  # PEFT moves the bias of an adapted module into base_layer
        if leaf == "weight" and inside and kind_of_module(target) in ("embedding", "output head"):
            copies.append(tensor)  # save_embedding_layers="auto" writes it; see `differences`
            continue
        if "original_module" in words and bias == "all" and leaf == "bias":
            copies.append(tensor)  # the bias that modules_to_save has put aside
            continue
        allowed = bias == "all" or (bias == "lora_only" and inside)
        if leaf == "bias" and allowed and inside == (target in parts):
            name, origin_ = f"{target}.bias", "bias"
        elif module == target and peft_config.saves(saved, module):
            name, origin_ = f"{module}.{leaf}", "modules_to_save"
        else:
            raise Refused(
                weights,
                "is neither a LoRA factor nor in modules_to_save or bias: PEFT would silently"
                " overwrite the base's weight with it; remove it from the file",
                tensor=key,
            )
        if name not in found:
            found[name] = Replacement(tensor, origin_)
        elif _same(tensor, found[name].weight):
            copies.append(tensor)  # bias="all" saves the biases of modules_to_save twice
        else:
            raise Refused(weights, f"is there twice, also as {found[name].weight.name}", tensor=key)
    return found, tuple(copies)


def _same(one: Tensor, two: Tensor) -> bool:
    return (one.dtype, one.shape) == (two.dtype, two.shape) and all(
        a.tobytes() == b.tobytes() for a, b in zip(one.chunks(), two.chunks(), strict=True)
    )


def _layers(config: Mapping[str, Any], updates: Mapping[str, Update]) -> int | None:
    """Number of blocks of the base, when the config implies it: names that match in every block."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("exclude_modules"):
        return None
    if config.get("layers_to_transform") not in (None, []):
        return None
    # attention is in every block; a feed-forward may be in some only (dense layers before experts)
    modules = [m for m in updates if kind_of_module(m).startswith("attention")]
    blocks = [b for m in modules if (b := block_of(m))]
    suffixes = all(any(b[2] == t or b[2].endswith(f".{t}") for t in targets) for b in blocks)
    return max(b[1] for b in blocks) + 1 if blocks and suffixes else None


def _base(
    config: Mapping[str, Any], metadata: Mapping[str, str], options: ReadOptions
) -> tuple[BaseRef, list[Note]]:
    """What is known of the base, and a note when its precision is not."""
    name = config.get("base_model_name_or_path")
    written = origin.parse(metadata) or {}
    trained = options.trained_on or written.get("trained_on")
    quantization = None if trained in (None, "none") else trained
    if trained is None:
        quantization = quantization_in_name(name or "")
    known = trained is not None or quantization is not None
    ref = BaseRef(name, config.get("revision"), quantization, known, written.get("kin"))
    if known:
        return ref, []
    return ref, [
        Note(
            "base-precision-unknown",
            "the file does not say whether the base was quantised in training (QLoRA); say so with"
            " --trained-on, e.g. --trained-on nf4 or none",
        )
    ]
