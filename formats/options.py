"""What a reader may be told about a folder that doesn't say it itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraduct.formats.base import Base


@dataclass(frozen=True)
class ReadOptions:
    """Options of every reader.

    ``scale``: of an old MLX ``adapters.npz`` that has no config. ``trained_on``: the precision of
    the base in training ("nf4", "none"). ``adapter``: which of several adapters. ``weights``: a
    checkpoint file to read instead of the folder's usual one. ``restore``: undo an earlier
    conversion's padding and folding by its record; a proof must not, it takes the file as it is.
    ``base``: the base model, on which the update of some of PEFT's methods depends.
    """

    scale: float | None = None
    trained_on: str | None = None
    allow_pickle: bool = False
    adapter: str | None = None
    weights: Path | None = None
    restore: bool = True
    base: Base | None = None
