"""What a compressed constant stands for: the values of ``constexpr_...`` operations.

The forms are those of coremltools 9.0 (``ops/defs/iOS16/constexpr_ops.py``, whose arguments are
attributes, and ``iOS18/compression.py``, whose arguments are inputs, and may be the results of others).
Steps and precision are coremltools', so that results are equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loraduct.errors import Refused
from loraduct.formats.coreml.package import Package
from loraduct.formats.coreml.program import string_value, type_of, value_of
from loraduct.formats.coreml.schema import new
from loraduct.packing import unpacked

PREFIX = "constexpr_"
_MOST = 1 << 34  # bytes of one constant that we are willing to make


def is_compressed(op: Any) -> bool:
    """Whether an operation is a compressed constant (or part of one)."""
    return bool(op.type.startswith(PREFIX))


def is_constant(op: Any) -> bool:
    """Whether an operation holds a constant, compressed or not: no work when the function runs."""
    return op.type == "const" or is_compressed(op)


def compressed(
    kind: str,
    name: str,
    out: Any,
    inputs: Mapping[str, Any],
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """The operation ``constexpr_`` + ``kind`` with one result, of type ``out``. ``inputs``,
    ``attributes``: argument -> Value."""
    made = new("Operation", type=f"{PREFIX}{kind}")
    made.outputs.add(name=name, type=out)
    made.attributes["name"].CopyFrom(string_value(name))
    for key, value in (attributes or {}).items():
        made.attributes[key].CopyFrom(value)
    for key, value in inputs.items():
        made.inputs[key].arguments.add().value.CopyFrom(value)
    return made


def parts_of(op: Any, by_name: Mapping[str, Any]) -> Iterator[Any]:
    """The operations that a compressed constant is made of, what is read first; itself the last."""
    for argument in op.inputs.values():
        for binding in argument.arguments:
            inner = by_name.get(binding.name) if binding.WhichOneof("binding") == "name" else None
            if inner is not None and is_compressed(inner):
                yield from parts_of(inner, by_name)
    yield op


def expanded(package: Package, op: Any, by_name: Mapping[str, Any]) -> Any:
    """The first result of a compressed constant, an ndarray of the declared shape.

    ``by_name``: a function's operations by the names of their results. Raises Refused, naming it.
    """
    import numpy as np

    out = op.outputs[0]
    dtype, shape = type_of(out.type)
    sizes = tuple(s or 0 for s in shape)
    if None in shape or dtype not in ("FLOAT16", "FLOAT32") or math.prod(sizes) > _MOST // 4:
        what = f"is a compressed constant of type {dtype} {list(shape)}"
        raise Refused(package.spec_path, what, tensor=out.name)
    try:
        found = _results(package, op, by_name, 0)[0]
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as e:
        what = f"is a broken {op.type}: {e or type(e).__name__}"
        raise Refused(package.spec_path, what, tensor=out.name) from None
    if found.shape != sizes or found.dtype != np.dtype(dtype.lower()):
        what = f"gives {found.dtype} {list(found.shape)}, its type says {dtype} {list(sizes)}"
        raise Refused(package.spec_path, what, tensor=out.name)
    return found


def _results(package: Package, op: Any, by_name: Mapping[str, Any], depth: int) -> tuple[Any, ...]:
    if depth > 4 or op.type not in _STEPS:
        raise ValueError(f"{op.type} is not known" if depth <= 4 else "nested in itself")
    given: dict[str, Any] = {}
    for key, value in op.attributes.items():
        if key != "name":
            given[key] = value_of(package, value, op.outputs[0].name)
    for key, argument in op.inputs.items():
        (binding,) = argument.arguments
        if binding.WhichOneof("binding") == "value":
            given[key] = value_of(package, binding.value, op.outputs[0].name)
            continue
        inner = by_name[binding.name]
        at = [o.name for o in inner.outputs].index(binding.name)
        if inner.type == "const":
            given[key] = value_of(package, inner.attributes["val"], binding.name)
        else:
            given[key] = _results(package, inner, by_name, depth + 1)[at]
    found = _STEPS[op.type](**given)
    return found if isinstance(found, tuple) else (found,)


def _along(small: Any, axis: int, rank: int) -> Any:
    return small if not small.ndim else small.reshape([-1 if i == axis else 1 for i in range(rank)])


def _wide(values: Any) -> Any:
    import numpy as np

    return values if values.dtype.kind == "f" else values.astype(np.float32)


def _spread(small: Any, shape: tuple[int, ...]) -> Any:
    """Each value for its block of ``shape``."""
    import numpy as np

    for axis, (n, s) in enumerate(zip(shape, small.shape, strict=True)):
        if not s or n % s:
            raise ValueError(f"{list(small.shape)} does not divide {list(shape)} into blocks")
        if s not in (1, n):
            small = np.repeat(small, n // s, axis)
    return small


def _affine(quantized_data: Any, zero_point: Any, scale: Any, axis: Any) -> Any:
    rank = quantized_data.ndim
    at = int(axis) % rank
    steps = _wide(quantized_data) - _wide(_along(zero_point, at, rank))
    return (steps * _along(scale, at, rank)).astype(scale.dtype)


def _blockwise(data: Any, scale: Any, offset: Any = None) -> Any:
    steps = _wide(data)
    if offset is not None:
        steps = steps - _spread(_wide(offset), data.shape)
    return (steps * _spread(scale, data.shape)).astype(scale.dtype)


def _lut(indices: Any, lut: Any, shape: Any = None, vector_axis: Any = None) -> Any:
    import numpy as np

    if shape is not None:
        sizes = tuple(int(n) for n in shape)
        count, bits = math.prod(sizes), int(lut.size).bit_length() - 1
        if lut.size != 1 << bits or indices.size != -(-count * bits // 8):
            raise ValueError(f"{indices.size} bytes of indices into {lut.size} for {list(sizes)}")
        flat = unpacked(indices, bits, count)
        return _taken(lut, flat).reshape(sizes)
    groups, entries, vector = lut.shape[:-2], lut.shape[-2], lut.shape[-1]
    if len(groups) != indices.ndim:
        raise ValueError(f"tables of {list(lut.shape)} for indices of {list(indices.shape)}")
    if indices.size and int(indices.max()) >= entries:
        raise ValueError(f"index {int(indices.max())} into a table of {entries}")
    flat = lut.reshape(-1, entries, vector)
    if vector == 1 and len(flat) == 1:
        return _taken(flat.reshape(-1), indices.reshape(-1)).reshape(indices.shape)
    which = np.arange(len(flat), dtype=np.int64).reshape(groups)
    axes = [axis for axis, count in enumerate(groups) if count > 1]
    if vector == 1 and axes in ([], [0]):
        out = np.empty(indices.shape, lut.dtype)
        step, rest = divmod(indices.shape[0], len(flat))
        if rest:
            raise ValueError(f"{len(flat)} tables do not divide {indices.shape[0]} channels")
        for table, at in zip(flat[:, :, 0], range(0, len(out), step), strict=True):
            np.take(table, indices[at : at + step], out=out[at : at + step], mode="clip")
        return out
    place = _spread(which, indices.shape) * entries + indices
    found = np.take(flat.reshape(-1, vector), place, axis=0)
    if vector == 1:
        return found[..., 0]
    at = int(vector_axis) % indices.ndim
    found = np.moveaxis(found, -1, at + 1)
    return found.reshape([n * (vector if i == at else 1) for i, n in enumerate(indices.shape)])


def _taken(table: Any, flat: Any) -> Any:
    """``table[flat]``, in pieces: numpy widens indices to eight bytes."""
    import numpy as np

    out = np.empty(flat.size, table.dtype)
    step = 1 << 16
    for at in range(0, flat.size, step):
        np.take(table, flat[at : at + step], out=out[at : at + step], mode="clip")
    return out


def _sparse(nonzero_data: Any, mask: Any, shape: Any = None) -> Any:
    import numpy as np

    if shape is not None:
        sizes = tuple(int(n) for n in shape)
        mask = unpacked(mask, 1, math.prod(sizes)).reshape(sizes)
    kept = mask != 0
    if int(kept.sum()) != nonzero_data.size:
        raise ValueError(f"{nonzero_data.size} values for {int(kept.sum())} places")
    out = np.zeros(mask.shape, nonzero_data.dtype)
    out[kept] = nonzero_data
    return out


def _lut_sparse(
    indices_mask: Any, indices_nonzero_data: Any, lut: Any, vector_axis: Any = None
) -> Any:
    import numpy as np

    dense = _lut(_sparse(indices_nonzero_data, indices_mask), lut, None, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = np.repeat(mask, lut.shape[-1], int(vector_axis) % mask.ndim)
    return mask, dense[mask != 0]


def _blockwise_sparse(data_mask: Any, nonzero_data: Any, scale: Any, offset: Any = None) -> Any:
    dense = _blockwise(_sparse(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def _cast(source_val: Any, output_dtype: Any) -> Any:
    import numpy as np

    if output_dtype != "fp32":
        raise ValueError(f"output dtype {output_dtype!r}, expected 'fp32'")
    return source_val.astype(np.float32)


_KINDS: dict[str, Callable[..., Any]] = {
    "affine_dequantize": _affine,
    "blockwise_shift_scale": _blockwise,
    "lut_to_dense": _lut,
    "sparse_to_dense": _sparse,
    "lut_to_sparse": _lut_sparse,
    "sparse_blockwise_shift_scale": _blockwise_sparse,
    "cast": _cast,
}
_STEPS = {f"{PREFIX}{kind}": step for kind, step in _KINDS.items()}
