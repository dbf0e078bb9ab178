"""Inputs of a function against what the model's description allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loraduct.errors import Refused
from loraduct.formats.coreml.package import Package
from loraduct.text import several
from loraduct.validation.mil_program import Program


def check(package: Package, program: Program, inputs: Mapping[str, Any]) -> None:
    """Names, kinds and shapes of the inputs. Raises Refused."""
    missing = [n for n in program.inputs if n not in inputs]
    strange = [n for n in inputs if n not in program.inputs]
    if missing or strange:
        problem = f"has no input {several(strange)}" if strange else f"needs {several(missing)}"
        raise Refused(
            package.path,
            f"function {program.function} {problem}; its inputs are"
            f" {several(list(program.inputs), 8) or 'none'}",
        )
    features = {f.name: f for f in description(package, program.function).input}
    for name, declared in program.inputs.items():
        array = np.asarray(inputs[name])
        kinds = "biuf" if declared.dtype.startswith("FLOAT") else "biu"
        if array.dtype.kind not in kinds:
            raise Refused(
                package.path, f"an input of {array.dtype}, expected {declared.dtype}", tensor=name
            )
        if declared.dtype == "INT32" and array.size and _beyond_int32(array):
            raise Refused(package.path, "an input beyond the range of INT32", tensor=name)
        if name in features:
            _check_flexible(package, name, features[name], array.shape)


def _beyond_int32(array: Any) -> bool:
    return bool(int(array.max()) > 2**31 - 1 or int(array.min()) < -(2**31))


def description(package: Package, function: str) -> Any:
    """The part of the description that tells of one function's features."""
    whole = package.model.description
    return next((f for f in whole.functions if f.name == function), whole)


def _check_flexible(package: Package, name: str, feature: Any, found: tuple[int, ...]) -> None:
    """A shape against the ranges or the list of shapes that the description allows."""
    array = feature.type.multiArrayType
    kind = array.WhichOneof("ShapeFlexibility")
    if kind == "enumeratedShapes":
        allowed = [tuple(s.shape) for s in array.enumeratedShapes.shapes]
        if found not in allowed:
            shown = several([str(list(s)) for s in allowed], 6)
            raise Refused(
                package.path, f"has the shape {list(found)}, allowed: {shown}", tensor=name
            )
    if kind == "shapeRange":
        ranges = [(r.lowerBound, r.upperBound) for r in array.shapeRange.sizeRanges]
        # an upper bound of -1, or 0 in an unsigned field, means none (FeatureTypes.proto)
        fits = len(ranges) == len(found) and all(
            low <= n and (n <= high or high <= 0)
            for n, (low, high) in zip(found, ranges, strict=True)
        )
        if not fits:
            shown = ", ".join(f"{low} to {high}" for low, high in ranges)
            raise Refused(
                package.path, f"has the shape {list(found)}, allowed: [{shown}]", tensor=name
            )
