"""One run of a function: inputs in, steps in order, outputs and states out."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraduct.errors import Refused
from loraduct.formats.coreml.program import NUMPY, Shape
from loraduct.text import several
from loraduct.validation import mil_features, mil_ops_shape
from loraduct.validation.mil import FAULTS, FULL, STRICT, Ranges
from loraduct.validation.mil_numbers import Numbers, narrowed, rounded, widened
from loraduct.validation.mil_program import OPS, READ, STATE_OPS, WRITE, Constant, Output, Step

if TYPE_CHECKING:
    from loraduct.validation.mil import Machine

UPDATES = "slice_update"
_FLOATS = ("FLOAT16", "FLOAT32")


class Running:
    """The values of one run."""

    def __init__(self, machine: Machine, precision: str, ranges: Ranges | None) -> None:
        self.machine, self.program = machine, machine.program
        self.full, self.ranges = precision == FULL, ranges
        opset = self.program.opset
        self.plain = Numbers(False, opset)
        self.strict = Numbers(precision == STRICT, opset)
        self.values: dict[str, Any] = {}
        self.own: dict[int, Any] = {}  # arrays that nobody outside of this run sees, by their id

    @np.errstate(all="ignore")  # what overflows is rounded to infinity, as on a device
    def run(self, inputs: Mapping[str, Any], state: dict[str, Any] | None) -> dict[str, Any]:
        program, path = self.program, self.machine.path
        mil_features.check(self.machine.weights.package, program, inputs)
        for name, declared in program.inputs.items():
            self.values[name] = self.taken(inputs[name], declared)
        if program.states and (state is None or state.keys() != program.states.keys()):
            raise Refused(
                path,
                f"function {program.function} has the states {several(list(program.states), 5)};"
                f" given: {several(list(state or {}), 5) or 'none'}",
            )
        for name, declared in program.states.items():
            given = (state or {})[name]
            self.values[name] = self.taken(given, declared)
            if not np.may_share_memory(self.values[name], given):
                self.owned(self.values[name])
        for step in program.steps:
            self.step(step)
        for name, declared in program.states.items():
            if state is not None:
                state[name] = self.given(self.values[name], declared.dtype)
        return {name: self.output(source) for name, source in program.outputs.items()}

    def taken(self, array: Any, declared: Output) -> Any:
        """An input or state as it is computed with."""
        array = np.asarray(array)
        _check_shape(self.machine.path, self.program.function, "input", declared, array.shape)
        if declared.dtype not in _FLOATS:
            return array.astype(NUMPY[declared.dtype], copy=False)
        if array.dtype == np.float16:
            return widened(array)
        array = array.astype(np.float32, copy=False)
        return array if self.full or declared.dtype == "FLOAT32" else rounded(array)

    def given(self, value: Any, dtype: str) -> Any:
        """A value as it is handed out, in memory of its own."""
        value = np.asarray(value)
        half = dtype == "FLOAT16" and not self.full and value.dtype == np.float32
        return narrowed(value) if half else value.copy()

    def output(self, source: str | Constant) -> Any:
        if isinstance(source, Constant):
            return self.given(self.machine.weights.get(source), source.dtype)
        return self.given(self.values[source], self.program.types[source])

    def value(self, argument: Any) -> Any:
        """An argument as an array (a text stays one)."""
        if isinstance(argument, tuple):
            return [self.value(a) for a in argument]
        if isinstance(argument, str):
            return self.values[argument]
        return self.machine.weights.get(argument)

    def step(self, step: Step) -> None:
        # outside of the try: a constant that can't be made says so itself
        arguments = {p: self.value(a) for p, a in step.arguments.items()}
        try:
            run = self.on_state if step.kind in STATE_OPS else self.computed
            results = run(step, arguments)
        except Refused as e:
            raise self.failed(step, str(e)) from None
        except FAULTS as e:
            raise self.failed(step, f"{type(e).__name__}: {e}") from None
        for declared, value in zip(step.outputs, results, strict=True):
            self.values[declared.name] = value
        for name in step.frees:
            if name not in self.program.states:
                self.values.pop(name, None)

    def failed(self, step: Step, what: str) -> Refused:
        return Refused(
            self.machine.path,
            f"op {step.kind} in function {self.program.function}: {what}",
            tensor=step.name,
        )

    def on_state(self, step: Step, arguments: dict[str, Any]) -> list[Any]:
        parameters = STATE_OPS[step.kind]
        name = str(step.arguments[parameters[0]])
        if step.kind != READ:
            value = arguments[parameters[1]]
            declared = self.program.states[name]
            _check_shape(self.machine.path, self.program.function, step.kind, declared, value.shape)
            self.values[name] = value
        return [] if step.kind == WRITE else [self.values[name]]

    def computed(self, step: Step, arguments: dict[str, Any]) -> list[Any]:
        op = OPS[step.kind]
        if self.machine.watch is not None:
            self.machine.watch(step, arguments)
        if op.wants_numbers:
            half = step.outputs[0].dtype == "FLOAT16"
            arguments["numbers"] = self.strict if half else self.plain
        if step.kind == UPDATES and self.is_last_use(step, arguments):
            found = mil_ops_shape.overwrite(arguments)
        else:
            found = op.run(**arguments)
        if step.kind == UPDATES:
            self.owned(found)
        results = found if isinstance(found, tuple) else (found,)
        if len(results) != len(step.outputs):
            raise ValueError(f"{len(results)} outputs, {len(step.outputs)} are declared")
        return [
            self.settled(step, declared, value, op.moves, arguments)
            for declared, value in zip(step.outputs, results, strict=True)
        ]

    def is_last_use(self, step: Step, arguments: dict[str, Any]) -> bool:
        """Whether a slice can be replaced where it lies: no other value sees that memory.

        A decoder's cache is updated once a layer; copying all of it each time takes longer than
        the rest of a step.
        """
        name, held = step.arguments["x"], self.own.get(id(arguments["x"]))
        if held is None or held() is not arguments["x"] or name not in step.frees:
            return False
        part = mil_ops_shape.slice_of(arguments)
        others = (v for n, v in self.values.items() if n != name and n not in step.replaced)
        return not any(np.may_share_memory(v, part) for v in others)

    def owned(self, array: Any) -> None:
        """Remember an array as this run's own, for as long as it lives."""
        self.own[id(array)] = weakref.ref(array)

    def settled(
        self, step: Step, declared: Output, value: Any, moves: bool, arguments: dict[str, Any]
    ) -> Any:
        """A result in its declared dtype and shape."""
        value = np.asarray(value)
        _check_shape(self.machine.path, self.program.function, step.kind, declared, value.shape)
        if declared.dtype not in _FLOATS:
            return value.astype(NUMPY[declared.dtype], copy=False)
        if value.dtype == np.float16:
            value = widened(value)
        elif value.dtype != np.float32:
            value = value.astype(np.float32)
        peak = _peak(value) if self.ranges is not None else 0.0
        if declared.dtype == "FLOAT16" and not moves and not self.full:
            fresh = value.base is None and not any(value is a for a in arguments.values())
            value = rounded(value, in_place=fresh and value.flags.c_contiguous)
        if self.ranges is not None:
            after = peak if moves else _peak(value)
            where = (self.program.function, step.kind, declared.name)
            self.ranges.note(where, peak, after, lambda: _before(arguments))
        return value


def _peak(value: Any) -> float:
    """The largest |x|; NaN if there is one."""
    if not value.size:
        return 0.0
    return float(max(value.max(), -value.min())) if not np.isnan(value.max()) else float("nan")


def _before(arguments: dict[str, Any]) -> tuple[float, bool]:
    """The largest finite |x| among an operation's float inputs, and whether all are finite."""
    largest, finite = 0.0, True
    for argument in arguments.values():
        for value in argument if isinstance(argument, list) else [argument]:
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
                good = np.isfinite(value)
                finite = finite and bool(good.all())
                largest = max(largest, float(np.abs(value).max(initial=0, where=good)))
    return largest, finite


def _check_shape(
    path: Any, function: str, kind: str, declared: Output, found: tuple[int, ...]
) -> None:
    if declared.shape is None or _fits(found, declared.shape):
        return
    raise Refused(
        path,
        f"op {kind} in function {function} yields the shape {list(found)},"
        f" the program declares {list(declared.shape)}",
        tensor=declared.name,
    )


def _fits(found: tuple[int, ...], shape: Shape) -> bool:
    return len(found) == len(shape) and all(
        d is None or d == n for n, d in zip(found, shape, strict=True)
    )
