"""Reading several adapters and writing one, for the verbs that combine them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.converters.merge import Merged
    from loraduct.formats.base import Base
    from loraduct.formats.options import ReadOptions


def read_all(
    sources: Sequence[Path],
    options: ReadOptions,
    base: Path | None,
    output: Path | None = None,
    force: bool = False,
) -> tuple[list[Adapter], Base | None]:
    """The adapters and the base, after a look at whether the output may be written."""
    # factors are thin: threads cost more than they give, and could change the order of sums
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from loraduct.formats import base as base_folder
    from loraduct.formats import folder, locate, read

    model = base_folder.read(base) if base else None
    options = replace(options, base=model)
    if output is not None:
        for source in sources:
            folder.check_target(output, locate(source, options)[0], force)
        if model is not None:
            folder.check_target(output, model.path, force)
    return [read(s, options) for s in sources], model


def format_of(adapter: Adapter, to: str | None) -> str:
    """What is written: as asked for, else as the adapter is, else PEFT's."""
    return to or (adapter.format if adapter.format in ("peft", "mlx") else "peft")


def residual_of(merged: Merged) -> str:
    """A line on what is lost, for people."""
    from loraduct.text import printable

    worst = max(merged.modules, key=lambda m: m.residual)
    mean = sum(m.residual for m in merged.modules) / len(merged.modules)
    return (
        f"  residual  {mean:.2e} of the norm on average, at most {worst.residual:.2e} in"
        f" {printable(worst.module)}"
    )
