"""Adapters with fewer bits: LoRA's factors as tables and indices, or as integers with scales.

The factors of a module are turned first where that makes less of an error (`balance`): b a stays.
What is reported is the error of dW = scale * b a per module, from the factors as they are read back.
Measured on the two adapters in examples/: 4 bits lose 8 to 10 % of dW's norm (cosine 0.995), 6 bits
2 to 3 %, 8 bits half a percent.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from loraduct import origin
from loraduct.adapter import Adapter
from loraduct.converters import balance, bits
from loraduct.converters.compress_factors import PROBE, Coded, Pair, best, blank, losses, pairs
from loraduct.converters.compress_wanted import Wanted
from loraduct.converters.convert import Options as Conversion
from loraduct.converters.convert import convert
from loraduct.converters.start import check_unmoved
from loraduct.errors import Refused
from loraduct.files import file_chunks, staged_folder, write_file
from loraduct.formats import CONFIG, folder, locate, mlx, packed_adapter, peft
from loraduct.formats import read as read_adapter
from loraduct.formats.options import ReadOptions
from loraduct.formats.safetensors_file import ordered, serialized
from loraduct.tensor import Tensor
from loraduct.text import printable, size

KEPT = 0.99  # cosine of the logit effect, below which another width is looked for
WIDER = (4, 6, 8)  # widths that are tried then
_PLANNED = (2, 3, 4, 6, 8)
_SLACK = 64  # bytes that a header may vary by
_READ = {"peft": peft.read_weights, "mlx": mlx.read_weights}


@dataclass(frozen=True)
class Module:
    """``loss``: relative Frobenius error of dW. ``form``: what the factors were turned into."""

    name: str
    bits: int
    form: str
    loss: float
    norm: float  # of dW
    nbytes: int


@dataclass
class Outcome:
    """What was compressed, or would be."""

    source: Path
    output: Path | None
    kind: str
    modules: list[Module]
    kept: list[str]
    before: int
    after: int
    files: dict[str, int] = field(default_factory=dict)
    effects: dict[str, float] = field(default_factory=dict)  # width -> cosine of the logit effect

    @property
    def loss(self) -> float:
        """Relative error of all dW together."""
        whole = sum(m.norm**2 for m in self.modules)
        lost = sum((m.loss * m.norm) ** 2 for m in self.modules)
        return float((lost / whole) ** 0.5) if whole else 0.0

    def lines(self) -> list[str]:
        """For people."""
        where = printable(str(self.output)) if self.output else "nothing written (--plan)"
        share = self.after / self.before if self.before else 0.0
        out = [
            f"{printable(str(self.source))} -> {where}: {size(self.before)} -> {size(self.after)}"
            f" ({share:.3f})"
        ]
        widths = sorted({m.bits for m in self.modules})
        for width in widths:
            held = [m for m in self.modules if m.bits == width]
            forms = sorted({m.form for m in held})
            turned = ", ".join(f"{sum(m.form == f for m in held)} {f}" for f in forms)
            name = f"{width}-bit tables" if self.kind == "lut" else f"int{width}"
            out.append(f"  {len(held):>5} modules in {name} ({turned})")
        out.append(f"  error of dW, all modules: {self.loss:.4f}")
        for m in sorted(self.modules, key=lambda m: -m.loss)[:3]:
            out.append(f"        {m.loss:.4f} {printable(m.name)}")
        if self.kept:
            out.append(f"  {len(self.kept):>5} tensors as they were")
        return out + self._effect_lines()

    def _effect_lines(self) -> list[str]:
        """What is left of the logit effect, and which width would leave more."""
        if not self.effects:
            return []
        (_, own), *others = self.effects.items()
        out = [f"  logit effect (with the adapter less without): cosine {own:.4f}"]
        out += [f"        {way}: {cosine:.4f}" for way, cosine in others]
        if own < KEPT:
            enough = next((way for way, cosine in others if cosine >= KEPT), None)
            what = f"{enough} keeps {KEPT}" if enough else f"no width keeps {KEPT}"
            out.append(f"  note: less than {KEPT} of the effect's direction is kept; {what}")
        return out

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "source": str(self.source),
            "output": str(self.output) if self.output else None,
            "kind": self.kind,
            "error": self.loss,
            "modules": {
                m.name: {"bits": m.bits, "form": m.form, "error": m.loss, "bytes": m.nbytes}
                for m in self.modules
            },
            "kept": self.kept,
            "logit_effect": self.effects,
            "bytes": {"before": self.before, "after": self.after},
            "files": self.files,
        }


def compress(target: Path, output: Path | None, wanted: Wanted) -> Outcome:
    """Write the adapter's folder ``target`` as a packed one to ``output`` (None: only say how).

    Raises Refused for what is packed already, holds NaN, or can't be made as small as asked.
    """
    where, options, adapter = opened(target, output, wanted)
    weights, tensors, metadata = _READ[adapter.format](where, options)
    held = [p for p in pairs(adapter, tensors) if wanted.left_out([p.name]) is None]
    if not held:
        raise Refused(adapter.weights, wanted.none_left("factors of LoRA to compress"))
    group = wanted.group_size or 0
    packed_names = {name for p in held for name in p.names}
    kept = {n: t for n, t in tensors.items() if n not in packed_names}
    metadata = {k: v for k, v in metadata.items() if k != origin.KEY} | _past(metadata)
    made = _Made(adapter, kept, metadata, "int" if wanted.quantize else "lut", group)
    found = {p.name: best(p, w, made.kind, group, f) for p, w, f in _widths(held, made, wanted)}
    done = {n: c for p in held for n, c in zip(p.names, found[p.name].coded, strict=True)}
    data = made.data(done)
    again = made.read_back(done).low_rank
    modules = [
        Module(p.name, f.coded[0].item.bits, f.form, *losses(p.update, again[p.name]), f.nbytes)
        for p in held
        for f in [found[p.name]]
    ]
    one_file = weights.suffix == ".safetensors"
    stored = sum(t.stored_nbytes for t in tensors.values())
    before = weights.stat().st_size if one_file else stored
    outcome = Outcome(target, output, made.kind, modules, sorted(kept), before, len(data))
    if wanted.size is not None and outcome.after > wanted.size:
        what = f"takes {outcome.after} bytes where {wanted.size} were asked for: ask for a few more"
        raise Refused(target, what)
    if output is not None:
        with staged_folder(output) as stage:
            write_file(stage / packed_adapter.WEIGHTS, [data])
            write_file(stage / CONFIG, file_chunks(adapter.path / CONFIG))
            for companion in adapter.companions:
                write_file(stage / companion.name, file_chunks(companion))
            outcome.files = {p.name: p.stat().st_size for p in sorted(stage.iterdir())}
    return outcome


def opened(target: Path, output: Path | None, wanted: Wanted) -> tuple[Path, ReadOptions, Adapter]:
    """(its folder, how it is read, the adapter), all checked but its values. Raises Refused."""
    _check_wanted(target, wanted)
    where, options = locate(target, ReadOptions(restore=False))
    if output is not None:
        folder.check_target(output, where, wanted.force)
    adapter = read_adapter(target, options)
    _check_adapter(adapter)
    return where, options, adapter


@dataclass(frozen=True)
class Expanded:
    """What was written out again."""

    source: Path
    output: Path
    files: dict[str, int]

    def lines(self) -> list[str]:
        """For people."""
        where = f"{printable(str(self.source))} -> {printable(str(self.output))}"
        return [f"{where}: {size(sum(self.files.values()))}"]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"source": str(self.source), "output": str(self.output), "files": self.files}


def decompress(target: Path, output: Path, *, force: bool) -> Expanded:
    """Write a packed adapter as a folder of the format it was compressed from."""
    where, options = locate(target, ReadOptions())
    folder.check_target(output, where, force)
    adapter = read_adapter(target, options)
    if adapter.container != "packed":
        raise Refused(adapter.weights, "is not packed: there is nothing to decompress")
    made = convert(adapter, Conversion(to=adapter.format))
    folder.write(made, output)
    return Expanded(target, output, made.account.files)


def _check_wanted(target: Path, wanted: Wanted) -> None:
    """Refuse what adapters don't have."""
    odd = {
        **{option: (given, "is for packages") for option, given in wanted.of_tables.items()},
        **{
            option: (given, "is for packages and bases: packed factors have symmetric integers and a"
                     " scale per channel, or per --group-size")
            for option, given in wanted.of_integers.items()
        },
        "--adapter-bits": (wanted.adapter_bits, "is for packages; use --palettize"),
        "--per-channel-scale": (wanted.per_channel_scale, "is not for adapters: their ranks are"
                                " balanced anyway"),
        "--quantize": ((wanted.quantize or "").startswith("mlx"), "has int8 and int4"),
        "--plain and --expanded": (wanted.plain or wanted.expanded, "are for bases"),
        "--group-size": (
            wanted.group_size and (wanted.bits_per_weight or wanted.size),
            "goes with --palettize or --quantize",
        ),
    }  # fmt: skip
    for option, (given, why) in odd.items():
        if given:
            raise Refused(target, f"is an adapter: {option} {why}")


