"""A base model as a Core ML package: built straight from its weights, tensor by tensor.

No tracing and no torch: the program is written operation by operation, and the weights stream
into the weight file as FLOAT16.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraduct.converters.coreml_graph import COS, SIN, Form, function, table_name
from loraduct.converters.coreml_inputs import arguments, kinds_of
from loraduct.converters.decoder import Decoder, describe
from loraduct.converters.fuse import HEAD, Weighted, as_stored, fused
from loraduct.converters.rope import rotation
from loraduct.errors import Refused
from loraduct.files import file_chunks, replace_file, staged_folder, write_file
from loraduct.formats.base import Base
from loraduct.formats.companions import find
from loraduct.formats.coreml import package, record
from loraduct.formats.coreml.blob import Layout
from loraduct.formats.coreml.record import BASE
from loraduct.formats.coreml.schema import new
from loraduct.formats.model_folder import Stored
from loraduct.formats.safetensors_file import serialized
from loraduct.tensor import FLOATS, Tensor

HALF = "F16"  # what every weight is stored in
# target -> (specification version, opset); coremltools 9.0 `_deployment_compatibility.py`
TARGETS = {"iOS18": (9, "CoreML8"), "iOS17": (8, "CoreML7")}
CONTEXT = 2048  # positions a package holds unless told otherwise, or the model has fewer


@dataclass(frozen=True)
class Options:
    """How a package is shaped.

    ``shapes``: fixed numbers of tokens per call, one function each; none: any number in one.
    ``max_rank``: adapters come as arguments, of up to this rank.
    """

    target: str = "iOS18"
    shapes: tuple[int, ...] = ()
    stateless: bool = False
    context: int | None = None
    max_rank: int | None = None


def context_of(decoder: Decoder, wanted: int | None, file: Path) -> int:
    """Positions that the package holds. Raises Refused beyond what its rotations hold for."""
    limits = [t.limit for t in decoder.tables.values() if t.limit]
    most = min([decoder.positions, *limits])
    context = wanted or min(most, CONTEXT)
    if context > most:
        what = "the rotation changes beyond" if limits and most == min(limits) else "the model has"
        raise Refused(file, f"--context {context}: {what} {most} positions; use {most} or fewer")
    return context


def forms_of(options: Options, decoder: Decoder, file: Path, name: str = BASE) -> dict[str, Form]:
    """The functions of the base, by name. Raises Refused for what the target can't hold."""
    stateless = options.stateless
    if options.target == "iOS17" and not stateless:
        raise Refused(file, "--target iOS17 has no states: add --stateless, or use --target iOS18")
    if options.target == "iOS17" and len(options.shapes) > 1:
        raise Refused(file, "--target iOS17 holds one function: give one of --shapes")
    context = context_of(decoder, options.context, file)
    for q in options.shapes:
        if not 1 <= q <= context:
            raise Refused(file, f"--shapes {q}: expected 1 to {context} tokens (--context)")
    one = Form(
        opset=TARGETS[options.target][1],
        context=context,
        stateless=stateless,
        inputs=kinds_of(decoder, options.max_rank) if options.max_rank else None,
    )
    if options.target == "iOS17":  # holds one function, of this name
        return {"main": replace(one, q=options.shapes[0] if options.shapes else None)}
    if not options.shapes:
        return {name: one}
    return {f"{name}_q{q}": replace(one, q=q) for q in options.shapes}


class Parts:
    """Parameters of the package, laid out in the weight file in the order they are asked for."""

    def __init__(self, tensors: Mapping[str, Stored], layout: Layout) -> None:
        self.tensors, self.layout = tensors, layout
        self.found: dict[str, tuple[tuple[int, ...], int]] = {}

    def find(self, name: str) -> tuple[tuple[int, ...], int] | None:
        """Shape and offset of a parameter, or None if the model has none of that name."""
        if name not in self.found:
            tensor = self.tensors.get(name)
            if tensor is None:
                return None
            offset = self.layout.add("FLOAT16", math.prod(tensor.shape), tensor.pieces())
            self.found[name] = (tensor.shape, offset)
        return self.found[name]


def check_plain(base: Base) -> None:
    """Raises Refused for a base whose weights are packed."""
    for name, tensor in base.tensors.items():
        if tensor.stored_dtype not in FLOATS:
            raise Refused(
                tensor.path or base.path,
                f"is stored as {tensor.stored_dtype}: a base in F32, F16 or BF16 is expected",
                tensor=name,
            )


def tables(decoder: Decoder, context: int) -> dict[str, Stored]:
    """The rotation tables by name."""
    found = {}
    for kind, rope in decoder.tables.items():
        for part, table in zip((COS, SIN), rotation(rope, context), strict=True):
            name = table_name(part, kind)
            found[name] = as_stored(Tensor(name, "F32", table.shape, data=table), HALF)
    return found


