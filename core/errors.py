"""What can go wrong, as one small tree.

    LoraductError            exit 1
    ├── Refused              input that can't be carried exactly, or is broken
    │   └── NotRecognised    a path that holds nothing loraduct reads
    ├── MissingExtra         an optional package is not installed
    └── GateFailed           exit 3: a validation that ran and did not pass

Every message is one line: file, tensor or field, what was found, what was expected, what to do.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar

from loraduct.text import printable


class LoraductError(Exception):
    """Base of all errors that are meant for people."""

    exit_code: ClassVar[int] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes: the message, not what it was made of."""
        return _again, (type(self), str(self))


def _again(kind: type[LoraductError], message: str) -> LoraductError:
    return kind.__new__(kind, message)


class Refused(LoraductError):
    """``Refused(file, what, tensor=...)``: broken, or not carried exactly; nothing was written."""

    def __init__(
        self, file: str | PathLike[str] | None, what: str, *, tensor: str | None = None
    ) -> None:
        parts = [printable(str(file), 300)] if file is not None else []
        parts += [printable(tensor, 200)] if tensor is not None else []
        super().__init__(": ".join([*parts, printable(what, 1500)]))


class NotRecognised(Refused):
    """The path holds nothing that loraduct reads."""


class MissingExtra(LoraductError):
    """An optional dependency is needed for this verb."""

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(
            f"{what} needs more packages; install them with: pip install 'loraduct[{extra}]'"
        )


class GateFailed(LoraductError):
    """A validation ran and failed."""

    exit_code = 3
