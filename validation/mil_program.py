"""A function of an ML program made ready to run: checked, its constants apart from its steps.

Everything that can be known before running is refused here, by the name of the operation's output:
unknown operations and parameters, names that are not defined yet, dtypes that do not agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loraduct.errors import Refused
from loraduct.formats.coreml.package import Package
from loraduct.formats.coreml.program import NUMPY, Shape, type_of, value_of
from loraduct.text import several
from loraduct.validation import (
    mil_constexpr,
    mil_ops_element,
    mil_ops_index,
    mil_ops_matrix,
    mil_ops_shape,
)
from loraduct.validation.mil_numbers import limited
from loraduct.validation.mil_operation import TUPLES, Op

OPS: dict[str, Op] = (
    mil_ops_element.OPS
    | mil_ops_shape.OPS
    | mil_ops_index.OPS
    | mil_ops_matrix.OPS
    | mil_constexpr.OPS
)
READ, WRITE, UPDATE = "read_state", "write_state", "coreml_update_state"
# Operations on states: their parameters, all required. The first is the state.
STATE_OPS = {READ: ("input",), WRITE: ("input", "data"), UPDATE: ("state", "value")}
SUPPORTED = frozenset({"const", *STATE_OPS, *OPS})


@dataclass(frozen=True)
class Constant:
    """A value known before anything runs, made when it is first used.

    ``key``: equal for equal constants of a package, whatever function they are in.
    """

    name: str
    dtype: str
    shape: Shape
    key: Any = field(repr=False)
    make: Callable[[Any], Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Output:
    """What an operation declares to yield. ``shape`` is None where even the rank is open."""

    name: str
    dtype: str
    shape: Shape | None


Argument = str | Constant | tuple[str | Constant, ...]  # a name, a constant, or several


@dataclass(frozen=True)
class Step:
    """One operation. ``frees``: values that nothing needs after it; ``replaced``: states that are
    written before they are read again.
    """

    kind: str
    arguments: dict[str, Argument]
    outputs: tuple[Output, ...]
    frees: tuple[str, ...] = ()
    replaced: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """What errors call it."""
        return (
            self.outputs[0].name if self.outputs else str(next(iter(self.arguments.values()), ""))
        )


@dataclass(frozen=True)
class Program:
    """A function, ready to run. ``types``: name -> dtype of every value."""

    function: str
    opset: int
    inputs: dict[str, Output]
    states: dict[str, Output]
    steps: tuple[Step, ...]
    outputs: dict[str, str | Constant]
    types: dict[str, str]


def declared(named: Any) -> Output:
    """A NamedValueType."""
    dtype, shape = type_of(named.type)
    if named.type.WhichOneof("type") == "tensorType" and any(
        d.WhichOneof("dimension") == "unknown" and d.unknown.variadic
        for d in named.type.tensorType.dimensions
    ):
        return Output(named.name, dtype, None)
    return Output(named.name, dtype, shape)


def read(package: Package, function: str) -> Program:
    """The function ``function`` of a package. Raises Refused; nothing has run then."""
    return _Reader(package, function).program()


def block(package: Package, function: str) -> Any:
    """The block of a function. Raises Refused when there is none."""
    if function not in package.functions:
        known = several(sorted(package.functions), 5)
        raise Refused(package.path, f"has no function {function!r}; it has {known}")
    message = package.functions[function]
    if message.opset not in message.block_specializations:
        raise Refused(
            package.path, f"function {function} has no block for its opset {message.opset!r}"
        )
    return message.block_specializations[message.opset]


class _Reader:
    """One pass over a function's operations."""

    def __init__(self, package: Package, function: str) -> None:
        self.package, self.function = package, function
        self.block = block(package, function)
        self.types: dict[str, str] = {}  # of everything defined so far: name -> dtype
        self.constants: dict[str, Constant] = {}
        self.states: dict[str, Output] = {}
        self.steps: list[Step] = []

    def refuse(self, op: Any, what: str) -> Refused:
        """An error that names an operation, its output and the function."""
        name = op.outputs[0].name if op.outputs else "(no output)"
        return Refused(
            self.package.path, f"op {op.type} in function {self.function}: {what}", tensor=name
        )

    def program(self) -> Program:
        message = self.package.functions[self.function]
        opset = message.opset.removeprefix("CoreML")
        if not opset.isdigit():
            raise Refused(self.package.path, f"function {self.function} has the opset {opset!r}")
        unknown = [op for op in self.block.operations if op.type not in SUPPORTED or op.blocks]
        if unknown:
            raise self.refuse(unknown[0], "this operation is not known here")
        inputs: dict[str, Output] = {}
        for named in message.inputs:
            kind = named.type.WhichOneof("type")
            if kind not in ("tensorType", "stateType"):
                raise Refused(self.package.path, f"an input that is a {kind}", tensor=named.name)
            kept = self.states if kind == "stateType" else inputs
            kept[named.name] = declared(named)
            if kept[named.name].dtype not in NUMPY:
                what = f"an input of {kept[named.name].dtype}"
                raise Refused(self.package.path, what, tensor=named.name)
            self.define(named.name, kept[named.name].dtype, None)
        for op in self.block.operations:
            try:
                self.add(op)
            except Refused as e:  # what reads types and sizes knows neither file nor operation
                named = str(self.package.path) in str(e)
                raise e if named else self.refuse(op, str(e)) from None
        outputs: dict[str, str | Constant] = {}
        for name in self.block.outputs:
            if name not in self.types or name in self.states:
                raise Refused(
                    self.package.path,
                    f"function {self.function} yields {name!r}, which is no value",
                )
            outputs[name] = self.constants.get(name, name)
        steps = _with_frees(self.steps, {n for n in outputs.values() if isinstance(n, str)})
        return Program(self.function, int(opset), inputs, self.states, steps, outputs, self.types)

    def define(self, name: str, dtype: str, op: Any) -> None:
        """Every name is given once."""
        if name in self.types:
            what = "a name that was given before"
            raise (
                self.refuse(op, what)
                if op is not None
                else Refused(self.package.path, f"function {self.function}: {what}", tensor=name)
            )
        self.types[name] = dtype

    def add(self, op: Any) -> None:
        if op.type == "const":
            self.constant(op)
        elif op.type in STATE_OPS:
            self.state(op)
        elif op.type.startswith(mil_constexpr.PREFIX):
            self.compressed(op)
        else:
            arguments = self.arguments(op)
            outputs = self.outputs(op, arguments)
            self.steps.append(Step(op.type, arguments, outputs))

    def constant(self, op: Any) -> None:
        if len(op.outputs) != 1 or "val" not in op.attributes:
            raise self.refuse(op, "expected one output and a value (val)")
        out, found = declared(op.outputs[0]), self.value(op.attributes["val"], op)
        if (found.dtype, found.shape) != (out.dtype, out.shape):
            raise self.refuse(
                op,
                f"holds {_typed(found.dtype, found.shape)}, declares {_typed(out.dtype, out.shape)}",
            )
        self.define(out.name, out.dtype, op)
        self.constants[out.name] = found

    def value(self, value: Any, op: Any) -> Constant:
        """A value in the program or the weight file."""
        name = op.outputs[0].name if op.outputs else op.type
        dtype, shape = type_of(value.type)
        limited([s for s in shape if s is not None])
        key = value.SerializeToString(deterministic=True)
        return Constant(name, dtype, shape, key, lambda _: value_of(self.package, value, name))

    def binding(self, binding: Any, op: Any) -> str | Constant:
        if binding.WhichOneof("binding") == "value":
            return self.value(binding.value, op)
        if binding.name not in self.types:
            raise self.refuse(op, f"uses {binding.name!r}, which is not defined before it")
        name = str(binding.name)
        return self.constants.get(name, name)

    def arguments(self, op: Any) -> dict[str, Argument]:
        """Parameter -> what is bound to it, checked against the operation's parameters."""
        known = OPS[op.type].parameters
        found: dict[str, Argument] = {}
        for parameter, argument in op.inputs.items():
            bound = tuple(self.binding(b, op) for b in argument.arguments)
            if parameter in TUPLES:
                found[parameter] = bound
            elif len(bound) == 1:
                found[parameter] = bound[0]
            else:
                raise self.refuse(op, f"{len(bound)} values for {parameter}, expected 1")
        for attribute, value in op.attributes.items():  # where iOS16 keeps compressed constants
            if attribute in known and attribute not in found:
                found[attribute] = self.value(value, op)
        if strange := sorted(found.keys() - known.keys()):
            raise self.refuse(op, f"the parameter {strange[0]} is not known here")
        if missing := [p for p, required in known.items() if required and not found.get(p)]:
            raise self.refuse(op, f"has no {missing[0]}")
        if unread := [n for n in names_in(found) if n in self.states]:
            raise self.refuse(op, f"takes the state {unread[0]} without reading it")
        same = {p: self.dtype(found[p]) for p in OPS[op.type].same if p in found}
        if len(set(same.values())) > 1:
            shown = ", ".join(f"{p} {dtype}" for p, dtype in same.items())
            raise self.refuse(op, f"one dtype is expected, found {shown}")
        return found

    def dtype(self, argument: Argument) -> str:
        first = argument[0] if isinstance(argument, tuple) else argument
        return first.dtype if isinstance(first, Constant) else self.types[first]

    def outputs(self, op: Any, arguments: dict[str, Argument]) -> tuple[Output, ...]:
        """The declared outputs, their dtypes checked."""
        rule = OPS[op.type].dtype
        outputs = tuple(declared(o) for o in op.outputs)
        rules = rule if isinstance(rule, tuple) else (rule,) * len(outputs)
        if not outputs or len(outputs) > len(rules):
            raise self.refuse(op, f"{len(outputs)} outputs")
        for out, source in zip(outputs, rules, strict=False):
            expected = self.expected(op, source, arguments)
            if out.dtype != expected:
                raise self.refuse(op, f"yields {expected}, declares {out.dtype}")
            if out.shape is not None:
                limited([s for s in out.shape if s is not None])
            self.define(out.name, out.dtype, op)
        return outputs

    def expected(self, op: Any, source: str, arguments: dict[str, Argument]) -> str:
        if source.isupper():
            return source
        if source not in arguments:
            return OPS[op.type].default
        dtype = self.dtype(arguments[source])
        if op.type == "matmul":  # a constant may have another dtype (iOS17 matmul)
            y = arguments["y"]
            return self.dtype(y) if isinstance(arguments["x"], Constant) else dtype
        if dtype != "STRING":
            return dtype
        constant = arguments[source]
        name = constant.make(None) if isinstance(constant, Constant) else None
        if not isinstance(name, str) or name not in mil_ops_element.DTYPES:
            raise self.refuse(op, f"{source} is {name!r}, expected a dtype")
        return mil_ops_element.DTYPES[name]

    def compressed(self, op: Any) -> None:
        """A constexpr operation: a constant made of constants."""
        arguments = self.arguments(op)
        constants = {p: a for p, a in arguments.items() if isinstance(a, Constant)}
        if len(constants) < len(arguments):
            raise self.refuse(op, "expected constants only")
        outputs = self.outputs(op, arguments)
        key = (op.type, tuple(sorted((p, c.key) for p, c in constants.items())))
        for i, out in enumerate(outputs):
            made = Constant(
                out.name, out.dtype, out.shape or (), (*key, i), _maker(op.type, constants, i)
            )
            self.constants[out.name] = made

    def state(self, op: Any) -> None:
        parameters = STATE_OPS[op.type]
        if set(op.inputs) != set(parameters) or len(op.outputs) != (op.type != WRITE):
            raise self.refuse(op, f"expected the parameters {', '.join(parameters)}")
        found: dict[str, Argument] = {}
        for parameter in parameters:
            if len(op.inputs[parameter].arguments) != 1:
                raise self.refuse(op, f"expected one value for {parameter}")
            found[parameter] = self.binding(op.inputs[parameter].arguments[0], op)
        name = found[parameters[0]]
        if not isinstance(name, str) or name not in self.states:
            raise self.refuse(op, f"{parameters[0]} is no state")
        held = self.states[name]
        outputs = tuple(declared(o) for o in op.outputs)
        dtypes = [o.dtype for o in outputs] + [self.dtype(found[p]) for p in parameters[1:]]
        if set(dtypes) != {held.dtype}:
            raise self.refuse(op, f"the state is {held.dtype}, found {', '.join(dtypes)}")
        for out in outputs:
            self.define(out.name, out.dtype, op)
        self.steps.append(Step(op.type, found, outputs))


