"""Per-module comparison of two adapters' weight updates, in float64, from the files alone.

A second derivation, sharing nothing with converters: ||dW' - dW|| of low-rank updates from the
QR factors of the stacked difference; of DoRA and of replaced weights against the base's weight,
row block by row block. Within a matrix that is right as a whole one row (or column) may be wrong: each is
held against what rounding can do to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from loraduct.adapter import Dense, LowRank, Replacement, Update
from loraduct.formats.base import Base
from loraduct.modules import block_of
from loraduct.tensor import UNIT_ROUNDOFF, Tensor, as_float32
from loraduct.validation.declared import in_few_bits

# How far dW may be off by storage dtype (relative, Frobenius), and the gain from 1.
BOUNDS = {"F32": 1e-6, "F16": 1e-3, "BF16": 8e-3}
GAIN = 3e-3
EQUAL = BOUNDS["F32"]  # float32 arithmetic alone
SMALLEST = 2.0**-24  # FLOAT16's subnormal numbers
_ROWS = 1 << 21  # weight elements handled at once


@dataclass(frozen=True)
class Delta:
    """``error`` = ||dW' - dW|| / ||dW||, ``gain`` = <dW', dW> / <dW, dW>; NaN: not compared.

    ``decided`` is False where the files can't tell whether the two agree; ``note`` says why. ``lines``:
    rows and columns that are off by more than rounding can make them.
    """

    module: str
    error: float
    gain: float
    norm: float
    bound: float
    note: str = ""
    decided: bool = True
    gain_bound: float = GAIN
    rank: int | None = None  # of A's factors
    lines: int = 0

    @property
    def cosine(self) -> float:
        """Of the angle between dW and dW': error^2 = ||dW'||^2 / ||dW||^2 - 2 gain + 1."""
        size = self.error**2 + 2 * self.gain - 1
        if size > 0:
            return max(-1.0, min(1.0, self.gain / math.sqrt(size)))
        return math.nan if math.isnan(self.error) else float(self.error == 0)

    @property
    def fits(self) -> bool | None:
        """Whether both are within bounds; None where it can't be told."""
        if not self.decided:
            return None
        whole = self.error <= self.bound and abs(self.gain - 1) <= self.gain_bound
        return whole and not self.lines

    @property
    def compared(self) -> bool:
        """Whether there is a number at all."""
        return not math.isnan(self.error)

    @property
    def rounding(self) -> float:
        """The part of the error that is no change of scale: what rounding looks like."""
        return math.sqrt(max(0.0, self.error**2 - (self.gain - 1) ** 2))

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        block = block_of(self.module)
        place = {"layer": block[1] if block else None, "kind": block[2] if block else self.module}
        own = {"cosine": self.cosine, "compared": self.compared, "fits": self.fits}
        return asdict(self) | place | own


def compare(module: str, first: Update, second: Update, base: Base) -> Delta:
    """How far ``second`` is from ``first`` at one module or parameter."""
    if isinstance(first, Dense) and isinstance(second, Dense | LowRank):
        return _dense(module, first, second)
    if isinstance(first, LowRank) and isinstance(second, Dense):
        return _dense(module, first, second)
    if type(first) is not type(second):
        return Delta(module, 1.0, 0.0, 0.0, 0.0, "one replaces the parameter, the other adapts it")
    if isinstance(first, Replacement) and isinstance(second, Replacement):
        return _replaced(module, first, second, base)
    assert isinstance(first, LowRank)
    assert isinstance(second, LowRank)
    bound = _bound(first, second)
    shapes = [u.shape for u in (first, second)]
    if shapes[0] != shapes[1]:
        return Delta(module, 1.0, 0.0, 0.0, bound, f"shapes {shapes[0]} and {shapes[1]}")
    if (first.magnitude is None) != (second.magnitude is None):
        return Delta(module, 1.0, 0.0, 0.0, bound, "one is DoRA, the other is not")
    if first.magnitude is None or second.magnitude is None:
        return _plain(module, first, second, bound)
    weight = _own(base, f"{module}.weight", shapes[0])
    if weight is None:
        return _dora_by_parts(module, first, second, bound)
    return _dora(module, first, second, weight, bound)


def _bound(*updates: LowRank) -> float:
    return max(BOUNDS[t.stored_dtype] for u in updates for t in (u.a, u.b))


def _own(base: Base, parameter: str, shape: tuple[int, ...]) -> Tensor | None:
    """The base's own weight, if it is there in plain numbers."""
    weight = base.weight_of(parameter) if base.has_weights else None
    plain = weight is not None and weight.stored_dtype in BOUNDS and weight.shape == shape
    return weight if plain else None


