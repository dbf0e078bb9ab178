"""One side with the numbers that the other one stores: rounded, or compressed, as those are.

What rounding does to a number is judged where it happens: a compressed value must be its table's nearest
(`declared`), dW must be within bounds module by module (`delta`), a package's base must be the base's
(`base_model`). What becomes of it further on has no bound of its own: a network may make much of little.
So where something was rounded, the logits are asked what rounding can't explain: whether one runtime
computes from these very numbers what the other does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraduct.adapter import Adapter, LowRank, Replacement, Update
from loraduct.files import write_file
from loraduct.formats import CONFIG, json_file, mlx, packed_adapter, peft
from loraduct.formats import base as base_folder
from loraduct.formats.base import Base
from loraduct.formats.coded import Decoded
from loraduct.formats.safetensors_file import read_header, serialized
from loraduct.tensor import FLOATS, UNIT_ROUNDOFF, Tensor, is_power_of_two
from loraduct.validation import declared

HALF = 2.0**-24  # FLOAT16's finest step
NORM = 2.0**-10  # of 1 / ||W + dW||, which is rounded to FLOAT16, of rows of W that are, too
Pairs = Mapping[
    str, tuple[Update, Update]
]  # by common names: of the side that is restated, and of the other


@dataclass(frozen=True)
class Restated:
    """``adapter`` on ``base``, in files of their own. ``modules``: whose factors are the other side's.

    ``wrong``: modules of a DoRA whose stored norms belong to no weight that is known.
    """

    base: Base
    adapter: Adapter
    modules: frozenset[str]
    wrong: tuple[str, ...] = ()


@contextmanager
def restated(own: Adapter, other: Adapter, base: Base, pairs: Pairs) -> Iterator[Restated | None]:
    """``own`` and its base with the numbers of ``other``; None where its file can't be written again.

    Of a package the base's values are taken, too: its compressed weights, and FLOAT16 of the rest.
    Takes as much room in the folder for temporary files as the base's weights.
    """
    stored = _tensors(own)
    if stored is None:
        yield None
        return
    with TemporaryDirectory(prefix="loraduct-") as name:
        room = Path(name)
        changed = _base(base, other, room / base.path.name) if other.format == "coreml" else base
        work = _Work(own, other, base, changed)
        for module, (one, two) in pairs.items():
            if isinstance(one, LowRank) and isinstance(two, LowRank):
                work.take(module, one, two)
            elif isinstance(one, Replacement) and isinstance(two, Replacement):
                work.replace(module, one.weight, two.weight)
        folder = room / "adapter"
        folder.mkdir()
        file = folder / (peft.WEIGHTS if own.format == "peft" else mlx.WEIGHTS)
        texts = {"format": "pt" if own.format == "peft" else "mlx"}
        write_file(file, serialized(stored | work.tensors, texts, {}))
        write_file(folder / CONFIG, [json_file.dump(own.config)])
        adapter = replace(own, path=folder, weights=file, container=None)
        with _tables_in_half(own) if other.format == "coreml" else nullcontext():
            yield Restated(changed, adapter, frozenset(work.done), tuple(work.wrong))


@contextmanager
def _tables_in_half(adapter: Adapter) -> Iterator[None]:
    """transformers' models with the sines and cosines of positions that packages have: in FLOAT16.

    mlx-lm computes them within its kernels, where they can't be rounded.
    """
    if adapter.format != "peft":
        yield
        return
    from torch import nn

    def rounded(module: Any, _: Any, output: Any) -> Any:
        if not type(module).__name__.endswith("RotaryEmbedding") or not isinstance(output, tuple):
            return None
        return tuple(t.half().to(t.dtype) for t in output)

    hook = nn.modules.module.register_module_forward_hook(rounded)
    try:
        yield
    finally:
        hook.remove()


def _tensors(adapter: Adapter) -> dict[str, Tensor] | None:
    """All of an adapter's file, by name; None of a package, which no stock library loads."""
    if adapter.format not in ("peft", "mlx"):
        return None
    if adapter.container == "packed":
        return packed_adapter.unpacked(adapter.weights)[1]
    if adapter.weights.suffix == ".safetensors":
        return read_header(adapter.weights)[0]
    return {
        t.name: replace(t, transposed=False, factor=1.0, size=None, cast=None)
        for t in adapter.tensors()
    }


