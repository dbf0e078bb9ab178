"""Editing a program: adapters put into a function's operations, blobs found and moved.

A module's operation (``linear``, or ``gather`` of an embedding) is found by its result's name, which
is the module's. An adapter is a chain behind it: ``linear(x, A) -> mul(scale) -> linear(., B) -> add``.
The operation's result is renamed, and the last of the chain takes the old name, so that what reads
it stays as it is. Names of what is put in: a letter, which of the function's adapters, and which of
its modules: ``A0_17``, ``B0_17`` (factors), ``D`` (bias), ``M`` (magnitude), ``N`` (1 / norm);
``x``, ``y``, ``z``, ... are values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraduct.errors import Refused
from loraduct.files import read_bytes
from loraduct.formats.coreml.constexpr import is_compressed
from loraduct.formats.coreml.package import SPEC_LIMIT, WEIGHTS_NAME, Package
from loraduct.formats.coreml.program import (
    Shape,
    blob_value,
    blob_values,
    block_of_function,
    const,
    immediate_value,
    mangled,
    names_in,
    operation,
    string_value,
    tensor_type,
    type_of,
)
from loraduct.formats.coreml.schema import new
from loraduct.text import printable

HALF = "FLOAT16"
TINY = 2.0**-10
_REFERENCE = re.compile(
    b"\x0a%c%s\x10([\x80-\xff]*[\x00-\x7f])"
    % (len(WEIGHTS_NAME), re.escape(WEIGHTS_NAME.encode())),
    re.DOTALL,
)
# layout of an update -> the operation it can be put behind
KINDS = {"linear": "linear", "embedding": "gather"}


@dataclass(frozen=True)
class Blob:
    """A FLOAT16 tensor in the usual weight file. ``made``: the operation that gives it, where it is
    compressed."""

    offset: int
    shape: tuple[int, ...]
    made: Any = field(default=None, compare=False)

    @property
    def offsets(self) -> set[int]:
        """All that it is made of in the weight file."""
        more = None if self.made is None else _references(self.made.SerializeToString())
        return {self.offset} | (more or set())


@dataclass(frozen=True)
class Chain:
    """What one adapter does to one module's result y = W x.

    a (r, in), of an embedding (tokens, r); b (out, r). LoRA adds u = scale * b a x; with ``bias``
    (out,) it adds scale * (b a x + bias). With ``magnitude`` m and ``inverse`` n (out,) it is DoRA:
    (y + u) * n * m. Of several, each works on what those before it have made of y, as in PEFT
    (peft 0.21.2 `lora/dora.py`): the order counts where DoRA is among them.
    """

    stem: str
    a: Blob
    b: Blob
    scale: float
    bias: Blob | None = None
    magnitude: Blob | None = None
    inverse: Blob | None = None


@dataclass(frozen=True)
class Swap:
    """A parameter's constant with other values: ``const`` of that name, read by ``module`` alone
    (by all that read it, if None) as its ``parameter``."""

    const: str
    blob: Blob
    module: str | None = None
    parameter: str = ""


class Ops:
    """A function's operations, by the names of their results."""

    def __init__(self, function: Any, package: Package) -> None:
        self.package = package
        self.block = block_of_function(function)
        self.all = list(self.block.operations)
        self.by_name = {o.name: op for op in self.all for o in op.outputs}

    def site(self, module: str, layout: str) -> Any:
        """The operation of a module. Raises Refused where the program has none of that kind."""
        op = self.by_name.get(mangled(module))
        if layout not in KINDS or op is None or op.type != KINDS[layout] or len(op.outputs) != 1:
            what = "convolutions, experts and bare parameters have no place in a package"
            why = what if layout not in KINDS else f"the package has no {KINDS[layout]} layer of it"
            raise Refused(self.package.path, f"{why}; leave it out", tensor=module)
        return op

    def blob(self, name: str) -> Blob:
        """The blob of a constant. Raises Refused where there is none, or no FLOAT16 one."""
        op = self.by_name.get(name)
        if op is not None and is_compressed(op):
            return _compressed(op)
        value = op.attributes["val"] if op is not None and op.type == "const" else None
        if value is None or value.WhichOneof("value") != "blobFileValue":
            raise Refused(
                self.package.spec_path, "is in loraduct's record, not in the program", tensor=name
            )
        dtype, shape = type_of(value.type)
        file = value.blobFileValue.fileName
        if file != WEIGHTS_NAME:
            self.package.weight_path(file)  # says so if it lies outside
        if dtype != HALF or None in shape or file != WEIGHTS_NAME:
            what = f"is {dtype} in {printable(file, 80)}, a {HALF} in {WEIGHTS_NAME} is expected"
            raise Refused(self.package.spec_path, what, tensor=name)
        return Blob(value.blobFileValue.offset, tuple(s for s in shape if s is not None))


