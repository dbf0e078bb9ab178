"""An .mlpackage: a folder with a manifest, a model specification and a weight file.

Layout (coremltools 9.0, ``modelpackage/src/ModelPackage.cpp``): ``Manifest.json`` lists items by
identifier, each with a path under ``Data/``; ``rootModelIdentifier`` names the specification; a
program refers to weights as ``@model_path/weights/weight.bin``, next to the specification.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loraduct.errors import NotRecognised, Refused
from loraduct.files import read_bytes
from loraduct.formats.coreml.blob import BlobFile
from loraduct.formats.coreml.schema import messages
from loraduct.formats.json_file import read_object
from loraduct.text import printable

SUFFIX = ".mlpackage"
MANIFEST = "Manifest.json"
SPEC = "com.apple.CoreML/model.mlmodel"
WEIGHTS = "com.apple.CoreML/weights"
WEIGHT_FILE = "weight.bin"
MODEL_PATH = "@model_path/"
WEIGHTS_NAME = f"{MODEL_PATH}weights/{WEIGHT_FILE}"  # as a program calls the usual weight file
SPEC_LIMIT = 1 << 30  # bytes of a specification we are willing to parse
# What coremltools asks of function and feature names (`_utils.py`, NameSanitizer).
VALID_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True)
class Package:
    """A package on disk and its parsed specification (a ``Model`` message, yours to change)."""

    path: Path
    spec_path: Path
    model: Any

    @property
    def functions(self) -> Any:
        """Name -> Function of its program."""
        return self.model.mlProgram.functions

    def weight_path(self, file_name: str) -> Path:
        """The weight file that a program's ``fileName`` means; it must lie in the package."""
        folder = self.spec_path.parent
        relative = file_name.removeprefix(MODEL_PATH)
        parts = Path(relative).parts
        if relative == file_name or not parts or ".." in parts or Path(relative).is_absolute():
            raise Refused(
                self.spec_path,
                f"refers to the weight file {printable(file_name, 120)!r}, expected"
                f" {MODEL_PATH}weights/... inside the package",
            )
        path = folder / relative
        _check_inside(self.path, path)
        return path

    @cached_property
    def blobs(self) -> BlobFile:
        """The usual weight file."""
        return self.blob_file(WEIGHTS_NAME)

    def blob_file(self, file_name: str) -> BlobFile:
        """A weight file by the name a program gives it; each is opened once."""
        if file_name not in self._opened:
            self._opened[file_name] = BlobFile(self.weight_path(file_name))
        return self._opened[file_name]

    @cached_property
    def _opened(self) -> dict[str, BlobFile]:
        return {}


def is_package(path: Path) -> bool:
    """Whether ``path`` looks like a package: a folder with a manifest."""
    return path.is_dir() and (path / MANIFEST).exists()


def spec_path(path: Path) -> Path:
    """The specification's file, from the manifest. Raises Refused, NotRecognised."""
    if not path.is_dir():
        what = "does not exist" if not path.exists() else "is not a folder, as an .mlpackage is"
        raise NotRecognised(path, what)
    if not (path / MANIFEST).exists():
        raise NotRecognised(path, f"holds no {MANIFEST}; an .mlpackage is expected")
    manifest = read_object(path / MANIFEST)
    items, root = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
    item = items.get(root) if isinstance(items, dict) and isinstance(root, str) else None
    relative = item.get("path") if isinstance(item, dict) else None
    if not isinstance(relative, str) or not relative:
        raise Refused(path / MANIFEST, "names no root model (rootModelIdentifier, itemInfoEntries)")
    if ".." in Path(relative).parts or Path(relative).is_absolute():
        raise Refused(path / MANIFEST, f"names a path that leaves the package: {relative!r}")
    found = path / "Data" / relative
    _check_inside(path, found)
    return found


def _check_inside(package: Path, path: Path) -> None:
    """Links in a package must not lead out of it."""
    try:
        inside = path.resolve().is_relative_to(package.resolve())
    except (OSError, RuntimeError):
        inside = False
    if not inside:
        raise Refused(path, "leads out of the package")


def read(path: Path) -> Package:
    """The package at ``path``: an ML program, with its specification parsed.

    Raises Refused for what is broken or is no ML program, NotRecognised for what is no package.
    """
    from google.protobuf.message import DecodeError

    file = spec_path(path)
    data = read_bytes(file, SPEC_LIMIT)
    try:
        model = messages()["Model"].FromString(data)
    except (DecodeError, RecursionError):
        raise Refused(file, "is not a Core ML specification, or was cut short") from None
    if model.WhichOneof("Type") != "mlProgram" or not model.mlProgram.functions:
        raise Refused(file, "holds no ML program (a neural network or pipeline of another kind?)")
    return Package(path, file, model)


def manifest(identifiers: tuple[str, str]) -> dict[str, Any]:
    """A new package's manifest. ``identifiers``: of the specification and of the weights."""
    spec, weights = identifiers

    def item(path: str, what: str) -> dict[str, str]:
        return {
            "author": "com.apple.CoreML",
            "description": what,
            "name": path.rpartition("/")[2],
            "path": path,
        }

    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            weights: item(WEIGHTS, "CoreML Model Weights"),
            spec: item(SPEC, "CoreML Model Specification"),
        },
        "rootModelIdentifier": spec,
    }
