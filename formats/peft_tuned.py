"""Folders of PEFT's methods other than LoRA, read by the table in `peft_tuners`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter, Dense, Note, Replacement, Update
from loraduct.computed import given
from loraduct.errors import Refused
from loraduct.formats import CONFIG, companions, peft, peft_config
from loraduct.formats.base import CONV1D, Base
from loraduct.formats.options import ReadOptions
from loraduct.formats.peft_given import Given
from loraduct.formats.peft_keys import PREFIX
from loraduct.formats.peft_notes import notes_on
from loraduct.formats.peft_tuners import TUNERS, Tuner
from loraduct.tensor import FLOATS, Tensor, same

_SHARED = "base_model."
_COMMON = ("target_modules", "layers_to_transform", "modules_to_save", "exclude_modules")
# What PEFT leaves out of the file, and does not read from it, when these are false.
_SAVES = ("save_projection", "save_indices", "save_precomputed_indices")
Parts = dict[str, dict[str, Tensor]]


def read(folder: Path, config: Mapping[str, Any], options: ReadOptions) -> Adapter:
    """The adapter in ``folder``; every tensor is accounted for or refused by name."""
    config_file, tuner = folder / CONFIG, TUNERS[config["peft_type"]]
    kind = f"{tuner.name} adapter (peft_type {config['peft_type']})"
    if tuner.form == "refused":
        raise Refused(config_file, f"is a {kind}, which {tuner.why}")
    peft_config.check_common(config, config_file)
    weights, tensors, metadata = peft.read_weights(folder, options)
    if options.adapter not in (None, "default"):
        raise Refused(weights, f"holds one adapter, and not {options.adapter!r}")
    for field in _SAVES:
        if config.get(field) is False:
            raise Refused(
                config_file,
                f"is a {kind}, and {field} is false: PEFT makes what is missing anew, by a seed or"
                f" from the base, and not the same everywhere; save it with {field}=True",
            )
    parts, shared, plain = _sorted(tensors, tuner, weights)
    if not parts:
        raise Refused(weights, f"holds no tensors of the {kind} that {CONFIG} says it is")
    _check_targets(_named(parts, config, config_file), config, config_file, weights)
    if tuner.form == "rows":
        _check_rows(parts, config, weights)
    updates: dict[str, Update] = {}
    aside: list[Tensor] = []
    for module, leaves in parts.items():
        g = Given(tuner.name, module, leaves, shared, config, folder, weights, modules=len(parts))
        known = _with_base(g, tuner, options.base)
        found = {g.module: known} if isinstance(known, Dense) else _updates(known, tuner)
        updates |= found
        aside += _left_over(g, tuner, found)
    _check_shared(shared, updates, tuner, weights)
    biased = {**config, "bias": _bias(config)}
    replaced, copies = peft.replacements(plain, parts, biased, weights)
    files, odd = companions.find(folder)
    notes = [Note("companion", text) for text in odd]
    notes += notes_on({k: config.get(k) for k in _COMMON}, updates, [], config_file)
    base, base_notes = peft.base_of(config, metadata, options)
    return Adapter(
        path=folder,
        weights=weights,
        format="peft",
        method="full" if tuner.form == "replacement" else "lora",
        updates=updates | replaced,
        config=config,
        base=base,
        naming="hf",
        metadata=metadata,
        companions=files,
        notes=tuple(notes + base_notes),
        technique=tuner.name,
        layers=peft.layers_of(config, updates),
        set_aside=(*aside, *copies),
    )


def _bias(config: Mapping[str, Any]) -> str:
    """Which biases were trained, in LoRA's words: other methods say ``vera_only``, ..."""
    bias = str(config.get("bias") or "none")
    return "lora_only" if bias.endswith("_only") else bias


def _updates(g: Given, tuner: Tuner) -> dict[str, Update]:
    """The module's update, and its bias's."""
    if tuner.form in ("replacement", "rows"):
        leaves = {f"{g.module}.{k.rpartition('.')[2]}": t for k, t in g.tensors.items()}
        return {name: Replacement(t, tuner.name) for name, t in leaves.items()}
    assert tuner.make is not None
    update = tuner.make(g)
    found: dict[str, Update] = {g.module: update} if update is not None else {}
    if tuner.bias is not None and g.bias is not None and (moved := tuner.bias(g)):
        found[f"{g.module}.bias"] = moved
    return found


def _sorted(
    tensors: Mapping[str, Tensor], tuner: Tuner, weights: Path
) -> tuple[Parts, dict[str, Tensor], dict[str, Tensor]]:
    """(module -> leaf -> tensor), tensors shared by all modules by name, plain parameters by key."""
    parts: Parts = {}
    shared: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        words = key.removeprefix(PREFIX).split(".")
        mark = next((i for i, w in enumerate(words) if w.startswith(tuner.marks)), None)
        if not key.startswith(PREFIX):
            name = key.removeprefix(_SHARED)
            if name == key or not name.startswith(tuner.marks):
                raise Refused(weights, f"is not a name that {tuner.name} has", tensor=key)
            shared[name] = tensor
        elif mark is None:
            plain[key] = tensor
        elif not mark:
            raise Refused(weights, f"is not a name that {tuner.name} has", tensor=key)
        else:
            parts.setdefault(".".join(words[:mark]), {})[".".join(words[mark:])] = tensor
        leaf = key.rpartition(".")[2] if mark is None else ".".join(words[mark:])
        indices = any(i in leaf or i in key for i in tuner.integers)
        if tensor.stored_dtype not in FLOATS and not indices:
            raise Refused(
                weights, f"dtype {tensor.stored_dtype}, expected {', '.join(FLOATS)}", tensor=key
            )
        if 0 in tensor.stored_shape and tuner.name != "AdaLoRA":  # which prunes ranks to nothing
            raise Refused(weights, f"shape {list(tensor.stored_shape)} holds nothing", tensor=key)
    return parts, shared, plain


