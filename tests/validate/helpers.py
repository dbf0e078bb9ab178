"""Documents of a validation, read; and adapters with a fault put in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read(result: Any) -> dict[str, Any]:
    """The JSON document, its suites by name under ``by``."""
    assert not result.exception or isinstance(result.exception, SystemExit), result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value | {"by": {s["name"]: s for s in value["suites"]}}


def failed(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks that failed, in order, with their suite."""
    return [
        c | {"suite": s["name"]}
        for s in document["suites"]
        for c in s["checks"]
        if c["status"] == "failed"
    ]


def edited(folder: Path, to: Path, edit: Callable[[dict[str, Any]], None], **config: Any) -> Path:
    """A copy of an adapter's folder with its tensors (numpy) and its config changed."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, to)
    (file,) = to.glob("adapter*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt" if "model" in file.name else "mlx"})
    if config:
        path = to / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return to
