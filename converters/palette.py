"""A tensor as indices into tables: what that is, and its forms in Core ML.

``constexpr_lut_to_dense`` of iOS16 and of iOS18, as coremltools 9.0 has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraduct.errors import Refused
from loraduct.formats.coded import WIDTHS
from loraduct.packing import packed

BITS = WIDTHS["lut"]  # what Core ML has index types for
IOS16_BITS = (1, 2, 4, 6, 8)
MIL = {"float16": "FLOAT16", "float32": "FLOAT32"}  # what entries are stored in


@dataclass(frozen=True)
class Options:
    """``mode``: kmeans, uniform, unique. ``group``: channels per table along ``axis``, 0 for one table.

    ``ragged``: the last group may be shorter. ``vector``: numbers per entry, along ``axis``.
    ``scaled``: each channel along axis 0 is divided by a scale first. ``lut``: dtype of entries.
    ``bf16``: uint16 holds bfloat16, not float16. ``quick``: one table is searched as hastily as those of
    groups, for estimates.
    """

    bits: int | None
    mode: str = "kmeans"
    group: int = 0
    axis: int = 0
    ragged: bool = False
    vector: int = 1
    scaled: bool = False
    lut: str = "float16"
    bf16: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Palette:
    """Indices (uint8, the tensor's shape; along ``axis`` divided by the entries' length) and tables.

    ``lut`` (tables, 2**bits, vector). Table t serves channels t * group to (t + 1) * group - 1 of
    ``axis``. ``scale`` (shape[0], 1, ...) multiplies what the tables give. ``error``: the sum of
    (weighted) squared errors; ``norm``: of (weighted) squares of the numbers.
    """

    indices: Any
    lut: Any
    bits: int
    shape: tuple[int, ...]
    group: int
    axis: int = 0
    scale: Any = None
    error: float = 0.0
    norm: float = 0.0

    @property
    def vector(self) -> int:
        """Numbers per entry."""
        return int(self.lut.shape[2])


def expand(palette: Palette) -> Any:
    """The tensor that a palette stands for, in the tables' dtype."""
    import numpy as np

    p = palette
    step = p.vector if p.vector > 1 else 1
    picked = np.moveaxis(p.indices, p.axis, 0)
    out = np.empty((picked.shape[0], *picked.shape[1:], step), p.lut.dtype)
    for table, start in zip(p.lut, range(0, len(picked), p.group // step), strict=True):
        part = slice(start, start + p.group // step)
        np.take(table, picked[part], axis=0, out=out[part], mode="clip")
    out = np.moveaxis(out, -1, 1).reshape(picked.shape[0] * step, *picked.shape[1:])
    dense = np.ascontiguousarray(np.moveaxis(out, 0, p.axis))
    return dense if p.scale is None else p.scale * dense


def ios18(palette: Palette, name: str | None = None) -> dict[str, tuple[str, Any]]:
    """What ``constexpr_lut_to_dense`` of iOS18 takes: argument -> (MIL dtype, values).

    ``indices`` are unpacked, one a byte; ``lut`` is [tables along each axis..., 2**bits, vector].
    With a scale, ``scale`` is for ``constexpr_blockwise_shift_scale`` behind it. Raises Refused for a
    shorter last group, which the operation can't say.
    """
    import numpy as np

    p = palette
    if p.shape[p.axis] % p.group:
        raise Refused(
            None, f"has {p.shape[p.axis]} channels in groups of {p.group}: Core ML has no shorter"
            " last group", tensor=name
        )  # fmt: skip
    tables = [1] * len(p.shape)
    tables[p.axis] = len(p.lut)
    kind = MIL[str(p.lut.dtype)]
    found: dict[str, tuple[str, Any]] = {
        "indices": (f"UINT{p.bits}", p.indices),
        "lut": (kind, p.lut.reshape(*tables, 1 << p.bits, p.vector)),
    }
    if p.vector > 1:
        found["vector_axis"] = ("INT32", np.int32(p.axis))
    if p.scale is not None:
        found["scale"] = (kind, p.scale)
    return found


def ios16(palette: Palette, name: str | None = None) -> dict[str, tuple[str, Any]]:
    """What ``constexpr_lut_to_dense`` of iOS16 takes; ``indices`` are packed bytes.

    Raises Refused for 3 bits, groups, vectors and scales, which iOS18 brought.
    """
    import numpy as np

    p = palette
    newer = {
        f"{p.bits} bits": p.bits not in IOS16_BITS,
        "more than one table": len(p.lut) > 1,
        "entries of several numbers": p.vector > 1,
        "scales": p.scale is not None,
    }
    for what, so in newer.items():
        if so:
            raise Refused(None, f"has {what}, which needs iOS18", tensor=name)
    return {
        "indices": ("UINT8", packed(p.indices, p.bits)),
        "lut": (MIL[str(p.lut.dtype)], p.lut.reshape(-1)),
        "shape": ("UINT32", np.array(p.shape, np.uint32)),
    }
