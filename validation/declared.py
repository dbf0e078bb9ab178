"""What is stored in few bits, and how far that may move what is compared.

A package's record names the way its parts were compressed (``lut4``: tables of 16 entries), a packed
adapter its file's; tables and scales are then the yardstick. Of a base's weights, and of factors in
whichever of their forms, each value must be the nearest one that its table has; dW may then be off by what
rounding to these tables does. Values without that declaration get no allowance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from loraduct.adapter import Adapter, LowRank
from loraduct.formats.base import Base
from loraduct.formats.coded import Code, Decoded, recoded
from loraduct.tensor import Tensor, as_float32
from loraduct.validation import runtimes
from loraduct.validation.checks import Check
from loraduct.validation.forms import candidates

BASE, ADAPTER = "base", "adapter"
# of the rounding that is expected; tables are fitted to tails, of which gaps say less (measured: 0.7 to
# 1.3 times the expected, at 2 to 8 bits)
FACTOR = 2.0
_ROUNDED = 3 * 2.0**-11  # of an entry: it, its scale and the boundary between two were rounded
_SMALLEST = 2.0**-24  # and FLOAT16 has no finer steps
MATRICES = ("linear", "embedding", "weight", "parameter")  # layouts of factors that are matrices
_LOOKED_UP = 1 << 17  # more values of one table: every float16 is looked up once instead


def declared(adapter: Adapter) -> dict[str, Any]:
    """``base``, ``adapter`` -> how it was compressed; empty for all but packages that say so."""
    if adapter.format != "coreml":
        return {}
    return dict(_record(adapter).get("compression") or {})


def check(adapter: Adapter, base: Base) -> list[Check]:
    """A package's compressed weights against the base's, and whether its record tells of all."""
    if adapter.format != "coreml":
        return []
    import numpy as np

    from loraduct.formats.coreml.stored import PackageBase

    found = _record(adapter)
    said = found.get("compression") or {}
    rows = found["adapters"][adapter.name]["modules"]
    for module, u in adapter.low_rank.items():
        coded = next(filter(None, map(_code, (u.a, u.b))), None)
        if coded and not rows[module].get("sums") and not _covers(said.get(ADAPTER), coded):
            return [Check("codes", "failed", f"is {coded.way}; {_UNSAID}", module)]
    count = 0
    held = PackageBase(runtimes.package_at(adapter.path), found)
    for name, code in held.codes():
        weight = base.weight_of(name) if base.has_weights else None
        if not _covers(said.get(BASE), code):
            return [Check("codes", "failed", f"is {code.way}; {_UNSAID}", name)]
        if weight is None or weight.shape != code.codes.shape:
            continue
        count += 1
        source = as_float32(weight.raw(), weight.dtype).astype(np.float16)
        if what := _misplaced(code, source):
            return [Check("codes", "failed", what, name)]
    if not count:
        return []
    what = f"{count} compressed weights of the base: each value is its table's nearest"
    return [Check("codes", "passed", what)]


def _record(adapter: Adapter) -> dict[str, Any]:
    from loraduct.formats.coreml import record

    return record.read(runtimes.package_at(adapter.path))


_UNSAID = "the package's record does not say that it was compressed so"


def _covers(said: Any, code: Code) -> bool:
    """Whether a declaration is about a code: ``lut`` of any width, ``lut4``, ``lut4, groups of 16``."""
    return isinstance(said, str) and said.partition(",")[0] in (code.kind, code.way)


def tolerance(*updates: LowRank) -> float:
    """How far dW may be off (relative, Frobenius) by the rounding to the tables that its factors have.

    Rounding errors Ea and Eb of mean 0 make b a wrong by sum_i |b_i|^2 |Ea_i|^2 + |a_i|^2 |Eb_i|^2
    (squared, expected; i: ranks). A value is taken to lie anywhere in its entry's cell.
    """
    import numpy as np

    worst = 0.0
    for u in updates:
        codes = _code(u.a), _code(u.b)
        if not any(codes) or u.layout not in MATRICES:
            continue
        a, b = (t.read(finite=False).astype(np.float64) for t in (u.a, u.b))
        lost = [
            np.zeros(u.rank) if c is None else t.factor**2 * _spread(c).sum(axis)
            for c, t, axis in zip(codes, (u.a, u.b), (1, 0), strict=True)
        ]
        square = float((b**2).sum(0) @ lost[0] + (a**2).sum(1) @ lost[1])
        norm = float(((b.T @ b) * (a @ a.T)).sum())
        worst = max(worst, FACTOR * math.sqrt(square / norm) if norm > 0 else 0.0)
    return worst


def misplaced(first: LowRank, second: LowRank) -> str | None:
    """What is wrong with the codes of ``second``'s factors: those of ``first``, in one of its forms.

    In one and the same form every value of both factors must be its table's nearest; a scale that
    differs must be made up for by b. None where it is so, and where nothing is in few bits.
    """
    import numpy as np

    codes = _code(second.a), _code(second.b)
    if not any(codes) or second.layout not in MATRICES or first.shape != second.shape:
        return None
    if _pieced(second.a) or _pieced(second.b):
        return None  # put together of several, whose tables are not known any more
    a, b = (t.read(finite=False).astype(np.float64) for t in (first.a, first.b))
    found = None
    for _, one, two in candidates(a, b, second.a.read(finite=False)):
        two = two * (first.scale / second.scale) if second.scale else two
        wrong = _wrong(codes, (second.a, second.b), (one, two))
        if wrong is None:
            return None
        found = found or wrong  # of the plain form
    return found


def _wrong(
    codes: Sequence[Code | None], held: Sequence[Tensor], wanted: Sequence[Any]
) -> str | None:
    """What is wrong with a pair's codes if ``wanted`` was compressed; a plain factor is not looked at."""
    for leaf, code, tensor, values in zip(("lora_A", "lora_B"), codes, held, wanted, strict=True):
        if code is None:
            continue
        if what := _misplaced(code if tensor.factor == 1 else code.times(tensor.factor), values):
            return f"{leaf}: {what}"
    return None


