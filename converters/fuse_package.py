"""A Core ML package with adapters fused into its base's weights, compressed or not.

The result has the functions of the base alone; what they read is written once. A weight in 16 bits is
summed in float32 and rounded once. A compressed one stays in the form it has, see
`converters.fuse_coded`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.converters import compress_code, fuse_coded
from loraduct.converters.compress_code import Argument, Way
from loraduct.converters.compress_sites import NEW, OLD, Weight
from loraduct.converters.compress_write import copied, replaced
from loraduct.converters.fuse import EMBEDDINGS, HEAD, moves_one_side
from loraduct.converters.fuse_folder import Options, idle, kinship
from loraduct.converters.fuse_packed import WIDE, hurt
from loraduct.converters.fuse_places import Placed, check_parted, placed
from loraduct.converters.fuse_stream import fused_tensor
from loraduct.converters.neutral import neutral
from loraduct.converters.package import undescribe
from loraduct.errors import Refused
from loraduct.formats.coded import Code
from loraduct.formats.coreml import edit, record, stored
from loraduct.formats.coreml.blob import CODES, Layout
from loraduct.formats.coreml.coded import INLINE, argument_in, arguments, code_in
from loraduct.formats.coreml.constexpr import is_compressed, parts_of
from loraduct.formats.coreml.package import WEIGHTS_NAME, Package, read
from loraduct.formats.coreml.program import (
    blob_value,
    blob_values,
    mangled,
    type_of,
    value_of,
)
from loraduct.formats.coreml.schema import new
from loraduct.formats.coreml.stored import PackageBase
from loraduct.packing import packed
from loraduct.tensor import Tensor
from loraduct.text import printable, several

COMPARED = ("rescale", "compensate", "bits")  # what --remedy auto tries besides
_WAY_OUT = "`loraduct decompress` it, fuse, and compress the result"


@dataclass
class Change:
    """One parameter that changes. Of a compressed one: how it is stored ``now``, in iOS16's ``form`` or
    iOS18's; ``then``: how its tables are made anew, None where they stay; ``alike``: whether what is
    made in the way of ``now`` has their shape."""

    weight: Weight
    now: Way | None = None
    form: str = NEW
    alike: bool = True
    then: Way | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def written(self) -> list[Argument]:
        """The arguments that get other values; codes come first."""
        if self.now is None:
            return [Argument("val", self.weight.dtype, self.weight.shape)]
        found = compress_code.arguments(self.weight, self.then or self.now, self.form)
        return found if self.then else found[:1]


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
    notes += idle(adapters)
    given = [(neutral(a, base), weight) for a, weight in adapters]
    shapes = {n: t.shape for n, t in base.tensors.items()}
    untied = None
    if base.tied and EMBEDDINGS in shapes and moves_one_side(given):
        check_parted(given)
        untied, shapes[HEAD] = HEAD, shapes[EMBEDDINGS]
        notes.append(f"the head was tied to the embedding and now has a weight of its own ({HEAD})")
    gone = sorted(set(base.package.functions) - set(base.functions))
    if gone:
        notes.append(f"left out: {several(gone)}, which were made for the base as it was")
    places = placed(given, base, shapes)
    changes = {n: _change(base, n, places) for n in sorted(places.touched())}
    before = _bytes(base.package, base.functions)
    _renew(base, changes, places, options, int(options.growth * before))
    grown = sum(_growth(c, c.then) for c in changes.values() if c.then)
    if untied:
        grown += sum(_span(base.package, o) for o in _offsets(base, EMBEDDINGS))
    return Plan(
        base, places, given, changes, untied, tuple(notes), options.remedy, before, before + grown
    )


def _span(package: Package, offset: int) -> int:
    begin, end = package.blobs.span(offset, "a weight")
    return end - begin


def _bytes(package: Package, functions: Sequence[str]) -> int:
    used = set().union(*(edit.offsets_of(package.functions[f]) for f in functions))
    return sum(_span(package, o) for o in used)


def _offsets(base: PackageBase, name: str) -> set[int]:
    """Of all that a parameter is made of."""
    parts = new("Block")
    parts.operations.extend(parts_of(_op(base, name), base.ops.by_name))
    return {v.offset for v in blob_values(parts) if v.fileName == WEIGHTS_NAME}


# -- what changes ----------------------------------------------------------------------------------


def _op(base: PackageBase, name: str) -> Any:
    """The operation that yields a parameter; of a head that is to be untied, the embedding's."""
    by_name = base.ops.by_name
    return by_name.get(mangled(name)) or by_name[mangled(EMBEDDINGS)]


