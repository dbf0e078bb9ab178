"""Making a program operation by operation, with the type of every value known.

One method per operation that a decoder needs; each works out its result's shape. Sizes known only
when the program runs are None. Parameters are constants of the program: equal small ones are made
once. Operations and their parameters are those of coremltools 9.0
(``converters/mil/mil/ops/defs``); float values are FLOAT16 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraduct.formats.coreml.program import (
    Shape,
    blob_value,
    const,
    immediate_value,
    operation,
    state_type,
    string_value,
    tensor_type,
)
from loraduct.formats.coreml.schema import new

HALF, INT, BOOL = "FLOAT16", "INT32", "BOOL"


@dataclass(frozen=True)
class Value:
    """A value of the program."""

    name: str
    dtype: str
    shape: Shape


class Graph:
    """The operations of one function. ``opset``: "CoreML7" (iOS17) or "CoreML8" (iOS18)."""

    def __init__(self, opset: str) -> None:
        self.opset = opset
        self.inputs: list[Any] = []
        self.operations: list[Any] = []
        self._constants: dict[tuple[Any, ...], Value] = {}
        self._taken: dict[str, int] = {}

    def function(self, outputs: Sequence[Value]) -> Any:
        """The Function message."""
        made = new("Function", opset=self.opset)
        made.inputs.extend(self.inputs)
        block = made.block_specializations[self.opset]
        block.outputs.extend(o.name for o in outputs)
        block.operations.extend(self.operations)
        return made

    # -- values ------------------------------------------------------------------------------------

    def input(self, name: str, dtype: str, shape: Shape) -> Value:
        """An argument of the function."""
        self.inputs.append(new("NamedValueType", name=name, type=tensor_type(dtype, shape)))
        return Value(name, dtype, shape)

    def state(self, name: str, shape: tuple[int, ...]) -> Value:
        """A state of the function, which lives between calls."""
        self.inputs.append(new("NamedValueType", name=name, type=state_type(HALF, shape)))
        return Value(name, HALF, shape)

    def constant(self, value: Any, dtype: str) -> Value:
        """A small constant: a number, a text or a list."""
        key = (dtype, tuple(value) if isinstance(value, list) else value, isinstance(value, list))
        if key not in self._constants:
            made = string_value(value) if isinstance(value, str) else immediate_value(dtype, value)
            shape = (len(value),) if isinstance(value, list) else ()
            name = self._name("c")
            self.operations.append(const(name, made))
            self._constants[key] = Value(name, dtype, shape)
        return self._constants[key]

    def weight(self, name: str, shape: tuple[int, ...], offset: int, file_name: str) -> Value:
        """A constant in the weight file; asked for twice, it is made once."""
        key = ("weight", name)
        if key not in self._constants:
            self.operations.append(const(name, blob_value(HALF, shape, offset, file_name)))
            self._constants[key] = Value(name, HALF, shape)
        return self._constants[key]

    def _name(self, stem: str) -> str:
        count = self._taken.get(stem, 0)
        self._taken[stem] = count + 1
        return f"{stem}_{count}" if count or stem == "c" else stem

    def op(
        self,
        kind: str,
        name: str,
        shape: Shape,
        inputs: Mapping[str, Value | Sequence[Value]],
        dtype: str = HALF,
    ) -> Value:
        """Any operation with one result."""
        name = self._name(name)
        bound = {
            k: v.name if isinstance(v, Value) else [one.name for one in v]
            for k, v in inputs.items()
        }
        out = tensor_type(dtype, shape)
        self.operations.append(operation(kind, name, bound, [(name, out)]))
        return Value(name, dtype, shape)

    # -- arithmetic --------------------------------------------------------------------------------

    def unary(self, kind: str, name: str, x: Value, **parameters: Value) -> Value:
        """abs, rsqrt, tanh, silu, ...: of x's shape."""
        return self.op(kind, name, x.shape, {"x": x, **parameters}, x.dtype)

    def binary(self, kind: str, name: str, x: Value, y: Value | float, dtype: str = "") -> Value:
        """add, mul, maximum, greater_equal, ... with broadcasting."""
        if not isinstance(y, Value):
            y = self.constant(y, x.dtype)
        shape = broadcast(x.shape, y.shape)
        return self.op(kind, name, shape, {"x": x, "y": y}, dtype or x.dtype)

    def linear(self, name: str, x: Value, weight: Value, bias: Value | None) -> Value:
        """x @ weight.T + bias; weight (out, in)."""
        inputs: dict[str, Value | Sequence[Value]] = {"x": x, "weight": weight}
        if bias is not None:
            inputs["bias"] = bias
        return self.op("linear", name, (*x.shape[:-1], weight.shape[0]), inputs)

    def matmul(self, name: str, x: Value, y: Value, *, transpose_y: bool = False) -> Value:
        """x @ y over the last two axes."""
        cols = y.shape[-2] if transpose_y else y.shape[-1]
        flags = {
            "transpose_x": self.constant(False, BOOL),
            "transpose_y": self.constant(transpose_y, BOOL),
        }
        return self.op("matmul", name, (*x.shape[:-1], cols), {"x": x, "y": y, **flags})

    def reduce(self, kind: str, name: str, x: Value) -> Value:
        """reduce_max, reduce_mean, ... over the last axis, which stays as 1."""
        inputs = {
            "x": x,
            "axes": self.constant([-1], INT),
            "keep_dims": self.constant(True, BOOL),
        }
        return self.op(kind, name, (*x.shape[:-1], 1), dict(inputs))

    # -- shapes ------------------------------------------------------------------------------------

    def reshape(self, name: str, x: Value, shape: Shape, target: list[int]) -> Value:
        """To ``target``, where -1 stands for what is left; ``shape`` is the same with None."""
        return self.op(
            "reshape", name, shape, {"x": x, "shape": self.constant(target, INT)}, x.dtype
        )

    def transpose(self, name: str, x: Value, order: list[int]) -> Value:
        """Axes in a new order."""
        shape = tuple(x.shape[i] for i in order)
        return self.op("transpose", name, shape, {"x": x, "perm": self.constant(order, INT)})

    def expand(self, name: str, x: Value, axis: int) -> Value:
        """A new axis of 1."""
        shape = (*x.shape[:axis], 1, *x.shape[axis:])
        return self.op(
            "expand_dims", name, shape, {"x": x, "axes": self.constant([axis], INT)}, x.dtype
        )

    def tile(self, name: str, x: Value, reps: list[int]) -> Value:
        """Repeated along each axis."""
        shape = tuple(None if s is None else s * r for s, r in zip(x.shape, reps, strict=True))
        return self.op("tile", name, shape, {"x": x, "reps": self.constant(reps, INT)})

    def concat(self, name: str, values: Sequence[Value], axis: int) -> Value:
        """Side by side along an axis."""
        at = axis % len(values[0].shape)
        sizes = [v.shape[at] for v in values]
        total = None if None in sizes else sum(s for s in sizes if s is not None)
        shape = (*values[0].shape[:at], total, *values[0].shape[at + 1 :])
        inputs: dict[str, Value | Sequence[Value]] = {
            "values": list(values),
            "axis": self.constant(axis, INT),
            "interleave": self.constant(False, BOOL),
        }
        return self.op("concat", name, shape, inputs, values[0].dtype)

    def split(self, name: str, x: Value, sizes: list[int]) -> list[Value]:
        """Apart along the last axis."""
        names = [self._name(f"{name}{i}") for i in range(len(sizes))]
        values = [Value(n, x.dtype, (*x.shape[:-1], s)) for n, s in zip(names, sizes, strict=True)]
        inputs: dict[str, str | Sequence[str]] = {
            "x": x.name,
            "split_sizes": self.constant(sizes, INT).name,
            "axis": self.constant(-1, INT).name,
        }
        outputs = [(v.name, tensor_type(v.dtype, v.shape)) for v in values]
        self.operations.append(operation("split", self._name(name), inputs, outputs))
        return values

    def slice(
        self,
        name: str,
        x: Value,
        shape: Shape,
        begin: Value | list[int],
        end: Value | list[int],
        *,
        from_start: list[bool] | None = None,
        to_end: list[bool] | None = None,
        squeeze: list[bool] | None = None,
    ) -> Value:
        """x[begin:end] per axis; ``from_start``/``to_end`` ignore them, ``squeeze`` drops an axis."""
        return self.op(
            "slice_by_index", name, shape,
            {"x": x} | self._bounds(begin, end, from_start, to_end, squeeze), x.dtype,
        )  # fmt: skip

    def update(
        self, name: str, x: Value, update: Value, begin: Value | list[int], end: Value | list[int],
        *, to_end: list[bool] | None = None, squeeze: list[bool] | None = None,
    ) -> Value:  # fmt: skip
        """x with ``update`` in the place that ``slice`` would take."""
        inputs = {"x": x, "update": update} | self._bounds(begin, end, None, to_end, squeeze)
        return self.op("slice_update", name, x.shape, inputs)

    def _bounds(
        self, begin: Value | list[int], end: Value | list[int], from_start: list[bool] | None,
        to_end: list[bool] | None, squeeze: list[bool] | None,
    ) -> dict[str, Value]:  # fmt: skip
        masks = {"begin_mask": from_start, "end_mask": to_end, "squeeze_mask": squeeze}
        return {
            "begin": begin if isinstance(begin, Value) else self.constant(begin, INT),
            "end": end if isinstance(end, Value) else self.constant(end, INT),
        } | {k: self.constant(m, BOOL) for k, m in masks.items() if m is not None}

    # -- states ------------------------------------------------------------------------------------

    def read_state(self, name: str, state: Value) -> Value:
        """What a state holds now."""
        return self.op("read_state", name, state.shape, {"input": state})

    def write_state(self, name: str, state: Value, data: Value) -> None:
        """Put ``data`` into a state."""
        bound: dict[str, str | Sequence[str]] = {"input": state.name, "data": data.name}
        self.operations.append(operation("write_state", self._name(name), bound, []))


def broadcast(x: Shape, y: Shape) -> Shape:
    """The shape of an elementwise operation; an unknown size is taken for the other's, or 1."""
    rank = max(len(x), len(y))
    pairs = zip((1,) * (rank - len(x)) + x, (1,) * (rank - len(y)) + y, strict=True)
    return tuple(b if a == 1 else a for a, b in pairs)