def _pieced(tensor: Tensor) -> bool:
    return tensor.make is not None and not isinstance(tensor.make, Decoded)


def in_few_bits(u: LowRank) -> bool:
    """Whether a factor of it is."""
    return any(_code(t) is not None for t in (u.a, u.b))


def compressed(adapter: Adapter, base: Base) -> dict[str, Tensor]:
    """The compressed weights of a package's base, decoded, by the names of the base's own tensors."""
    from loraduct.formats.coreml.stored import PackageBase

    held = PackageBase(runtimes.package_at(adapter.path), _record(adapter))
    found = {}
    for name, tensor in held.tensors.items():
        own = base.weight_of(name) if tensor.make is not None else None
        if own is not None and own.shape == tensor.shape:
            found[own.name] = tensor
    return found


def inverse_norms(adapter: Adapter, module: str) -> Any:
    """1 / ||W + dW|| of a package's DoRA, (out,) float64; None where there is none."""
    from loraduct.formats.coreml.stored import parts_of, tensor_of

    package = runtimes.package_at(adapter.path)
    parts, _ = parts_of(package, _record(adapter), adapter.name or "")
    blob = parts[module].inverse if module in parts else None
    return None if blob is None else tensor_of(package, blob, module).read().astype("float64")


def _code(tensor: Tensor) -> Code | None:
    """The code of a factor in few bits, by whatever it was made of; its factor aside."""
    if isinstance(tensor.make, Decoded):
        code = tensor.make.code()
        return code.T if tensor.transposed else code
    inner = any(isinstance(t.make, Decoded) for t in tensor.inputs)
    return recoded(replace(tensor, cast=None, factor=1.0)) if inner else None


def _spread(code: Code) -> Any:
    """The expected square of the rounding error of each value, (rows, columns)."""
    import numpy as np

    if code.kind == "int":
        return (code.numbers.astype(np.float64) ** 2 / 12).reshape(-1)[
            np.broadcast_to(code.blocks(), code.codes.shape)
        ]
    tables = code.numbers.astype(np.float64)
    order = np.argsort(tables, -1)
    sorted_ = np.take_along_axis(tables, order, -1)
    gaps = np.diff(sorted_, axis=-1) / 2
    down = np.concatenate((gaps[..., :1], gaps), -1)
    up = np.concatenate((gaps, gaps[..., -1:]), -1)
    width = down + up
    cells = np.divide(down**3 + up**3, 3 * width, out=np.zeros_like(width), where=width > 0)
    squares = np.empty_like(cells)
    np.put_along_axis(squares, order, cells, -1)
    return replace(code, numbers=squares).values()


def _misplaced(code: Code, source: Any) -> str | None:
    """Which values are not the nearest that their tables (or scales) have, in words.

    ``source``: the matrix, float16 or wider.
    """
    import numpy as np

    wrong, at = 0, None
    for rows, columns, entries in _blocks(code):
        part = source[rows, columns]
        given = entries[code.codes[rows, columns]]
        best = _nearest(entries, part)
        slack = _ROUNDED * (np.abs(given) + np.abs(best)) + _SMALLEST
        off = np.abs(part - given) > np.abs(part - best) + slack
        if off.any():
            wrong += int(off.sum())
            if at is None:
                i, j = np.argwhere(off)[0]
                at = rows.start + int(i), columns.start + int(j)
    if at is None:
        return None
    return (
        f"{wrong} of {source.size} values, [{at[0]}, {at[1]}] the first, are not the nearest of"
        f" {code.way}'s tables: damaged, or another module's"
    )


def _blocks(code: Code) -> Iterator[tuple[slice, slice, Any]]:
    """(rows, columns, the values that codes stand for there, float32) of each block."""
    import numpy as np

    (high, wide), (down, across) = code.codes.shape, code.numbers.shape[:2]
    steps = np.arange(1 << code.bits, dtype=np.float32) - (1 << (code.bits - 1))
    for i in range(down):
        for j in range(across):
            entries = code.numbers[i, j].astype(np.float32)
            rows = slice(i * (high // down), (i + 1) * (high // down))
            columns = slice(j * (wide // across), (j + 1) * (wide // across))
            yield rows, columns, entries if code.kind == "lut" else entries * steps


def _nearest(entries: Any, values: Any) -> Any:
    """The nearest entry of each value (float16), float32."""
    import numpy as np

    ordered = np.sort(entries)
    middles = (ordered[1:] + ordered[:-1]) / 2
    if values.dtype != np.float16 or values.size < _LOOKED_UP:
        return ordered[np.searchsorted(middles, values.astype(np.float32))]
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    return ordered[np.searchsorted(middles, every)][values.view(np.uint16)]


def explains(source: list[Any], compressed: list[Any]) -> float:
    """||difference|| / ||logits less their mean||: at 1 a base says nothing of what it said."""
    import numpy as np

    off = size = 0.0
    for x, y in zip(source, compressed, strict=True):
        wide = x.astype(np.float64)
        off += float(((wide - y) ** 2).sum())
        size += float(((wide - wide.mean(-1, keepdims=True)) ** 2).sum())
    return math.sqrt(off / size) if size else math.inf
