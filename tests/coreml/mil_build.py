"""Packages made by coremltools' own exporter, and what coremltools says their values are."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


def quietly(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """coremltools warns at import and draws bars on stderr."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        return run(*args, **options)


def _import() -> Any:
    import logging

    import coremltools

    logging.getLogger("coremltools").setLevel(logging.ERROR)
    return coremltools


ct = quietly(_import)

from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.backend.mil.load import MILProtoExporter  # noqa: E402
from coremltools.converters.mil.mil import Function, Program, types  # noqa: E402

TARGETS = {15: ct.target.iOS15, 16: ct.target.iOS16, 17: ct.target.iOS17, 18: ct.target.iOS18}


@dataclass
class Case:
    """One operation. ``inputs``: values known only when it runs; ``params``: constants of it.

    ``oracle``: what it should yield, from the inputs and parameters; None: coremltools'
    ``value_inference``. ``ios``: the opset.
    """

    op: str
    inputs: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)
    oracle: Callable[..., Any] | None = None
    ios: int = 18
    label: str = ""

    @property
    def name(self) -> str:
        """A function's name."""
        return f"{self.op}_{self.label}" if self.label else self.op


def flat(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Inputs of a function: those in a tuple get numbers."""
    found: dict[str, np.ndarray] = {}
    for name, value in inputs.items():
        many = value if isinstance(value, list) else [value]
        found |= {f"{name}_{i}": v for i, v in enumerate(many)}
    return found


def placeholder(array: np.ndarray) -> Any:
    """An input shaped like an array."""
    kind = types.numpy_type_to_builtin_type(array.dtype)
    return mb.placeholder(array.shape, dtype=kind, allow_rank0_input=True)


def function(case: Case, opset: Any) -> Any:
    """A function that is this operation alone."""
    arrays = flat(case.inputs)
    with Function({n: placeholder(a) for n, a in arrays.items()}, opset_version=opset) as made:
        bound = {}
        for name, value in case.inputs.items():
            many = isinstance(value, list)
            named = [made.inputs[f"{name}_{i}"] for i in range(len(value) if many else 1)]
            bound[name] = named if many else named[0]
        out = getattr(mb, case.op)(**bound, **case.params)
        made.set_outputs(list(out) if isinstance(out, (tuple, list)) else [out])
    return made


def by_coremltools(case: Case) -> list[np.ndarray]:
    """What coremltools infers when every input is a constant."""
    with Function({}, opset_version=TARGETS[case.ios]) as scratch:
        out = getattr(mb, case.op)(**case.inputs, **case.params)
        scratch.set_outputs(list(out) if isinstance(out, (tuple, list)) else [out])
    outs = out if isinstance(out, (tuple, list)) else [out]
    values = [o.val for o in outs]
    assert all(v is not None for v in values), f"coremltools infers nothing for {case.op}"
    return [np.asarray(v) for v in values]


def save(
    program: Any, path: Path, description: Callable[[Any], None] | None = None, ios: int = 18
) -> Path:
    """A package that holds a program as coremltools exports it, without any pass."""
    version = ios - 9  # of the specification: 9 is iOS18's
    weights = path / "Data/com.apple.CoreML/weights"
    weights.mkdir(parents=True)
    proto = quietly(lambda: MILProtoExporter(program, str(weights), version).export())
    model = ct.proto.Model_pb2.Model(specificationVersion=version)
    model.mlProgram.CopyFrom(proto)
    if description:
        description(model.description)
    return write(model, path)


def write(model: Any, path: Path) -> Path:
    """A package around a specification."""
    folder = path / "Data/com.apple.CoreML"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.mlmodel").write_bytes(model.SerializeToString())
    item = {
        "author": "x",
        "description": "x",
        "name": "x",
        "path": "com.apple.CoreML/model.mlmodel",
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": {"A": item},
                "rootModelIdentifier": "A"}  # fmt: skip
    (path / "Manifest.json").write_text(json.dumps(manifest))
    return path


def package(cases: Sequence[Case], path: Path, ios: int) -> Path:
    """One package, one function per case."""
    program = Program()
    for case in cases:
        program.add_function(case.name, quietly(function, case, TARGETS[ios]))
    program.default_function_name = cases[0].name
    return save(program, path, ios=ios)


def one(path: Path, body: Callable[..., Any], **inputs: Any) -> Path:
    """A package whose main function is ``body``; inputs: (shape, type)."""

    def make() -> Any:
        given = {n: mb.placeholder(s, dtype=t) for n, (s, t) in inputs.items()}
        with Function(given, opset_version=TARGETS[18]) as made:
            out = body(**made.inputs)
            made.set_outputs(out if isinstance(out, list) else [out])
        program = Program()
        program.add_function("main", made)
        return program

    return save(quietly(make), path / "made.mlpackage")