def _array(tensor: Tensor) -> Any:
    import numpy as np

    return tensor.read(finite=False).astype(np.float64)


def _plain(module: str, first: LowRank, second: LowRank, bound: float) -> Delta:
    import numpy as np

    off2 = norm2 = inner = 0.0
    lines = _Lines()
    # in few bits every value is held against its table (`declared`), and rows have no bound
    rounded = not (in_few_bits(first) or in_few_bits(second))
    for n, ((a1, b1), (a2, b2)) in enumerate(zip(_pairs(first), _pairs(second), strict=True)):
        rows, columns = np.hstack([first.scale * b1, -second.scale * b2]), np.vstack([a1, a2]).T
        left: Any = np.linalg.qr(rows, mode="r")
        right: Any = np.linalg.qr(columns, mode="r")
        off2 += float(np.sum((left @ right.T) ** 2))
        own2 = float(np.sum((b1.T @ b1) * (a1 @ a1.T))) * first.scale**2
        norm2 += own2
        inner += float(np.sum((b1.T @ b2) * (a1 @ a2.T))) * first.scale * second.scale
        if rounded:
            sizes = [_allowed(u, a, b) for u, a, b in ((first, a1, b1), (second, a2, b2))]
            where = f" of expert {n}" if first.layout == "experts" else ""
            off = rows @ right.T, columns @ left.T
            for axis, name in enumerate(("row", "column")):
                errors = np.linalg.norm(off[axis], axis=1)
                floor = EQUAL * math.sqrt(own2 / len(errors))
                allowed = sizes[0][axis] + sizes[1][axis] + floor
                lines.add(name, errors, allowed, where=where)
    off = off2**0.5
    note = ""
    if first.bias is not None or second.bias is not None:
        biases = [
            np.zeros(1) if u.bias is None else u.scale * _array(u.bias) for u in (first, second)
        ]
        off += float(np.linalg.norm(biases[1] - biases[0]))
        note = "with lora_bias"
        share = max(BOUNDS[u.bias.stored_dtype] for u in (first, second) if u.bias is not None)
        lines.add("lora_bias", *_values(biases[0], biases[1], share, first.scale, second.scale))
    return lines.put(_delta(module, off, norm2, inner, bound, note))


def _allowed(u: LowRank, a: Any, b: Any) -> tuple[Any, Any]:
    """The most that storing a (r, in) and b (out, r) can have moved each row and column of dW by.

    Rounding moves a number by a share of itself, however far b's products with a cancel each other.
    """
    import numpy as np

    bound = _bound(u)
    low, high = (
        SMALLEST * max(1.0, abs(t.factor)) / bound if t.stored_dtype == "F16" else 0.0
        for t in (u.a, u.b)
    )
    found = []
    for one, least, other, more in ((b, high, a, low), (a.T, low, b.T, high)):
        sizes = np.linalg.norm(other, axis=1) + more * other.shape[1] ** 0.5
        found.append(bound * abs(u.scale) * ((np.abs(one) + least) @ sizes))
    return found[0], found[1]


@dataclass
class _Lines:
    """Rows and columns that are off by more than rounding explains: how many, and the worst in words."""

    count: int = 0
    worst: str = ""
    beyond: float = 0.0

    def add(self, name: str, errors: Any, allowed: Any, start: int = 0, where: str = "") -> None:
        """``errors``, ``allowed``: of each; the first is number ``start``."""
        import numpy as np

        with np.errstate(divide="ignore", invalid="ignore"):
            beyond = np.where(errors <= allowed, 0.0, errors / allowed)
        self.count += int((beyond != 0).sum())
        n = int(beyond.argmax())
        if not beyond[n] <= self.beyond:
            self.beyond = float(beyond[n])
            what = f"{errors[n]:.1e}, which rounding makes at most {allowed[n]:.1e}"
            self.worst = f"{name} {start + n}{where} is off by {what}"

    def put(self, delta: Delta) -> Delta:
        """The delta, with what was found."""
        if not self.count:
            return delta
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        note = "; ".join(filter(None, (delta.note, self.worst + more)))
        return replace(delta, lines=self.count, note=note)


