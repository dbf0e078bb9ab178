"""Adapters of a Core ML package: put in, replaced, taken out, and the weight file compacted.

Nothing is traced and no weight of the base is written again. Blobs are appended behind what any
program of this package ever referred to, and synced; then the new program takes the old one's place
with one rename, which is the only moment at which anything changes. What a killed writer left
behind is overwritten by the next one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraduct import files
from loraduct.account import Account
from loraduct.adapter import Adapter
from loraduct.converters.coreml_adapter import Store, place, swap_of
from loraduct.converters.neutral import neutral
from loraduct.converters.start import check_unmoved
from loraduct.errors import Refused
from loraduct.formats import read as read_adapter
from loraduct.formats.coreml import edit, record
from loraduct.formats.coreml.blob import Layout, header
from loraduct.formats.coreml.edit import Chain, Swap
from loraduct.formats.coreml.package import VALID_NAME, Package, read, spec_path
from loraduct.formats.coreml.record import BASE
from loraduct.formats.coreml.stored import PackageBase, Parts, Record, parts_of
from loraduct.formats.options import ReadOptions
from loraduct.tensor import UNIT_ROUNDOFF
from loraduct.text import number, printable, several

LONGEST = 80  # characters of a name: it is part of every function's


@dataclass(frozen=True)
class Member:
    """An adapter of a function: a folder, or the name of one in the package; and its weight.

    ``adapter``: what the folder holds, where it was read already, in transformers' names.
    """

    source: str
    weight: float = 1.0
    adapter: Adapter | None = None


@dataclass
class Report:
    """What was done: functions by adapter, tensors by what became of them, bytes of the package."""

    functions: dict[str, list[str]] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class _Part:
    """One adapter of a function, with its places."""

    name: str
    weight: float
    parts: Mapping[str, Parts]
    swaps: Sequence[Swap]
    row: Mapping[str, Any]


def add(
    path: Path,
    wanted: Mapping[str, Sequence[Member]],
    options: ReadOptions | None = None,
    *,
    over: bool = False,
) -> Report:
    """Add functions to the package at ``path``; with ``over``, in the place of those they have.

    Raises Refused, with the package as it was, for what can't be put in exactly.
    """
    spec_path(path)  # before anything is put beside what is no package
    with files.editing(path) as folder:
        return put(folder, wanted, options, over=over)


def put(
    folder: Path,
    wanted: Mapping[str, Sequence[Member]],
    options: ReadOptions | None = None,
    *,
    over: bool = False,
) -> Report:
    """As `add`, for who is the only writer."""
    report = Report(before=size_of(folder))
    package = read(folder)
    found = record.read(package)
    base = _base(package, found)
    groups = {name: _functions_of(base, name) for name in wanted}
    _check_names(package, found, groups, over)
    used = edit.used_blobs(package)
    end, blobs = _end(package, found, used)
    of_base: set[int] = set().union(
        *(edit.offsets_of(package.functions[f]) for f in base.functions)
    )
    store = Store(package, end, {o: e for o, e in used.items() if o not in of_base})
    for i, (name, members) in enumerate(wanted.items()):
        own = set(groups[name].values())
        later = {f for n in list(wanted)[i + 1 :] for f in groups[n].values()}
        parts = [
            _resolved(package, found, base, store, report, name, k, m, options, len(members) > 1)
            for k, m in enumerate(members)
        ]
        if len({p.name for p in parts}) < len(parts):
            raise Refused(package.path, "has an adapter twice; give it one weight", tensor=name)
        for part in parts:
            users = {f for f in _users(found, part.name) if f not in own | later}
            if users and part.row is not found["adapters"].get(part.name):
                what = (
                    f"{part.name} is part of {several(sorted(users))}: replace that too, after it"
                )
                raise Refused(package.path, what)
            found["adapters"][part.name] = part.row
        chains, swaps = _chains(package, report, name, parts)
        for source, function in groups[name].items():
            made = edit.adapted(package, package.functions[source], chains, swaps)
            package.functions[function].CopyFrom(made)
            _describe(package.model, source, function)
            rows = [[p.name, p.weight] for p in parts]
            found["functions"][function] = {
                "adapters": rows,
                "q": found["functions"][source]["q"],
            }
        report.functions[name] = list(groups[name].values())
    _prune(found)
    new = store.layout.parts
    found["weights"] = {"end": store.layout.end if new else end, "blobs": blobs + len(new)}
    if new:
        head = header(blobs + len(new))
        files.append(package.blobs.path, end, store.layout.chunks(), head)
    _commit(package, found)
    report.after = size_of(folder)
    return report


def remove(path: Path, names: Sequence[str]) -> Report:
    """Take functions out. Their weights stay in the file until it is compacted."""
    spec_path(path)
    with files.editing(path) as folder:
        report = Report(before=size_of(folder))
        package = read(folder)
        found = record.read(package)
        base = _base(package, found)
        for name in dict.fromkeys(names):
            functions = [f for f in _functions_of(base, name).values() if f in found["functions"]]
            if name == BASE or not functions or set(functions) & set(base.functions):
                there = several(list(groups_of(base, found)), 12) or "it holds none"
                what = "is the base" if name == BASE else f"is not in the package ({there})"
                raise Refused(package.path, f"{printable(repr(name), 80)} {what}")
            for function in functions:
                del package.functions[function]
                del found["functions"][function]
            undescribe(package.model, functions)
            report.functions[name] = functions
        end, blobs = _end(package, found, edit.used_blobs(package))
        found["weights"] = {"end": end, "blobs": blobs}
        _prune(found)
        _commit(package, found)
        report.after = size_of(folder)
    return report


def compact(path: Path) -> Report:
    """Copy what the program refers to into a new weight file; the rest is gone."""
    spec_path(path)
    with files.staged_folder(path) as stage:
        folder = files.resolved(path)
        report = Report(before=size_of(folder))
        package = read(folder)
        found = record.find(package)
        layout = Layout()
        to = {o: layout.copy(package.blobs, o, "a weight") for o in edit.used_blobs(package)}
        edit.moved(package, to)
        if found is not None:
            found["weights"] = {"end": layout.end, "blobs": len(to)}
            record.write(package.model, found)
        fresh = {package.spec_path: [package.model.SerializeToString(deterministic=True)]}
        weights = {package.blobs.path: layout.chunks()} if to else {}
        rewritten(folder, stage, {**weights, **fresh})
        report.after = size_of(stage)
    return report


def groups_of(base: PackageBase, found: Record) -> dict[str, list[str]]:
    """Names by which functions were added -> those functions, one for each of the base's."""
    suffixes = sorted((f.removeprefix(BASE) for f in base.functions), key=len, reverse=True)
    groups: dict[str, list[str]] = {}
    for function, row in found["functions"].items():
        if row["adapters"]:
            suffix = next((s for s in suffixes if s and function.endswith(s)), "")
            groups.setdefault(function.removesuffix(suffix), []).append(function)
    return groups


