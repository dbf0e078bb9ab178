"""Core ML packages: layout, weight file, program; and their adapters, read as any other format's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.formats.options import ReadOptions


def read(folder: Path, options: ReadOptions) -> Adapter:
    """An adapter of the package ``folder`` (``options.adapter`` says which, of several)."""
    from loraduct.formats.coreml import stored

    return stored.read(folder, options)