def _dense(module: str, first: Dense | LowRank, second: Dense | LowRank) -> Delta:
    """Of which at least one has full rank: PEFT's IA3, OFT, ... against what was made of it.

    Storing rounds each product of a column and a row by its own size, which is more than dW's where
    they cancel (as PiSSA's do, whose factors are of the size of the base's weight).
    """
    import numpy as np

    if first.shape != second.shape:
        return Delta(module, 1.0, 0.0, 0.0, EQUAL, f"shapes {first.shape} and {second.shape}")
    deltas = []
    stored = 0.0  # the most that storing may have moved it
    room: list[Any] = [0.0, 0.0]  # of rows and columns
    for u in (first, second):
        if isinstance(u, Dense):
            deltas.append(_array(u.delta))
        elif u.magnitude is not None or u.layout != "linear":
            return Delta(
                module, 1.0, 0.0, 0.0, EQUAL, "one has full rank, the other is no plain LoRA"
            )
        else:
            a, b = _array(u.a), _array(u.b)
            sizes = np.sum(b * b, axis=0) * np.sum(a * a, axis=1)
            stored = max(stored, _bound(u) * abs(u.scale) * float(np.sum(sizes)) ** 0.5)
            deltas.append(u.scale * (b @ a))
            room = [one + more for one, more in zip(room, _allowed(u, a, b), strict=True)]
    lines = _Lines()
    for axis, name in enumerate(("row", "column")):
        errors, sizes = (
            np.linalg.norm(d, axis=1 - axis) for d in (deltas[1] - deltas[0], deltas[0])
        )
        if not any(isinstance(u, LowRank) and in_few_bits(u) for u in (first, second)):
            lines.add(name, errors, room[axis] + EQUAL * sizes.max())
    off, norm2 = float(np.linalg.norm(deltas[1] - deltas[0])), float(np.vdot(deltas[0], deltas[0]))
    inner = float(np.vdot(deltas[0], deltas[1]))
    bound = max(EQUAL, stored / norm2**0.5) if norm2 > 0 else EQUAL
    return lines.put(_delta(module, off, norm2, inner, bound, "full rank"))


def _pairs(u: LowRank) -> Iterator[tuple[Any, Any]]:
    """(a (r, in), b (out, r)): one, or one an expert; a convolution's kernel belongs to its inputs."""
    a, b = _array(u.a), _array(u.b)
    if u.layout == "experts":
        yield from zip(a, b, strict=True)
    else:
        yield a.reshape(u.rank, -1), b.reshape(-1, u.rank)


def _delta(
    module: str, off: float, norm2: float, inner: float, bound: float, note: str = ""
) -> Delta:
    if norm2 <= 0:  # no effect: then the other must have none either
        return Delta(
            module, 0.0 if off == 0 else 1.0, 1.0 if off == 0 else 0.0, 0.0, bound, "no effect"
        )
    norm = norm2**0.5
    return Delta(module, off / norm, inner / norm2, norm, bound, note)