def _check_adapter(adapter: Adapter) -> None:
    """Refuse what has no factors, or whose factors say more than their product."""
    if adapter.container == "packed":
        raise Refused(adapter.weights, "is compressed already; decompress it first")
    if adapter.technique is not None or adapter.format not in _READ:
        what = adapter.technique or adapter.format
        raise Refused(adapter.weights, f"is {what}: convert it to LoRA first (convert --to peft)")
    check_unmoved(adapter)
    if not (adapter.path / CONFIG).exists():
        raise Refused(adapter.path, f"has no {CONFIG}: convert it first (convert --to peft)")


def _past(metadata: Mapping[str, str]) -> dict[str, str]:
    """Of an earlier conversion's record, all but the changes that it would undo: they are lost."""
    record = origin.parse(metadata)
    if record is None:
        return {}
    import json

    kept = {k: v for k, v in record.items() if k not in ("modules", "joined")}
    return {origin.KEY: json.dumps(kept, separators=(",", ":"))}


@dataclass(frozen=True)
class _Made:
    """The file to be: all but the packed factors."""

    adapter: Adapter
    kept: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    kind: str
    group: int

    def data(self, done: Mapping[str, Coded]) -> bytes:
        """The file."""
        import numpy as np

        items = {name: c.item for name, c in done.items()}
        said = packed_adapter.layout(self.adapter.format, self.kind, self.group, items)
        numbers = np.concatenate([c.numbers for c in done.values()]).view(np.uint16)
        stream = np.concatenate([c.stream for c in done.values()])
        sums = np.array([zlib.crc32(c.back) for c in done.values()], np.uint32)
        beside = packed_adapter.NUMBERS[self.kind]
        tensors = {
            **self.kept,
            beside: Tensor(beside, "F16", numbers.shape, data=numbers),
            packed_adapter.STREAM: Tensor(packed_adapter.STREAM, "U8", stream.shape, data=stream),
            packed_adapter.SUMS: Tensor(packed_adapter.SUMS, "U32", sums.shape, data=sums),
        }
        return _bytes(ordered(tensors), {**self.metadata, packed_adapter.KEY: said})

    def read_back(self, done: Mapping[str, Coded]) -> Adapter:
        """The adapter as the file will be read."""
        import numpy as np

        back = {
            name: Tensor(name, "F16", c.item.shape, data=c.back.view(np.uint16))
            for name, c in done.items()
        }
        reader = packed_adapter.READERS[self.adapter.format]
        options = ReadOptions(restore=False)
        tensors = {**self.kept, **back}
        return reader(self.adapter.path, options, self.adapter.weights, tensors, self.metadata)


