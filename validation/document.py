"""The JSON document of a validation, schema 2: see docs/validation.md."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter
from loraduct.formats.base import Base
from loraduct.validation import suites
from loraduct.validation.size import paths_of
from loraduct.validation.suites import SCHEMA, Suite
from loraduct.version import __version__

_VERSIONS = ("numpy", "torch", "transformers", "peft", "mlx", "mlx-lm", "coremltools")


def document(
    found: Sequence[Suite],
    adapters: Sequence[Adapter],
    given: Sequence[Path],
    base: Base,
    thresholds: Mapping[str, Any],
    command: Sequence[str],
    fixed: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any] | None],
) -> dict[str, Any]:
    """Everything that was found. ``given``: A and B as the user named them; ``files``: `named` ones."""
    ran = {s.name for s in found if s.status != "skipped"}
    inputs: dict[str, Any] = {"a": None, "b": None}
    for key, path, adapter in zip("ab", given, adapters, strict=False):
        digest = _digest(paths_of(adapter))
        inputs[key] = {"path": str(path), "format": adapter.format, "sha256": digest}
    whole = ran & {"parity", "quality", "latency", "swap"}
    held = {p.name: p for p in [base.path / "config.json", *base.path.glob("model*.safetensors*")]}
    packed = "mlx" if base.quantization is not None else "transformers"
    inputs["base"] = {
        "path": str(base.path),
        "format": packed,
        "sha256": _digest(held) if whole else None,
    }
    inputs |= files
    parity = next(s for s in found if s.name == "parity")
    return {
        "schema": SCHEMA,
        "tool": {"name": "loraduct", "version": __version__},
        "command": list(command),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "passed": suites.all_passed(found),
        "verdict": suites.verdict(found),
        "inputs": inputs,
        "suites": [s.as_json() for s in found],
        "thresholds": dict(thresholds),
        "environment": environment(),
        # of schema 1
        "adapter": str(given[0]),
        "base": str(base.path),
        "against": str(given[1]) if len(given) > 1 else None,
        "weights": [str(a.weights) for a in adapters],
        "fixed_base_config": dict(fixed),
        "checks": [c.as_json() for s in found for c in s.checks],
        "parity": dict(parity.numbers) or None,
    }


def named(path: Path | None) -> dict[str, Any] | None:
    """A file that was given, as documents name it; None without one."""
    return None if path is None else {"path": str(path), "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _digest(files: Mapping[str, Path]) -> str:
    """Of the lines that sha256sum prints for the files, sorted by name."""
    lines = [f"{_sha256(path)}  {name}\n" for name, path in sorted(files.items())]
    return sha256("".join(lines).encode()).hexdigest()


def environment() -> dict[str, Any]:
    """What computed this: Python, the system, and versions of what is installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
