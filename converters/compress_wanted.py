"""What a user asks `compress` for, and what it answers, whatever is compressed.

Each kind of target has a module with ``compress(target, output, wanted) -> Outcome`` and
``decompress(target, output, *, force) -> Outcome``; ``output`` None: nothing is written (--plan). Whether an
existing ``output`` may be replaced is checked by them (``force``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from loraduct.errors import Refused
from loraduct.formats.coded import WIDTHS
from loraduct.text import printable

PALETTES = WIDTHS["lut"]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9,
          "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMG]?I?B|)\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Calibration:
    """What is measured on a text, when it is first asked for.

    ``measure`` gives the `moments`, ``probe`` the `loss` (None: not to be had).
    """

    measure: Callable[[], Mapping[str, Any]]
    probe: Callable[[], Callable[[Mapping[str, Any]], float | None]] | None = None

    @cached_property
    def moments(self) -> Mapping[str, Any]:
        """E[x_j^2] of the inputs of each linear layer, (in,), by its weight's name as the target calls
        it (an adapter's in a package: FUNCTION/WEIGHT)."""
        return self.measure()

    @cached_property
    def loss(self) -> Callable[[Mapping[str, Any]], float | None] | None:
        """What the predictions lose (mean KL, nats) with other values in the weights named; None where
        there is no such weight."""
        return self.probe() if self.probe is not None else None


@dataclass(frozen=True)
class Wanted:
    """One of ``palettize`` (bits), ``quantize`` (int8, int4; of bases
    mlx2 to mlx8), ``bits_per_weight``, ``size`` (bytes).

    ``adapter_bits``: of the factors of adapters, which are left as they are without it.
    ``group_size``: channels per table; input channels per scale with ``quantize``. ``asymmetric``:
    integers with offsets; ``granularity``: what shares a scale of integers. ``lut``,
    ``cluster_dim``, ``axis``: of tables, see `compress_code.Way`. ``include``, ``exclude``: regular
    expressions, searched in the names of tensors. ``force``: replace ``output``.
    Of bases alone: ``plain`` scales instead of searched ones, ``expanded`` weights.
    """

    palettize: int | None = None
    quantize: str | None = None
    bits_per_weight: float | None = None
    size: int | None = None
    adapter_bits: int | None = None
    group_size: int | None = None
    asymmetric: bool = False
    granularity: str | None = None
    per_channel_scale: bool = False
    lut: str = "kmeans"
    cluster_dim: int = 1
    axis: int = 0
    calibration: Calibration | None = None
    plain: bool = False
    expanded: bool = False
    include: str | None = None
    exclude: str | None = None
    force: bool = False

    @property
    def of_integers(self) -> dict[str, bool]:
        """Options that say how integers are made -> whether they are given."""
        return {"--asymmetric": self.asymmetric, "--granularity": self.granularity is not None}

    @property
    def of_tables(self) -> dict[str, bool]:
        """Options that say how tables are made -> whether they are given."""
        return {
            "--lut": self.lut != "kmeans",
            "--cluster-dim": self.cluster_dim != 1,
            "--axis": self.axis != 0,
        }

    def left_out(self, names: Sequence[str]) -> str | None:
        """Why a tensor of these names is not meant, or None if it is. Raises Refused for what is no
        regular expression."""
        include, exclude = _pattern(self.include), _pattern(self.exclude)
        if include is not None and not any(map(include.search, names)):
            return "not in --include"
        if exclude is not None and any(map(exclude.search, names)):
            return "in --exclude"
        return None

    def none_left(self, what: str) -> str:
        """What is said where there is no ``what``, or `left_out` leaves none."""
        given = {"--include": self.include, "--exclude": self.exclude}
        options = [f"{o} {printable(repr(v))}" for o, v in given.items() if v is not None]
        leave = "leave" if len(options) > 1 else "leaves"
        among = f" among those that {' and '.join(options)} {leave}" if options else ""
        return f"holds no {what}{among}"

    def unmet(self, least: int, rest: int, tensors: int, count: int) -> str:
        """What is said of a budget that can't be met: the least that can.

        ``least``: bytes of the ``tensors`` that it is for, of ``count`` numbers; ``rest``: all others.
        """
        if self.size is not None:
            low = f"--size {self.size}: the smallest possible is {least + rest} bytes"
        else:
            per = f"{math.ceil(800 * least / count) / 100:g} bits" if count else "nothing"
            low = f"--bits-per-weight {self.bits_per_weight:g}: the smallest possible is {per}"
        return f"{low} ({tensors} {'tensor' if tensors == 1 else 'tensors'})"


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as e:
        raise Refused(None, f"{printable(repr(text))} is no regular expression: {e}") from None


class Outcome(Protocol):
    """What was done, or planned."""

    def lines(self) -> list[str]:
        """For people."""

    def as_json(self) -> dict[str, Any]:
        """For programs: one document."""


def bytes_of(text: str) -> int:
    """``60MB`` (10**6), ``60MiB`` (2**20), or bytes. Raises Refused for what is no size."""
    found = _SIZE.match(text.strip())
    if not found:
        raise Refused(None, f"{printable(repr(text), 60)} is no size; such as 60MB, 1.5GB or 57MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])
