"""mlx-lm adapter folders: ``adapter_config.json`` + ``adapters.safetensors`` (mlx-lm 0.32.2).

Tensors (measured): module + ``.lora_a`` (in, r), ``.lora_b`` (r, out), and ``.m`` (out,) for
DoRA; y = Wx + scale * (x @ a) @ b with one ``scale`` and one ``rank`` for all modules. ``full``
holds whole parameters. Older: ``adapters.npz`` without a config and with scale 20.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraduct import origin
from loraduct.adapter import Adapter, BaseRef, LowRank, Note, Replacement, Update
from loraduct.computed import reshaped
from loraduct.errors import Refused
from loraduct.formats import CONFIG, companions, mlx_keys, mlx_lists
from loraduct.formats.base_name import quantization_in_name
from loraduct.formats.json_file import read_object
from loraduct.formats.options import ReadOptions
from loraduct.formats.peft_config import MAX_RANK
from loraduct.formats.safetensors_file import check_floats, read_header
from loraduct.modules import block_of, is_lookup, kind_of_module
from loraduct.tensor import Tensor
from loraduct.text import number, printable, ranges, several

WEIGHTS, OLD_WEIGHTS = "adapters.safetensors", "adapters.npz"
OLD_SCALE = 20.0  # the fixed scale of mlx-examples/lora, which wrote no config
_LEAVES = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}


def read(folder: Path, options: ReadOptions) -> Adapter:
    """The adapter in ``folder``; every tensor is accounted for or refused by name."""
    return interpreted(folder, options, *read_weights(folder, options))


def interpreted(
    folder: Path,
    options: ReadOptions,
    weights: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> Adapter:
    """The adapter of a folder's config and of tensors under MLX's names."""
    check_floats(tensors.values(), weights)
    if not tensors:
        raise Refused(weights, "holds no tensors; an adapter without weights does nothing")
    config, notes = _config(folder, weights, tensors, options)
    method = config.get("fine_tune_type", "lora")
    updates: dict[str, Update] = {}
    record = None
    if method == "full":
        updates |= {name: Replacement(t, "full") for name, t in tensors.items()}
    else:
        updates |= _low_rank(tensors, config, weights)
        notes += _selection_notes(
            config, list(dict.fromkeys(map(mlx_lists.whole, updates))), folder
        )
        notes += mlx_lists.notes(updates)
        if options.restore:
            updates, record = origin.restore(updates, metadata)
    files, odd = companions.find(folder)
    notes += [Note("companion", text) for text in odd]
    base, base_notes = _base(config, metadata, options)
    return Adapter(
        path=folder,
        weights=weights,
        format="mlx",
        method=method,
        updates=updates,
        config=config,
        base=base,
        naming="mlx",
        metadata=metadata,
        origin=record,
        companions=files,
        notes=tuple(notes + base_notes),
        layers=_layers(config, updates),
    )


def read_weights(
    folder: Path, options: ReadOptions
) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The weights file, its tensors and its texts."""
    weights = options.weights or folder / WEIGHTS
    old = folder / OLD_WEIGHTS
    if (
        options.weights is None
        and not weights.exists()
        and not weights.is_symlink()
        and old.exists()
    ):
        weights = old
    if weights.suffix == ".npz":
        from loraduct.formats.npz_file import read_npz

        return weights, read_npz(weights), {}
    return weights, *read_header(weights)


def _config(
    folder: Path, weights: Path, tensors: Mapping[str, Tensor], options: ReadOptions
) -> tuple[dict[str, Any], list[Note]]:
    """The folder's config, checked; for an old .npz without one, what its tensors and defaults say."""
    file = folder / CONFIG
    if not file.exists() and not file.is_symlink() and weights.suffix == ".npz":
        scale = OLD_SCALE if options.scale is None else options.scale
        ranks = Counter(
            t.shape[-1] for n, t in tensors.items() if n.endswith(".lora_a") and t.shape
        )
        blocks = {b[1] for n in tensors if (b := block_of(n))}
        rank = ranks.most_common(1)[0][0] if ranks else 0
        what = (
            "given with --scale"
            if options.scale is not None
            else "the fixed scale of that time; another is given with --scale"
        )
        config = {
            "fine_tune_type": "lora",
            "num_layers": len(blocks),
            "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0},
        }
        return config, [
            Note("old-npz", f"{OLD_WEIGHTS} without a config: scale {number(scale)} ({what})")
        ]
    if options.scale is not None:
        raise Refused(
            file, "has a scale of its own; --scale is for an old adapters.npz without a config"
        )
    config = read_object(file)
    return config, check_config(config, file)