def size_of(folder: Path) -> int:
    """Bytes of a package."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _base(package: Package, found: Record) -> PackageBase:
    """The base to make functions from. Raises Refused where there is none, or room for one only."""
    base = PackageBase(package, found)
    again = "build it again with all its adapters (`loraduct package --base BASE -a NAME=...`)"
    if not package.model.description.functions:
        raise Refused(package.path, f"holds one function, as before iOS18: {again}")
    if not base.functions or "merged" in found:
        raise Refused(package.path, f"has no function of the base alone: {again}")
    return base


def _functions_of(base: PackageBase, name: str) -> dict[str, str]:
    """The base's functions -> those of ``name``."""
    return {f: name + f.removeprefix(BASE) for f in base.functions}


def check_name(name: str, path: Path) -> None:
    """Refuse a name that Core ML does not take."""
    if not VALID_NAME.match(name) or len(name) > LONGEST:
        what = "letters, digits and _ are expected, and no digit first"
        shown = printable(repr(name), LONGEST)
        raise Refused(path, f"{shown} is a name that Core ML refuses: {what}")


def _check_names(
    package: Package, found: Record, groups: Mapping[str, Mapping[str, str]], over: bool
) -> None:
    """Names that Core ML takes, that no other function has."""
    own = {f for functions in groups.values() for f in functions.values()}
    taken = {f.lower(): f for f in package.functions if not (over and f in own)}
    taken |= {a.lower(): a for a in found["adapters"] if not (over and a in groups)}
    taken[BASE] = BASE
    for name, functions in groups.items():
        shown = printable(repr(name), LONGEST)
        check_name(name, package.path)
        for new in {name, *functions.values()}:
            if (other := taken.get(new.lower())) is not None:
                how = "`package replace` puts another in its place" if other == name else "is taken"
                raise Refused(
                    package.path, f"{shown}: {printable(other, LONGEST)!r} is there: {how}"
                )
        if over and not set(functions.values()) <= set(package.functions):
            raise Refused(package.path, f"{shown} is not in the package; `package add` adds it")
        taken |= {new.lower(): new for new in (name, *functions.values())}


def _users(found: Record, adapter: str) -> set[str]:
    """Functions that have an adapter."""
    rows = found["functions"].items()
    return {f for f, row in rows if adapter in [name for name, _ in row["adapters"]]}


def _resolved(
    package: Package, found: Record, base: PackageBase, store: Store, report: Report, name: str,
    k: int, member: Member, options: ReadOptions | None, stacked: bool,
) -> _Part:  # fmt: skip
    """One member of a function: an adapter that is there, or one read and laid out."""
    source, weight = member.source, member.weight
    if member.adapter is None and source in found["adapters"]:
        if os.path.lexists(source):
            what = f"{printable(source, 80)} is both an adapter of the package and a path"
            raise Refused(package.path, f"{what}: write ./{printable(source, 80)} for the path")
        parts, replaced = parts_of(package, found, source)
        row = found["adapters"][source]
        swaps = [swap_of(base, p, b) for p, b in replaced.items()]
        return _Part(source, weight, parts, swaps, row)
    label = f"{name}_{k + 1}" if stacked else name
    adapter = member.adapter or read_adapter(Path(source), options)
    check_unmoved(adapter)
    placed = place(neutral(adapter, base), base, store)
    placed.account.notes += [n.text for n in adapter.notes]
    report.accounts[label] = placed.account
    return _Part(label, weight, placed.parts, placed.swaps, placed.row)