def _tensor(base: PackageBase, name: str) -> Tensor:
    """What the operation yields."""
    return base.tensors.get(name) or base.tensors[EMBEDDINGS]


def _change(base: PackageBase, name: str, places: Placed) -> Change:
    op, weight = _op(base, name), Weight(0, name, "FLOAT16", _tensor(base, name).shape)
    if not is_compressed(op):
        return Change(weight)
    code = code_in(base.package, op, base.ops.by_name)
    if code is None:
        what = f"is compressed as {printable(op.type, 60)}, which can't be done again"
        raise Refused(base.path, f"{what}: {_WAY_OUT}", tensor=name)
    if name in places.replaced:
        what = "replaces a compressed weight: `loraduct decompress` the package, fuse, and compress it again"
        raise Refused(places.replaced[name].path, what, tensor=name)
    inner, *outer = parts_of(op, base.ops.by_name)
    form = OLD if inner.type.endswith("affine_dequantize") or "shape" in inner.attributes else NEW
    held = type_of(argument_in(inner, "lut" if code.kind == "lut" else "scale").type)
    # a scale behind tables is multiplied into the code's: how many tables there are, they say
    blocks = held[1][:2] if code.kind == "lut" and form == NEW else code.numbers.shape[:2]
    now = fuse_coded.way_of(code, blocks, scaled=bool(outer))
    made = compress_code.arguments(weight, now, form)[1]
    return Change(weight, now, form, alike=(made.dtype, made.shape) == held)


def _renew(
    base: PackageBase, changes: Mapping[str, Change], places: Placed, options: Options, room: int
) -> None:
    """Say which tables are made anew, and how. Raises Refused for those that can't be."""
    now = {n: c.now for n, c in changes.items() if c.now}
    then = now if options.remedy == "rescale" else {}
    if options.remedy == "bits":
        wide = {n: replace(w, bits=WIDE) for n, w in now.items() if w.bits < WIDE}
        more = {n: _growth(changes[n], w) for n, w in wide.items()}
        then = {n: wide[n] for n in hurt(more, places, room)}
    for name, way in then.items():
        if not changes[name].alike:
            what = "has tables, or scales, of blocks that can't be made again"
            raise Refused(base.path, f"{what}: {_WAY_OUT}", tensor=name)
        changes[name].then = way