def _bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    return b"".join(bytes(memoryview(c).cast("B")) for c in serialized(tensors, metadata, {}))


def _widths(
    held: Sequence[Pair], made: _Made, wanted: Wanted
) -> list[tuple[Pair, int, tuple[str, ...]]]:
    """(pair, bits, the forms to try) of each module: one width, or the plan of least error.

    What is tried for a plan is not kept: all widths together are larger than the adapter was.
    """
    if wanted.palettize or wanted.quantize:
        width = wanted.palettize or int((wanted.quantize or "")[3:])
        return [(p, width, tuple(balance.FORMS)) for p in held]
    count = {p.name: sum(prod(t.stored_shape) for t in p.stored) for p in held}
    blanks = {p.name: blank(p, min(_PLANNED)) for p in held}
    least = sum(c.nbytes for pair in blanks.values() for c in pair)
    rest = 0
    if wanted.bits_per_weight:
        room = bits.size_of(count, wanted.bits_per_weight)
    else:
        done = {n: c for p in held for n, c in zip(p.names, blanks[p.name], strict=True)}
        rest = len(made.data(done)) - least + _SLACK + 4 * len(made.kept)
        assert wanted.size is not None
        room = wanted.size - rest
    if least > room:
        said = wanted.unmet(least, rest, 2 * len(held), sum(count.values()))
        raise Refused(made.adapter.weights, said)
    probes = {p.name: best(p, PROBE, "lut", 0) for p in held}
    choices = dict[str, list[bits.Choice]]()
    for p in held:
        form, square = (probes[p.name].form,), losses(p.update, p.update)[1] ** 2
        tried = {w: probes[p.name] if w == PROBE else best(p, w, "lut", 0, form) for w in _PLANNED}
        choices[p.name] = [bits.Choice(w, f.nbytes, f.loss**2 * square) for w, f in tried.items()]
    plan = bits.plan(choices, room)
    return [
        (p, int(plan.widths[p.name]), tuple(dict.fromkeys((probes[p.name].form, "plain"))))
        for p in held
    ]
