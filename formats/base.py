"""Base model folders (transformers' or mlx-lm's): config and weights, lazily, and who they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.architectures import table
from loraduct.errors import NotRecognised, Refused
from loraduct.formats.json_file import read_object
from loraduct.formats.safetensors_file import read_header, read_index
from loraduct.modules import block_of, kind_of_module, pattern_of
from loraduct.tensor import FLOATS, UNIT_ROUNDOFF, Tensor, as_float32
from loraduct.text import printable

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Architectures whose linear layers are transformers' Conv1D: their weights are stored (in, out).
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_KIN_TENSORS, _KIN_VALUES = 8, 32
_TIED_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Base:
    """A base model folder. Nothing but ``config.json`` is read until it is asked for."""

    path: Path
    config: Mapping[str, Any]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture."""
        value = self.config.get("model_type")
        if not isinstance(value, str):
            raise Refused(self.path / "config.json", "has no model_type")
        return value

    @property
    def layers(self) -> int | None:
        """Number of blocks."""
        found = [self.text_config.get(k) for k in _LAYERS]
        return next((v for v in found if type(v) is int and v > 0), None)

    @property
    def tied(self) -> bool | None:
        """Whether the head shares the embedding's weight; None when the config doesn't say."""
        value = self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        return value if isinstance(value, bool) else None

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """mlx-lm's quantization settings, if the weights are packed."""
        value = self.config.get("quantization")
        return value if isinstance(value, dict) else None

    @cached_property
    def linear_modules(self) -> frozenset[str]:
        """Modules with a matrix for a weight; none known without weights."""
        if not self.has_weights:
            return frozenset()
        return frozenset(
            n.removesuffix(".weight")
            for n, t in self.tensors.items()
            if n.endswith(".weight") and len(t.shape) == 2
        )

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds weights beside its config."""
        return any(self.path.glob("model*.safetensors"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All weights by name, lazily."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            return read_index(index)[0]
        files = sorted(self.path.glob("model*.safetensors"))
        if not files:
            raise Refused(self.path, "holds no model*.safetensors; a base with weights is expected")
        found: dict[str, Tensor] = {}
        for file in files:
            found |= read_header(file)[0]
        return found

    def weight_of(self, parameter: str) -> Tensor | None:
        """The tensor of a parameter, or None; a head that is tied has the embedding's."""
        found = self.tensors.get(parameter)
        if found is None and parameter.endswith(_TIED_HEADS) and self.tied is not False:
            embeddings = [
                t
                for n, t in self.tensors.items()
                if n.endswith(".weight")
                and not block_of(n)
                and kind_of_module(n.removesuffix(".weight")) == "embedding"
            ]
            found = embeddings[0] if len(embeddings) == 1 else None
        return found

    def shape_of(self, module: str) -> tuple[int, ...] | None:
        """(out, in) of a linear layer's weight, unpacked if quantised; None when there is none."""
        tensor = self.weight_of(f"{module}.weight")
        if tensor is None or len(tensor.shape) != 2:
            return None
        rows, cols = tensor.shape
        if tensor.stored_dtype == "U32" and self.quantization:
            return rows, cols * 32 // self._bits(tensor.name.removesuffix(".weight"))
        return rows, cols

    def _bits(self, module: str) -> int:
        """Bits of a packed weight: the module's own, or the config's."""
        settings, field = self.quantization or {}, "quantization.bits"
        if isinstance(own := settings.get(module), dict):
            settings, field = own, f"quantization.{module}.bits"
        bits = settings.get("bits", 4)
        if type(bits) is not int or not 1 <= bits <= 8:
            raise Refused(
                self.path / "config.json",
                f"{field} is {printable(repr(bits), 60)}, expected an integer from 1 to 8",
            )
        return bits

    @cached_property
    def kin(self) -> str | None:
        """A sample of the weights by which copies of one base are known, whatever their dtype.

        Eight matrices of the blocks, spread evenly over the sorted names; of each, 32 values from
        the middle row. None when the weights are packed.
        """
        import numpy as np

        names = sorted(
            n
            for n, t in self.tensors.items()
            if n.endswith(".weight")
            and len(t.shape) == 2
            and block_of(n)
            and t.stored_dtype in FLOATS
            and t.shape[1] >= _KIN_VALUES
        )
        if not names:
            return None
        chosen = [
            names[i * len(names) // _KIN_TENSORS] for i in range(min(_KIN_TENSORS, len(names)))
        ]
        rows = []
        for name in chosen:
            tensor = self.tensors[name]
            middle = tensor.shape[0] // 2
            row = as_float32(tensor.rows(middle, middle + 1, finite=False), tensor.dtype)
            rows.append(row[0, :_KIN_VALUES])
        sample = np.stack(rows)
        scaled = sample / np.maximum(np.abs(sample).max(axis=1, keepdims=True), 1e-30)
        import base64

        return base64.b64encode(scaled.astype("<f2").tobytes()).decode()


def correlation(kin: str, other: str) -> float | None:
    """Correlation of two kin samples: about 1 for copies of one base in any dtype."""
    import base64

    import numpy as np

    try:
        a, b = (np.frombuffer(base64.b64decode(k, validate=True), "<f2") for k in (kin, other))
    except ValueError:
        return None
    if a.shape != b.shape or not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.dot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def differences(adapter: Adapter, base: Base) -> list[Refused]:
    """Why ``base`` is not the adapter's: modules it lacks, shapes, or the recorded sample."""
    found: list[Refused] = []
    if adapter.config.get("layer_replication"):
        return found  # its layers are counted in a base that is yet to be made
    for module, u in adapter.low_rank.items():
        block = block_of(module)
        if block and base.layers is not None and block[1] >= base.layers:
            what = (
                f"block {block[1]}, the base {base.path} has {base.layers}: made for another base"
            )
            found.append(Refused(adapter.weights, what, tensor=u.a.name))
    if not base.has_weights:
        return found
    known = table().get(base.model_type)
    plain = {m: u for m, u in adapter.low_rank.items() if u.layout in ("linear", "embedding")}
    shapes = {m: base.shape_of(m) for m in plain}
    alike_named = any(shapes.values())  # else the base has other names, and nothing can be said
    for module, u in plain.items():
        shape, wanted = shapes[module], u.shape
        # a module that the two libraries name differently may have either name in the base
        pattern = pattern_of(module)
        twofold = (
            known is not None
            and (pattern in known.by_hf or pattern in known.by_mlx)
            and (pattern not in known.equal or pattern in known.renamed_in_files)
        )
        head = kind_of_module(module) == "output head"
        if shape is None and alike_named and not twofold and not head:
            what = f"the base {base.path} has no weight {module}.weight: made for another base"
            found.append(Refused(adapter.weights, what, tensor=u.a.name))
        if base.text_config.get("model_type") in CONV1D and shape == wanted[::-1]:
            continue
        if shape is not None and shape != wanted:
            found.append(
                Refused(
                    adapter.weights,
                    f"updates a weight of shape {list(wanted)}, the base {base.path} has"
                    f" {list(shape)}: made for another base",
                    tensor=u.a.name,
                )
            )
    found += [p for t in adapter.set_aside if (p := _differs_from_base(t, base, adapter.weights))]
    if adapter.base.kin and base.kin:
        alike = correlation(adapter.base.kin, base.kin)
        if alike is not None and alike < 0.99:
            found.append(
                Refused(
                    base.path,
                    "is not the base this adapter was converted with before (sampled weights"
                    f" correlate {alike:.3f}, expected over 0.99)",
                )
            )
    return found


def wrong_experts(adapter: Adapter, base: Base) -> list[Refused]:
    """Updates of experts whose number is not the base's."""
    experts = next((n for k in _EXPERTS if type(n := base.text_config.get(k)) is int), None)
    return [
        Refused(
            adapter.weights,
            f"has {u.shape[0]} experts, the base {base.path} has {experts}",
            tensor=u.a.name,
        )
        for u in adapter.low_rank.values()
        if u.layout == "experts" and experts is not None and u.shape[0] != experts
    ]


def _differs_from_base(copy: Tensor, base: Base, file: Path) -> Refused | None:
    """Whether a saved copy of one of the base's own weights (an embedding's) has other values."""
    import numpy as np

    name = copy.name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    own = base.weight_of(name)
    if own is None or own.stored_dtype not in FLOATS:
        return None
    bound = 2 * max(UNIT_ROUNDOFF[copy.stored_dtype], UNIT_ROUNDOFF[own.stored_dtype])
    if copy.shape == own.shape:
        step = max(1, (1 << 20) // copy.shape[-1])
        for i in range(0, copy.shape[0], step):
            j = min(i + step, copy.shape[0])
            a, b = (as_float32(t.rows(i, j, finite=False), t.dtype) for t in (copy, own))
            if not np.allclose(a, b, rtol=bound, atol=1e-6):
                break
        else:
            return None
    return Refused(
        file,
        "is a copy of the base's own weight, which PEFT loads over it, but its shape or values are"
        " not the base's: the vocabulary was resized, or it was trained; save the changed base, or"
        " leave it out by saving with save_embedding_layers=False",
        tensor=copy.name,
    )


def read(path: Path) -> Base:
    """The base model in ``path`` (a folder, or its config.json)."""
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").exists():
        raise NotRecognised(folder, "holds no config.json; a base model folder is expected")
    return Base(folder, read_object(folder / "config.json"))


def misread_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Old-style fields that are absent though the new ``rope_parameters`` hold them.

    transformers 5 writes only ``rope_parameters``; most model files of mlx-lm 0.32.2 read only
    top-level ``rope_theta``/``rope_scaling`` and fall back to their defaults without a word.
    """
    return {k: v for k, v in _old_rope(config).items() if config.get(k) in (None, {})}


def rope_conflicts(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Old-style fields that say something else than ``rope_parameters``: (old, new) by name."""
    return {
        k: (config[k], v)
        for k, v in _old_rope(config).items()
        if config.get(k) not in (None, {}) and _differs(config[k], v)
    }


def _old_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``rope_parameters`` says, in the old form."""
    found: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return found
    local = rope.get("sliding_attention")
    if isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    if isinstance(local, dict) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if rope.get("partial_rotary_factor") is not None:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return found


def _differs(old: Any, new: Any) -> bool:
    """Whether two values of a field differ; of two objects, where both have a key."""
    if isinstance(old, dict) and isinstance(new, dict):
        old = {"rope_type": old.get("type"), **old}  # transformers 4 wrote "type"
        return any(old[k] not in (None, v) for k, v in new.items() if k in old)
    return bool(old != new)
