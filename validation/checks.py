"""One check of a validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loraduct.text import printable


@dataclass(frozen=True)
class Check:
    """``status``: passed, failed, warning (worth knowing, not wrong) or skipped (and why).

    ``adapter`` is "A" or "B" where there are two and the check is about one of them.
    """

    name: str
    status: str
    detail: str
    module: str | None = None
    adapter: str | None = None

    def line(self) -> str:
        """For people."""
        whose = f"{self.adapter}: " if self.adapter else ""
        where = f"{printable(self.module)}: " if self.module else ""
        return f"  {self.status:<8} {self.name:<10} {whose}{where}{printable(self.detail, 500)}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def passed(checks: Sequence[Check]) -> bool:
    """Whether nothing failed."""
    return all(c.status != "failed" for c in checks)