def program(
    base: Base, decoder: Decoder, forms: Mapping[str, Form], tensors: Mapping[str, Stored]
) -> tuple[Any, Layout]:
    """The specification and the weight file to be written."""
    first = next(iter(forms.values()))
    layout = Layout()
    parts = Parts(tensors, layout)

    def find(name: str) -> tuple[tuple[int, ...], int] | None:
        found = parts.find(name)
        if found is None and not name.endswith(".bias"):
            raise Refused(base.path, f"has no weight {name}, which a {decoder.model_type} has")
        return found

    version = next(v for v, opset in TARGETS.values() if opset == first.opset)
    model = new("Model", specificationVersion=version)
    described = []
    for name, form in forms.items():
        made, about = function(decoder, form, find, package.WEIGHTS_NAME, name)
        model.mlProgram.functions[name].CopyFrom(made)
        described.append(about)
    model.mlProgram.version = 1
    _describe(model, described, multi=version >= 9)
    return model, layout


def _describe(model: Any, described: Sequence[Any], *, multi: bool) -> None:
    """Inputs and outputs: per function from iOS18 on, before that of the only one."""
    if multi:
        model.description.functions.extend(described)
        model.description.defaultFunctionName = described[0].name
        return
    model.description.input.extend(described[0].input)
    model.description.output.extend(described[0].output)


def identifiers(spec: bytes) -> tuple[str, str]:
    """Identifiers of a package's two items, from its specification: same input, same bytes."""
    digest = hashlib.sha256(spec).digest()
    one, two = (uuid.UUID(bytes=digest[i : i + 16], version=4) for i in (0, 16))
    return str(one), str(two)


@contextlib.contextmanager
def written(output: Path, model: Any, chunks: Iterable[Any]) -> Iterator[Path]:
    """A new package folder, all or nothing, in place when the block ends without error."""
    with staged_folder(output) as stage:
        data = stage / "Data" / "com.apple.CoreML"
        (data / "weights").mkdir(parents=True)
        write_file(data / "weights" / package.WEIGHT_FILE, chunks)
        spec = model.SerializeToString(deterministic=True)
        write_file(data / "model.mlmodel", [spec])
        text = json.dumps(package.manifest(identifiers(spec)), indent=4) + "\n"
        write_file(stage / package.MANIFEST, [text.encode()])
        yield stage


def build(
    base: Base,
    output: Path,
    options: Options,
    *,
    merged: tuple[str, Weighted] | None = None,
    inputs: Mapping[str, Weighted] | None = None,
    then: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write the package of a base, its tokenizer beside it; returns all that was written.

    ``merged``: a name and the adapters (with weights) that are fused into the weights. ``inputs``:
    adapters that come as arguments, each written as safetensors beside the package. ``then`` is
    called with the new package's folder before it takes its place, to add functions to it.
    Adapters have transformers' names (`loraduct.converters.neutral`).
    """
    decoder = describe(base)
    check_plain(base)
    held = dict(base.tensors)
    if decoder.tied:
        held.pop(HEAD, None)  # some files hold a copy
    name = BASE
    if merged is None:
        tensors = {n: as_stored(t, HALF) for n, t in held.items()}
    else:
        name = merged[0]
        tensors = fused(base, held, merged[1], decoder.tied, HALF)
        decoder = replace(decoder, tied=decoder.tied and HEAD not in tensors)
    forms = forms_of(options, decoder, base.path / "config.json", name)
    first = next(iter(forms.values()))
    model, layout = program(base, decoder, forms, tensors | tables(decoder, first.context))
    made = record.fresh(base, {n: f.q for n, f in forms.items()}, tied=decoder.tied)
    made["context"] = first.context
    if merged is not None:
        made["merged"] = [[a.path.name, weight] for a, weight in merged[1]]
    record.write(model, made)
    beside = {
        arguments_of(output, n): arguments(adapters, decoder, first.inputs or {})
        for n, adapters in (inputs or {}).items()
    }
    with written(output, model, layout.chunks()) as stage:
        if then is not None:
            then(stage)
    done = [output]
    for file, given in beside.items():
        replace_file(file, serialized(given, {"format": "coreml"}, {}))
        done.append(file)
    return done + _tokenizer(base, output)


def tokenizer_of(output: Path) -> Path:
    """The folder beside a package that holds its tokenizer."""
    return output.with_name(f"{output.stem}.tokenizer")


def arguments_of(output: Path, name: str) -> Path:
    """The file beside a package that holds an adapter as arguments."""
    return output.with_name(f"{output.stem}.{name}.safetensors")


def _tokenizer(base: Base, output: Path) -> list[Path]:
    """The base's tokenizer files in a folder beside the package; none where it has none."""
    files = [f for f in find(base.path)[0] if f.name != "README.md"]
    if not any(f.name.startswith("tokenizer") for f in files):
        return []
    target = tokenizer_of(output)
    with staged_folder(target) as stage:
        for file in files:
            write_file(stage / file.name, file_chunks(file))
    return [target]
