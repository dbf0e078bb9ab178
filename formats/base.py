"""Base model folders (transformers' or mlx-lm's): config and weights, lazily, and who they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.architectures import table, without_experts
from loraduct.errors import NotRecognised, Refused
from loraduct.formats import mlx_lists
from loraduct.formats.experts import number_of
from loraduct.formats.json_file import read_object
from loraduct.formats.safetensors_file import read_header, read_index
from loraduct.modules import block_of, kind_of_module, pattern_of
from loraduct.tensor import FLOATS, UNIT_ROUNDOFF, Tensor, as_float32
from loraduct.text import printable

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Architectures whose linear layers are transformers' Conv1D: their weights are stored (in, out).
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_KIN_TENSORS, _KIN_VALUES = 8, 32
_COPY = ".base_layer.weight"  # how PEFT saves the whole weight of an adapted embedding or head
HEADS = ("lm_head", "embed_out")  # ends of the names of heads that may be tied


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
    def architecture(self) -> str:
        """Which entry of the table of names it is: its type, or its type without experts."""
        dense = without_experts(self.model_type)
        if dense is None:
            return self.model_type
        number = number_of(self.text_config)
        if number is None:
            what = (
                "does not say how many experts it has (num_local_experts), which decides its names"
            )
            raise Refused(self.path / "config.json", what)
        return self.model_type if number else dense

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
        tied = parameter.endswith(tuple(f"{h}.weight" for h in HEADS)) and self.tied is not False
        if found is None and tied and self.embedding is not None:
            found = self.tensors[self.embedding]
        return found

    @property
    def embedding(self) -> str | None:
        """The name of the input embedding's tensor; None when it can't be told."""
        found = [
            n
            for n in self.tensors
            if n.endswith(".weight")
            and not block_of(n)
            and kind_of_module(n.removesuffix(".weight")) == "embedding"
        ]
        return found[0] if len(found) == 1 else None

    @property
    def stored_head(self) -> str | None:
        """The name of the tensor of a head of its own, if the weights have one."""
        names = tuple(f"{h}.weight" for h in HEADS)
        tensors = self.tensors if self.has_weights else {}
        return next((n for n in tensors if n.endswith(names) and not block_of(n)), None)

    def shape_of(self, module: str) -> tuple[int, ...] | None:
        """(out, in) of a linear layer's weight, unpacked if quantised; None when there is none."""
        tensor = self.weight_of(f"{module}.weight")
        if tensor is None or len(tensor.shape) != 2:
            return None
        rows, cols = tensor.shape
        if tensor.stored_dtype == "U32" and self.quantization:
            return rows, cols * 32 // self._bits(tensor.name.removesuffix(".weight"))
        return rows, cols

    def packed_bits(self, module: str) -> int | None:
        """Bits of a weight that mlx-lm has packed, None of a plain one; by mlx-lm's names.

        Without weights, the config's word for all its layers.
        """
        if self.quantization is None or self.quantization.get(module) is False:
            return None
        if self.has_weights:
            tensor = self.weight_of(f"{module}.weight")
            if tensor is None or tensor.stored_dtype != "U32":
                return None
        return self._bits(module)

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
    def sample(self) -> Any:
        """Some of the weights: eight matrices of the blocks, spread evenly over the sorted names; of
        each, 32 values from the middle row, (matrices, 32) float32.

        None when weights are packed: of the few that are not, others would be chosen than of the
        unpacked copy.
        """
        import numpy as np

        if self.quantization is not None:
            return None

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
        return np.stack(rows)

    @cached_property
    def kin(self) -> str | None:
        """The sample, each row by its largest value: copies of one base are known by it in any dtype."""
        import base64

        import numpy as np

        if self.sample is None:
            return None
        scaled = self.sample / np.maximum(np.abs(self.sample).max(axis=1, keepdims=True), 1e-30)
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
    if adapter.base.tied is not None and base.tied == (not adapter.base.tied):
        does, other = ("ties", "not tied") if base.tied else ("does not tie", "tied")
        what = f"{does} the head to the embedding, and the adapter was written for a base where it is {other}"
        found.append(Refused(base.path, f"{what}: there it would move another side"))
    if not base.has_weights:
        return found
    known = table().get(base.architecture)
    in_parts = mlx_lists.parts(adapter.low_rank)
    found += mlx_lists.misfits(adapter.low_rank, base, adapter.weights)
    plain = {
        m: u
        for m, u in adapter.low_rank.items()
        if u.layout in ("linear", "embedding") and mlx_lists.whole(m) not in in_parts
    }
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


def uncompared(adapter: Adapter, base: Base | None) -> list[Tensor]:
    """Saved copies of the base's own weights that nothing was there to compare with."""
    copies = [t for t in adapter.set_aside if t.name.endswith(_COPY)]
    return [t for t in copies if base is None or not base.has_weights or _own(t, base) is None]


def _own(copy: Tensor, base: Base) -> Tensor | None:
    """The base's weight that ``copy`` is one of; None when it has none, or a packed one."""
    name = copy.name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    own = base.weight_of(name)
    return own if own is not None and own.stored_dtype in FLOATS else None


def _differs_from_base(copy: Tensor, base: Base, file: Path) -> Refused | None:
    """Whether a saved copy of one of the base's own weights (an embedding's) has other values."""
    import numpy as np

    own = _own(copy, base)
    if own is None:
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