def _compressed(op: Any) -> Blob:
    _, shape = type_of(op.outputs[0].type)
    held = _references(op.SerializeToString()) or {0}
    return Blob(min(held), tuple(s or 0 for s in shape), op)


def used_blobs(package: Package) -> dict[int, int]:
    """Offsets of the usual weight file's blobs that the program on disk refers to -> where they end.

    Raises Refused for what is not in the file.
    """
    data = read_bytes(package.spec_path, SPEC_LIMIT)
    found = _references(data)
    if found is None:
        found = set().union(*(offsets_of(f) for f in package.functions.values()))
    return {o: package.blobs.span(o, "a weight")[1] for o in sorted(found)}


def offsets_of(function: Any) -> set[int]:
    """Offsets in the usual weight file that a function refers to."""
    found = _references(function.SerializeToString())
    if found is not None:
        return found
    return {v.offset for v in _values_of(function) if v.fileName == WEIGHTS_NAME}


def _references(data: bytes) -> set[int] | None:
    """Offsets in a message's bytes, where a blobFileValue is its file's name and then its offset.

    A walk over all operations takes ten times as long; it is needed where the name stands
    elsewhere too, which None says.
    """
    found = _REFERENCE.findall(data)
    complete = len(found) == data.count(WEIGHTS_NAME.encode())
    return {_varint(digits) for digits in found} if complete else None


def _varint(digits: bytes) -> int:
    """Seven bits a byte, the low ones first."""
    return sum((digit & 0x7F) << (7 * i) for i, digit in enumerate(digits))


def _values_of(function: Any) -> Iterator[Any]:
    for block in function.block_specializations.values():
        yield from blob_values(block)


def moved(package: Package, to: Mapping[int, int]) -> None:
    """Every reference into the usual weight file, to where its blob is now."""
    for function in package.functions.values():
        for value in _values_of(function):
            if value.fileName == WEIGHTS_NAME:
                value.offset = to[value.offset]


def adapted(
    package: Package,
    function: Any,
    chains: Mapping[str, Sequence[Chain]],
    swaps: Sequence[Swap] = (),
) -> Any:
    """A copy of ``function`` with chains (by module) put in and parameters swapped."""
    ops = Ops(function, package)
    made = new("Function", opset=function.opset)
    made.inputs.extend(function.inputs)
    block = made.block_specializations[function.opset]
    block.outputs.extend(ops.block.outputs)
    adder = _Adder(package, block.operations, set(ops.by_name))
    everywhere = {s.const: s.blob for s in swaps if s.module is None}
    own = {mangled(s.module): s for s in swaps if s.module is not None}
    behind = {mangled(m): c for m, c in chains.items()}
    touched = {id(ops.by_name[n]) for n in (*everywhere, *own, *behind)}
    begin = 0
    for at in (i for i, op in enumerate(ops.all) if id(op) in touched):
        block.operations.extend(ops.all[begin:at])
        begin = at + 1
        op = ops.all[at]
        name = op.outputs[0].name
        swap = own.get(name)
        if swap is not None:
            adder.constant(swap.const, swap.blob)
        done = block.operations.add()
        done.CopyFrom(op)
        if name in everywhere:  # whatever it was: a compressed one gives way too
            done.CopyFrom(_constant(name, everywhere[name]))
        if swap is not None:
            del done.inputs[swap.parameter].arguments[:]
            done.inputs[swap.parameter].arguments.add(name=swap.const)
        if name in behind:
            adder.behind(done, behind[name])
    block.operations.extend(ops.all[begin:])
    return made


def _constant(name: str, blob: Blob) -> Any:
    """The operation that yields a blob."""
    if blob.made is None:
        return const(name, blob_value(HALF, blob.shape, blob.offset, WEIGHTS_NAME))
    made = new("Operation")
    made.CopyFrom(blob.made)
    renamed(made, name)
    return made