def _chains(
    package: Package, report: Report, name: str, parts: Sequence[_Part]
) -> tuple[dict[str, list[Chain]], list[Swap]]:
    """What is put behind each module. Raises Refused for sums that mean nothing."""
    chains: dict[str, list[Chain]] = {}
    worst = (0.0, 0.0)
    for k, part in enumerate(parts):
        dora = any(p.magnitude for p in part.parts.values())
        if part.weight != 1 and (dora or part.swaps):
            what = "is DoRA" if dora else "replaces whole parameters"
            raise Refused(
                package.path, f"{part.name} {what}: its weight can only be 1", tensor=name
            )
        if part.swaps and len(parts) > 1:
            what = "replaces whole parameters, which can't be added to another adapter's"
            raise Refused(package.path, f"{part.name} {what}", tensor=name)
        for i, (module, p) in enumerate(part.parts.items()):
            row = part.row["modules"][module]
            exact = row["scale"] * part.weight * 2.0 ** -row.get("fold", 0)
            scale, error = half(exact)
            if error > 1.01 * UNIT_ROUNDOFF["F16"]:
                what = f"a scale of {exact:g}, which FLOAT16 can't hold"
                raise Refused(package.path, f"{part.name}: {what}", tensor=module)
            worst = max(worst, (error, exact))
            one = Chain(f"{k}_{i}", p.a, p.b, scale, p.bias, p.magnitude, p.inverse)
            chains.setdefault(module, []).append(one)
    if worst[0]:
        report.notes.append(
            f"{name}: a scale of {number(worst[1])} is rounded to FLOAT16 (relative error"
            f" {worst[0]:.1e}); `extract` gives it back exactly"
        )
    return chains, [s for part in parts for s in part.swaps]


def half(value: float) -> tuple[float, float]:
    """A number in FLOAT16, and the relative error of that."""
    import numpy as np

    with np.errstate(over="ignore"):
        done = float(np.float16(value))
    error = abs(done - value) / abs(value) if value else 0.0
    return done, error if math.isfinite(done) else math.inf


def _describe(model: Any, source: str, function: str) -> None:
    """A description of a new function, which takes and gives what ``source`` does."""
    found = {f.name: f for f in model.description.functions}
    target = found[function] if function in found else model.description.functions.add()
    target.CopyFrom(found[source])
    target.name = function


def undescribe(model: Any, functions: Iterable[str]) -> None:
    """Drop the descriptions of functions that go; where one was the default, the first is now."""
    gone = set(functions)
    kept = [f for f in model.description.functions if f.name not in gone]
    copies = [type(f).FromString(f.SerializeToString()) for f in kept]
    del model.description.functions[:]
    model.description.functions.extend(copies)
    if copies and model.description.defaultFunctionName in gone:
        model.description.defaultFunctionName = copies[0].name


def _end(package: Package, found: Record, used: Mapping[int, int]) -> tuple[int, int]:
    """Where new blobs may begin, and how many there are before.

    Behind all that this program refers to, or an earlier one did: whoever still reads by that one
    is not disturbed.
    """
    known = found.get("weights") or {"end": 0, "blobs": len(used)}
    return max([*used.values(), min(known["end"], package.blobs.size)]), known["blobs"]


def _prune(found: Record) -> None:
    """Forget the adapters that no function has."""
    used = {name for row in found["functions"].values() for name, _ in row["adapters"]}
    found["adapters"] = {n: row for n, row in found["adapters"].items() if n in used}


def _commit(package: Package, found: Record) -> None:
    """The new program in the place of the old one."""
    record.write(package.model, found)
    data = package.model.SerializeToString(deterministic=True)
    files.swap_file(files.resolved(package.spec_path), [data])


def rewritten(path: Path, stage: Path, instead: Mapping[Path, Iterable[Any]]) -> None:
    """A package's files, those of ``instead`` first and with other contents; synced. Links are refused."""
    fresh = {p.relative_to(path): chunks for p, chunks in instead.items()}
    folder = files.resolved(path)
    items = {item.relative_to(folder): item for item in sorted(folder.rglob("*"))}
    for inner, item in items.items():
        if item.is_symlink():
            raise Refused(item, "is a symbolic link; copy the package without links first")
        if item.is_dir():
            files.make_folder(stage / inner)
    for inner, chunks in fresh.items():
        if not (stage / inner).parent.exists():
            files.make_folder((stage / inner).parent)
        files.write_file(stage / inner, chunks)
    for inner, item in items.items():
        if inner not in fresh and not item.is_dir():
            files.write_file(stage / inner, files.file_chunks(item))
    for inner_folder in sorted({(stage / p).parent for p in fresh}):
        files.sync(inner_folder)