@dataclass
class _Work:
    """Tensors of ``own``'s file by name, module by module."""

    own: Adapter
    other: Adapter
    base: Base
    changed: Base
    tensors: dict[str, Tensor] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def take(self, module: str, own: LowRank, other: LowRank) -> None:
        """Its factors as the other side has them, where those are its own, rounded or in few bits."""
        if not own.scale or own.layout != other.layout:
            return
        coded, ratio = declared.in_few_bits(other), other.scale / own.scale
        found: dict[str, Tensor] = {}
        factors = []
        for axis, mine, theirs in ((0, own.a, other.a), (1, own.b, other.b)):
            values = _read(theirs) * (ratio if axis else 1)
            if own.layout in declared.MATRICES:
                values = _fitted(values, own.rank, axis)
            fits = values is not None and values.shape == mine.shape
            if not fits or not (coded or _rounded(mine, values, theirs, ratio)):
                return
            if not (one := _stored(mine, values)):
                return
            found |= one
            factors.append(values)
        if own.magnitude is not None and other.magnitude is not None:
            if not (one := self._magnitude(module, own, other, factors)):
                return
            found |= one
        self.tensors |= found
        self.done.append(module)

    def replace(self, parameter: str, own: Tensor, other: Tensor) -> None:
        """A replaced parameter as the other side has it, where that is the own one, rounded."""
        values = _read(other)
        same = values.shape == own.shape and _rounded(own, values, other)
        if same and (found := _stored(own, values)):
            self.tensors |= found
            self.done.append(parameter)

    def _magnitude(
        self, module: str, own: LowRank, other: LowRank, factors: list[Any]
    ) -> dict[str, Tensor]:
        """m, so that PEFT's m / ||W + dW|| is what the other side has.

        A package stores 1 / ||W + dW||: of the weight that it had when the adapter was put in.
        """
        import numpy as np

        assert own.magnitude is not None
        assert other.magnitude is not None
        m = other.magnitude.read(finite=False).astype(np.float64)
        if not _rounded(own.magnitude, m, other.magnitude):
            return {}
        if self.other.format == "coreml":
            inverse = declared.inverse_norms(self.other, module)
            low = own.scale * (factors[1] @ factors[0])
            now = _norms(self.changed, module, low, own.layout)
            mine = own.scale * (_read(own.b) @ _read(own.a))
            before = (
                _norms(base, module, dw, own.layout)
                for base in (self.base, self.changed)
                for dw in (mine, low)
            )
            if inverse is None or now is None:
                return {}
            if not any(n is not None and _near(n * inverse) for n in before):
                self.wrong.append(module)
                return {}
            m = m * inverse * now
        return _stored(own.magnitude, m)


def _near(values: Any) -> bool:
    return bool((abs(values - 1) <= NORM).all())


def _read(tensor: Tensor) -> Any:
    return tensor.read(finite=False).astype("float64")


def _norms(base: Base, module: str, low: Any, layout: str) -> Any:
    """||W + dW|| of every output; None without the weight."""
    import numpy as np

    weight = base.weight_of(f"{module}.weight")
    low = low.T if layout == "embedding" else low
    if weight is None or weight.dtype not in FLOATS or weight.shape != low.shape:
        return None
    return np.linalg.norm(_read(weight) + low, axis=0 if layout == "embedding" else 1)


def _fitted(values: Any, rank: int, axis: int) -> Any:
    """A factor with ``rank`` ranks; None where others than zeros would be lost."""
    import numpy as np

    values = np.moveaxis(values, axis, 0)
    if values[rank:].any():
        return None
    missing = max(0, rank - len(values))
    return np.moveaxis(np.pad(values[:rank], ((0, missing), (0, 0))), 0, axis)


def _rounded(own: Tensor, values: Any, theirs: Tensor, ratio: float = 1.0) -> bool:
    """Whether each value is the own one, rounded: itself, and again times the scales' ratio.

    By the dtype that it is stored in: float32 has bfloat16's values exactly.
    """
    import numpy as np

    mine = _read(own)
    unit = UNIT_ROUNDOFF.get(theirs.stored_dtype, 0.0)
    step = HALF * max(1.0, abs(ratio))
    return bool((abs(values - mine) <= 2 * unit * np.abs(mine) + step).all())


def _stored(tensor: Tensor, values: Any) -> dict[str, Tensor]:
    """The one tensor of the file that ``tensor`` is, so that it reads as ``values``; {} if several are."""
    import numpy as np

    plain = tensor.make is None or isinstance(tensor.make, Decoded)
    if not plain or tensor.size is not None or not is_power_of_two(tensor.factor):
        return {}
    values = np.ascontiguousarray((values.T if tensor.transposed else values) / tensor.factor)
    return {
        tensor.name: Tensor(tensor.name, "F32", tensor.stored_shape, data=values.astype(np.float32))
    }


def _base(base: Base, package: Adapter, folder: Path) -> Base:
    """The base with the package's compressed weights, and FLOAT16 of all others, in ``folder``."""
    if base.quantization is not None:
        return base
    folder.mkdir()
    compressed = declared.compressed(package, base)
    for path in base.path.iterdir():
        if path.is_dir():
            continue
        if not path.match("model*.safetensors"):
            (folder / path.name).symlink_to(path.absolute())
            continue
        tensors = {
            name: _in_half(tensor, compressed.get(name))
            for name, tensor in read_header(path)[0].items()
        }
        write_file(folder / path.name, serialized(tensors, {"format": "pt"}, {}))
    return base_folder.read(folder)


def _in_half(tensor: Tensor, compressed: Tensor | None) -> Tensor:
    if compressed is not None:
        return replace(compressed, name=tensor.name)
    return tensor.to("F16") if tensor.dtype in FLOATS else tensor
