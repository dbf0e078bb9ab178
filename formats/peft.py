"""PEFT adapter folders: ``adapter_config.json`` + ``adapter_model.safetensors`` (peft 0.21.2).

Weights of modules_to_save and biases stand under their plain names, with ``.base_layer.bias`` for
targeted modules; rows of trained tokens under ``.token_adapter.trainable_tokens_delta``. All are
absolute values, never deltas. For the keys of low-rank factors see `peft_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraduct import origin
from loraduct.adapter import Adapter, BaseRef, Note, Replacement, Update
from loraduct.errors import Refused
from loraduct.formats import CONFIG, companions, peft_config
from loraduct.formats.base_name import quantization_in_name
from loraduct.formats.json_file import read_object
from loraduct.formats.options import ReadOptions
from loraduct.formats.peft_keys import PREFIX as PREFIX
from loraduct.formats.peft_keys import sorted_by_module
from loraduct.formats.peft_lora import low_rank
from loraduct.formats.peft_notes import notes_on
from loraduct.formats.peft_variants import expanded
from loraduct.formats.safetensors_file import check_floats, read_header, read_index
from loraduct.modules import block_of, kind_of_module
from loraduct.tensor import Tensor, same

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
INDEX = f"{WEIGHTS}.index.json"  # of shards, as transformers saves large adapters
_TOKENS = ["token_adapter", "trainable_tokens_delta"]
_VOCABULARY = ("embedding", "output head")


def read(folder: Path, options: ReadOptions) -> Adapter:
    """The adapter in ``folder``; every tensor is accounted for or refused by name."""
    config_file = folder / CONFIG
    config = read_object(config_file)
    if options.scale is not None:
        raise Refused(
            config_file,
            "has a scale of its own; --scale is for an old adapters.npz without a config",
        )
    if peft_config.kind_of(config, config_file) != "LORA":
        from loraduct.formats import peft_tuned

        return peft_tuned.read(folder, config, options)
    return interpreted(folder, options, *read_weights(folder, options))


def interpreted(
    folder: Path,
    options: ReadOptions,
    weights: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> Adapter:
    """The LoRA of a folder's config and of tensors under PEFT's keys."""
    config_file = folder / CONFIG
    config = read_object(config_file)
    unknown = peft_config.check(config, config_file)
    check_floats(tensors.values(), weights)
    parts, plain = sorted_by_module(tensors, weights, options.adapter)
    if not parts and not plain:
        raise Refused(weights, "holds no tensors; an adapter without weights does nothing")
    full, config, factors = expanded(parts, config, config_file)
    updates: dict[str, Update] = {
        m: replace(u, scale=u.scale * factors.get(m, 1.0))
        for m, u in low_rank(full, config, config_file, weights).items()
    }
    replaced, copies = replacements(plain, parts, config, weights)
    updates |= replaced
    record = None
    if options.restore:
        updates, record = origin.restore(updates, metadata)
    files, odd = companions.find(folder)
    notes = [Note("companion", text) for text in odd]
    notes += notes_on(config, updates, unknown, config_file)
    base, base_notes = base_of(config, metadata, options)
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
        layers=layers_of(config, updates),
        set_aside=copies,
    )


def read_weights(
    folder: Path, options: ReadOptions
) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The weights file or index, its tensors and its texts."""
    weights = options.weights or folder / WEIGHTS
    pickle, index = folder / PICKLE, folder / INDEX
    if options.weights is None and not weights.exists() and index.exists():
        return index, *read_index(index)
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


def replacements(
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
        if words[-2:] == _TOKENS:
            found[".".join(words)] = _tokens(tensor, module, config, weights)
            continue
        target = module.removesuffix(".base_layer")
        inside = module != target  # PEFT moves the bias of an adapted module into base_layer
        if leaf == "weight" and inside and kind_of_module(target) in _VOCABULARY:
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
            vocabulary = leaf == "weight" and kind_of_module(module) in _VOCABULARY
            out = (
                "if it was trained, name its module in modules_to_save, and if it is the base's own"
                " (save_embedding_layers), remove it from the file"
                if vocabulary
                else "remove it from the file"
            )
            raise Refused(
                weights,
                "is neither a LoRA factor nor in modules_to_save or bias: PEFT would silently"
                f" overwrite the base's weight with it; {out}",
                tensor=key,
            )
        if name not in found:
            found[name] = Replacement(tensor, origin_)
        elif same(tensor, found[name].weight):
            copies.append(tensor)  # bias="all" saves the biases of modules_to_save twice
        else:
            raise Refused(weights, f"is there twice, also as {found[name].weight.name}", tensor=key)
    return found, tuple(copies)


def _tokens(tensor: Tensor, module: str, config: Mapping[str, Any], weights: Path) -> Replacement:
    """Trained rows of an embedding; they replace the base's rows, whatever their name says."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        name = module.removesuffix(".token_adapter")
        indices = next((v for k, v in indices.items() if name.endswith(k)), None)
    if not isinstance(indices, list) or len(tensor.shape) != 2 or len(indices) != tensor.shape[0]:
        found = f"{len(indices)} indices" if isinstance(indices, list) else "no list of indices"
        raise Refused(
            weights,
            f"shape {list(tensor.shape)}, but trainable_token_indices in the config gives {found}"
            " for it",
            tensor=tensor.name,
        )
    return Replacement(tensor, "trained tokens")


def layers_of(config: Mapping[str, Any], updates: Mapping[str, Update]) -> int | None:
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


def base_of(
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
