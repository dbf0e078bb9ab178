"""Compressed constants, decompressed: tables, scales, sparse values, nested in each other.

The forms are those of coremltools 9.0 (``ops/defs/iOS16/constexpr_ops.py``,
``iOS18/compression.py``). iOS16's pack indices and masks into bytes and give a ``shape``.
Results equal coremltools' bit for bit: the same steps in the same precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loraduct.packing import unpacked
from loraduct.validation.mil_numbers import limited, rounded
from loraduct.validation.mil_operation import Op, along, ints, times


def affine_dequantize(quantized_data: Any, zero_point: Any, scale: Any, axis: Any) -> Any:
    """``scale * (data - zero point)``, both along ``axis`` or of the whole."""
    rank = quantized_data.ndim
    at = int(axis) % rank
    steps = quantized_data.astype(np.float32) - along(zero_point, at, rank).astype(np.float32)
    return steps * along(scale, at, rank)


def _spread(small: Any, shape: tuple[int, ...]) -> Any:
    """Repeated along every axis so that each value covers its block of ``shape``."""
    if small.ndim != len(shape) or any(
        not s or n % s for n, s in zip(shape, small.shape, strict=True)
    ):
        raise ValueError(f"{list(small.shape)} does not divide {list(shape)} into blocks")
    for axis, (n, s) in enumerate(zip(shape, small.shape, strict=True)):
        if s not in (1, n):  # what is 1 broadcasts, without a copy
            small = np.repeat(small, n // s, axis)
    return small


def blockwise_shift_scale(data: Any, scale: Any, offset: Any = None) -> Any:
    """``scale * (data - offset)``, each for a block of ``data``."""
    steps = data.astype(np.float32)
    if offset is not None:
        if offset.shape != scale.shape:
            raise ValueError(f"offset of {list(offset.shape)}, scale of {list(scale.shape)}")
        steps = steps - _spread(offset, data.shape).astype(np.float32)
        if scale.dtype == np.float16 and "f" in (data.dtype.kind, offset.dtype.kind):
            steps = steps if offset.dtype == np.float32 else rounded(steps)
    return steps * _spread(scale.astype(np.float32), data.shape)


def lut_to_dense(indices: Any, lut: Any, shape: Any = None, vector_axis: Any = None) -> Any:
    """The values ``indices`` name in tables: lut (*groups, entries, vector), or one vector."""
    if shape is not None:
        sizes, bits = limited(ints(shape)), int(lut.size).bit_length() - 1
        if lut.size != 1 << bits or indices.size != -(-times(sizes) * bits // 8):
            raise ValueError(f"{indices.size} bytes of indices into {lut.size} for {list(sizes)}")
        return lut[unpacked(indices.tobytes(), bits, times(sizes))].reshape(sizes)
    groups, entries, vector = lut.shape[:-2], lut.shape[-2], lut.shape[-1]
    if len(groups) != indices.ndim or any(
        not g or n % g for n, g in zip(indices.shape, groups, strict=True)
    ):
        raise ValueError(f"tables of {list(lut.shape)} for indices of {list(indices.shape)}")
    if indices.size and int(indices.max()) >= entries:
        raise IndexError(f"index {int(indices.max())} into a table of {entries}")
    place = indices.astype(np.int32)
    stride = entries
    for axis in reversed(range(indices.ndim)):
        if groups[axis] > 1:  # which table, from the position along this axis
            own = np.arange(indices.shape[axis], dtype=np.int32) // (
                indices.shape[axis] // groups[axis]
            )
            place = place + along(own * stride, axis, indices.ndim)
        stride *= groups[axis]
    if vector == 1:
        return np.take(lut.reshape(-1), place)
    at = int(vector_axis) % indices.ndim
    limited([*indices.shape, vector])
    found = np.moveaxis(np.take(lut.reshape(-1, vector), place, axis=0), -1, at + 1)
    return found.reshape([n * (vector if i == at else 1) for i, n in enumerate(indices.shape)])


def sparse_to_dense(nonzero_data: Any, mask: Any, shape: Any = None) -> Any:
    """``nonzero_data`` where the mask is set, in order; zeros elsewhere."""
    if shape is not None:
        sizes = limited(ints(shape))
        if mask.size != -(-times(sizes) // 8):
            raise ValueError(f"{mask.size} bytes of mask for {list(sizes)}")
        mask = unpacked(mask.tobytes(), 1, times(sizes)).reshape(sizes)
    kept = mask != 0
    if int(kept.sum()) != nonzero_data.size:
        raise ValueError(f"{nonzero_data.size} values for {int(kept.sum())} places")
    out = np.zeros(mask.shape, nonzero_data.dtype)
    out[kept] = nonzero_data
    return out


def lut_to_sparse(
    indices_mask: Any, indices_nonzero_data: Any, lut: Any, vector_axis: Any = None
) -> Any:
    """(mask, values): tables applied to the values that are there."""
    dense = lut_to_dense(
        sparse_to_dense(indices_nonzero_data, indices_mask), lut, None, vector_axis
    )
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = np.repeat(mask, lut.shape[-1], int(vector_axis) % mask.ndim)
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Any, nonzero_data: Any, scale: Any, offset: Any = None
) -> Any:
    """(mask, values): scales applied to the values that are there."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def cast(source_val: Any, output_dtype: str) -> Any:
    """float16 as float32."""
    if output_dtype != "fp32":
        raise ValueError(f"output dtype {output_dtype!r}, expected 'fp32'")
    return source_val.astype(np.float32)


PREFIX = "constexpr_"
OPS: dict[str, Op] = {
    "constexpr_affine_dequantize": Op(affine_dequantize, "scale"),
    "constexpr_blockwise_shift_scale": Op(blockwise_shift_scale, "scale"),
    "constexpr_lut_to_dense": Op(lut_to_dense, "lut", True),
    "constexpr_sparse_to_dense": Op(sparse_to_dense, "nonzero_data", True),
    "constexpr_lut_to_sparse": Op(lut_to_sparse, ("indices_mask", "lut"), True),
    "constexpr_sparse_blockwise_shift_scale": Op(
        sparse_blockwise_shift_scale, ("data_mask", "scale")
    ),
    "constexpr_cast": Op(cast, "output_dtype"),
}
