"""What a package holds, as loraduct's own model: its adapters, and its base's weights.

Factors come back as they went in: FLOAT16 bytes are the source's; what was rounded is widened to
the dtype it had, and what was folded into b by a power of two is taken out again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loraduct.adapter import Adapter, BaseRef, LowRank, Replacement, Update
from loraduct.errors import NotRecognised, Refused
from loraduct.formats.base import Base
from loraduct.formats.coded import Code, Decoded
from loraduct.formats.coreml import record
from loraduct.formats.coreml.coded import code_in
from loraduct.formats.coreml.constexpr import expanded, is_compressed
from loraduct.formats.coreml.edit import HALF, Blob, Ops
from loraduct.formats.coreml.package import Package
from loraduct.formats.coreml.package import read as read_package
from loraduct.formats.coreml.program import mangled, type_of
from loraduct.formats.options import ReadOptions
from loraduct.tensor import Tensor
from loraduct.text import printable, several

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
Record = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """Where the tensors of one module's update lie; see `loraduct.formats.coreml.edit.Chain`."""

    a: Blob
    b: Blob
    bias: Blob | None = None
    magnitude: Blob | None = None
    inverse: Blob | None = None


def place_of(found: Record, name: str) -> tuple[str, int] | None:
    """A function that has the adapter, and which of the function's adapters it is."""
    for function, row in found["functions"].items():
        members = [m for m, _ in row["adapters"]]
        if name in members:
            return function, members.index(name)
    return None


def parts_of(
    package: Package, found: Record, name: str
) -> tuple[dict[str, Parts], dict[str, Blob]]:
    """Blobs of an adapter by module, and of the parameters that it replaces."""
    place = place_of(found, name)
    if place is None:
        raise Refused(package.spec_path, f"no function has the adapter {printable(name)!r}")
    function, k = place
    ops = Ops(package.functions[function], package)
    modules = {}
    for i, (module, row) in enumerate(found["adapters"][name]["modules"].items()):
        stem, extra = f"{k}_{i}", row.get("extra", [])
        one = Parts(
            ops.blob(f"A{stem}"),
            ops.blob(f"B{stem}"),
            ops.blob(f"D{stem}") if "bias" in extra else None,
            ops.blob(f"M{stem}") if "magnitude" in extra else None,
            ops.blob(f"N{stem}") if "magnitude" in extra else None,
        )
        rank = one.a.shape[-1 if row.get("layout") == "embedding" else 0]
        if (
            len(one.a.shape) != 2
            or len(one.b.shape) != 2
            or {rank, one.b.shape[1]} != {row["rank"]}
        ):
            what = (
                f"factors of shapes {list(one.a.shape)}, {list(one.b.shape)} for rank {row['rank']}"
            )
            raise Refused(package.spec_path, f"holds {what}", tensor=module)
        modules[module] = one
    replaced = found["adapters"][name]["replaced"]
    return modules, {p: ops.blob(row["const"]) for p, row in replaced.items()}


def tensor_of(package: Package, blob: Blob, name: str) -> Tensor:
    """A blob as a lazy tensor; of a compressed one, the values it stands for."""
    if blob.made is not None:
        code = code_in(package, blob.made, {})
        plain = Tensor(name, "F16", blob.shape, path=package.blobs.path)
        if code is None:
            return replace(plain, data=expanded(package, blob.made, {}).view("u2"))
        inner = replace(plain, data=code.values().view("u2"))
        return replace(plain, make=Decoded(lambda: code), inputs=(inner,))
    return package.blobs.tensor(blob.offset, HALF, blob.shape, name)


def updates_of(package: Package, found: Record, name: str) -> dict[str, Update]:
    """An adapter's updates by module and parameter."""
    modules, replaced = parts_of(package, found, name)
    updates: dict[str, Update] = {}
    rows = found["adapters"][name]
    for module, row in rows["modules"].items():
        one, extra = modules[module], row.get("extra", [])
        _check_sums(package, module, one, row.get("sums"))
        dtypes = row.get("dtypes") or ["F16"] * (2 + len(extra))
        held = {
            leaf: tensor_of(package, blob, f"{module}.{leaf}").to(dtype)
            for leaf, blob, dtype in zip(
                ("lora_A", "lora_B", *extra),
                (one.a, one.b, *(getattr(one, e) for e in extra)),
                dtypes,
                strict=True,
            )
        }
        layout = row.get("layout", "linear")
        a, b = held["lora_A"], held["lora_B"]
        updates[module] = LowRank(
            a.T if layout == "embedding" else a,
            b.times(2.0 ** -row["fold"]) if row.get("fold") else b,
            float(row["scale"]),
            held.get("magnitude"),
            held.get("bias"),
            layout,
        )
    for parameter, row in rows["replaced"].items():
        weight = tensor_of(package, replaced[parameter], parameter).to(row.get("dtype", "F16"))
        updates[parameter] = Replacement(weight, row["origin"])
    return updates


