"""The parts of an ML program: types, values, operations; read and made.

A ``Value`` holds its numbers itself (``immediateValue``) or points into the weight file
(``blobFileValue``). Immediate values of up to 16 bits are raw bytes, narrow ones packed as in the weight
file; others have fields of their own (coremltools 9.0 ``backend/mil/helper.py``,
``create_immediate_value``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraduct.errors import Refused
from loraduct.formats.coreml.blob import CODES
from loraduct.formats.coreml.schema import ARRAY_TYPES, DATA_TYPE_NAMES, DATA_TYPES, new
from loraduct.packing import packed, unpacked

if TYPE_CHECKING:
    from loraduct.formats.coreml.package import Package

# Dtype -> numpy's name of it, as values are held once they are read.
NUMPY = {
    "BOOL": "bool", "FLOAT16": "float16", "FLOAT32": "float32", "FLOAT64": "float64",
    "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64", "INT4": "int8",
    "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "UINT1": "uint8", "UINT2": "uint8", "UINT3": "uint8", "UINT4": "uint8", "UINT6": "uint8",
}  # fmt: skip
_FIELDS = {"FLOAT32": "floats", "FLOAT64": "doubles", "INT32": "ints", "INT64": "longInts",
           "BOOL": "bools", "STRING": "strings"}  # fmt: skip
Shape = tuple[int | None, ...]  # None: known only when it runs


def mangled(name: str) -> str:
    """A module's or parameter's name as a program has it: Core ML's names hold no dots."""
    return name.replace(".", "_")


# -- reading ---------------------------------------------------------------------------------------


def type_of(value_type: Any) -> tuple[str, Shape]:
    """(dtype, shape) of a tensor type, or of the tensor a state holds."""
    if value_type.WhichOneof("type") == "stateType":
        value_type = value_type.stateType.wrappedType
    if value_type.WhichOneof("type") != "tensorType":
        raise Refused(None, f"a {value_type.WhichOneof('type')} where a tensor is expected")
    tensor = value_type.tensorType
    shape = tuple(
        d.constant.size if d.WhichOneof("dimension") == "constant" else None
        for d in tensor.dimensions
    )
    return DATA_TYPE_NAMES.get(tensor.dataType, f"type {tensor.dataType}"), shape


