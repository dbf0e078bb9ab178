"""Variants of LoRA whose factors are stored in a shorter form, written out in full.

BD-LoRA keeps only the blocks on the diagonal of A or B (peft 0.21.2, `variants.py:
BlockDiagonalLinear`). QALoRA averages groups of inputs before A (`QALoraLinearVariant.forward`):
x' = mean over each group * (in / group), so dW = scale * in / group^2 * B @ (every column of A
repeated group times). KaSA (`KasaLinearVariant`) has a diagonal between the factors: dW = scale * B
@ diag(d) @ A, relative to a base that is cut at the start (`converters.start`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraduct.computed import given, moved
from loraduct.errors import Refused
from loraduct.tensor import Tensor

Parts = Mapping[str, Mapping[str, Tensor]]
FIELDS = {"use_bdlora": None, "use_qalora": False}  # as plain LoRA has them


def expanded(
    parts: Parts, config: Mapping[str, Any], file: Path
) -> tuple[Parts, dict[str, Any], dict[str, float]]:
    """Parts with full factors, the config that then holds, and what each scale is multiplied by."""
    parts = {m: _with_diagonal(p, config, file) for m, p in parts.items()}
    blocks, pooled = config.get("use_bdlora"), config.get("use_qalora")
    if not blocks and not pooled:
        return parts, dict(config), {}
    group = config.get("qalora_group_size", 16)
    if pooled and (type(group) is not int or group < 1):
        raise Refused(file, f"qalora_group_size is {group!r}, expected a positive integer")
    done: dict[str, Mapping[str, Tensor]] = {}
    factors: dict[str, float] = {}
    for module, part in parts.items():
        new = dict(part)
        if blocks:
            for name, field in (("a", "target_modules_bd_a"), ("b", "target_modules_bd_b")):
                if name in new and _named(module, blocks, field, file):
                    new[name] = _block_diagonal(new[name], _count(blocks, file), file)
        elif "a" in new and len(new["a"].shape) == 2:
            rank, pools = new["a"].shape
            new["a"] = moved((rank, pools * group), [new["a"]], lambda v: v.repeat(group, 1))
            factors[module] = pools / group
        done[module] = new
    return done, {**config, **FIELDS}, factors


def _with_diagonal(
    part: Mapping[str, Tensor], config: Mapping[str, Any], file: Path
) -> Mapping[str, Tensor]:
    """KaSA's diagonal taken into B, in float32."""
    diagonal = part.get("diag")
    if config.get("kasa_config") is None:
        if diagonal is None:
            return part
        what = "is of KaSA, but kasa_config is not set: PEFT would drop it in silence"
        raise Refused(file, what, tensor=diagonal.name)
    first = next(iter(part.values()))
    if diagonal is None or "b" not in part:
        missing = "lora_diag" if diagonal is None else "lora_B"
        raise Refused(file, f"has no {missing} to go with it", tensor=first.name)
    b, d = part["b"], diagonal
    if len(b.shape) != 2 or d.shape != b.shape[1:]:
        what = f"shape {list(d.shape)}, expected {list(b.shape[1:])} as {b.name} has columns"
        raise Refused(file, what, tensor=d.name)

    def scaled() -> Any:
        import numpy as np

        with np.errstate(over="ignore"):  # Inf is refused where the tensor is written
            return b.read() * d.read()

    return {
        **{k: t for k, t in part.items() if k != "diag"},
        "b": given(b.name, [b, d], b.shape, scaled),
    }


def _named(module: str, blocks: Any, field: str, file: Path) -> bool:
    names = blocks.get(field) or [] if isinstance(blocks, dict) else None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise Refused(file, f"use_bdlora.{field} is not a list of names")
    return any(n in module.rpartition(".")[2] for n in names)


def _count(blocks: Mapping[str, Any], file: Path) -> int:
    count = blocks.get("nblocks", 1)
    if type(count) is not int or not 0 < count <= 1 << 16:
        raise Refused(file, f"use_bdlora.nblocks is {count!r}, expected a positive integer")
    return count


def _block_diagonal(tensor: Tensor, count: int, file: Path) -> Tensor:
    """(rows, cols) holds ``count`` blocks of rows; each gets columns of its own."""
    rows, cols = tensor.shape
    if rows % count:
        raise Refused(file, f"has {rows} rows, not {count} blocks of them", tensor=tensor.name)
    height = rows // count

    def move(values: Any) -> Any:
        import numpy as np

        out = np.zeros((rows, cols * count), values.dtype)
        for i in range(count):
            block = slice(i * height, (i + 1) * height)
            out[block, i * cols : (i + 1) * cols] = values[block]
        return out

    return moved((rows, cols * count), [tensor], move)
