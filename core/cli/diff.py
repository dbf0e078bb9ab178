"""``loraduct diff``: two adapters, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraduct.cli.common import PATH, base_option, json_option, print_json, reading_options

if TYPE_CHECKING:
    from loraduct.converters.diff import Diff


@click.command("diff")
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@base_option
@click.option("--html", type=PATH, metavar="FILE", help="Also draw a heat map, modules by layers.")
@click.option("--png", type=PATH, metavar="FILE", help="The same as a picture.")
@click.option("--force", is_flag=True, help="Replace an existing HTML or PNG file.")
@json_option
@reading_options
def command(
    first: Path,
    second: Path,
    base: Path | None,
    html: Path | None,
    png: Path | None,
    force: bool,
    as_json: bool,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
) -> None:
    """How alike A and B are, and how much they would disturb each other when merged.

    Interference of a module: what B does on the inputs that A reacts to, over what A does there, or
    the other way round, whichever is larger.
    """
    from loraduct.cli.combine import read_all
    from loraduct.cli.diff_map import heat_map, need_plots, picture
    from loraduct.converters.diff import diff
    from loraduct.errors import Refused
    from loraduct.files import replace_file
    from loraduct.formats.options import ReadOptions

    drawn = [f for f in (html, png) if f is not None]
    for file in drawn:
        if file.is_dir() or not file.parent.is_dir():
            what = "is a folder" if file.is_dir() else "would stand in a folder that isn't there"
            raise Refused(file, f"{what}; choose another file")
        if file.exists() and not force:
            raise Refused(file, "exists; use --force to replace it, or choose another file")
    if len({f.resolve() for f in drawn}) < len(drawn):
        raise click.UsageError("--html and --png name one file: give each its own")
    if png is not None:
        need_plots()
    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name)
    (one, two), model = read_all([first, second], options, base)
    found = diff(one, two, model)
    names = [str(first), str(second)]
    page = heat_map(found, names).encode() if html else b""
    image = picture(found, names) if png else b""
    for target, held in ((html, page), (png, image)):  # both are drawn before either is written
        if target is not None:
            replace_file(target, [held])
    if as_json:
        print_json({"first": str(first), "second": str(second), **found.as_json()})
        return
    from loraduct.text import printable, table

    for note in found.notes:
        click.echo(f"note: {printable(note, 300)}")
    count = f"{len(found.modules)} common modules"
    only = f"{len(found.only_first)} only in A, {len(found.only_second)} only in B"
    click.echo(f"{printable(str(first))} and {printable(str(second))}: {count}, {only}")
    click.echo(f"  cosine        {found.cosine:+.4f}")
    both = f"B on A's inputs {found.on_first:.3f}, A on B's {found.on_second:.3f}"
    click.echo(f"  interference  {found.interference:.3f} ({both})")
    click.echo(f"  signs         {_signs(found)}")
    worst = sorted(found.modules, key=lambda m: -m.interference)[:8]
    rows = [["most interference", "", "cosine", "|B|/|A|", "angle of inputs", "signs"]]
    for m in worst:
        angle = f"{m.row_angles[0]:.1f} deg" if m.row_angles else "-"
        rows.append(
            [
                printable(m.module),
                f"{m.interference:.3f}",
                f"{m.cosine:+.3f}",
                f"{m.ratio:.3f}",
                angle,
                f"{m.sign_conflict:.1%}",
            ]
        )
    click.echo("\n".join(table(rows)))


def _signs(found: Diff) -> str:
    mean = sum(m.sign_conflict for m in found.modules) / len(found.modules)
    how = " (from a sample of rows)" if any(m.sampled for m in found.modules) else ""
    return f"{mean:.1%} of the entries that both move are moved in opposite directions{how}"
