"""loraduct: convert, inspect and validate fine-tuning adapters.

Exact, or refused with the reason; never silently wrong. Importing this package loads none of
the heavy libraries; every module imports what it needs when it needs it.
"""

from loraduct.version import __version__

__all__ = ["__version__"]