def _check_shared(
    shared: Mapping[str, Tensor], updates: Mapping[str, Update], tuner: Tuner, weights: Path
) -> None:
    used = {o.name for u in updates.values() for t in u.tensors for o in t.origins}
    for tensor in shared.values():
        if tensor.name not in used:
            raise Refused(weights, f"no {tuner.name} module uses it", tensor=tensor.name)


def _named(parts: Parts, config: Mapping[str, Any], file: Path) -> list[str]:
    """Modules that the config must name: a tied head has the rows of the embedding, which it does."""
    leaf = "trainable_tokens_delta"
    targeted = peft_config.targeted(config, list(parts), file)
    rows = [
        p[leaf] for p, named in zip(parts.values(), targeted, strict=True) if leaf in p and named
    ]
    return [m for m, p in parts.items() if leaf not in p or not any(same(p[leaf], r) for r in rows)]


def _check_rows(parts: Parts, config: Mapping[str, Any], weights: Path) -> None:
    """Rows of the embedding, as many as the config has indices (tuners/trainable_tokens/layer.py)."""
    indices = config.get("token_indices")
    listed = isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices)
    for tensor in (t for leaves in parts.values() for t in leaves.values()):
        if not listed or len(tensor.shape) != 2 or tensor.shape[0] != len(indices or ()):
            found = f"{len(indices)} indices" if listed and indices else "no list of indices"
            what = f"shape {list(tensor.shape)}, but token_indices in {CONFIG} gives {found}"
            raise Refused(weights, what, tensor=tensor.name)


def _check_targets(
    modules: list[str], config: Mapping[str, Any], file: Path, weights: Path
) -> None:
    targeted = peft_config.targeted(config, modules, file)
    for module, wanted in zip(modules, targeted, strict=True):
        if not wanted:
            raise Refused(
                weights,
                f"the config's target_modules, exclude_modules or layers_to_transform in {CONFIG}"
                " leave this module out: PEFT would drop its tensors in silence",
                tensor=module,
            )


def _with_base(g: Given, tuner: Tuner, base: Base | None) -> Given | Dense:
    """With the base's weight and bias of the module; where they are needed and missing, a stand-in.

    The stand-in is an update of unknown shape, so that a folder can be looked at without its base.
    """
    bat = tuner.name == "MiSS" and g.config.get("init_weights") == "bat"
    needs = "weights" if bat else tuner.base
    if base is None or not base.has_weights:
        return _unknown(g, needs) if needs else g
    weight, shape = base.weight_of(f"{g.module}.weight"), base.shape_of(g.module)
    transposed = base.text_config.get("model_type") in CONV1D
    if weight is None or shape is None or transposed:
        if not needs:
            return g
        if transposed:
            raise g.refuse(f"{tuner.name} on transposed weights (Conv1D) isn't carried")
        found = "no weight" if weight is None else f"shape {list(weight.shape)}"
        raise g.refuse(f"the base {base.path} has {found} for {g.module}.weight, expected a matrix")
    if needs == "weights" and weight.stored_dtype not in FLOATS:
        raise g.refuse(
            f"the base {base.path} is quantised, and what {tuner.name} changes depends on its"
            " weights; give the base as it was in training, in F32, F16 or BF16"
        )
    rows, cols = shape
    bias = base.tensors.get(f"{g.module}.bias")
    return replace(g, shape=(rows, cols), weight=weight, bias=bias)


def _unknown(g: Given, needs: str) -> Dense:
    """An update that can't be made without the base: asking for its values says so."""
    what = {
        "shapes": "the file does not hold the shapes of the weights it changes",
        "weights": "what it changes depends on the base's weights",
    }[needs]

    def values() -> Any:
        kind = f"{g.method} adapter (peft_type {g.config['peft_type']})"
        raise Refused(g.folder / CONFIG, f"is a {kind}: {what}; give --base BASE, with weights")

    inputs = [*g.tensors.values(), *g.shared.values()]
    return Dense(given(f"{g.module}.delta", inputs, (0, 0), values), what)


def _left_over(g: Given, tuner: Tuner, found: Mapping[str, Update]) -> list[Tensor]:
    """Tensors of the module that its updates aren't made from; refused unless they do nothing."""
    used = {o.name for u in found.values() for t in u.tensors for o in t.origins}
    left = []
    for leaf, tensor in g.tensors.items():
        if tensor.name in used:
            continue
        pruned = not found and 0 in g.tensors["lora_A"].shape if "lora_A" in g.tensors else False
        copy = leaf in g.shared and not same(tensor, g.shared[leaf])
        if not (leaf.startswith(tuner.aside) or pruned) or copy:
            raise g.refuse(f"is not a tensor of {tuner.name} that this version knows", leaf)
        left.append(tensor)
    return left