def _check_sums(package: Package, module: str, parts: Parts, sums: Any) -> None:
    """Refuse compressed factors that are not those that were put in."""
    for blob, wanted in zip((parts.a, parts.b), sums or (), strict=False):
        if wanted is not None and zlib.crc32(tensor_of(package, blob, module).raw()) != wanted:
            what = "does not hold the values that were put in: damaged, or another module's"
            raise Refused(package.blobs.path, what, tensor=module)


def named(package: Package, found: Record, wanted: str | None) -> str:
    """Which adapter is meant. Raises Refused with the names there are."""
    names = list(found["adapters"])
    if not names and found.get("merged"):
        how = f"`convert {printable(str(package.path), 200)} --to peft --base BASE` takes it out"
        raise NotRecognised(package.path, f"has its adapter merged into the weights: {how}")
    if wanted is None and len(names) == 1:
        return str(names[0])
    if wanted is None or wanted not in names:
        there = f"it holds {several(names, 12)}" if names else "it holds none"
        asked = (
            f"has no adapter {printable(wanted)!r}" if wanted else "is a package: name an adapter"
        )
        how = f"; say {printable(str(package.path), 200)}:NAME" if names else ""
        raise NotRecognised(package.path, f"{asked}: {there}{how}")
    return wanted


def read(path: Path, options: ReadOptions) -> Adapter:
    """An adapter of the package at ``path``, as it was put in."""
    package = read_package(path)
    found = record.read(package)
    if options.scale is not None:
        raise Refused(path, "has scales of its own; --scale is for an old adapters.npz")
    name = named(package, found, options.adapter)
    row, base = found["adapters"][name], found["base"]
    source = row["base"]
    trained = options.trained_on or source.get("quantization")
    return Adapter(
        path=path,
        weights=package.blobs.path,
        format="coreml",
        name=name,
        method=row["method"],
        updates=updates_of(package, found, name),
        config=row["config"],
        base=BaseRef(
            name=_text(source.get("name")) or base["name"],
            revision=_text(source.get("revision")),
            quantization=None if trained in (None, "none") else _text(trained),
            quantization_known=trained is not None or source.get("quantization_known") is True,
            kin=base["kin"],
        ),
        metadata=row["metadata"],
        origin=_origin(row),
        layers=base["layers"],
        model_type=base["model_type"],
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _origin(row: Mapping[str, Any]) -> dict[str, Any]:
    """As a conversion records it: the format and config the adapter came with, and those before."""
    past = row["origin"] or {}
    return {
        "format": row["source"],
        "config": row["config"],
        **{k: past[k] for k in ("blocks", "joined") if k in past},
        **({"before": {k: past[k] for k in ("format", "config")}} if "config" in past else {}),
    }


class PackageBase(Base):
    """The base in a package, with the names it has in transformers; ``package`` holds it."""

    def __init__(self, package: Package, found: Record) -> None:
        base = found["base"]
        config = {"model_type": base["model_type"], "num_hidden_layers": base["layers"]}
        super().__init__(package.path, {k: v for k, v in config.items() if v is not None})
        # frozen, as Base is
        object.__setattr__(self, "package", package)
        object.__setattr__(self, "found", found)

    package: Package
    found: Record

    @cached_property
    def functions(self) -> list[str]:
        """The functions without an adapter: one, or one for each number of tokens."""
        return [f for f, row in self.found["functions"].items() if not row["adapters"]]

    @cached_property
    def ops(self) -> Ops:
        """Operations of the base."""
        return Ops(self.package.functions[self.functions[0]], self.package)

    @property
    def tied(self) -> bool | None:
        """Whether the head has no weight of its own."""
        return mangled(f"{HEAD}.weight") not in self.ops.by_name

    @property
    def has_weights(self) -> bool:
        """It always has."""
        return True

    @cached_property
    def kin(self) -> str | None:
        """As the base's folder gave it."""
        kin: str | None = self.found["base"]["kin"]
        return kin

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its parameters in FLOAT16; of one that is compressed, what it stands for."""
        found = {}
        for name in self.found["base"]["parameters"]:
            op = self.ops.by_name.get(mangled(name))
            if op is None:
                continue
            _, shape = type_of(op.outputs[0].type)
            if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue":
                found[name] = tensor_of(self.package, self.ops.blob(mangled(name)), name)
            elif None not in shape:
                sizes = tuple(s for s in shape if s is not None)
                found[name] = replace(
                    Tensor(name, "F16", sizes, path=self.package.path), make=self._compressed(name)
                )
        return found

    def codes(self) -> Iterator[tuple[str, Code]]:
        """Parameters that are matrices in few bits, one at a time."""
        for name in self.found["base"]["parameters"]:
            op = self.ops.by_name.get(mangled(name))
            if op is not None and is_compressed(op):
                code = code_in(self.package, op, self.ops.by_name)
                if code is not None:
                    yield name, code

    def _compressed(self, name: str) -> Any:
        def values() -> Any:
            op = self.ops.by_name[mangled(name)]
            return expanded(self.package, op, self.ops.by_name).astype("f2").view("u2")

        return values