def _dora(module: str, first: LowRank, second: LowRank, weight: Tensor, bound: float) -> Delta:
    """dW = m * (W + s b a) / ||W + s b a||_row - W, with the base's W."""
    import numpy as np

    parts = [
        (u.scale, _array(u.a), _array(u.b), _array(u.magnitude))
        for u in (first, second)
        if u.magnitude
    ]
    off2 = norm2 = inner = 0.0
    for i, j, (w,) in _blocks(weight):
        deltas = []
        for scale, a, b, m in parts:
            moved = w + scale * (b[i:j] @ a)
            deltas.append(m[i:j, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - w)
        off2 += float(np.sum((deltas[1] - deltas[0]) ** 2))
        norm2 += float(np.sum(deltas[0] ** 2))
        inner += float(np.sum(deltas[0] * deltas[1]))
    found = _delta(module, off2**0.5, norm2, inner, bound, "DoRA")
    product, magnitude = _plain(module, first, second, bound), _magnitude(module, first, second)
    if magnitude.error > EQUAL and magnitude.fits and product.fits and norm2 > 0:
        # m was rounded, and with it the base's own weight, by more than dW is allowed
        bound += magnitude.bound * magnitude.norm / norm2**0.5
        by_chance = 4 * found.error / math.sqrt(weight.shape[0])
        found = replace(found, bound=bound, gain_bound=max(GAIN, by_chance))
    one = product if product.lines else magnitude
    return replace(found, lines=one.lines, note=f"DoRA: {one.note}") if one.lines else found


def _magnitude(module: str, first: LowRank, second: LowRank) -> Delta:
    """Of m alone, as a whole and value by value."""
    t1, t2 = (u.magnitude for u in (first, second))
    assert t1 is not None
    assert t2 is not None
    m1, m2 = _array(t1), _array(t2)
    share = max(EQUAL, _rounding(t1, t2))
    off = float(((m2 - m1) ** 2).sum() ** 0.5)
    found = _delta(module, off, float(m1 @ m1), float(m1 @ m2), share, "the magnitudes m differ")
    lines = _Lines()
    lines.add("magnitude", *_values(m1, m2, share))
    return lines.put(found)


def _values(one: Any, two: Any, share: float, *scales: float) -> tuple[Any, Any]:
    """(How far numbers are apart, what storing allows): ``share`` of each, or FLOAT16's finest step."""
    step = SMALLEST * max(map(abs, (1.0, *scales)))
    return abs(two - one), share * (abs(one) + abs(two)) + step


def _dora_by_parts(module: str, first: LowRank, second: LowRank, bound: float) -> Delta:
    """Without W (packed, or not there): equal products and equal magnitudes give an equal dW.

    Parts that differ by more than rounding differ in dW too; what lies between can't be told.
    """
    product = _plain(module, first, second, bound)
    magnitude = _magnitude(module, first, second)
    if not product.fits:
        what = "; ".join(filter(None, ("the products b @ a differ", product.note)))
        return replace(product, note=f"DoRA: {what}")
    if not magnitude.fits:
        return replace(magnitude, note=f"DoRA: {magnitude.note}")
    if max(product.error, magnitude.error) <= EQUAL:
        return replace(product, note="DoRA, by its parts")
    why = (
        f"DoRA's products are off by {product.error:.1e} and its magnitudes by"
        f" {magnitude.error:.1e}, and what that does to dW can't be told without the base's plain"
        " weight; give the unpacked base"
    )
    return Delta(module, math.nan, math.nan, math.nan, bound, why, decided=False)


def _replaced(module: str, first: Replacement, second: Replacement, base: Base) -> Delta:
    """The update is what the new weight is away from the base's; training moves it by little.

    Rounding acts on the whole weight, so where both sides are stored in different dtypes it is
    allowed for at its size; where that could be all of the update, nothing is decided.
    """
    x, y = first.weight, second.weight
    if x.shape != y.shape:
        return Delta(module, 1.0, 0.0, 0.0, EQUAL, "shapes differ")
    own = _own(base, module, x.shape)
    off2 = norm2 = inner = whole2 = 0.0
    lines, share = _Lines(), _rounding(x, y)
    for i, _, (a, b, *w) in _blocks(x, y, *([own] if own else [])):
        sizes, errors = (a * a).sum(1), ((b - a) ** 2).sum(1)
        whole2 += float(sizes.sum())
        off2 += float(errors.sum())
        room = max(EQUAL, share) * sizes**0.5 + SMALLEST * a.shape[1] ** 0.5
        lines.add("row" if len(x.shape) == 2 else "value", errors**0.5, room, i)
        if w:
            a, b = a - w[0], b - w[0]
        norm2 += float((a * a).sum())
        inner += float((a * b).sum())
    rounded = share * whole2**0.5  # the most that storing can have moved it
    allowed = rounded / norm2**0.5 if norm2 > 0 else math.inf
    found = _delta(module, off2**0.5, norm2, inner, max(EQUAL, allowed), "replaced")
    if x.stored_dtype != y.stored_dtype:  # of few values, rounding also shifts the gain by chance
        by_chance = 4 * found.error / math.sqrt(math.prod(x.shape))
        found = replace(found, gain_bound=max(GAIN, by_chance))
    found = lines.put(found)
    if found.error <= EQUAL or off2**0.5 > rounded or lines.count or (own and allowed < 1):
        return found
    why = (
        f"storing it in 16 bits may have moved it by {allowed:.1f} times what training did;"
        " store it in float32"
        if own
        else "the base's own weight is not there in plain numbers to compare with"
    )
    return replace(found, note=why, decided=False)


def _rounding(x: Tensor, y: Tensor) -> float:
    """Relative error that storing may cost: none of note between equal dtypes."""
    dtypes = {x.stored_dtype, y.stored_dtype}
    return sum(UNIT_ROUNDOFF[d] for d in dtypes) if len(dtypes) > 1 else UNIT_ROUNDOFF["F32"]


def _blocks(*tensors: Tensor) -> Iterator[tuple[int, int, list[Any]]]:
    """(start, stop, rows) of tensors of one shape, in float64; elements where it is no matrix."""
    import numpy as np

    shape = tensors[0].shape
    count, width = shape if len(shape) == 2 else (math.prod(shape), 1)
    step = max(1, _ROWS // max(width, 1))
    for i in range(0, count, step):
        j = min(i + step, count)
        rows = [as_float32(t.rows(i, j, finite=False), t.dtype) for t in tensors]
        yield i, j, [r.astype(np.float64) for r in rows]
