"""``loraduct convert``: from one format to another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraduct.cli.common import PATH, Number, base_option, json_option, print_json, reading_options

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.formats.base import Base
    from loraduct.formats.options import ReadOptions
    from loraduct.formats.untied import Untied


@click.command("convert")
@click.argument("source", metavar="SRC", type=PATH)
@click.option(
    "--to", "to", type=click.Choice(["peft", "mlx", "coreml"]), required=True, help="Target format."
)
@click.option("-o", "--output", type=PATH, help="Folder to write (needed unless --dry-run).")
@base_option
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16", "keep"]),
    default="keep",
    show_default=True,
    help="Store tensors in this dtype.",
)
@click.option(
    "--uniform",
    is_flag=True,
    help="PEFT with one r and one alpha, for servers that read no patterns.",
)
@click.option(
    "--name-map",
    type=PATH,
    metavar="FILE",
    help="JSON of transformers' to mlx-lm's module names; {} is an index.",
)
@click.option("-i", "--include", metavar="REGEX", help="Only modules that match.")
@click.option("-e", "--exclude", metavar="REGEX", help="Leave modules out that match.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@click.option(
    "--allow-approximate", is_flag=True, help="Accept a measured loss that is otherwise refused."
)
@click.option(
    "--rank",
    type=click.IntRange(1, 65536),
    help="Approximate updates of full rank (IA3, OFT, ...) by this rank.",
)
@click.option(
    "--energy",
    type=Number(0, 1, min_open=True),
    help="Or by the rank that keeps this share of the squared norm, such as 0.99.",
)
@click.option(
    "--initial",
    type=PATH,
    metavar="FOLDER",
    help="The adapter as it was before training, for PiSSA, OLoRA, LoftQ and the like.",
)
@click.option(
    "--always-on", is_flag=True, help="Let an aLoRA act from the first token on, as plain LoRA."
)
@click.option(
    "--untie-base",
    type=PATH,
    metavar="DIR",
    help="Write a copy of the base there whose head is not tied, and the adapter for it.",
)
@click.option("--merged", is_flag=True, help="For --to coreml: into the weights, not a function.")
@click.option("--force", is_flag=True, help="Replace an existing adapter folder.")
@json_option
@reading_options
def command(
    source: Path,
    to: str,
    output: Path | None,
    base: Path | None,
    dtype: str,
    uniform: bool,
    name_map: Path | None,
    include: str | None,
    exclude: str | None,
    dry_run: bool,
    allow_approximate: bool,
    rank: int | None,
    energy: float | None,
    initial: Path | None,
    always_on: bool,
    untie_base: Path | None,
    merged: bool,
    force: bool,
    as_json: bool,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
) -> None:
    """Convert the adapter SRC and print what became of every tensor."""
    if output is None and not dry_run:
        raise click.UsageError("give -o OUT, or --dry-run")
    if uniform and to == "mlx":
        raise click.UsageError("MLX is always uniform (one rank, one scale): leave --uniform out")
    if rank is not None and energy is not None:
        raise click.UsageError("--rank and --energy both say how near: give one")
    if untie_base is not None and (to != "mlx" or base is None):
        raise click.UsageError("--untie-base is for --to mlx, and copies --base BASE: give both")
    from loraduct.formats.options import ReadOptions

    if to == "coreml":
        others = [uniform, name_map, include, exclude, initial, always_on, dry_run]
        if (
            base is None
            or output is None
            or dtype != "keep"
            or any([*others, rank, energy, allow_approximate])
        ):
            what = "--to coreml takes -o OUT.mlpackage, --base BASE, --merged and --force"
            raise click.UsageError(f"{what}; convert to peft first for what else is to be changed")
        reading = ReadOptions(scale, trained_on, allow_pickle, adapter_name)
        _package(source, output, base, merged, reading, force, as_json)
        return
    if merged:
        raise click.UsageError("--merged is for --to coreml")
    from loraduct.converters.approximate import Wanted
    from loraduct.converters.convert import Options, convert
    from loraduct.converters.unmerge import merged_in
    from loraduct.formats import base as base_folder
    from loraduct.formats import folder, locate, read

    model = base_folder.read(base) if base else None
    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name, base=model)
    if output is not None:
        given = source if merged_in(source) else locate(source, options)[0]
        folder.check_target(output, given, force)
    copy = _untied(untie_base, model, [source, *([output] if output else [])])
    if merged_in(source):
        adapter = _unmerged(source, model, rank, energy)
        rank = energy = None
    else:
        adapter = read(source, options)
    plan = convert(
        adapter,
        Options(
            to=to,
            base=model,
            dtype=dtype,
            uniform=uniform,
            name_map=_name_map(name_map),
            name_map_file=name_map,
            include=include,
            exclude=exclude,
            initial=read(initial, ReadOptions(allow_pickle=allow_pickle)) if initial else None,
            always_on=always_on,
            untied_base=untie_base,
            wanted=Wanted(rank, energy, allow_approximate),
        ),
    )
    target = None if dry_run else output
    with _written(copy, untie_base if target else None) as files:
        folder.write(plan, target, allow_approximate=allow_approximate)
    account = plan.account
    account.notes += copy.notes if copy else ()
    if as_json:
        print_json(
            {
                "source": str(source),
                "source_format": adapter.format,
                "to": to,
                "dry_run": dry_run,
                "output": None if dry_run else str(output),
                **({"untied_base": {"path": str(untie_base), "files": files}} if copy else {}),
                **account.as_json(),
            }
        )
        return
    from loraduct.text import printable, several, size

    what = f"{adapter.format} -> {to}, {len(account.entries)} tensors"
    where = "nothing written (--dry-run)" if dry_run else printable(str(output))
    click.echo(f"{printable(str(source))} -> {where}: {what}, {size(sum(account.files.values()))}")
    click.echo("\n".join(account.lines()))
    if plan.companions:
        names = [c.name for c in plan.companions]
        click.echo(f"  carried along: {several(names, 20)}")
    if copy:
        done = f"{len(files)} files, {size(sum(files.values()))}" if files else "not written"
        click.echo(f"untied base {printable(str(untie_base))}: {copy.head}.weight stored, {done}")


def _package(
    source: Path,
    output: Path,
    base: Path,
    merged: bool,
    reading: ReadOptions,
    force: bool,
    as_json: bool,
) -> None:
    """A package with the one adapter, named after its folder."""
    import re

    from loraduct.cli.package import say_built
    from loraduct.converters import coreml, packaging
    from loraduct.converters.package import Member
    from loraduct.formats import base as base_folder

    words = re.sub(r"\W", "_", source.resolve().name.rpartition(":")[2], flags=re.ASCII)
    name = words if words and not words[0].isdigit() else f"adapter_{words}"
    how = packaging.MERGED if merged else packaging.FUNCTIONS
    wanted = {name: [Member(str(source))]}
    model = base_folder.read(base)
    built = packaging.package(model, output, wanted, how, coreml.Options(), reading, force=force)
    say_built(output, how, built, as_json)


def _unmerged(source: Path, model: Base | None, rank: int | None, energy: float | None) -> Adapter:
    """The adapter that was merged into a package's weights."""
    from loraduct.converters.approximate import Wanted
    from loraduct.converters.unmerge import unmerge
    from loraduct.errors import Refused

    if model is None:
        raise Refused(source, "holds merged weights: give --base BASE, to tell what was merged")
    return unmerge(source, model, Wanted(rank, energy))


def _untied(target: Path | None, model: Base | None, others: list[Path]) -> Untied | None:
    """The copy of the base to be written, if one is wanted; everything checked."""
    if target is None or model is None:
        return None
    from loraduct.formats import untied

    untied.check_target(target, model.path, *others)
    return untied.plan(model)


@contextlib.contextmanager
def _written(copy: Untied | None, target: Path | None) -> Iterator[dict[str, int]]:
    """Write the copy, which was checked to be new, and take it away again if what follows fails."""
    if copy is None or target is None:
        yield {}
        return
    from loraduct.files import remove_tree, staged_folder
    from loraduct.formats import untied

    with staged_folder(target) as stage:
        files = untied.write(copy, stage)
    try:
        yield files
    except BaseException:
        remove_tree(target)
        raise


def _name_map(file: Path | None) -> dict[str, str] | None:
    if file is None:
        return None
    from loraduct.errors import Refused
    from loraduct.formats.json_file import read_object

    names = read_object(file)
    if not all(isinstance(v, str) for v in names.values()):
        raise Refused(file, "must map transformers' module names to mlx-lm's, text to text")
    return names
