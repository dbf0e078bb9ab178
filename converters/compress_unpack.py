"""A base that MLX has packed, written out again with plain weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from loraduct.converters import fuse_packed, mlx_quantize
from loraduct.converters.base_report import Outcome
from loraduct.converters.fuse_folder import check_base
from loraduct.errors import Refused
from loraduct.files import staged_folder
from loraduct.formats import base as base_folder
from loraduct.formats import model_folder
from loraduct.formats.base import Base
from loraduct.formats.model_folder import Stored, copied
from loraduct.tensor import BITS
from loraduct.text import printable

_ROWS = 1 << 20  # numbers unpacked at once


def decompress(target: Path, output: Path, *, force: bool) -> Outcome:
    """Write a packed base's weights out, as the values that MLX computes with, in the scales' dtype.

    Raises Refused for what isn't packed, or in another way than MLX's integers.
    """
    base = base_folder.read(target)
    model_folder.check_target(output, [base.path], force)
    check_base(base)
    _check_mode(base)
    held = fuse_packed.modules(base)
    if not held:
        raise Refused(base.path / "config.json", "is not packed: there is nothing to decompress")
    tensors: dict[str, Stored] = {}
    for name, tensor in base.tensors.items():
        module, _, part = name.rpartition(".")
        if module not in held:
            tensors[name] = copied(tensor)
        elif part == "weight":
            m = held[module]
            tensors[name] = Stored(m.scales.dtype, m.shape, partial(_unpacked, m))
        elif part not in ("scales", "biases"):
            tensors[name] = copied(tensor)
    config = {k: v for k, v in base.config.items() if not k.startswith("quantization")}
    with staged_folder(output) as stage:
        files = model_folder.write(base, tensors, config, model_folder.SHARD, stage)
    return Outcome(
        target, output, "unpacked", {n: BITS[m.scales.dtype] for n, m in held.items()},
        sum(t.stored_nbytes for t in base.tensors.values()),
        sum(t.nbytes for t in tensors.values()), sum(math.prod(m.shape) for m in held.values()),
        sum(tensors[f"{n}.weight"].nbytes for n in held), {}, files=files,
    )  # fmt: skip


def _check_mode(base: Base) -> None:
    """Refuse packings of other numbers than integers."""
    settings = base.quantization or {}
    for part in (settings, *(own for own in settings.values() if isinstance(own, dict))):
        mode = part.get("mode") or "affine"
        if mode != "affine":
            what = (
                f"is packed as {printable(str(mode), 40)}; only affine packings are decompressed:"
            )
            raise Refused(base.path / "config.json", f"{what} use mlx_lm.convert --dequantize")


def _unpacked(m: fuse_packed.Module) -> Iterator[Any]:
    """The weight's rows as they are stored: two-byte floats as uint16, since no buffer is of bfloat16."""
    import ml_dtypes
    import numpy as np

    kinds = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
    high = math.prod(m.shape[:-1])
    tensors = (m.weight, m.scales, m.biases)
    step = max(1, _ROWS // m.shape[-1])
    for start in range(0, high, step):
        span = (start, min(start + step, high))
        parts = [fuse_packed.rows_of(t, *span, t.shape[-1]) for t in tensors]
        kind = kinds[m.scales.dtype]
        scales, biases = (np.ascontiguousarray(p).view(kind) for p in parts[1:])
        packed = mlx_quantize.Packed(parts[0], scales, biases, m.now.bits, m.now.group)
        made = mlx_quantize.dequantize(packed)
        yield made.view(np.uint16) if made.itemsize == 2 else made
