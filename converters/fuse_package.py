"""A Core ML package with adapters fused into its base's weights, compressed or not.

The result has the functions of the base alone; what they read is written once. A weight in 16 bits is
summed in float32 and rounded once. A compressed one stays in the form it has, see
`converters.fuse_coded`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.converters import fuse_coded, palette, quantize
from loraduct.converters.compress_code import pieces as stream
from loraduct.converters.compress_write import copied, replaced
from loraduct.converters.fuse_folder import Options, kinship
from loraduct.converters.fuse_packed import WIDE, hurt
from loraduct.converters.fuse_places import Placed, placed
from loraduct.converters.fuse_stream import fused_tensor
from loraduct.converters.neutral import neutral
from loraduct.errors import Refused
from loraduct.formats.coded import Code
from loraduct.formats.coreml import edit, record
from loraduct.formats.coreml.blob import CODES, Layout
from loraduct.formats.coreml.coded import INLINE, code_in
from loraduct.formats.coreml.constexpr import is_compressed, parts_of
from loraduct.formats.coreml.package import WEIGHTS_NAME, Package, read
from loraduct.formats.coreml.program import (
    blob_value,
    block_of_function,
    immediate_value,
    mangled,
    type_of,
)
from loraduct.formats.coreml.stored import EMBEDDING, HEAD, PackageBase
from loraduct.text import printable, several

COMPARED = ("rescale", "compensate", "bits")  # what --remedy auto tries besides
_HEAD, _EMBEDDING = f"{HEAD}.weight", f"{EMBEDDING}.weight"
_CODES = ("indices", "data", "quantized_data")  # arguments that hold codes
_TABLES = ("lut", "scale")


@dataclass
class Change:
    """One parameter that changes: its constant, and of a compressed one what replaces its arguments.

    ``arguments``: key -> (MIL dtype, shape); empty for a constant that is not compressed.
    """

    name: str
    now: Code | None = None  # without values: kind, bits, blocks
    bits: int = 16
    scaled: int | None = None  # channels per table, where there are scales behind it
    old: bool = False  # iOS16's forms
    count: int = 0  # numbers in a compressed matrix
    arguments: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A package to be written: decided and checked, no weights changed yet."""

    base: PackageBase
    places: Placed
    adapters: Sequence[tuple[Adapter, float]]
    changes: Mapping[str, Change]
    untied: str | None
    notes: tuple[str, ...]
    remedy: str
    before: int  # bytes of what the base's functions read in the weight file
    nbytes: int

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The base's."""
        return self.base.tensors

    @property
    def side(self) -> int:
        """Of the adapters as functions of the package: 16 bits a number."""
        updates = (u for a, _ in self.adapters for u in a.updates.values())
        return sum(2 * prod(t.shape) for u in updates for t in u.tensors)


def opened(path: Path) -> PackageBase:
    """The base of the package at ``path``. Raises Refused where no function is of the base alone."""
    package = read(path)
    base = PackageBase(package, record.read(package))
    if not base.functions:
        raise Refused(path, "has no function of the base alone to fuse into")
    return base


def compressed(base: PackageBase) -> bool:
    """Whether any of its weights is in few bits."""
    return any(is_compressed(op) for op in base.ops.all)


def plan(base: PackageBase, adapters: Sequence[tuple[Adapter, float]], options: Options) -> Plan:
    """What is written for the package of ``base`` with ``adapters`` (each with its weight) fused into it.

    Raises Refused for other bases, updates without a place, and compressed forms that can't be had again.
    """
    if options.dtype != "keep":
        raise Refused(base.path, "is a package: its dtype is kept, --dtype is for model folders")
    notes = [kinship(a, base, base.kin, options.allow_kin) for a, _ in adapters]
    given = [(neutral(a, base), weight) for a, weight in adapters]
    shapes = {n: t.shape for n, t in base.tensors.items()}
    untied = None
    if base.tied and _EMBEDDING in shapes and any(_is_end(n) for a, _ in given for n in a.updates):
        untied, shapes[_HEAD] = _HEAD, shapes[_EMBEDDING]
        notes.append(
            f"the head was tied to the embedding and now has a weight of its own ({_HEAD})"
        )
    gone = sorted(set(base.package.functions) - set(base.functions))
    if gone:
        notes.append(f"left out: {several(gone)}, which were made for the base as it was")
    places = placed(given, base, shapes)
    changes = {n: _change(base, n, places) for n in sorted(places.touched())}
    room = int(options.growth * _bytes(base.package, base.functions))
    if options.remedy == "bits":
        more = {n: _growth(c) for n, c in changes.items() if c.now and c.now.bits < WIDE}
        for name in hurt(more, places, room):
            changes[name].bits = WIDE
    for change in changes.values():
        _reshape(change, options.remedy)
    before = _bytes(base.package, base.functions)
    grown = sum(_size(c.arguments) - _size(_arguments(base, c)) for c in changes.values())
    if untied:
        op = base.ops.by_name[mangled(_EMBEDDING)]
        held = {o for p in parts_of(op, base.ops.by_name) for o in _offsets(p)}
        grown += sum(_span(base.package, o) for o in held)
    made = Plan(
        base, places, given, changes, untied, tuple(notes), options.remedy, before, before + grown
    )
    return made


