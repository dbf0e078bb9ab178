"""A package with its adapters: the base built, and adapters put in the way that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loraduct.converters import coreml
from loraduct.converters.coreml import arguments_of, tokenizer_of
from loraduct.converters.neutral import neutral
from loraduct.converters.package import Member, Report, check_name, put
from loraduct.errors import Refused
from loraduct.files import resolved
from loraduct.formats import read
from loraduct.formats.base import Base
from loraduct.formats.companions import is_companion
from loraduct.formats.coreml.package import SUFFIX, is_package
from loraduct.formats.options import ReadOptions

FUNCTIONS, MERGED, INPUTS = "functions", "merged", "inputs"
Specs = Mapping[str, Sequence[Member]]


@dataclass
class Built:
    """What was written, and what became of the adapters' tensors (where they became functions)."""

    written: list[Path] = field(default_factory=list)
    report: Report | None = None


def package(
    base: Base,
    output: Path,
    wanted: Specs,
    how: str,
    options: coreml.Options,
    reading: ReadOptions | None = None,
    *,
    force: bool = False,
) -> Built:
    """Write ``output``: the base with adapters as functions, merged, or as arguments.

    Raises Refused, with nothing written, for what can't be had exactly.
    """
    check_output(output, force)
    names = [tokenizer_of(output).name]
    names += [arguments_of(output, n).name for n in wanted] if how == INPUTS else []
    check_beside([output.with_name(n) for n in names], force)
    done = Built()
    for name in wanted:
        check_name(name, output)
    read_in: dict[str, list[Member]] = {}
    for name, members in wanted.items():
        before = read_in if how == FUNCTIONS else {}  # a function may be made of earlier ones
        read_in[name] = [m if m.source in before else _read(m, base, reading) for m in members]
    if how == FUNCTIONS:
        if wanted and options.target == "iOS17":
            raise Refused(
                output, "iOS17 holds one function: use --adapters merged, or --adapters inputs"
            )

        def then(stage: Path) -> None:
            done.report = put(stage, read_in)

        done.written = coreml.build(base, output, options, then=then if wanted else None)
        return done
    if not wanted:
        raise Refused(output, f"--adapters {how}: give an adapter (-a NAME=ADAPTER)")
    given = {n: [(m.adapter, m.weight) for m in ms if m.adapter] for n, ms in read_in.items()}
    if how == MERGED:
        if len(given) > 1:
            raise Refused(output, "merged weights are one model: give one -a, or several with +")
        done.written = coreml.build(base, output, options, merged=next(iter(given.items())))
        return done
    ranks = [sum(a.rank for a, _ in one) for one in given.values()]
    options = replace(options, max_rank=options.max_rank or max(ranks))
    done.written = coreml.build(base, output, options, inputs=given)
    return done


def check_output(output: Path, force: bool, source: Path | None = None) -> None:
    """Refuse a target that is no package's name, or that is there and isn't ours to replace.

    ``source``: the package that it is made from, which ``force`` replaces where it is the target itself.
    """
    if source is not None:
        one, other = resolved(output), resolved(source)
        if other in one.parents or one in other.parents:
            raise Refused(output, f"lies in {source}, or holds it; choose another place")
    if output.suffix != SUFFIX:
        raise Refused(output, f"a package's name ends in {SUFFIX}")
    if output.exists() or output.is_symlink():
        if not is_package(output):
            raise Refused(output, "is there and is no package; nothing was changed")
        if not force:
            raise Refused(output, "is there; --force replaces it")


def check_beside(paths: Sequence[Path], force: bool) -> None:
    """Refuse to write over what is beside the package, and is not of an earlier one."""
    for path in paths:
        if not (path.exists() or path.is_symlink()):
            continue
        if path.is_symlink() or (
            path.is_dir() and not all(is_companion(f.name) for f in path.iterdir())
        ):
            raise Refused(path, "is there and is not ours to replace; nothing was changed")
        if not force:
            raise Refused(path, "is there; --force replaces it")


def _read(member: Member, base: Base, reading: ReadOptions | None) -> Member:
    adapter = read(Path(member.source), replace(reading or ReadOptions(), base=base))
    return replace(member, adapter=neutral(adapter, base))
