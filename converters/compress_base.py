"""A base model's folder with fewer bits: packed as MLX packs, or palettized and expanded again.

Packed folders are what mlx-lm loads: ``weight``, ``scales`` and ``biases`` of every linear layer and
of the embedding, and a ``quantization`` in the config that says the width of each. Nothing is renamed,
so only architectures whose names are one in both libraries are packed; others are refused by name.
Expanded folders are for evaluation: transformers' own, with the values that tables would give.

Weights are read, packed and written some rows at a time (expanded ones: one tensor at a time).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from loraduct.architectures import table
from loraduct.converters import bits, compress_expanded, mlx_quantize
from loraduct.converters.base_report import Outcome
from loraduct.converters.compress_loss import DAMPED, Lazily, Loss, best, damped, measured
from loraduct.converters.compress_plan import squared
from loraduct.converters.compress_unpack import decompress
from loraduct.converters.compress_wanted import Wanted
from loraduct.converters.fuse_folder import check_base
from loraduct.converters.lut import THREADS
from loraduct.errors import Refused
from loraduct.files import staged_folder
from loraduct.formats import base as base_folder
from loraduct.formats import model_folder
from loraduct.formats.base import HEADS, Base
from loraduct.formats.model_folder import Stored, copied
from loraduct.modules import pattern_of
from loraduct.tensor import BITS, FLOATS, Tensor, as_float32
from loraduct.text import printable, several

__all__ = ["compress", "decompress"]

GROUP = 64  # mlx-lm's own default
_ROWS = 1 << 20  # numbers packed at once
_SAMPLE = 1 << 14  # numbers of each weight by which widths are compared
_PROBED = 4  # bits to which weights are changed to see what that does to the predictions
_SLACK = 4096  # bytes of headers and config that a size leaves room for, beside what was counted


def compress(target: Path, output: Path | None, wanted: Wanted) -> Outcome:
    """Write the base ``target`` packed for mlx-lm, or expanded, to ``output`` (None: only plan it)."""
    _check_wanted(target, wanted)
    base = base_folder.read(target)
    if output is not None:
        model_folder.check_target(output, [base.path], wanted.force)
    check_base(base)
    if base.quantization is not None:
        raise Refused(base.path / "config.json", "is packed already; decompress it first")
    made, outcome = (compress_expanded.planned if wanted.expanded else _packed)(base, wanted)
    outcome.output = output
    if output is not None:
        tensors, config = made
        with staged_folder(output) as stage:
            outcome.files = model_folder.write(base, tensors, config, model_folder.SHARD, stage)
        outcome.notes += model_folder.left(base)
    return outcome


def _check_wanted(target: Path, wanted: Wanted) -> None:
    if wanted.quantize is None:
        for option, asked in wanted.of_integers.items():
            if asked:
                raise Refused(target, f"is a base: {option} goes with --quantize int8 or int4")
    if (wanted.quantize or "").startswith("mlx"):
        for option, asked in wanted.of_integers.items():
            if asked:
                what = "is packed by MLX in blocks, each with a scale and a bias (so: asymmetric)"
                raise Refused(target, f"{what}; {option} is for --quantize int8 or int4")
    odd = {
        **wanted.of_tables,
        "--adapter-bits": wanted.adapter_bits,
        "--per-channel-scale": wanted.per_channel_scale,
        "--quantize mlx... with --expanded": wanted.expanded
        and (wanted.quantize or "").startswith("mlx"),
        "--palettize": wanted.palettize and not wanted.expanded,
        "--quantize int8 or int4": (wanted.quantize or "").startswith("int")
        and not wanted.expanded,
    }
    for option, given in odd.items():
        if given:
            raise Refused(
                target, f"is a base: {option} is for packages; --quantize mlx4 packs it for mlx-lm,"
                " --palettize with --expanded writes it with what tables would give",
            )  # fmt: skip


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.stored_nbytes for t in tensors.values())


def _packed(base: Base, wanted: Wanted) -> tuple[tuple[dict[str, Stored], dict[str, Any]], Outcome]:
    """What is written for mlx-lm, and what is said of it."""
    group = wanted.group_size or GROUP
    if group not in mlx_quantize.GROUPS:
        known = ", ".join(map(str, mlx_quantize.GROUPS))
        raise Refused(base.path, f"--group-size {group}: MLX packs groups of {known}")
    mode = "mlx" if wanted.plain else "optimal"
    held, kept = _modules(base, group, wanted)
    how = _How(group, mode, _importance(held, wanted))
    widths, predicted = _widths(base, held, kept, how, wanted)
    errors: dict[str, float] = {}
    tensors: dict[str, Stored] = {}
    for name, tensor in base.tensors.items():
        module = name.removesuffix(".weight")
        if module in widths and module != name:
            tensors |= _Packing(module, tensor, widths[module], how, errors).stored()
        else:
            tensors[name] = copied(tensor)
    said = _quantization(widths, group)
    config = {**base.config, "quantization": said, "quantization_config": said}
    inner = sum(tensors[f"{m}.{p}"].nbytes for m in held for p in ("weight", "scales", "biases"))
    outcome = Outcome(
        base.path, None, f"MLX, groups of {group}, {'plain' if wanted.plain else 'optimal'} scales",
        dict(widths), _bytes(base.tensors), sum(t.nbytes for t in tensors.values()),
        sum(math.prod(t.shape) for t in held.values()), inner, kept, errors,
        weighted=len(how.counts), predicted=predicted,
    )  # fmt: skip
    return (tensors, config), outcome


@dataclass(frozen=True)
class _How:
    """How weights are packed, whatever their widths. ``counts``: by module, what squared errors count,
    per input channel, where it is known."""

    group: int
    mode: str
    counts: Mapping[str, Any]

    def packed(self, module: str, rows: Any, tensor: Tensor, width: int) -> mlx_quantize.Packed:
        """Some rows of a module's weight, as they are stored."""
        return mlx_quantize.quantize(
            rows, width, self.group, mode=self.mode, bf16=tensor.dtype == "BF16",
            importance=self.counts.get(module), threads=THREADS, name=tensor.name,
        )  # fmt: skip

    def lost(self, module: str, rows: Any, tensor: Tensor, width: int) -> tuple[Any, float]:
        """(what is read back of the rows, the squared error that this makes, as it counts)."""
        import numpy as np

        made = mlx_quantize.dequantize(self.packed(module, rows, tensor, width)).astype(np.float32)
        return made, squared(made - as_float32(rows, tensor.dtype), self.counts.get(module))