def _is_end(name: str) -> bool:
    return name.removesuffix(".weight").endswith(
        (EMBEDDING, HEAD, "embed_tokens", "token_adapter.trainable_tokens_delta")
    )


def _span(package: Package, offset: int) -> int:
    begin, end = package.blobs.span(offset, "a weight")
    return end - begin


def _bytes(package: Package, functions: Sequence[str]) -> int:
    used = set().union(*(edit.offsets_of(package.functions[f]) for f in functions))
    return sum(_span(package, o) for o in used)


def _offsets(op: Any) -> set[int]:
    values = [*op.attributes.values(), *(b.value for a in op.inputs.values() for b in a.arguments)]
    return {v.blobFileValue.offset for v in values if v.WhichOneof("value") == "blobFileValue"}


# -- what changes ----------------------------------------------------------------------------------


def _op(base: PackageBase, name: str) -> Any:
    """The operation that yields a parameter; of a head that is to be untied, the embedding's."""
    by_name = base.ops.by_name
    return by_name.get(mangled(name)) or by_name[mangled(_EMBEDDING)]


def _change(base: PackageBase, name: str, places: Placed) -> Change:
    op = _op(base, name)
    if not is_compressed(op):
        return Change(name)
    code = code_in(base.package, op, base.ops.by_name)
    if code is None:
        what = f"is compressed as {printable(op.type, 60)}, which can't be done again: `loraduct decompress` it"
        raise Refused(base.path, f"{what}, fuse, and compress the result", tensor=name)
    if name in places.replaced:
        what = "replaces a compressed weight: `loraduct decompress` the package, fuse, and compress it again"
        raise Refused(places.replaced[name].path, what, tensor=name)
    parts = list(parts_of(op, base.ops.by_name))
    inner = parts[0]
    scaled = None
    if len(parts) > 1:
        tables = type_of(_value(inner, "lut").type)[1][0] or 1
        scaled = len(code.codes) // tables if tables > 1 else 0
    shell = replace(code, codes=None, numbers=None)
    old = inner.type.endswith("affine_dequantize") or "shape" in inner.attributes
    made = Change(name, shell, code.bits, scaled, old, code.codes.size)
    made.arguments = _arguments(base, made)
    return made


