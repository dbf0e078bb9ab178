"""Documents of a validation, read; and adapters with a fault put in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraduct.formats import base as base_folder
from loraduct.formats import read as read_adapter
from loraduct.formats.options import ReadOptions
from loraduct.validation import suites
from loraduct.validation.runs import Runs


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


class Judge:
    """Validates pairs on one base, which is run once; and so is what was A before."""

    def __init__(self, folder: Path, prompts: list[str]) -> None:
        self.base = base_folder.read(folder)
        self.options = ReadOptions(restore=False, base=self.base)
        self.runs = Runs(self.base, prompts)
        self.read_before: dict[Path, Any] = {}

    def __call__(self, first: Path, second: Path | None = None) -> dict[str, suites.Suite]:
        adapters = [self._read(first)]
        adapters += [self.fresh(second)] if second else []
        context = suites.Context(tuple(adapters), self.base, self.runs)
        return {s.name: s for s in suites.run(context)}

    def _read(self, path: Path) -> Any:
        if path not in self.read_before:
            self.read_before[path] = self.fresh(path)
        return self.read_before[path]

    def fresh(self, path: Path) -> Any:
        """The adapter, read; of PACKAGE:NAME too."""
        return read_adapter(path, self.options)