def _importance(held: Mapping[str, Tensor], wanted: Wanted) -> dict[str, Any]:
    known = wanted.calibration.moments if wanted.calibration else {}
    names = {m: f"{m}.weight" for m in held}
    return {
        m: known[n] for m, n in names.items() if n in known and known[n].shape == held[m].shape[1:]
    }


def _modules(base: Base, group: int, wanted: Wanted) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(weights to be packed by module, why the others are not). Raises Refused by architecture."""
    known = table().get(base.architecture)
    file = base.path / "config.json"
    differ = [] if known is None else [
        r.hf for r in known.by_hf.values() if r.how != "same" or r.mlx != (r.hf,)
    ]  # fmt: skip
    if known is None or differ or known.blocked:
        why = f"names that differ in mlx-lm ({several([*differ, *known.blocked])})" if known else (
            "no verified names in mlx-lm")  # fmt: skip
        raise Refused(
            file, f"is a {printable(base.model_type, 60)} model, which has {why}: convert it with"
            " mlx_lm.convert -q",
        )  # fmt: skip
    found: dict[str, Tensor] = {}
    kept: dict[str, str] = {}
    for name, tensor in base.tensors.items():
        module = name.removesuffix(".weight")
        idle = base.tied is not False and module.endswith(HEADS)
        reasons = {
            "no linear layer or embedding": module == name or pattern_of(module) not in known.equal,
            "a head that is tied": idle,
            "left out on request": wanted.left_out([name]) is not None,
            f"groups of {group} don't divide its rows": len(tensor.shape) != 2
            or tensor.shape[1] % group != 0,
        }
        left = next((reason for reason, so in reasons.items() if so), None)
        if left is not None:
            kept[name] = left
            continue
        if tensor.stored_dtype not in FLOATS:
            raise Refused(tensor.path, f"is {tensor.stored_dtype}, expected floats", tensor=name)
        found[module] = tensor
    if not found:
        raise Refused(base.path, wanted.none_left("weight that can be packed"))
    return found, kept


def _quantization(widths: Mapping[str, int], group: int) -> dict[str, Any]:
    """mlx-lm's settings: the commonest width for all, and the modules with another."""
    usual = Counter(widths.values()).most_common(1)[0][0]
    own = {m: {"group_size": group, "bits": w} for m, w in widths.items() if w != usual}
    return {"group_size": group, "bits": usual, "mode": "affine", **own}