def _arguments(base: PackageBase, change: Change) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Those of the operations as they are: key -> (dtype, shape)."""
    found = {}
    if change.now is not None:
        for op in parts_of(_op(base, change.name), base.ops.by_name):
            for key in (*_CODES, *_TABLES):
                value = _value(op, key)
                if value is not None:
                    dtype, shape = type_of(value.type)
                    found[key] = dtype, tuple(n or 0 for n in shape)
    return found


def _value(op: Any, key: str) -> Any:
    """The value of an argument, wherever it stands; None if it is no value."""
    if key in op.attributes:
        return op.attributes[key]
    bound = op.inputs[key].arguments if key in op.inputs else ()
    return next((b.value for b in bound if b.WhichOneof("binding") == "value"), None)


def _growth(change: Change) -> int:
    """Bytes that WIDE bits cost."""
    wide = replace(change, bits=WIDE, arguments=dict(change.arguments))
    _reshape(wide, "bits")
    return _size(wide.arguments) - _size(change.arguments)


def _reshape(change: Change, remedy: str) -> None:
    """Dtypes and shapes of the arguments that are to be written: codes, and tables that are new."""
    now = change.now
    if now is None:
        return
    fresh = change.bits != now.bits or remedy == "rescale"
    for key, (dtype, shape) in list(change.arguments.items()):
        if key in _TABLES and not fresh:
            continue
        if key == "lut":
            entries = 1 << change.bits
            shape = (entries,) if change.old else (*shape[:-2], entries, 1)
        elif key == "indices" and change.old:
            shape = (-(-change.count * change.bits // 8),)
        elif key == "indices":
            dtype = f"UINT{change.bits}"
        elif key == "data":
            dtype = f"INT{change.bits}"
        change.arguments[key] = dtype, shape


def _size(arguments: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(-(-prod(shape) * CODES[dtype][1] // 8) for dtype, shape in arguments.values())


# -- writing ---------------------------------------------------------------------------------------


def write(made: Plan, stage: Path) -> None:
    """Write the package into ``stage``."""
    package = read(made.base.path)
    found = record.read(package)
    base = made.base
    for function in sorted(set(package.functions) - set(base.functions)):
        del package.functions[function]
        del found["functions"][function]
    _describe(package.model, base.functions)
    blocks = [block_of_function(package.functions[f]) for f in base.functions]
    if made.untied:
        for block in blocks:
            _untie(block)
    rows = [_named(block) for block in blocks]
    old = {id(by): by for by in rows}
    values: list[tuple[Change, str, list[Any]]] = []  # and where they go
    for change in made.changes.values():
        for key in _written(change, made.remedy):
            there = [v for by in old.values() for v in _values(by, change.name, key)]
            values.append((change, key, there))
            for value in there:
                value.ClearField("value")  # so that what nobody else reads is left behind
    layout = Layout()
    kept = sorted(set().union(*(edit.offsets_of(package.functions[f]) for f in base.functions)))
    edit.moved(package, {o: layout.copy(base.package.blobs, o, "a weight") for o in kept})
    late: list[tuple[Change, str, list[Any]]] = []
    for change, key, there in values:
        dtype, shape = change.arguments.get(key) or ("FLOAT16", _shape(base, change.name))
        if prod(shape) < INLINE and change.now is not None:
            late.append((change, key, there))
            continue
        at = layout.add(dtype, prod(shape), _pieces(made, change, key))
        for value in there:
            value.CopyFrom(blob_value(dtype, shape, at, WEIGHTS_NAME))

    def program() -> bytes:
        for change, key, there in late:
            if key not in change.made:
                change.made.update(_made(made, change))
            dtype, shape = change.arguments[key]
            for value in there:
                value.CopyFrom(immediate_value(dtype, change.made[key].reshape(shape)))
        for change in made.changes.values():
            change.made.clear()
        _note(found, made, layout)
        record.write(package.model, found)
        return bytes(package.model.SerializeToString(deterministic=True))

    copied(package, stage, layout.chunks(), program)


def read_through(made: Plan) -> None:
    """Compute everything and write nothing, so that what would be refused is."""
    for change in made.changes.values():
        for key in _written(change, made.remedy):
            for _ in _pieces(made, change, key):
                pass
        change.made.clear()


def _written(change: Change, remedy: str) -> list[str]:
    """Which arguments are written; of a plain constant its value. Codes come first."""
    if change.now is None:
        return ["val"]
    fresh = change.bits != change.now.bits or remedy == "rescale"
    return [k for k in change.arguments if k in _CODES or fresh]


def _shape(base: PackageBase, name: str) -> tuple[int, ...]:
    tensor = base.tensors.get(name) or base.tensors[_EMBEDDING]
    return tensor.shape


def _values(by_name: Mapping[str, Any], name: str, key: str) -> Iterator[Any]:
    """Where an argument of a parameter stands in one function."""
    for op in parts_of(by_name[mangled(name)], by_name):
        value = _value(op, key)
        if value is not None:
            yield value


def _named(block: Any) -> dict[str, Any]:
    return {o.name: op for op in block.operations for o in op.outputs}


def _pieces(made: Plan, change: Change, key: str) -> Iterator[Any]:
    """The bytes of one argument; all of a compressed matrix are worked out with its codes."""
    if change.now is None:
        tensor = made.base.tensors.get(change.name) or made.base.tensors[_EMBEDDING]
        yield from fused_tensor(change.name, tensor, made.places, "F16").pieces()
        return
    if key in _CODES:
        change.made = _made(made, change)
    values = change.made[key]
    if prod(change.arguments[key][1]) >= INLINE:  # what is in the program is asked for later
        del change.made[key]
    yield from stream(values, change.arguments[key][0])


def _made(made: Plan, change: Change) -> dict[str, Any]:
    """Key -> values of the matrix with its updates, one number each (iOS16's indices: packed)."""
    base, name = made.base, change.name
    code = code_in(base.package, _op(base, name), base.ops.by_name)
    assert code is not None
    updates, rows = made.places.updates.get(name, []), made.places.rows.get(name)
    try:
        if change.bits != code.bits or made.remedy == "rescale":
            found = _renewed(code, change, updates, rows)
        else:
            compensate = made.remedy in ("compensate", "bits")
            found = _again(
                fuse_coded.moved(code, updates, rows, name, compensate=compensate), change
            )
    except Refused as e:
        raise Refused(base.path, str(e)) from None
    return {k: v for k, (_, v) in found.items() if k in change.arguments}


def _renewed(code: Code, change: Change, updates: Any, rows: Any) -> dict[str, tuple[str, Any]]:
    import numpy as np

    whole = np.concatenate([b.copy() for b in fuse_coded.summed(code, updates, rows, change.name)])
    new = fuse_coded.renewed(code, whole, change.bits, change.scaled, change.name)
    if isinstance(new, quantize.Linear):
        return quantize.ios16(new) if change.old else quantize.ios18(new)
    return palette.ios16(new) if change.old else palette.ios18(new)


def _again(code: Code, change: Change) -> dict[str, tuple[str, Any]]:
    """The codes alone, as the operation takes them."""
    import numpy as np

    if code.kind == "int":
        data = (code.codes.astype(np.int16) - (1 << (code.bits - 1))).astype(np.int8)
        return {"data": ("", data), "quantized_data": ("", data)}
    if change.old:
        from loraduct.packing import packed

        return {"indices": ("", packed(code.codes, code.bits))}
    return {"indices": ("", code.codes)}


def _untie(block: Any) -> None:
    """Give the head a copy of the embedding's constant, under its own name."""
    by_name = _named(block)
    chain = list(parts_of(by_name[mangled(_EMBEDDING)], by_name))
    stem, new = mangled(_EMBEDDING), mangled(_HEAD)
    fresh, names = [], {}
    for op in chain:
        one = type(op).FromString(op.SerializeToString())
        before = op.outputs[0].name
        names[before] = edit.renamed(one, new + before.removeprefix(stem))
        for argument in one.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = names.get(binding.name, binding.name)
        fresh.append(one)
    done = []
    for op in block.operations:
        if op.outputs and op.outputs[0].name == mangled(HEAD):
            op.inputs["weight"].arguments[0].name = new
        done.append(op)
        if op.outputs and op.outputs[0].name == stem:
            done += fresh
    replaced(block, done)


def _describe(model: Any, functions: Sequence[str]) -> None:
    """Descriptions of these functions alone."""
    kept = [f for f in model.description.functions if f.name in functions]
    copies = [type(f).FromString(f.SerializeToString()) for f in kept]
    del model.description.functions[:]
    model.description.functions.extend(copies)
    if copies and model.description.defaultFunctionName not in functions:
        model.description.defaultFunctionName = functions[0]


def _note(found: dict[str, Any], made: Plan, layout: Layout) -> None:
    """The record of what it is now."""
    found["adapters"] = {}
    found["merged"] = [*found.get("merged", ()), *([a.path.name, w] for a, w in made.adapters)]
    found["weights"] = {"end": layout.end, "blobs": len(layout.parts)}
    if made.untied:
        found["base"]["tied"] = False
        found["base"]["parameters"] = sorted({*found["base"]["parameters"], _HEAD})
    declared = dict(found.get("compression") or {})
    declared.pop("adapter", None)
    wide = [c for c in made.changes.values() if c.now is not None and c.bits != c.now.bits]
    if wide and "base" in declared and wide[0].now is not None:
        declared["base"] = wide[0].now.kind  # widths of each tensor's own
    if declared:
        found["compression"] = declared
    else:
        found.pop("compression", None)