def check_config(config: dict[str, Any], file: Path) -> list[Note]:
    """Refuse what mlx-lm can't read, or reads as something else than it says."""
    notes = []
    method = config.get("fine_tune_type", "lora")
    if method not in ("lora", "dora", "full"):
        raise Refused(
            file,
            f"fine_tune_type is {printable(repr(method), 60)}, expected lora, dora or full"
            " (mlx-lm would take it for lora in silence)",
        )
    if "fine_tune_type" not in config:
        notes.append(
            Note("no-fine-tune-type", "fine_tune_type is absent: mlx-lm takes it for lora")
        )
    if "peft_type" in config:
        raise Refused(file, "is a PEFT config beside MLX weights; mlx-lm can't load the folder")
    if method == "full":
        return notes
    last = config.get("num_layers")
    if type(last) is not int or abs(last) > 1 << 20:
        raise Refused(file, f"num_layers is {printable(repr(last), 60)}, expected an integer")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise Refused(
            file, f"lora_parameters is {printable(repr(parameters), 60)}, expected an object"
        )
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        raise Refused(
            file,
            f"lora_parameters.rank is {printable(repr(rank), 60)}, expected an integer from 1 to {MAX_RANK}",
        )
    if scale is None and "alpha" in parameters:
        raise Refused(
            file,
            "lora_parameters has alpha but no scale; mlx-lm wants scale, which is alpha / rank",
        )
    if not isinstance(scale, int | float) or isinstance(scale, bool) or abs(scale) >= 1e9:
        raise Refused(
            file, f"lora_parameters.scale is {printable(repr(scale), 60)}, expected a number"
        )
    dropout = parameters.get("dropout", 0.0)
    if not isinstance(dropout, int | float) or isinstance(dropout, bool):
        raise Refused(file, "lora_parameters.dropout is not a number")
    keys = parameters.get("keys")
    if keys is not None and (
        not isinstance(keys, list) or not all(isinstance(k, str) for k in keys)
    ):
        raise Refused(
            file, f"lora_parameters.keys is {printable(repr(keys), 60)}, expected a list of names"
        )
    if "alpha" in parameters:
        notes.append(
            Note(
                "alpha-ignored", "lora_parameters.alpha is ignored by mlx-lm: scale is what counts"
            )
        )
    if last <= 0:
        notes.append(Note("all-layers", f"num_layers {last} means all layers in mlx-lm, not none"))
    return notes


def _low_rank(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], weights: Path
) -> dict[str, LowRank]:
    """The low-rank updates in PEFT's orientation, shapes checked against the config."""
    parameters = config["lora_parameters"]
    rank, scale = parameters["rank"], float(parameters["scale"])
    dora = config.get("fine_tune_type") == "dora"
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, leaf = mlx_lists.split(name)
        if leaf not in _LEAVES or not module:
            what = "; these are PEFT names" if ".lora_A" in name else ""
            raise Refused(
                weights,
                f"is not a tensor of an MLX LoRA or DoRA adapter{what}; mlx-lm refuses it too",
                tensor=name,
            )
        parts.setdefault(module, {})[_LEAVES[leaf]] = tensor
    found = {m: _update(m, part, rank, scale, dora, weights) for m, part in parts.items()}
    mlx_lists.check_gaps(found, weights)
    return found


def _update(
    module: str, part: Mapping[str, Tensor], rank: int, scale: float, dora: bool, weights: Path
) -> LowRank:
    """One module's update; experts have three axes, (experts, rank, in) and (experts, out, rank)."""
    for leaf, name in (("lora_a", "a"), ("lora_b", "b")):
        if name not in part:
            there = next(iter(part.values())).name
            what = f"has no {leaf} to go with it; mlx-lm would leave it without effect"
            raise Refused(weights, what, tensor=there)
    a, b, magnitude = part["a"], part["b"], part.get("magnitude")
    if len(b.shape) == 3:
        return _experts(a, b, rank, scale, weights)
    if len(a.shape) != 2 or len(b.shape) != 2:
        what = f"shape {list(a.shape)} with lora_b of {list(b.shape)}: no layout of mlx-lm"
        raise Refused(weights, what, tensor=a.name)
    if a.shape[1] != rank:
        turned = "; it looks like PEFT's orientation" if a.shape[0] == rank else ""
        what = f"shape {list(a.shape)}, expected (in, {rank}) by the config's rank{turned}"
        raise Refused(weights, what, tensor=a.name)
    if b.shape[0] != rank:
        what = f"shape {list(b.shape)}, expected ({rank}, out) by the config's rank"
        raise Refused(weights, what, tensor=b.name)
    if dora and magnitude is None:
        what = "has no DoRA magnitude m; mlx-lm would compute one from the base in silence"
        raise Refused(weights, what, tensor=a.name)
    if magnitude is not None and not dora:
        what = "is a DoRA magnitude, but fine_tune_type is not dora; mlx-lm refuses it too"
        raise Refused(weights, what, tensor=magnitude.name)
    embedding = is_lookup(module)
    if magnitude is not None and embedding:
        raise Refused(
            weights,
            "is DoRA on an embedding, whose magnitude is per token in mlx-lm and per dimension in"
            " PEFT: neither can say what the other does",
            tensor=magnitude.name,
        )
    if magnitude is not None and magnitude.shape != (b.shape[1],):
        what = f"shape {list(magnitude.shape)}, expected [{b.shape[1]}]"
        raise Refused(weights, what, tensor=magnitude.name)
    return LowRank(a.T, b.T, scale, magnitude, layout="embedding" if embedding else "linear")


