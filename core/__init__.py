"""loraduct: convert, inspect and validate fine-tuning adapters.

Exact, or refused with the reason; never silently wrong. Importing this package loads none of
the heavy libraries; every module imports what it needs when it needs it.
"""

from importlib import import_module

from loraduct.version import __version__

__all__ = ["AdapterPool", "__version__"]
_ELSEWHERE = {"AdapterPool": "loraduct.converters.pool"}  # what is offered here, when asked for


def __getattr__(name: str) -> object:
    if name in _ELSEWHERE:
        return getattr(import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module 'loraduct' has no attribute {name!r}")