def _growth(change: Change, then: Way) -> int:
    """Bytes that another way costs."""
    before, after = (
        sum(
            -(-a.count * CODES[a.dtype][1] // 8)
            for a in compress_code.arguments(change.weight, way, change.form)
        )
        for way in (change.now or then, then)
    )
    return after - before


# -- writing ---------------------------------------------------------------------------------------


def write(made: Plan, stage: Path) -> None:
    """Write the package into ``stage``."""
    package = read(made.base.path)
    found = record.read(package)
    base = made.base
    gone = sorted(set(package.functions) - set(base.functions))
    for function in gone:
        del package.functions[function]
        del found["functions"][function]
    undescribe(package.model, gone)
    if made.untied:
        for function in base.functions:
            _untie(edit.Ops(package.functions[function], package))
    rows = [edit.Ops(package.functions[f], package).by_name for f in base.functions]
    values: list[tuple[Change, Argument, list[Any]]] = []  # and where they go
    for change in made.changes.values():
        for argument in change.written:
            stem = mangled(change.weight.name)
            there = [v for by in rows for v in _values(parts_of(by[stem], by), argument.key)]
            values.append((change, argument, there))
            for value in there:
                value.ClearField("value")  # so that what nobody else reads is left behind
    layout = Layout()
    kept = sorted(set().union(*(edit.offsets_of(package.functions[f]) for f in base.functions)))
    edit.moved(package, {o: layout.copy(base.package.blobs, o, "a weight") for o in kept})
    late: list[tuple[Change, Argument, list[Any]]] = []
    for change, argument, there in values:
        if argument.count < INLINE and change.now is not None:
            late.append((change, argument, there))
            continue
        at = layout.add(argument.dtype, argument.count, _pieces(made, change, argument))
        for value in there:
            value.CopyFrom(blob_value(argument.dtype, argument.shape, at, WEIGHTS_NAME))

    def program() -> bytes:
        for change, argument, there in late:
            if argument.key not in change.made:
                change.made.update(_made(made, change))
            for value in there:
                value.CopyFrom(compress_code.value(argument, None, change.made[argument.key]))
        for change in made.changes.values():
            change.made.clear()
        _note(found, made, layout)
        record.write(package.model, found)
        return bytes(package.model.SerializeToString(deterministic=True))

    copied(package, stage, layout.chunks(), program)


def read_through(made: Plan) -> None:
    """Compute everything and write nothing, so that what would be refused is."""
    for change in made.changes.values():
        for argument in change.written:
            for _ in _pieces(made, change, argument):
                pass
        change.made.clear()


def _values(parts: Iterable[Any], key: str) -> Iterator[Any]:
    """An argument of a parameter, of whichever of its operations has it."""
    for op in parts:
        value = argument_in(op, key)
        if value is not None:
            yield value


def _pieces(made: Plan, change: Change, argument: Argument) -> Iterator[Any]:
    """The bytes of one argument; all of a compressed matrix are worked out with its codes."""
    name = change.weight.name
    if change.now is None:
        yield from fused_tensor(name, _tensor(made.base, name), made.places, "F16").pieces()
        return
    if argument == change.written[0]:
        change.made = _made(made, change)
    values = change.made[argument.key]
    if argument.count >= INLINE:  # what is in the program is asked for later
        del change.made[argument.key]
    yield from compress_code.pieces(values, argument.dtype)


def _made(made: Plan, change: Change) -> dict[str, Any]:
    """Key -> values of the matrix with its updates, one number each (iOS16's indices: packed)."""
    base, name = made.base, change.weight.name
    code = code_in(base.package, _op(base, name), base.ops.by_name)
    assert code is not None
    updates, rows = made.places.updates.get(name, []), made.places.rows.get(name)
    try:
        if change.then is not None:
            found = fuse_coded.renewed(code, updates, rows, change.then, name)
            if not isinstance(found, Code):
                return compress_code.values_of(found, change.weight, change.form)
        else:
            compensate = made.remedy in ("compensate", "bits")
            found = fuse_coded.moved(code, updates, rows, name, compensate=compensate)
    except Refused as e:
        raise Refused(base.path, str(e)) from None
    _, codes = next(iter(arguments(found).values()))
    first, *others = change.written
    old_table = first.key == "indices" and change.form == OLD
    parts = list(parts_of(_op(base, name), base.ops.by_name))
    held = {a.key: next(_values(parts, a.key)) for a in others}
    return {first.key: packed(codes, code.bits) if old_table else codes} | {
        key: value_of(base.package, value, name) for key, value in held.items()
    }


def _untie(ops: edit.Ops) -> None:
    """Give the head a copy of the embedding's constant, under its own name."""
    stem, new_stem = mangled(EMBEDDINGS), mangled(HEAD)
    fresh, names = [], {}
    for op in parts_of(ops.by_name[stem], ops.by_name):
        one = type(op).FromString(op.SerializeToString())
        before = op.outputs[0].name
        names[before] = edit.renamed(one, new_stem + before.removeprefix(stem))
        for argument in one.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = names.get(binding.name, binding.name)
        fresh.append(one)
    done = []
    for op in ops.all:
        if op.outputs and op.outputs[0].name == mangled(stored.HEAD):
            op.inputs["weight"].arguments[0].name = new_stem
        done.append(op)
        if op.outputs and op.outputs[0].name == stem:
            done += fresh
    replaced(ops.block, done)


def _note(found: dict[str, Any], made: Plan, layout: Layout) -> None:
    """The record of what it is now."""
    found["adapters"] = {}
    found["merged"] = [*found.get("merged", ()), *([a.path.name, w] for a, w in made.adapters)]
    found["weights"] = {"end": layout.end, "blobs": len(layout.parts)}
    if made.untied:
        found["base"]["tied"] = False
        found["base"]["parameters"] = sorted({*found["base"]["parameters"], HEAD})
    declared = dict(found.get("compression") or {})
    declared.pop("adapter", None)
    wide = [c.then for c in made.changes.values() if c.then and c.then != c.now]
    if wide and "base" in declared:
        declared["base"] = wide[0].kind  # widths of each tensor's own
    if declared:
        found["compression"] = declared
    else:
        found.pop("compression", None)