def _experts(a: Tensor, b: Tensor, rank: int, scale: float, weights: Path) -> LowRank:
    """SwitchLinear. Before 2025-10-02 lora_a was (experts * rank, in), experts slowest."""
    experts = b.shape[0]
    if len(a.shape) == 2 and a.shape[0] == experts * rank:
        a = reshaped(a, experts, rank, a.shape[1])
    if len(a.shape) != 3 or a.shape[:2] != (experts, rank):
        what = f"shape {list(a.shape)}, expected ({experts}, {rank}, in) beside lora_b"
        raise Refused(weights, what, tensor=a.name)
    if b.shape[2] != rank:
        what = f"shape {list(b.shape)}, expected (experts, out, {rank}) by the config's rank"
        raise Refused(weights, what, tensor=b.name)
    return LowRank(a, b, scale, layout="experts")


def _selection_notes(config: Mapping[str, Any], modules: list[str], folder: Path) -> list[Note]:
    """Compare keys and num_layers with the tensors; refuse tensors that mlx-lm would refuse."""
    parameters = config["lora_parameters"]
    keys, last = parameters.get("keys"), config["num_layers"]
    if keys is None:
        notes = [Note("default-keys", mlx_keys.explain_defaults(modules))]
    else:
        notes = []
        for module, chosen in mlx_keys.selects(config, modules, None).items():
            if not chosen:
                raise Refused(
                    folder / CONFIG,
                    "lora_parameters.keys do not select it, so mlx-lm can't load its"
                    " tensors (a key is a path within the block, or a full path)",
                    tensor=module,
                )
        relative = {b[2] for m in modules if (b := block_of(m))}
        idle = [k for k in keys if k not in relative and k not in modules]
        if idle:
            notes.append(
                Note(
                    "keys-without-tensors",
                    f"keys name {several(idle)} but the file has no tensors for it: it has no effect",
                )
            )
    within = {b[1] for m in modules if (b := block_of(m)) and m not in (keys or ())}
    if within and 0 < last < len(within):
        raise Refused(
            folder / CONFIG,
            f"num_layers is {last}, but the file adapts {len(within)} layers"
            f" ({ranges(within)}); mlx-lm refuses it",
        )
    if within and sorted(within) != list(range(min(within), max(within) + 1)):
        notes.append(
            Note(
                "missing-modules",
                f"adapts layers {ranges(within)} only: the layers between have no tensors and stay as the base",
            )
        )
    return notes


def _layers(config: Mapping[str, Any], updates: Mapping[str, Update]) -> int | None:
    """Number of blocks of the base, when the config implies it: relative keys reach the last one."""
    if config.get("fine_tune_type") == "full":
        return None
    keys = config["lora_parameters"].get("keys")
    # attention is in every block; a feed-forward may be in some only (dense layers before experts)
    modules = [m for m in updates if kind_of_module(m).startswith("attention")]
    modules = [mlx_lists.whole(m) for m in modules]
    blocks = [b for m in modules if (b := block_of(m)) and (keys is None or b[2] in keys)]
    if len({b[0] for b in blocks}) > 1 or mlx_lists.parts(updates):
        return None  # several lists of blocks make up mlx-lm's: which is the last can't be told
    return max((b[1] for b in blocks), default=-1) + 1 or None


def _base(
    config: Mapping[str, Any], metadata: Mapping[str, str], options: ReadOptions
) -> tuple[BaseRef, list[Note]]:
    name = config.get("model")
    name = name if isinstance(name, str) else None
    written = origin.parse(metadata) or {}
    trained = options.trained_on or written.get("trained_on")
    quantization = None if trained == "none" else trained or quantization_in_name(name or "")
    known = trained is not None or quantization is not None
    kin, tied = written.get("kin"), written.get("tied")
    return BaseRef(name, None, quantization, known, kin, tied), []
