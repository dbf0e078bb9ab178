"""Compressed constants as codes, and codes as the operations that a program has for them (iOS18)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loraduct.formats.coded import WIDTHS, Code
from loraduct.formats.coreml.constexpr import PREFIX, compressed
from loraduct.formats.coreml.package import WEIGHTS_NAME, Package
from loraduct.formats.coreml.program import (
    blob_value,
    immediate_value,
    tensor_type,
    type_of,
    value_of,
)
from loraduct.packing import unpacked

INLINE = 10  # fewer values than that are in the program itself, as coremltools has it


def code_in(package: Package, op: Any, by_name: Mapping[str, Any]) -> Code | None:
    """The code of a compressed FLOAT16 matrix; None for what is no plain one (sparse, vectors, ...)."""
    read = _FORMS.get(op.type.removeprefix(PREFIX))
    found = None if read is None else read(package, op, by_name)
    return found if found is not None and found.numbers.dtype == "float16" else None


def argument_in(op: Any, key: str) -> Any:
    """An argument's Value, wherever it stands (iOS16: an attribute); None where it is no value."""
    if key in op.attributes:
        return op.attributes[key]
    bound = op.inputs[key].arguments if key in op.inputs else ()
    values = [b.value for b in bound if b.WhichOneof("binding") == "value"]
    return values[0] if len(values) == 1 else None


def _given(package: Package, op: Any, key: str) -> Any:
    """An argument as an array; None where it is not a value."""
    value = argument_in(op, key)
    return None if value is None else value_of(package, value, op.outputs[0].name)


def _table(package: Package, op: Any, by_name: Mapping[str, Any]) -> Code | None:
    codes, lut, shape = (_given(package, op, k) for k in ("indices", "lut", "shape"))
    if codes is None or lut is None:
        return None
    if shape is not None:  # iOS16: one table, indices in a stream of bits
        sizes, bits = tuple(int(n) for n in shape), int(lut.size).bit_length() - 1
        codes, lut = (
            unpacked(codes, bits, math.prod(sizes)).reshape(sizes),
            lut.reshape(1, 1, -1, 1),
        )
    if codes.ndim != 2 or lut.ndim != 4 or lut.shape[3] != 1:
        return None
    bits = int(lut.shape[2]).bit_length() - 1
    blocks = all(n % g == 0 for n, g in zip(codes.shape, lut.shape[:2], strict=True))
    if bits not in WIDTHS["lut"] or lut.shape[2] != 1 << bits or not blocks:
        return None
    return Code("lut", bits, codes, lut[..., 0])


def _scaled(package: Package, op: Any, by_name: Mapping[str, Any]) -> Code | None:
    """Integers; or a table's values with a scale for each row."""
    data, scale = _given(package, op, "data"), _given(package, op, "scale")
    if scale is None or scale.ndim != 2 or "offset" in op.inputs:
        return None
    if data is None:
        names = [b.name for b in op.inputs["data"].arguments]
        inner = by_name.get(names[0]) if len(names) == 1 else None
        code = None if inner is None else code_in(package, inner, by_name)
        if code is None or code.kind != "lut" or scale.shape != (len(code.codes), 1):
            return None
        tables = code.numbers.repeat(len(scale) // len(code.numbers), 0)
        return Code("lut", code.bits, code.codes, tables * scale[:, :, None])
    whole = data.ndim == 2 and all(n % s == 0 for n, s in zip(data.shape, scale.shape, strict=True))
    dtype, _ = type_of(op.inputs["data"].arguments[0].value.type)
    bits = {"INT4": 4, "INT8": 8}.get(dtype)
    return _integers(data, bits, scale) if whole and bits else None


def _affine(package: Package, op: Any, by_name: Mapping[str, Any]) -> Code | None:
    data, scale, zero = (_given(package, op, k) for k in ("quantized_data", "scale", "zero_point"))
    axis = _given(package, op, "axis")
    if data is None or scale is None or data.ndim != 2 or data.dtype != "int8" or zero is None:
        return None
    if zero.any() or int(axis) != 0:
        return None
    return _integers(data, 8, scale.reshape(-1, 1))


def _integers(data: Any, bits: int, scale: Any) -> Code:
    import numpy as np

    codes = (data.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return Code("int", bits, codes, scale)


_FORMS = {
    "lut_to_dense": _table,
    "blockwise_shift_scale": _scaled,
    "affine_dequantize": _affine,
}


def arguments(code: Code) -> dict[str, tuple[str, Any]]:
    """argument -> (MIL's dtype, its values, one each) of the operation that stands for a code."""
    import numpy as np

    codes = np.ascontiguousarray(code.codes)
    numbers = np.ascontiguousarray(code.numbers)
    if code.kind == "lut":
        return {"indices": (f"UINT{code.bits}", codes), "lut": ("FLOAT16", numbers[..., None])}
    data = (codes.astype(np.int16) - (1 << (code.bits - 1))).astype(np.int8)
    return {"data": (f"INT{code.bits}", data), "scale": ("FLOAT16", numbers)}


def operation_of(code: Code, offsets: Mapping[str, int]) -> Any:
    """The operation; its result has no name yet. ``offsets``: of its arguments in the weight file,
    of those that are there."""
    kind = {"lut": "lut_to_dense", "int": "blockwise_shift_scale"}[code.kind]
    given = {
        key: blob_value(dtype, values.shape, offsets[key], WEIGHTS_NAME)
        if key in offsets
        else immediate_value(dtype, values)
        for key, (dtype, values) in arguments(code).items()
    }
    return compressed(kind, "", tensor_type("FLOAT16", code.codes.shape), given)
