"""Fusing into weights that MLX has packed: unpacked, added to in float32, packed again.

A packed weight can hold only so much of an update: what is less than half a step away from where a
weight is, is rounded off. The remedies differ in how the sum is packed:

* ``none``: as ``mx.quantize`` does;
* ``rescale``: scales and biases of the groups are searched for the least squared error, the base's own
  among them: its values lie on their steps, so a small update may find none that are better;
* ``compensate``: codes are then moved by one step where that lessens the error along the inputs
  that the adapter reads (the row space of its A), at little cost in all other directions. That is
  the objective of GPTQ (arXiv 2210.17323) with A's row space, of which no data is needed, for the
  inputs' second moments, minimised greedily;
* ``bits``: the layers whose update is largest for its bytes get 8 bits, all others as ``compensate``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any

from loraduct.adapter import LowRank
from loraduct.converters.fuse_places import Placed, Update
from loraduct.converters.fuse_stream import ROWS, blocks, rounded
from loraduct.converters.mlx_quantize import BITS, GROUPS, quantize
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.formats.model_folder import Stored, copied
from loraduct.packing import packed as pack
from loraduct.packing import unpacked as unpack
from loraduct.tensor import Tensor, as_float32
from loraduct.text import printable

REMEDIES = ("none", "rescale", "compensate", "bits")
WIDE = 8  # bits of layers that get more
KEEP = 0.1  # what error in a direction that A does not read counts, against one that it reads
MOVES = 24  # steps per row, at most


@dataclass(frozen=True)
class Setting:
    """How one module is packed."""

    bits: int
    group: int


@dataclass(frozen=True)
class Module:
    """A packed module of the base, and how it is packed when it is written."""

    name: str
    weight: Tensor
    scales: Tensor
    biases: Tensor
    now: Setting
    then: Setting

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, unpacked."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.now.group)


def modules(base: Base) -> dict[str, Module]:
    """All packed modules by name. Raises Refused for packings other than MLX's integers."""
    settings = base.quantization
    if settings is None:
        return {}
    found = {}
    for name, tensor in base.tensors.items():
        module = name.removesuffix(".weight")
        if tensor.stored_dtype != "U32" or module == name:
            continue
        own = settings.get(module)
        own = own if isinstance(own, dict) else {}
        here = {**{k: settings.get(k) for k in ("bits", "group_size", "mode")}, **own}
        found[module] = _module(base, module, tensor, here)
    return found