def _nbytes(tensor: Tensor, width: int, group: int) -> int:
    """Of the packed weight, scales and biases."""
    count = math.prod(tensor.shape)
    return count * width // 8 + 2 * (count // group) * BITS[tensor.dtype] // 8


def _widths(
    base: Base, held: Mapping[str, Tensor], kept: Mapping[str, str], how: _How, wanted: Wanted
) -> tuple[dict[str, int], bool]:
    """(bits of each module, whether they are by measured losses): one width, or the plan of the least
    error.

    Errors are estimated on evenly spread rows, and count by what the predictions lose (`_sensitivities`);
    where that is not known, relative to the weight's mean square: layers stand behind norms, so what a
    layer's size is says little of what its errors do.
    """
    if wanted.quantize:
        return dict.fromkeys(held, int(wanted.quantize.removeprefix("mlx"))), False
    count = {m: math.prod(t.shape) for m, t in held.items()}
    sizes = {w: sum(_nbytes(t, w, how.group) for t in held.values()) for w in mlx_quantize.BITS}
    fixed = sum(base.tensors[n].stored_nbytes for n in kept) + _SLACK + 400 * len(held)
    whole = bits.size_of(count, wanted.bits_per_weight or 0)
    room = whole if wanted.size is None else wanted.size - fixed
    if (least := min(sizes.values())) > room:
        raise Refused(base.path, wanted.unmet(least, fixed, len(held), sum(count.values())))
    loss = wanted.calibration.loss if wanted.calibration else None
    errors: dict[str, dict[int, float]] = {}
    relative: dict[str, float] = {}
    for module, tensor in held.items():
        rows = sample(tensor)
        of_all = count[module] / rows.size
        square = squared(as_float32(rows, tensor.dtype), how.counts.get(module)) or 1.0
        relative[module] = rows.size / square
        errors[module] = {
            w: how.lost(module, rows, tensor, w)[1] * of_all for w in mlx_quantize.BITS
        }
    choices = {
        m: [bits.Choice(w, _nbytes(held[m], w, how.group), e) for w, e in of.items()]
        for m, of in errors.items()
    }
    share = _sensitivities(held, how, loss) if loss else {}

    def planned(power: float) -> dict[str, int]:
        counts = damped(share, relative, power) if share else relative
        return {m: int(w) for m, w in bits.plan(choices, room, importance=counts).widths.items()}

    if not (loss and share):
        return planned(0.0), False
    alike = [dict.fromkeys(held, w) for w, size in sizes.items() if size <= room][-1:]
    shown = {m: t for m, t in held.items() if m in share}
    return _best([*map(planned, DAMPED), *alike], shown, how, loss), True


