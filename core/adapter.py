"""The neutral adapter model: what every format is read into and written from.

Orientation and names are PEFT's and transformers': a module is named by its live path
(``model.layers.0.self_attn.q_proj``), ``a`` is (r, in), ``b`` is (out, r) and the update of the
weight (out, in) is ``scale * b @ a``. ``scale`` is always the final multiplier: alpha/r,
alpha/sqrt(r) and patterns are resolved by the reader, once. Tensors are lazy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraduct.computed import resized
from loraduct.tensor import Tensor

# eq=False: these are never compared by value, and a generated method costs every start-up


@dataclass(frozen=True, eq=False)
class LowRank:
    """dW = scale * b @ a; with ``magnitude`` (out,) it is DoRA: W' = m * (W + dW) / ||W + dW||_row.

    ``layout`` says which axes are which:

    * ``linear``: a (r, in), b (out, r), dW (out, in);
    * ``embedding``: a (r, tokens), b (dim, r), dW (tokens, dim) = scale * (b @ a).T;
    * ``conv``: a (r, in, *kernel), b (out, r, 1, ...), dW (out, in, *kernel);
    * ``weight``: as linear, but PEFT adapts the bare weight of the module (a router's);
    * ``parameter``: the same with a parameter of another name, which ends the module's path;
    * ``experts``: a (experts, r, in), b (experts, out, r), dW (experts, out, in).

    ``bias`` (out,) is a low-rank bias as PEFT's ``lora_bias`` has it: the bias moves by
    ``scale * bias``.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    layout: str = "linear"

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.a.shape[1] if self.layout == "experts" else self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of dW, as the base's weight has it."""
        if self.layout == "embedding":
            return self.a.shape[1], self.b.shape[0]
        if self.layout == "experts":
            return self.b.shape[0], self.b.shape[1], self.a.shape[2]
        return self.b.shape[0], *self.a.shape[1:]

    def with_rank(self, rank: int) -> LowRank:
        """Padded with zeros, or cropped of zeros, to ``rank``."""
        at_a, at_b = (1, 2) if self.layout == "experts" else (0, 1)
        return replace(self, a=resized(self.a, at_a, rank), b=resized(self.b, at_b, rank))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All its tensors, a and b first."""
        return tuple(t for t in (self.a, self.b, self.magnitude, self.bias) if t is not None)


@dataclass(frozen=True, eq=False)
class Replacement:
    """A parameter of the base is replaced by ``weight``; ``origin`` says why it is in the file."""

    weight: Tensor
    origin: str = "modules_to_save"  # or "bias", "full"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one tensor."""
        return (self.weight,)


@dataclass(frozen=True, eq=False)
class Dense:
    """dW (out, in) = ``delta``: of full rank, so that a LoRA can only approximate it.

    ``note`` says what it is, for people.
    """

    delta: Tensor
    note: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of dW, as the base's weight has it."""
        return self.delta.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one tensor."""
        return (self.delta,)


Update = LowRank | Replacement | Dense


@dataclass(frozen=True, eq=False)
class BaseRef:
    """What an adapter says about the base model it was trained on."""

    name: str | None = None
    revision: str | None = None
    quantization: str | None = None  # "4-bit bitsandbytes", ...; None: none known
    quantization_known: bool = False
    kin: str | None = None  # sampled weights, see loraduct.formats.base
    tied: bool | None = None  # whether its head is tied, where the adapter's meaning hangs on it


@dataclass(frozen=True, eq=False)
class Note:
    """Something a reader found that a person should know. ``kind`` is stable, for programs."""

    kind: str
    text: str


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter as read from a folder.

    ``updates`` maps a module (LowRank) or a parameter (Replacement) to what happens to it, in
    file order. ``config`` is the folder's own configuration, field by field. ``naming`` says
    whose names the modules have. ``origin`` is what loraduct recorded when it wrote the file, if
    it still holds; ``metadata`` are the file's other texts.
    """

    path: Path
    weights: Path
    format: str
    method: str  # "lora", "dora", "full"
    updates: Mapping[str, Update]
    config: Mapping[str, Any]
    base: BaseRef = BaseRef()
    naming: str = "hf"
    metadata: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any] | None = None
    companions: tuple[Path, ...] = ()
    notes: tuple[Note, ...] = ()
    technique: str | None = None  # PEFT's method when it isn't LoRA: "LoHa"
    layers: int | None = None  # blocks of the base, when known
    model_type: str | None = None  # the base's, when it was given
    base_modules: frozenset[str] = frozenset()  # linear modules of the base, when known
    container: str | None = None  # "packed": the file holds the format's tensors compressed
    name: str | None = None  # which of a package's adapters it is
    set_aside: tuple[Tensor, ...] = ()  # copies of other tensors, without an effect of their own

    @property
    def low_rank(self) -> dict[str, LowRank]:
        """The low-rank updates by module."""
        return {m: u for m, u in self.updates.items() if isinstance(u, LowRank)}

    @property
    def dense(self) -> dict[str, Dense]:
        """The updates of full rank by module."""
        return {m: u for m, u in self.updates.items() if isinstance(u, Dense)}

    @property
    def adapted(self) -> set[str]:
        """The modules whose weight is updated: all but the replaced parameters."""
        return {m for m, u in self.updates.items() if not isinstance(u, Replacement)}

    @property
    def replacements(self) -> dict[str, Replacement]:
        """The replaced parameters."""
        return {m: u for m, u in self.updates.items() if isinstance(u, Replacement)}

    def tensors(self) -> Iterator[Tensor]:
        """All stored tensors, each once, in the order of the updates; copies last."""
        held = [t for u in self.updates.values() for t in u.tensors]
        stored = [o for t in (*held, *self.set_aside) for o in t.origins]
        yield from {o.name: o for o in stored}.values()

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max((u.rank for u in self.low_rank.values()), default=0)


def kind_of(adapter: Adapter) -> str:
    """The method in words: ``rsLoRA with rank patterns``."""
    if adapter.technique is not None:
        return adapter.technique
    if adapter.method == "full":
        return "full fine-tune (replaced weights)"
    name = {"lora": "LoRA", "dora": "DoRA"}[adapter.method]
    if adapter.config.get("use_rslora"):
        name = "rsLoRA" if name == "LoRA" else "rsDoRA"
    if adapter.config.get("kasa_config") is not None:
        name = "KaSA"
    if len({u.rank for u in adapter.low_rank.values()}) > 1:
        name += ", ranks per module"
    elif len({u.scale for u in adapter.low_rank.values()}) > 1:
        name += ", scales per module"
    return name
