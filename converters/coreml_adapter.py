"""An adapter laid out for a package: FLOAT16 blobs, scales that FLOAT16 holds, DoRA's norms.

Factors are stored as they are given; of another dtype they are rounded once. A scale far from 1 is
folded into b by a power of two, which is exact. DoRA divides by ||W + s b a|| of each row: that is
worked out here, once, in float32, from the package's own weights and the factors as stored.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from loraduct.account import Account
from loraduct.adapter import Adapter, LowRank, Replacement
from loraduct.errors import Refused
from loraduct.formats.coded import Code, Decoded, code_of, recoded
from loraduct.formats.coreml.blob import ALIGN, CODES, Layout
from loraduct.formats.coreml.coded import INLINE, arguments, operation_of
from loraduct.formats.coreml.edit import HALF, Blob, Swap
from loraduct.formats.coreml.package import Package
from loraduct.formats.coreml.program import mangled
from loraduct.formats.coreml.stored import EMBEDDING, HEAD, PackageBase, Parts
from loraduct.packing import packed
from loraduct.tensor import UNIT_ROUNDOFF, Loss, Tensor, as_float32, from_float

HALF_MAX, HALF_NORMAL = 65504.0, 2.0**-14
FAR = 10  # a scale within 2**-FAR and 2**FAR is left alone
# dtype of b -> relative error from which on another power of two is better: BFLOAT16's eight bits
# fit as they are, where their range does; of float32, more than rounding does on average
_LOSSES = {"BF16": 0.0, "F32": 0.6 * UNIT_ROUNDOFF["F16"]}
_SMALL = 4 << 20  # bytes of a blob that is compared with others
_HEAD = 64  # bytes by which blobs are told apart at first
_BLOCK = 4 << 20  # bytes of a weight worked on at once


class Store:
    """New blobs behind those of a package's weight file; equal ones are stored once."""

    def __init__(self, package: Package, start: int, others: Mapping[int, int]) -> None:
        """``start``: where new blobs begin. ``others``: blobs that may serve again, and their ends."""
        self.package = package
        self.layout = Layout(start)
        self._chunks: dict[int, Callable[[], Iterable[Any]]] = {}  # of new blobs
        self._of_size: dict[int, list[int]] = {}  # blobs not looked at yet
        self._alike: dict[tuple[Any, ...], list[int]] = {}  # by dtype, size and first bytes
        for offset, end in others.items():
            self._of_size.setdefault(end - offset - ALIGN, []).append(offset)

    def put(self, tensor: Tensor) -> Blob:
        """The blob of a FLOAT16 tensor, which is written when the package is."""
        return Blob(self._placed(HALF, math.prod(tensor.shape), tensor.chunks), tensor.shape)

    def put_code(self, code: Code) -> Blob:
        """The operation that stands for a code's values, and the blobs that it reads."""
        offsets = {}
        for key, (dtype, values) in arguments(code).items():
            if dtype != HALF or values.size >= INLINE:  # codes never lie in the program
                width = CODES[dtype][1]
                data = values.reshape(-1).view("u1")
                data = data if width >= 8 else packed(data & ((1 << width) - 1), width)
                offsets[key] = self._placed(dtype, values.size, partial(iter, [data]))
        made = operation_of(code, offsets)
        return Blob(min(offsets.values(), default=0), code.codes.shape, made)

    def _placed(self, dtype: str, count: int, chunks: Callable[[], Iterable[Any]]) -> int:
        """The offset of a blob of these bytes: of one that is there, or of a new one."""
        code, bits = CODES[dtype]
        size = -(-count * bits // 8)
        for offset in self._of_size.pop(size, []):
            kind = self.package.blobs.kind(offset, "a weight")
            head = self.package.blobs.source.read(offset + ALIGN, min(size, _HEAD), "a weight")
            self._alike.setdefault((*kind, size, bytes(head)), []).append(offset)
        first = memoryview(next(iter(chunks()), b"")).cast("B")
        key = (code, size * 8 - count * bits, size, bytes(first[:_HEAD]))
        alike = self._alike.setdefault(key, [])
        if alike and size <= _SMALL:
            digest = _digest(chunks())
            for offset in alike:
                if _digest(self._pieces(offset)) == digest:
                    return offset
        offset = self.layout.add(dtype, count, chunks())
        alike.append(offset)
        self._chunks[offset] = chunks
        return offset

    def _pieces(self, offset: int) -> Any:
        if offset in self._chunks:
            return self._chunks[offset]()
        return self.package.blobs.whole(offset, "a weight")[2]


def _digest(pieces: Any) -> bytes:
    found = hashlib.blake2b(digest_size=20)
    for piece in pieces:
        found.update(piece)
    return found.digest()


@dataclass(frozen=True)
class Placed:
    """An adapter whose tensors have their places. ``row``: its entry in the package's record."""

    parts: Mapping[str, Parts]
    swaps: tuple[Swap, ...]
    row: dict[str, Any]
    account: Account


def place(adapter: Adapter, base: PackageBase, store: Store) -> Placed:
    """Lay out an adapter that has transformers' names and is known to be the base's.

    Raises Refused naming the module that the package has no operation for.
    """
    account = Account()
    parts: dict[str, Parts] = {}
    modules: dict[str, Any] = {}
    replaced: dict[str, Any] = {}
    swaps = []
    for name, update in adapter.updates.items():
        if isinstance(update, LowRank):
            base.ops.site(name, update.layout)
            parts[name], modules[name] = _factors(name, update, base, store, account)
        elif isinstance(update, Replacement):
            swap, replaced[name] = _replaced(name, update, adapter, base, store, account)
            swaps.append(swap)
        else:
            raise Refused(
                adapter.weights,
                f"{update.note}: of full rank; convert it with --rank and --allow-approximate first",
                tensor=name,
            )
    account.set_aside(adapter.set_aside)
    account.check_complete(adapter.tensors())
    row = {
        "method": adapter.method,
        "source": adapter.format
        if adapter.format != "coreml"
        else (adapter.origin or {})["format"],
        "config": dict(adapter.config),
        "origin": _past(adapter),
        "metadata": {k: v for k, v in adapter.metadata.items() if k not in ("format", "loraduct")},
        "base": {
            "name": adapter.base.name,
            "revision": adapter.base.revision,
            "quantization": adapter.base.quantization,
            "quantization_known": adapter.base.quantization_known,
        },
        "modules": modules,
        "replaced": replaced,
    }
    return Placed(parts, tuple(swaps), row, account)


def _past(adapter: Adapter) -> dict[str, Any] | None:
    """Where the adapter came from before it had its own format."""
    past = adapter.origin or {}
    if adapter.format == "coreml":
        past = {**past.get("before", {}), **{k: past[k] for k in ("blocks", "joined") if k in past}}
    kept = {k: past[k] for k in ("format", "config", "blocks", "joined") if k in past}
    return kept if "config" in kept else None


def _factors(
    module: str, u: LowRank, base: PackageBase, store: Store, account: Account
) -> tuple[Parts, dict[str, Any]]:
    """Blobs of one update, and its row in the record."""
    names = [f"{module}.{leaf}" for leaf in ("lora_A", "lora_B", "magnitude", "bias")]
    lookup = u.layout == "embedding"
    a = _rounded(u.a, names[0], account)
    b, fold = _folded(u, names[1], account)
    extra = {
        leaf: _rounded(t, name, account)
        for leaf, t, name in (
            ("magnitude", u.magnitude, names[2]),
            ("bias", u.bias, names[3]),
        )
        if t is not None
    }
    blobs = {leaf: store.put(t) for leaf, t in extra.items()}
    inverse = None
    if u.magnitude is not None:
        inverse = store.put(_half(_inverse(module, u, a, b, fold, base), f"{module}.norm"))
    factors = (a.T if lookup else a, b)
    codes = [_code(t) for t in factors]
    stored = [
        store.put(t) if c is None else store.put_code(c)
        for t, c in zip(factors, codes, strict=True)
    ]
    parts = Parts(
        a=stored[0],
        b=stored[1],
        bias=blobs.get("bias"),
        magnitude=blobs.get("magnitude"),
        inverse=inverse,
    )
    given = [u.a, u.b, *(t for t in (u.magnitude, u.bias) if t is not None)]
    row: dict[str, Any] = {"rank": u.rank, "scale": u.scale}
    row |= {"layout": u.layout} if lookup else {}
    row |= {"dtypes": [t.dtype for t in given]} if any(t.dtype != "F16" for t in given) else {}
    row |= {"fold": fold} if fold else {}
    row |= {"extra": list(extra)} if extra else {}
    if any(codes):
        row["sums"] = [None if c is None else zlib.crc32(c.values()) for c in codes]
    for leaf, tensor, code in zip(names, factors, codes, strict=False):
        if code is None and _is_coded(tensor):
            account.notes.append(f"{leaf}: came in few bits and is stored in 16: more values than"
                                 " a table holds")  # fmt: skip
    return parts, row


def _code(tensor: Tensor) -> Code | None:
    """How a tensor can stay in few bits, with the very values that it has."""
    return (code_of(tensor) or recoded(tensor)) if _is_coded(tensor) else None


def _is_coded(tensor: Tensor) -> bool:
    """Whether it, or a tensor that it is made of, is in few bits."""
    return isinstance(tensor.make, Decoded) or any(map(_is_coded, tensor.inputs))


def _rounded(tensor: Tensor, name: str, account: Account) -> Tensor:
    """The tensor in FLOAT16, with what that loses measured."""
    done = tensor.to("F16")
    account.carry(name, done)
    if tensor.dtype == "F16":
        return done
    largest, loss = _measured(tensor, 1.0)
    if largest > HALF_MAX:
        what = f"holds {largest:.6g}, and a package's weights are FLOAT16 (up to {HALF_MAX:g})"
        raise Refused(tensor.path, what, tensor=tensor.name)
    account.losses[name] = loss
    return done


def _folded(u: LowRank, name: str, account: Account) -> tuple[Tensor, int]:
    """b in FLOAT16 times a power of two, and which: 0 unless its scale or its values are far out."""
    b, scale = u.b, abs(u.scale)
    fold = 0
    if scale and not 2.0**-FAR <= scale <= 2.0**FAR:
        fold = math.frexp(scale)[1] - 1
    largest, loss = _measured(b, 2.0**fold)
    if b.dtype == "F16":
        if (
            fold and loss.error
        ):  # its own values are as far out: leave them, if FLOAT16 has the scale
            fold, loss = 0, Loss()
    elif largest > HALF_MAX or loss.relative > _LOSSES[b.dtype]:
        fold -= math.frexp(largest)[1] - 1
        if scale:  # what is left of the scale must be one of FLOAT16's normal numbers
            fold = min(fold, math.frexp(scale)[1] + 12)
        _, loss = _measured(b, 2.0**fold)
    if abs(fold) > 60:
        what = f"values and a scale of {u.scale:g} that FLOAT16 can't hold together"
        raise Refused(b.path, what, tensor=b.name)
    stored = (b.times(2.0**fold) if fold else b).to("F16")
    account.carry(name, stored)
    if b.dtype != "F16":
        account.losses[name] = loss
    return stored, fold


def _measured(tensor: Tensor, factor: float) -> tuple[float, Loss]:
    """The largest value of a tensor times ``factor``, and what rounding it to FLOAT16 loses."""
    import numpy as np

    largest, loss = 0.0, Loss()
    if tensor.dtype == "F16" and factor == 1:
        return largest, loss
    for piece in tensor.chunks():
        exact = as_float32(piece, tensor.dtype).astype(np.float64) * factor
        if exact.size:
            largest = max(largest, float(np.abs(exact).max()))
        with np.errstate(over="ignore"):
            error = exact.astype(np.float16) - exact
        loss.error += float(np.vdot(error, error))
        loss.size += float(np.vdot(exact, exact))
    return largest, loss


def _half(values: Any, name: str) -> Tensor:
    """Values worked out here, as a tensor."""
    return Tensor(name, "F16", values.shape, data=from_float(values, "F16"))


def _inverse(module: str, u: LowRank, a: Tensor, b: Tensor, fold: int, base: PackageBase) -> Any:
    """1 / ||W + s b a|| of every output, (out,) float32: of W's rows; of an embedding, its columns."""
    import numpy as np

    weight = base.weight_of(f"{module}.weight")
    if weight is None or weight.shape != u.shape:
        raise Refused(base.path, f"has no weight {module}.weight of shape {list(u.shape)}")
    low_a, low_b = a.read(), b.read() * np.float32(u.scale * 2.0**-fold)
    rows, cols = weight.shape
    step = max(1, _BLOCK // (4 * cols))
    squares = np.zeros(low_b.shape[0], np.float64)
    for i in range(0, rows, step):
        j = min(i + step, rows)
        block = as_float32(weight.rows(i, j), weight.dtype)
        if u.layout == "embedding":
            block = block + low_a[:, i:j].T @ low_b.T
            squares += np.einsum("ij,ij->j", block, block, dtype=np.float64)
        else:
            block = block + low_b[i:j] @ low_a
            squares[i:j] = np.einsum("ij,ij->i", block, block, dtype=np.float64)
    with np.errstate(divide="ignore"):
        inverse = 1 / np.sqrt(squares)
    if not (inverse.max() <= HALF_MAX and inverse.min() >= HALF_NORMAL):
        what = (
            f"is DoRA whose rows have norms from {1 / inverse.max():.3g} to {1 / inverse.min():.3g}"
        )
        raise Refused(u.a.path, f"{what}: FLOAT16 can't hold their inverse", tensor=module)
    return inverse.astype(np.float32)


def swap_of(base: PackageBase, parameter: str, blob: Blob) -> Swap:
    """Another constant for a parameter of the base; of a tied embedding, for one side only."""
    module = parameter.rpartition(".")[0]
    if base.tied and parameter == f"{HEAD}.weight":
        return Swap(mangled(parameter), blob, module, "weight")
    if base.tied and parameter == f"{EMBEDDING}.weight":
        return Swap(f"{mangled(parameter)}_in", blob, module, "x")
    return Swap(mangled(parameter), blob)


def _replaced(
    parameter: str,
    r: Replacement,
    adapter: Adapter,
    base: PackageBase,
    store: Store,
    account: Account,
) -> tuple[Swap, dict[str, Any]]:
    """A parameter's other constant, and its row in the record."""
    own = base.weight_of(parameter)
    if own is None:
        what = (
            "rows of an embedding (trained tokens)" if "token_adapter" in parameter else parameter
        )
        raise Refused(
            adapter.weights,
            f"replaces {what}, which the package has no constant for; merge the adapter into the base",
            tensor=r.weight.name,
        )
    if own.shape != r.weight.shape:
        what = f"shape {list(r.weight.shape)}, the package's {parameter} has {list(own.shape)}"
        raise Refused(adapter.weights, f"{what}: made for another base", tensor=r.weight.name)
    swap = swap_of(base, parameter, store.put(_rounded(r.weight, parameter, account)))
    row: dict[str, Any] = {"origin": r.origin, "const": swap.const}
    row |= {"dtype": r.weight.dtype} if r.weight.dtype != "F16" else {}
    return swap, row
