"""The adapter that was merged into a package's weights: what they differ by from the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter, BaseRef, Note, Update
from loraduct.converters.approximate import Wanted
from loraduct.converters.extract import differences
from loraduct.converters.fuse import EMBEDDINGS, HEAD
from loraduct.errors import Refused
from loraduct.formats.base import Base
from loraduct.formats.coreml import record
from loraduct.formats.coreml.package import Package, is_package, read
from loraduct.formats.coreml.program import block_of_function, mangled, type_of
from loraduct.tensor import Tensor
from loraduct.text import printable, several


def merged_in(path: Path) -> dict[str, Any] | None:
    """The record of the package at ``path``, if adapters were merged into its weights."""
    if not is_package(path):
        return None
    found = record.find(read(path))
    return found if found and found.get("merged") else None


def unmerge(path: Path, base: Base, wanted: Wanted) -> Adapter:
    """The merged adapter, of the rank above rounding's noise unless ``wanted`` says another.

    Raises Refused when the package was made of another base, or holds more of a difference than
    low rank and rounding explain.
    """
    package = read(path)
    weights = parameters(package, base)
    found = differences(weights, _stored(base, weights), wanted, path)
    if not found:
        raise Refused(path, f"has the weights of {base.path}: there is nothing merged into it")
    unlike = [n for n, f in found.items() if not f.whole]
    if unlike and wanted == Wanted():
        worst = max(unlike, key=lambda n: found[n].residual)
        what = (
            f"differs from the base by more than low rank and rounding in {several(unlike)}:"
            f" {found[worst].residual:.1%} of {printable(worst)}'s difference is left (rounding"
            f" explains {found[worst].rounding:.1%}); say how near with --rank or --energy"
        )
        raise Refused(path, what)
    updates: dict[str, Update] = {name: f.update for name, f in found.items()}
    left = max(f.residual for f in found.values())
    note = Note(
        "unmerged",
        f"taken from merged weights of 16 bits: {left:.2%} of a difference is left at most, which"
        f" {'rounding explains' if not unlike else 'is more than rounding explains'}",
    )
    name = base.config.get("_name_or_path")
    return Adapter(
        path=path,
        weights=package.blobs.path,
        format="coreml",
        method="lora",
        updates=updates,
        config={},
        base=BaseRef(name=name if isinstance(name, str) and name else None),
        notes=(note,),
        layers=base.layers,
        model_type=base.model_type,
        base_modules=base.linear_modules,
    )


def parameters(package: Package, base: Base) -> dict[str, Tensor]:
    """The weights that a package's first function refers to, under the base's names."""
    function = next(iter(package.functions.values()))
    consts = {
        op.outputs[0].name: op.attributes["val"]
        for op in block_of_function(function).operations
        if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue"
    }
    found = {}
    for name in dict.fromkeys([*base.tensors, HEAD]):
        value = consts.get(mangled(name))
        if value is not None:
            dtype, shape = type_of(value.type)
            sizes = tuple(s for s in shape if s is not None)
            found[name] = package.blobs.tensor(value.blobFileValue.offset, dtype, sizes, name)
    if not found:
        raise Refused(package.path, f"has no weights of {base.path}: made of another base")
    return found


def _stored(base: Base, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's weights; a head of its own is compared with the embedding it was tied to."""
    stored = dict(base.tensors)
    if HEAD in weights and HEAD not in stored and EMBEDDINGS in stored:
        stored[HEAD] = stored[EMBEDDINGS]
    return stored
