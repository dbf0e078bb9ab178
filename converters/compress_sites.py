"""The weights of a package: each blob once, all constants that refer to it, and who uses it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraduct.converters.compress_wanted import Wanted
from loraduct.converters.compressible import left_alone
from loraduct.errors import Refused
from loraduct.formats.coreml.constexpr import is_compressed
from loraduct.formats.coreml.edit import offsets_of
from loraduct.formats.coreml.package import WEIGHTS_NAME, Package
from loraduct.formats.coreml.program import blob_values, type_of
from loraduct.tensor import Tensor
from loraduct.text import printable

FLOATS = ("FLOAT16", "FLOAT32")
BASE, ADAPTER = "base", "adapter"
# opsets -> which forms of compressed constants they have (coremltools 9.0, the versions of its ops)
OLD, NEW = "iOS16", "iOS18"
FORMS = {"CoreML6": OLD, "CoreML7": OLD, "CoreML8": NEW, "CoreML9": NEW}


@dataclass
class Weight:
    """One blob. ``users``: the constants that refer to it, (function, operation); ``reason``: why it
    is left as it is."""

    offset: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    group: str = BASE
    users: list[tuple[str, Any]] = field(default_factory=list)
    reason: str | None = None

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def form_of(package: Package) -> str:
    """Which forms the package's opset has. Raises Refused for one that has none, and for a mixture."""
    opsets = sorted({f.opset for f in package.functions.values()})
    if len(opsets) > 1:
        raise Refused(package.path, f"has functions of several opsets: {', '.join(opsets)}")
    if opsets[0] not in FORMS:
        what = f"is of opset {printable(opsets[0], 40)}, which has no compressed constants"
        raise Refused(package.path, f"{what}: {', '.join(FORMS)} have")
    return FORMS[opsets[0]]


def operations(block: Any) -> Iterator[Any]:
    """A block's operations, those of blocks within included."""
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from operations(inner)


def blocks_of(package: Package) -> Iterator[tuple[str, Any]]:
    """Every block that a function may run, with the function's name."""
    for name, function in package.functions.items():
        for block in function.block_specializations.values():
            yield name, block


def compressed_in(package: Package, functions: Collection[str] | None = None) -> int:
    """How many compressed constants there are, of some functions or all."""
    held = [b for name, b in blocks_of(package) if functions is None or name in functions]
    return sum(is_compressed(op) for block in held for op in operations(block))


def base_functions(package: Package, record: Mapping[str, Any] | None) -> set[str]:
    """Functions without an adapter, whose constants are the base's; all where each has one."""
    rows = (record or {}).get("functions", {})
    names = set(package.functions)
    return {name for name in names if not rows.get(name, {}).get("adapters")} or names


def weights(package: Package, record: Mapping[str, Any] | None, wanted: Wanted) -> list[Weight]:
    """All constants in the weight file, in its order; with the reason where one is left as it is."""
    found: dict[int, Weight] = {}
    for function, block in blocks_of(package):
        for op in operations(block):
            one = constant(op)
            if one is None:
                continue
            weight = found.setdefault(one.offset, one)
            weight.users.append((function, op))
            if (weight.dtype, weight.shape) != (one.dtype, one.shape):
                weight.reason = "read as several shapes"
    elsewhere = _elsewhere(package, found)
    adapters = _adapters_only(package, record)
    for weight in found.values():
        names = list(dict.fromkeys(op.outputs[0].name for _, op in weight.users))
        weight.group = ADAPTER if weight.offset in adapters else BASE
        weight.reason = (
            weight.reason
            or wanted.left_out(names)
            or ("is also an argument of its own" if weight.offset in elsewhere else None)
            or ("no float" if weight.dtype not in FLOATS else None)
            or (next(filter(None, (left_alone(n, weight.shape) for n in names)), None)
                if wanted.include is None else None)
            or ("scalar or vector" if len(weight.shape) < 2 else None)
        )  # fmt: skip
    return [found[o] for o in sorted(found)]


def importance(held: Sequence[Weight], moments: Mapping[str, Any]) -> dict[int, Any]:
    """By offset, what errors of a weight count: one number per input channel, where it is known."""
    found = {}
    for weight in held:
        users = [(function, op.outputs[0].name) for function, op in weight.users]
        for function, name in users or [("", weight.name)]:  # a base's folder has no operations
            known = moments.get(f"{function}/{name}") if weight.group == ADAPTER else None
            known = moments.get(name) if known is None and weight.group == BASE else known
            if known is not None and weight.shape[1:] == known.shape:
                found[weight.offset] = known
                break
    return found


def tensor_of(package: Package, weight: Weight) -> Tensor:
    """Its values, lazily."""
    return package.blobs.tensor(weight.offset, weight.dtype, weight.shape, weight.name)


def constant(op: Any) -> Weight | None:
    """The weight of a constant in the usual weight file."""
    if op.type != "const" or "val" not in op.attributes:
        return None
    value = op.attributes["val"]
    if value.WhichOneof("value") != "blobFileValue" or value.blobFileValue.fileName != WEIGHTS_NAME:
        return None
    dtype, shape = type_of(value.type)
    sizes = tuple(n or 0 for n in shape)
    return Weight(value.blobFileValue.offset, op.outputs[0].name, dtype, sizes)


def _elsewhere(package: Package, found: Mapping[int, Weight]) -> set[int]:
    """Offsets that something else than constants refers to. Counting references is quick."""
    if references(package) == sum(len(w.users) for w in found.values()):
        return set()
    used: Counter[int] = Counter()
    for _, block in blocks_of(package):
        used.update(v.offset for v in blob_values(block) if v.fileName == WEIGHTS_NAME)
    return {o for o, n in used.items() if o in found and n > len(found[o].users)}


def references(package: Package) -> int:
    """How often the program refers to the usual weight file."""
    functions = package.functions.values()
    return sum(f.SerializeToString().count(WEIGHTS_NAME.encode()) for f in functions)


def _adapters_only(package: Package, record: Mapping[str, Any] | None) -> set[int]:
    """Offsets that functions with an adapter refer to, and no other function does."""
    rows = (record or {}).get("functions", {})
    with_adapter = {f for f, row in rows.items() if row["adapters"]}
    used: dict[bool, set[int]] = {True: set(), False: set()}
    for name, function in package.functions.items():
        used[name in with_adapter] |= offsets_of(function)
    return used[True] - used[False]