class _Adder:
    """Puts operations behind those there are."""

    def __init__(self, package: Package, operations: Any, taken: set[str]) -> None:
        self.package, self.operations, self.taken = package, operations, taken
        self.scales: dict[float, str] = {}

    def _name(self, name: str) -> str:
        if name in self.taken:
            raise Refused(self.package.spec_path, "is there twice", tensor=name)
        self.taken.add(name)
        return name

    def constant(self, name: str, blob: Blob) -> str:
        self.operations.append(_constant(self._name(name), blob))
        return name

    def scale(self, value: float) -> str:
        """A number; equal ones are one constant."""
        if value not in self.scales:
            name = self._name(f"S{len(self.scales)}")
            self.operations.append(const(name, immediate_value(HALF, value)))
            self.scales[value] = name
        return self.scales[value]

    def op(self, kind: str, name: str, shape: Shape, **inputs: str) -> str:
        """One operation with one FLOAT16 result."""
        out = [(self._name(name), tensor_type(HALF, shape))]
        self.operations.append(operation(kind, name, inputs, out))
        return name

    def behind(self, op: Any, chains: Sequence[Chain]) -> None:
        """Chains behind a module's operation (already copied), whose name the last one takes."""
        module = op.outputs[0].name
        _, shape = type_of(op.outputs[0].type)
        lookup = op.type == "gather"
        x = (names_in(op, "indices" if lookup else "x") or [""])[0]
        like = new("Operation") if lookup else None
        if like is not None:
            like.CopyFrom(op)
        dora = any(c.magnitude for c in chains)
        bias = names_in(op, "bias")[:1] if dora else []
        if bias:  # DoRA scales W x alone
            del op.inputs["bias"]
        y = renamed(op, self._name(f"{module}_base"))
        self.taken.discard(module)
        for c in chains:
            y = self._chain(c, x, like, shape, y)
        if bias:
            y = self.op("add", f"{module}_biased", shape, x=y, y=bias[0])
        last = self.operations[-1]
        self.taken.discard(y)
        renamed(last, self._name(module))

    def _chain(self, c: Chain, x: str, like: Any | None, shape: Shape, y: str) -> str:
        s = c.stem
        rank = c.a.shape[1] if like is not None else c.a.shape[0]
        inner = (*shape[:-1], rank)
        a, b = self.constant(f"A{s}", c.a), self.constant(f"B{s}", c.b)
        u = (
            self.op("linear", f"x{s}", inner, x=x, weight=a)
            if like is None
            else self._gather(like, f"x{s}", inner, a)
        )
        # r values are fewer than out; but a tiny scale would push them below FLOAT16's numbers
        late = c.bias is not None or abs(c.scale) < TINY
        if c.scale != 1 and not late:
            u = self.op("mul", f"y{s}", inner, x=u, y=self.scale(c.scale))
        extra = {"bias": self.constant(f"D{s}", c.bias)} if c.bias else {}
        u = self.op("linear", f"z{s}", shape, x=u, weight=b, **extra)
        if c.scale != 1 and late:
            u = self.op("mul", f"y{s}", shape, x=u, y=self.scale(c.scale))
        if c.magnitude is None or c.inverse is None:
            return self.op("add", f"o{s}", shape, x=y, y=u)
        m, n = self.constant(f"M{s}", c.magnitude), self.constant(f"N{s}", c.inverse)
        u = self.op("add", f"u{s}", shape, x=y, y=u)
        u = self.op("mul", f"n{s}", shape, x=u, y=n)
        return self.op("mul", f"m{s}", shape, x=u, y=m)

    def _gather(self, like: Any, name: str, shape: Shape, a: str) -> str:
        """The embedding's lookup, in a."""
        made = self.operations.add()
        made.CopyFrom(like)
        renamed(made, self._name(name))
        made.outputs[0].type.CopyFrom(tensor_type(HALF, shape))
        del made.inputs["x"].arguments[:]
        made.inputs["x"].arguments.add(name=a)
        return name


def renamed(op: Any, name: str) -> str:
    """Give an operation's one result, and the operation, another name."""
    op.outputs[0].name = name
    op.attributes["name"].CopyFrom(string_value(name))
    return name