def _best(
    plans: Sequence[dict[str, int]], held: Mapping[str, Tensor], how: _How, loss: Loss
) -> dict[str, int]:
    """The plan by which the predictions lose least. What is packed for one is kept for the others."""

    @cache
    def packed(module: str, width: int) -> mlx_quantize.Packed:
        tensor = held[module]
        return how.packed(module, tensor.rows(0, tensor.shape[0]), tensor, width)

    def changed(widths: Mapping[str, int]) -> Mapping[str, Any]:
        modules = {f"{m}.weight": m for m in held}

        def read_back(name: str) -> Any:
            module = modules[name]
            return mlx_quantize.dequantize(packed(module, widths[module])).astype("float32")

        return Lazily(list(modules), read_back)

    return best(plans, changed, loss)


def _changed(
    name: str, held: Mapping[str, Tensor], how: _How, widths: Mapping[str, int]
) -> tuple[Any, float]:
    """A whole weight as it is read back, and the error of that."""
    module = name.removesuffix(".weight")
    tensor = held[module]
    return how.lost(module, tensor.rows(0, tensor.shape[0]), tensor, widths[module])


def _sensitivities(held: Mapping[str, Tensor], how: _How, loss: Loss) -> dict[str, float]:
    """What the predictions lose per unit of each module's error, where that can be measured.

    Of weights as ``mx.quantize`` packs them, which is quick: what counts is loss over error.
    """
    plain = replace(how, mode="mlx")
    changed = partial(_changed, held=held, how=plain, widths=dict.fromkeys(held, _PROBED))
    found = measured([f"{m}.weight" for m in held], changed, loss)
    return {n.removesuffix(".weight"): share for n, share in found.items()}


def sample(tensor: Tensor) -> Any:
    """Evenly spread rows as they are stored, about _SAMPLE numbers."""
    import numpy as np

    height, width = tensor.shape
    few = max(1, min(height, _SAMPLE // width))
    starts = np.linspace(0, height - 1, few).astype(int)
    return np.concatenate([tensor.rows(int(at), int(at) + 1) for at in starts])


@dataclass
class _Packing:
    """One module being packed: the weight is computed as it is written, and what goes with it kept."""

    module: str
    tensor: Tensor
    width: int
    how: _How
    errors: dict[str, float]
    beside: dict[str, list[Any]] = field(default_factory=dict)

    def stored(self) -> dict[str, Stored]:
        """The three tensors, in the order in which they must be written."""
        high, wide = self.tensor.shape
        dtype, groups = self.tensor.dtype, (high, wide // self.how.group)
        return {
            f"{self.module}.weight": Stored("U32", (high, wide * self.width // 32), self._weight),
            f"{self.module}.scales": Stored(dtype, groups, partial(self._kept, "scales")),
            f"{self.module}.biases": Stored(dtype, groups, partial(self._kept, "biases")),
        }

    def _weight(self) -> Iterator[Any]:
        import numpy as np

        high, wide = self.tensor.shape
        step, counts = max(1, _ROWS // wide), self.how.counts.get(self.module)
        self.beside = {"scales": [], "biases": []}
        error = norm = 0.0
        for start in range(0, high, step):
            rows = self.tensor.rows(start, min(start + step, high))
            p = self.how.packed(self.module, rows, self.tensor, self.width)
            before = as_float32(rows, self.tensor.dtype)
            gap = mlx_quantize.dequantize(p).astype(np.float32) - before
            error += squared(gap, counts)
            norm += squared(before, counts)
            self.beside["scales"].append(p.scales)
            self.beside["biases"].append(p.biases)
            yield np.ascontiguousarray(p.weight)
        self.errors[self.module] = math.sqrt(error / norm) if norm else 0.0

    def _kept(self, part: str) -> Iterator[Any]:
        import numpy as np

        for block in self.beside.pop(part):
            kind = np.uint16 if block.dtype.itemsize == 2 else np.float32
            yield np.ascontiguousarray(block).view(kind)
