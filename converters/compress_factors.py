"""A module's two factors in fewer bits, turned first where that makes less of an error of b a."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from loraduct.adapter import Adapter, LowRank
from loraduct.converters import balance, palette, palettize, quantize
from loraduct.converters.compress_code import Way, linear
from loraduct.errors import Refused
from loraduct.formats.packed_adapter import Item, values
from loraduct.packing import packed
from loraduct.tensor import FLOATS, Tensor

PROBE = 3  # bits at which the forms of wide factors are told apart; they take long to try at 8
_END = 65520.0  # from here on float16 is infinite
_LAYOUTS = ("linear", "embedding", "weight", "parameter")


@dataclass(frozen=True)
class Coded:
    """One tensor of the file as it will be stored."""

    item: Item
    stream: Any  # uint8
    numbers: Any  # float16: tables or scales

    @property
    def nbytes(self) -> int:
        """Without its place in the header."""
        return int(self.stream.nbytes + self.numbers.nbytes)

    @property
    def back(self) -> Any:
        """What it is read back as: float16, in the shape of the tensor."""
        return values(self.item, self.stream, self.numbers)

    @property
    def rows(self) -> Any:
        """The same as the stored rows, ranks first, float64."""
        import numpy as np

        ranked = np.moveaxis(self.back, self.item.axis, 0)
        return ranked.reshape(len(ranked), -1)[: self.item.rows].astype(np.float64)


@dataclass(frozen=True)
class Pair:
    """The factors of a module: their names in the file, and which of their axes there is the ranks'.

    ``turnable``: ranks may be mixed; not those of experts and convolutions.
    """

    name: str
    update: LowRank
    names: tuple[str, str]
    axes: tuple[int, int]
    turnable: bool

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """The tensors as they are in the file."""
        return self.update.a.origins[0], self.update.b.origins[0]


@dataclass(frozen=True)
class Found:
    """``form``: which of balance.FORMS. ``loss``: relative error of dW (of others than plain matrices:
    about)."""

    form: str
    coded: tuple[Coded, Coded]
    loss: float

    @property
    def nbytes(self) -> int:
        """Of both."""
        return sum(c.nbytes for c in self.coded)


def pairs(adapter: Adapter, tensors: Mapping[str, Tensor]) -> list[Pair]:
    """The modules each of whose factors is a tensor of the file."""
    found = []
    for name, u in adapter.low_rank.items():
        a, b = ([o for o in t.origins if o.name in tensors] for t in (u.a, u.b))
        names = tuple(o.name for o in (*a, *b))
        if len(a) != 1 or len(b) != 1 or any(tensors[n].stored_dtype not in FLOATS for n in names):
            continue
        plain = u.layout in _LAYOUTS and u.a.make is None and u.b.make is None
        axes = (int(u.a.transposed), int(not u.b.transposed)) if plain else (0, 0)
        found.append(Pair(name, u, (names[0], names[1]), axes, plain))
    return found


def best(
    pair: Pair, width: int, kind: str, group: int, forms: Sequence[str] = tuple(balance.FORMS)
) -> Found:
    """The pair at ``width`` bits, in that of ``forms`` whose dW comes out best.

    Raises Refused for NaN and Inf, and where each form has values beyond float16.
    """
    import numpy as np

    if not pair.turnable:
        flat = [t.read().reshape(t.shape[0], -1) for t in pair.stored]
        made = _both(pair, flat, width, kind, group)
        lost = [_relative(m, c.rows) for m, c in zip(flat, made, strict=True)]
        return Found("plain", made, float(np.hypot(lost[0], lost[1])))
    a, b = _live(pair.update.a.read(), pair.update.b.read())

    def tried(form: str, width: int) -> Found:
        turned, other = balance.FORMS[form](a, b)
        made = _both(pair, [turned, other.T], width, kind, group)
        return Found(form, made, balance.loss(a, b, made[0].rows, made[1].rows.T))

    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        forms = ("plain",)  # whose tables say so; an SVD would fail
    elif min(a.shape) != min(b.shape):
        # more ranks than one side has channels, which `balance.turned` does not take
        forms = [form for form in forms if form in ("plain", "balanced")]
    if width > 4 and len(forms) > 2 and kind == "lut":
        probed = _least(partial(tried, width=PROBE), forms).form
        forms = tuple(dict.fromkeys((probed, "plain")))
    return _least(partial(tried, width=width), forms)


def _least(tried: Callable[[str], Found], forms: Sequence[str]) -> Found:
    """What loses least. Raises Refused where no form can be stored; one of several may be beyond float16."""
    found: list[Found] = []
    refused: list[Refused] = []
    for form in forms:
        try:
            found.append(tried(form))
        except Refused as e:
            refused.append(e)
    if not found:
        raise refused[0]
    return min(found, key=lambda f: f.loss)


def blank(pair: Pair, width: int) -> tuple[Coded, Coded]:
    """The pair in tables of ``width`` bits for all of a factor, without its values: of its size."""
    import numpy as np

    heights = [t.shape[0] for t in pair.stored]
    if pair.turnable:
        heights = [len(_live(pair.update.a.read(), pair.update.b.read())[0])] * 2
    made = []
    for tensor, axis, high in zip(pair.stored, pair.axes, heights, strict=True):
        shape = tensor.stored_shape
        count = high * (prod(shape) // shape[axis])
        stream, table = packed(np.zeros(count, np.uint8), width), np.zeros(1 << width, np.float16)
        made.append(Coded(Item(width, shape, axis, high, 0, "lut"), stream, table))
    return made[0], made[1]


def _live(a: Any, b: Any) -> tuple[Any, Any]:
    """Without the ranks behind the last that does anything: padding is not stored. float64."""
    import numpy as np

    a, b = a.astype(np.float64), b.astype(np.float64)
    live = np.flatnonzero(np.abs(a).max(1) * np.abs(b).max(0) != 0)  # NaN is not padding
    rank = int(live[-1]) + 1 if len(live) else 1
    return a[:rank], b[:, :rank]


def _both(
    pair: Pair, matrices: Sequence[Any], width: int, kind: str, group: int
) -> tuple[Coded, Coded]:
    made = []
    for m, tensor, axis in zip(matrices, pair.stored, pair.axes, strict=True):
        item = Item(width, tensor.stored_shape, axis, len(m), group, kind)
        made.append(_coded(m, item, tensor.name))
    return made[0], made[1]


def _coded(matrix: Any, item: Item, name: str) -> Coded:
    import numpy as np

    matrix = np.ascontiguousarray(matrix, np.float32)
    if item.kind == "int":
        largest = float(np.abs(matrix).max(initial=0))
        if np.isfinite(largest) and largest >= _END:
            what = f"holds values of {largest:.4g}: float16, as which it is read, ends before that"
            raise Refused(None, what, tensor=name)
        way = Way("int", item.bits, item.group)
        q = quantize.quantize(matrix, linear(way, "float16"), name=name)
        codes, numbers = q.data.astype(np.int16) + (1 << (item.bits - 1)), q.scale
    else:
        group = min(item.group, len(matrix))
        tables = palette.Options(item.bits, group=group, ragged=True)
        p = palettize.palettize(matrix, tables, name=name)
        codes, numbers = p.indices, p.lut
    return Coded(item, packed(codes.astype(np.uint8), item.bits), numbers.reshape(-1))


def _relative(one: Any, two: Any) -> float:
    import numpy as np

    norm = float(np.linalg.norm(one))
    return float(np.linalg.norm(one - two)) / norm if norm else 0.0


def losses(before: LowRank, after: LowRank) -> tuple[float, float]:
    """(relative error of dW, the norm of dW) of a module and of what is read back of it."""
    error = norm = 0.0
    for one, two in zip(_matrices(before), _matrices(after), strict=True):
        a, b = one
        square = float(((a @ a.T) * (b.T @ b)).sum())
        error += balance.loss(a, b, *two) ** 2 * square
        norm += square
    return ((error / norm) ** 0.5 if norm else 0.0), max(norm, 0.0) ** 0.5 * abs(before.scale)


def _matrices(u: LowRank) -> list[tuple[Any, Any]]:
    import numpy as np

    a, b = (t.read().astype(np.float64) for t in (u.a, u.b))
    if u.layout == "experts":
        return list(zip(a, b, strict=True))
    return [(a.reshape(len(a), -1), b.reshape(len(b), -1))]
