"""How much of an adapter is left in a model that it was fused into, from the files alone.

A second derivation, in float64, sharing nothing with converters: what the stored weights differ by
(packed ones unpacked here, bit by bit) against dW worked out from the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from loraduct.adapter import LowRank
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.formats.coded import Code
from loraduct.formats.coreml.coded import code_in
from loraduct.formats.coreml.constexpr import is_compressed
from loraduct.formats.coreml.program import mangled
from loraduct.formats.coreml.stored import PackageBase
from loraduct.tensor import FLOATS, Tensor, as_float32

_NUMBERS = 1 << 20  # of a weight, at once


@dataclass(frozen=True)
class Survival:
    """``share`` = <dW', dW> / <dW, dW> and ``cosine`` of what changed (dW') to the update (dW).

    ``size`` is ||dW|| / ||W||; ``codes`` the share of packed codes that changed, None where none are
    compared (not packed, or in other bits). ``bits`` is what the weight is stored in now.
    """

    module: str
    share: float
    cosine: float
    size: float
    bits: int
    codes: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class Survived:
    """All modules, and all of them taken as one vector."""

    modules: tuple[Survival, ...]
    share: float
    cosine: float
    size: float
    codes: float | None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "share": self.share,
            "cosine": self.cosine,
            "size": self.size,
            "codes_changed": self.codes,
            "modules": [m.as_json() for m in self.modules],
        }


Updates = Mapping[str, Sequence[tuple[LowRank, float]]]  # parameter -> updates and their weights


def survey(before: Base, after: Base, updates: Updates) -> Survived:
    """What of ``updates`` (by the parameters of ``before``) is in ``after``. Raises Refused for
    weights that one of them does not have."""
    found, sums, codes = [], [0.0] * 4, [0, 0]
    for name, ones in updates.items():
        parts, changed, count = _inner(name, before, after, ones)
        sums = [a + b for a, b in zip(sums, parts, strict=True)]
        if changed is not None:
            codes = [codes[0] + changed, codes[1] + count]
        share, cosine, size = _figures(parts)
        bits = _Stored(after, name).bits
        found.append(
            Survival(name, share, cosine, size, bits, None if changed is None else changed / count)
        )
    return Survived(tuple(found), *_figures(sums), codes[0] / codes[1] if codes[1] else None)


def _figures(sums: Sequence[float]) -> tuple[float, float, float]:
    """share, cosine and size from <dW', dW>, ||dW||^2, ||dW'||^2, ||W||^2."""
    inner, wanted, got, weight = sums
    share = inner / wanted if wanted else 1.0
    cosine = inner / math.sqrt(wanted * got) if wanted and got else float(not wanted)
    return share, cosine, math.sqrt(wanted / weight) if weight else 0.0


def _inner(
    name: str, before: Base, after: Base, updates: Sequence[tuple[LowRank, float]]
) -> tuple[list[float], int | None, int]:
    """(the four sums of `_figures`, how many codes changed, how many numbers there are)."""
    import numpy as np

    conv = any(u.layout == "conv" for u, _ in updates)
    old, new = (_Stored(base, name, conv=conv) for base in (before, after))
    if old.shape != new.shape:
        raise Refused(after.path, f"has shape {new.shape}, the base {old.shape}", tensor=name)
    sums, changed = np.zeros(4), 0
    alike = old.packed and new.packed and old.bits == new.bits
    for (first, w, c), (_, w_new, c_new) in zip(old.rows(), new.rows(), strict=True):
        delta = _delta_rows(old, w, first, updates)
        moved = w_new - w
        sums += [np.vdot(x, y) for x, y in ((moved, delta), (delta, delta), (moved, moved), (w, w))]
        if alike:
            changed += int(np.count_nonzero(c != c_new))
    return [float(x) for x in sums], changed if alike else None, math.prod(old.shape)


class _Stored:
    """A weight as a base stores it, read as float64 rows, packed or not."""

    def __init__(self, base: Base, name: str, *, conv: bool = False) -> None:
        module = name.removesuffix(".weight")
        weight = base.weight_of(name)
        if weight is None:
            raise Refused(base.path, "has no such weight", tensor=name)
        self.weight: Tensor = weight
        self.packed = weight.stored_dtype == "U32"
        self.bits = {"F32": 32, "F16": 16, "BF16": 16}.get(weight.stored_dtype, 0)
        self.shape: tuple[int, ...] = weight.shape
        if self.packed:
            stem = weight.name.removesuffix(".weight")
            self.scales, self.biases = (base.tensors[f"{stem}.{p}"] for p in ("scales", "biases"))
            settings = base.quantization or {}
            own = settings.get(module)
            settings = own if isinstance(own, dict) else settings
            self.bits, self.group = settings["bits"], settings["group_size"]
            self.shape = (*weight.shape[:-1], weight.shape[-1] * 32 // self.bits)
        elif weight.stored_dtype not in FLOATS:
            raise Refused(base.path, f"is stored as {weight.stored_dtype}", tensor=name)
        self.code = _code(base, weight) if isinstance(base, PackageBase) else None
        if self.code is not None:
            self.packed, self.bits = True, self.code.bits
        self.width = self.shape[-1]
        if conv:  # all that makes one output
            self.width = math.prod(self.shape[1:])
        self.height = math.prod(self.shape) // self.width

    @cached_property
    def values(self) -> Any:
        """What a code stands for, float16."""
        assert self.code is not None
        return self.code.values()

    def rows(self) -> Iterator[tuple[int, Any, Any]]:
        """(first row, values (rows, width), codes or None), in order."""
        step = max(1, _NUMBERS // self.width)
        for first in range(0, self.height, step):
            yield first, *self._read(first, min(first + step, self.height))

    def _read(self, first: int, last: int) -> tuple[Any, Any]:
        import numpy as np

        if self.code is not None:
            return self.values[first:last].astype(np.float64), self.code.codes[first:last]
        if not self.packed:
            raw = _flat(self.weight, first, last, self.width)
            return as_float32(raw, self.weight.dtype).astype(np.float64), None
        words = _flat(self.weight, first, last, self.width * self.bits // 32)
        stream = np.unpackbits(
            np.ascontiguousarray(words).view(np.uint8), axis=None, bitorder="little"
        )
        powers = 1 << np.arange(self.bits)
        codes = stream.reshape(-1, self.bits) @ powers
        s, b = (
            as_float32(_flat(t, first, last, t.shape[-1]), t.dtype)
            .astype(np.float64)
            .reshape(-1, 1)
            for t in (self.scales, self.biases)
        )
        values = codes.reshape(-1, self.group) * s + b
        return values.reshape(last - first, self.width), codes


def _code(base: PackageBase, weight: Tensor) -> Code | None:
    """Of a compressed weight of a package; None for another. Raises Refused for a form of others."""
    by_name = base.ops.by_name
    op = by_name[mangled(weight.name)]
    if not is_compressed(op):
        return None
    code = code_in(base.package, op, by_name)
    if code is None:
        raise Refused(
            base.path, f"is compressed as {op.type}, which is not compared", tensor=weight.name
        )
    return code


def _flat(tensor: Tensor, first: int, last: int, width: int) -> Any:
    span = (first, last) if len(tensor.shape) == 2 else (first * width, last * width)
    return tensor.rows(*span).reshape(last - first, width)


def _delta_rows(
    stored: _Stored, w: Any, first: int, updates: Sequence[tuple[LowRank, float]]
) -> Any:
    """Those rows of what the updates change, float64."""
    import numpy as np

    total = w.copy()
    for u, weight in updates:  # each on what those before it have made, as PEFT runs them
        delta = weight * u.scale * _product(u, first, len(w))
        total += delta
        if u.magnitude is not None:
            m = u.magnitude.read().astype(np.float64).reshape(-1)
            if u.layout == "embedding":
                total *= m / _column_lengths(stored, u)
            else:
                part = m[first : first + len(w)]
                total *= (part / np.linalg.norm(w + delta, axis=1))[:, None]
    return total - w


def _product(u: LowRank, first: int, count: int) -> Any:
    """Rows of b @ a in the stored orientation."""
    import numpy as np

    a, b = u.a.read().astype(np.float64), u.b.read().astype(np.float64)
    if u.layout == "embedding":
        return np.einsum("ri,or->io", a[:, first : first + count], b)
    if u.layout == "experts":
        height = b.shape[1]
        at = np.arange(first, first + count)
        done = np.empty((count, a.shape[2]))
        for e in np.unique(at // height):
            mine = at // height == e
            done[mine] = b[e][at[mine] % height] @ a[e]
        return done
    if u.layout == "conv":
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    return b[first : first + count] @ a


def _column_lengths(stored: _Stored, u: LowRank) -> Any:
    import numpy as np

    squares = np.zeros(stored.width)
    for first, w, _ in stored.rows():
        squares += np.square(w + u.scale * _product(u, first, len(w))).sum(axis=0)
    return np.sqrt(squares)