def value_of(package: Package, value: Any, name: str) -> Any:
    """A value as an ndarray, or as a str or bool or number where it is one; ``name``: for messages."""
    import numpy as np

    if value.type.WhichOneof("type") != "tensorType":
        raise Refused(package.spec_path, "holds a value that is no tensor", tensor=name)
    dtype, shape = type_of(value.type)
    if None in shape or (dtype not in NUMPY and dtype != "STRING"):
        raise Refused(package.spec_path, f"a constant of type {dtype} {list(shape)}", tensor=name)
    sizes = tuple(s for s in shape if s is not None)
    kind = value.WhichOneof("value")
    if kind == "blobFileValue":
        blob = value.blobFileValue
        return package.blob_file(blob.fileName).array(blob.offset, dtype, sizes, name)
    immediate = value.immediateValue
    if kind != "immediateValue" or immediate.WhichOneof("value") != "tensor":
        raise Refused(package.spec_path, "holds a constant without a value", tensor=name)
    held = immediate.tensor.WhichOneof("value")
    values: Any = getattr(immediate.tensor, held).values if held else ()
    if dtype == "STRING":
        return str(values[0]) if len(values) == 1 else list(values)
    count, there = math.prod(sizes), len(values)
    bits = CODES[dtype][1] if dtype in CODES else 8 * np.dtype(NUMPY[dtype]).itemsize
    if there != (-(-count * bits // 8) if held == "bytes" else count):
        what = f"holds {there} {'bytes' if held == 'bytes' else 'values'}"
        what = f"{what}, its type says {dtype} {list(sizes)}"
        raise Refused(package.spec_path, what, tensor=name)
    if held != "bytes":
        array = np.array(values, NUMPY[dtype])
    elif bits < 8:
        array = unpacked(values, bits, count, signed=dtype.startswith("INT"))
    else:
        array = np.frombuffer(values, NUMPY[dtype])
    return array.reshape(sizes)


def names_in(operation: Any, parameter: str) -> list[str]:
    """Names of the values bound to a parameter of an operation."""
    if parameter not in operation.inputs:
        return []
    return [
        a.name for a in operation.inputs[parameter].arguments if a.WhichOneof("binding") == "name"
    ]


def blob_values(message: Any) -> Iterator[Any]:
    """Every blobFileValue in the operations of a block, blocks within included."""
    for op in message.operations:
        yield from blobs_of(op)
        for block in op.blocks:
            yield from blob_values(block)


def blobs_of(operation: Any) -> Iterator[Any]:
    """The blobFileValues of one operation: attributes, and what is bound to its inputs."""
    for attribute in operation.attributes.values():
        if attribute.WhichOneof("value") == "blobFileValue":
            yield attribute.blobFileValue
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.value.WhichOneof("value") == "blobFileValue":
                yield binding.value.blobFileValue


def states_of(function: Any) -> list[Any]:
    """The inputs of a function that it keeps between calls."""
    return [named for named in function.inputs if named.type.WhichOneof("type") == "stateType"]


def block_of_function(function: Any) -> Any:
    """The block that runs: its opset's specialization."""
    return function.block_specializations[function.opset]


# -- making ----------------------------------------------------------------------------------------


def tensor_type(dtype: str, shape: Sequence[int | None]) -> Any:
    """A ValueType."""
    made = new("ValueType")
    made.tensorType.dataType = DATA_TYPES[dtype]
    made.tensorType.rank = len(shape)
    for size in shape:
        dimension = made.tensorType.dimensions.add()
        if size is None:
            dimension.unknown.SetInParent()
        else:
            dimension.constant.size = size
    return made


def state_type(dtype: str, shape: Sequence[int]) -> Any:
    """A ValueType of a state."""
    made = new("ValueType")
    made.stateType.wrappedType.CopyFrom(tensor_type(dtype, shape))
    return made


def string_value(text: str) -> Any:
    """A Value that is a text."""
    made = new("Value", type=tensor_type("STRING", ()))
    made.immediateValue.tensor.strings.values.append(text)
    return made


def immediate_value(dtype: str, array: Any) -> Any:
    """A Value that holds its numbers itself."""
    import numpy as np

    array = np.asarray(array)
    made = new("Value", type=tensor_type(dtype, array.shape))
    tensor = made.immediateValue.tensor
    if dtype in _FIELDS:
        getattr(tensor, _FIELDS[dtype]).values.extend(array.reshape(-1).tolist())
        getattr(tensor, _FIELDS[dtype]).SetInParent()
    else:
        held, bits = np.ascontiguousarray(array.astype(NUMPY[dtype])), CODES[dtype][1]
        if bits < 8:
            held = packed(held.view(np.uint8) & ((1 << bits) - 1), bits)
        tensor.bytes.values = held.tobytes()
    return made


def blob_value(dtype: str, shape: Sequence[int], offset: int, file_name: str) -> Any:
    """A Value whose numbers lie in the weight file."""
    made = new("Value", type=tensor_type(dtype, shape))
    made.blobFileValue.fileName = file_name
    made.blobFileValue.offset = offset
    return made


def operation(
    kind: str,
    name: str,
    inputs: Mapping[str, str | Sequence[str]],
    outputs: Sequence[tuple[str, Any]],
) -> Any:
    """An Operation. ``inputs``: parameter -> name (or names); ``outputs``: (name, ValueType)."""
    made = new("Operation", type=kind)
    for parameter, given in inputs.items():
        for one in [given] if isinstance(given, str) else given:
            made.inputs[parameter].arguments.add(name=one)
    for out, value_type in outputs:
        made.outputs.add(name=out, type=value_type)
    made.attributes["name"].CopyFrom(string_value(name))
    return made


def const(name: str, value: Any) -> Any:
    """A ``const`` operation that yields ``value``."""
    made = operation("const", name, {}, [(name, value.type)])
    made.attributes["val"].CopyFrom(value)
    return made


def feature(name: str, dtype: str, shape: Sequence[tuple[int, int]], *, state: bool = False) -> Any:
    """A FeatureDescription; ``shape`` is (smallest, largest) per axis, the default the smallest."""
    made = new("FeatureDescription", name=name)
    array = made.type.stateType.arrayType if state else made.type.multiArrayType
    array.dataType = ARRAY_TYPES[dtype]
    array.shape.extend(low for low, _ in shape)
    if any(low != high for low, high in shape):
        for low, high in shape:
            array.shapeRange.sizeRanges.add(lowerBound=low, upperBound=high)
    return made