def _module(base: Base, name: str, weight: Tensor, here: Mapping[str, Any]) -> Module:
    file = base.path / "config.json"
    mode, bits, group = here.get("mode") or "affine", here.get("bits"), here.get("group_size")
    if mode != "affine":
        what = (
            f"is packed as {printable(str(mode), 40)}; weights packed as affine can be fused into;"
        )
        raise Refused(file, f"{what} fuse into the unpacked base and pack it again", tensor=name)
    parts = [base.tensors.get(f"{name}.{part}") for part in ("scales", "biases")]
    if bits not in BITS or group not in GROUPS or None in parts:
        what = f"is not packed as MLX packs ({printable(str(bits), 9)} bits, groups of {group})"
        raise Refused(file, what, tensor=name)
    scales, biases = (p for p in parts if p is not None)
    setting = Setting(bits, group)
    wide = scales.shape[-1] * group
    fits = weight.shape == (*scales.shape[:-1], wide * bits // 32) and scales.shape == biases.shape
    if not fits or scales.dtype not in ("F16", "BF16", "F32") or scales.dtype != biases.dtype:
        what = f"shape {list(weight.shape)} does not fit scales of {list(scales.shape)}"
        raise Refused(weight.path, f"{what} at {bits} bits", tensor=name)
    return Module(name, weight, scales, biases, setting, setting)


def shapes(base: Base, held: Mapping[str, Module]) -> dict[str, tuple[int, ...]]:
    """Parameters and their shapes, unpacked."""
    inner = {f"{m}.{part}" for m in held for part in ("weight", "scales", "biases")}
    plain = {n: t.shape for n, t in base.tensors.items() if n not in inner}
    return plain | {f"{n}.weight": m.shape for n, m in held.items()}


def widened(held: Mapping[str, Module], places: Placed, room: int) -> dict[str, Module]:
    """``held`` with WIDE bits for the modules whose dW is largest for its bytes, within ``room``."""
    more = {f"{n}.weight": prod(m.shape) * (WIDE - m.now.bits) // 8 for n, m in held.items()}
    chosen = hurt(more, places, room)
    return {
        n: replace(m, then=Setting(WIDE, m.now.group)) if f"{n}.weight" in chosen else m
        for n, m in held.items()
    }


def hurt(more: Mapping[str, int], places: Placed, room: int) -> set[str]:
    """The parameters to get more bits: largest ||dW||^2 for its bytes first, within ``room``.

    ``more``: by parameter the bytes that they cost; those without an update, or that cost nothing, get
    none.
    """
    gains = [
        (size_of(places.updates[n]) / cost, cost, n)
        for n, cost in more.items()
        if n in places.updates and cost > 0 and not _idle(places.updates[n])
    ]
    done = set()
    for _, cost, name in sorted(gains, key=lambda g: (-g[0], g[2])):
        if cost <= room:
            done.add(name)
            room -= cost
    return done


def size_of(updates: Sequence[Update]) -> float:
    """||dW||^2 of the low-rank parts, from the Gram matrices of their factors."""
    total = 0.0
    for u, weight in updates:
        a, b = u.a.read(), u.b.read()
        rank = u.rank
        pairs = zip(a, b, strict=True) if u.layout == "experts" else [(a, b)]
        for x, y in pairs:
            x, y = x.reshape(rank, -1), y.reshape(-1, rank)
            total += float(((x @ x.T) * (y.T @ y)).sum()) * (u.scale * weight) ** 2
    return total


def _idle(updates: Sequence[Update]) -> bool:
    """Whether all of them are zero: to pack the weight again would only add noise."""
    factors = ((u.a.read(), u.b.read()) for u, w in updates if u.scale * w)
    lengths = any(u.magnitude is not None for u, _ in updates)
    return not lengths and not any(a.any() and b.any() for a, b in factors)


def stored(m: Module, places: Placed, remedy: str) -> dict[str, Stored]:
    """The three tensors of a module with the updates in it."""
    dtype, then = m.scales.dtype, m.then
    shape = (*m.shape[:-1], m.shape[-1] * then.bits // 32)
    groups = (*m.shape[:-1], m.shape[-1] // then.group)

    weight = f"{m.name}.weight"

    def of(part: int) -> Any:
        def pieces() -> Iterator[Any]:
            if weight not in places.rows and _idle(places.updates.get(weight, [])):
                yield from copied((m.weight, m.scales, m.biases)[part]).pieces()
            else:
                yield from (piece[part] for piece in _packed(m, _Places(places), remedy))

        return pieces

    return {
        weight: Stored("U32", shape, of(0)),
        f"{m.name}.scales": Stored(dtype, groups, of(1)),
        f"{m.name}.biases": Stored(dtype, groups, of(2)),
    }


class _Places:
    """Compared by identity, so that `_packed` can remember by it."""

    def __init__(self, places: Placed) -> None:
        self.it = places

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Places) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


@lru_cache(maxsize=2)  # the three tensors of a module are written one after the other
def _packed(m: Module, places: _Places, remedy: str) -> list[tuple[Any, Any, Any]]:
    """(words, scales, biases) of all blocks of rows."""
    updates = places.it.updates.get(f"{m.name}.weight", [])
    rows = places.it.rows.get(f"{m.name}.weight")
    kept = remedy == "compensate" or (remedy == "bits" and m.now == m.then)
    read = directions(updates) if kept else None
    done, at = [], 0
    for block in blocks(partial(read_blocks, m), updates, rows):
        width = m.scales.shape[-1]
        s, b = (rows_of(t, at, at + len(block), width) for t in (m.scales, m.biases))
        if read is not None:
            rounded(
                block, m.scales.dtype, m.name, m.weight
            )  # steps that stay would hide what is beyond
            done.append(_compensated(s, b, block, read, m))
        elif remedy == "rescale":
            done.append(_rescaled(s, b, block, m))
        else:
            done.append(_anew(block, m, "mlx"))
        at += len(block)
    return done


def _anew(block: Any, m: Module, mode: str) -> tuple[Any, Any, Any]:
    """(words, scales, biases) of other steps."""
    made = quantize(block, m.then.bits, m.then.group, mode=mode, name=m.name)
    s, b = (rounded(x, m.scales.dtype, m.name, m.weight) for x in (made.scales, made.biases))
    return made.weight, s, b


def _rescaled(s: Any, b: Any, block: Any, m: Module) -> tuple[Any, Any, Any]:
    """(words, scales, biases): each group on the base's own steps, on those that are searched, or on
    MLX's, whichever errs least as they are stored."""
    import numpy as np

    codes: Any = np.zeros(block.shape, np.float32)
    scales, biases, least = s, b, np.inf
    for steps in ((s, b), *(_anew(block, m, mode)[1:] for mode in ("optimal", "mlx"))):
        found, _, error = _nearest(*steps, block, m)
        total = np.square(error).reshape(*s.shape, -1).sum(2, dtype=np.float64)
        less = total < least
        codes = np.where(np.repeat(less, m.now.group, axis=1), found, codes)
        scales, biases = (
            np.where(less, x, y) for x, y in zip(steps, (scales, biases), strict=True)
        )
        least = np.minimum(total, least)
    return _words(codes, m), scales, biases


def _wide(part: Any, m: Module) -> Any:
    """Scales or biases (rows, in), float32."""
    import numpy as np

    return np.repeat(as_float32(part, m.scales.dtype), m.now.group, axis=1)


def _nearest(s: Any, b: Any, block: Any, m: Module) -> tuple[Any, Any, Any]:
    """(codes as float32, steps, errors) of a block on the base's own steps."""
    import numpy as np

    step, low = _wide(s, m), _wide(b, m)
    divisor = np.where(step == 0, np.float32(1), step)
    codes = np.clip(np.rint((block - low) / divisor), 0, (1 << m.now.bits) - 1)
    return codes, step, codes * step + low - block


def _words(codes: Any, m: Module) -> Any:
    import numpy as np

    return pack(codes.astype(np.uint8), m.now.bits).view("<u4").reshape(len(codes), -1)


def read_blocks(m: Module) -> Iterator[tuple[int, Any]]:
    """(first row, float32 rows) of the weight as packed: scale * code + bias, nothing rounded."""
    import numpy as np

    width = m.shape[-1]
    height = prod(m.shape) // width
    step = max(1, ROWS // width)
    words, groups = m.weight.shape[-1], m.scales.shape[-1]
    for start in range(0, height, step):
        stop = min(start + step, height)
        raw = rows_of(m.weight, start, stop, words)
        codes = unpack(np.ascontiguousarray(raw).view(np.uint8), m.now.bits, (stop - start) * width)
        s, b = (
            as_float32(rows_of(t, start, stop, groups), t.dtype).reshape(-1, 1)
            for t in (m.scales, m.biases)
        )
        wide = codes.reshape(-1, m.now.group) * s
        wide += b
        yield start, wide.reshape(stop - start, width)


def rows_of(tensor: Tensor, start: int, stop: int, width: int) -> Any:
    """Rows of a tensor seen as a matrix of ``width`` columns, in raw storage."""
    span = (start, stop) if len(tensor.shape) == 2 else (start * width, stop * width)
    return tensor.rows(*span).reshape(stop - start, width)


def directions(updates: Sequence[Update]) -> Any:
    """An orthonormal basis (in, r) of what all updates read of the input; None for experts."""
    import numpy as np

    read = [_reads(u) for u, _ in updates if u.layout in ("linear", "weight", "embedding")]
    if not read or len(read) < len(updates):
        return None
    return np.linalg.qr(np.concatenate(read).astype(np.float64).T)[0].astype(np.float32)


def _reads(u: LowRank) -> Any:
    return u.b.read().T if u.layout == "embedding" else u.a.read()


def _compensated(s: Any, b: Any, block: Any, read: Any, m: Module) -> tuple[Any, Any, Any]:
    """(words, scales, biases): the base's own steps, on which its weights lie already, and codes
    moved by single steps while that lessens ||E V||^2 + KEEP ||E||^2, row by row.

    E is the error (rows, in) of what is packed, V the basis ``read``. The best step of each row is
    taken at once; a row is done when none helps.
    """
    import numpy as np

    top = (1 << m.now.bits) - 1
    codes, step, error = _nearest(s, b, block, m)
    along = error @ read
    weight = (np.einsum("ij,ij->i", read, read) + np.float32(KEEP)) * step * step
    alive = np.arange(len(block))
    for _ in range(MOVES):
        pull = along[alive] @ read.T
        pull += np.float32(KEEP) * error[alive]
        pull *= step[alive]
        there = codes[alive]
        pull[((pull > 0) & (there <= 0)) | ((pull < 0) & (there >= top))] = 0
        at = (2 * np.abs(pull) - weight[alive]).argmax(axis=1)
        each = np.arange(len(alive))
        good = 2 * np.abs(pull[each, at]) > weight[alive, at]
        alive, at, move = alive[good], at[good], -np.sign(pull[each, at])[good]
        if not len(alive):
            break
        codes[alive, at] += move
        moved = move * step[alive, at]
        error[alive, at] += moved
        along[alive] += moved[:, None] * read[at]
    return _words(codes, m), s, b