def _maker(kind: str, constants: dict[str, Constant], index: int) -> Callable[[Any], Any]:
    """What decompresses; ``exact`` gives a constant in its own dtype."""

    def make(exact: Callable[[Constant], Any]) -> Any:
        found = OPS[kind].run(**{p: exact(c) for p, c in constants.items()})
        return found[index] if isinstance(found, tuple) else found

    return make


def _typed(dtype: str, shape: Shape | None) -> str:
    return f"{dtype} {list(shape) if shape is not None else '?'}"


def names_in(arguments: dict[str, Argument]) -> list[str]:
    """Names among the arguments of an operation; constants have none."""
    found: list[str] = []
    for argument in arguments.values():
        every = argument if isinstance(argument, tuple) else (argument,)
        found += [a for a in every if isinstance(a, str)]
    return found


def _with_frees(steps: list[Step], kept: set[str]) -> tuple[Step, ...]:
    """The steps, each with the values whose last use it is and the states that are replaced."""
    seen, replaced = set(kept), frozenset[str]()
    out = []
    for step in reversed(steps):
        used = names_in(step.arguments) + [o.name for o in step.outputs]
        frees = tuple(n for n in dict.fromkeys(used) if n not in seen)
        seen.update(frees)
        out.append(Step(step.kind, step.arguments, step.outputs, frees, replaced))
        if step.kind in STATE_OPS:
            state = str(step.arguments[STATE_OPS[step.kind][0]])
            replaced = replaced - {state} if step.kind == READ else replaced | {state}
    return tuple(reversed(out))
