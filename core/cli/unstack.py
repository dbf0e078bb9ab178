"""``loraduct unstack``: the adapters of a stack, as they were."""

from __future__ import annotations

from pathlib import Path

import click

from loraduct.cli.common import PATH, json_option, print_json


@click.command("unstack")
@click.argument("source", metavar="STACK", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write; must be new.")
@click.option("--only", metavar="NAME", help="This adapter alone, into OUT itself.")
@json_option
def command(source: Path, output: Path, only: str | None, as_json: bool) -> None:
    """Write the adapters of STACK into folders of their own in OUT: tensors and configs as they were."""
    from loraduct.cli.combine import read_all
    from loraduct.converters.convert import Options, convert
    from loraduct.converters.stack import unstack
    from loraduct.errors import Refused
    from loraduct.files import staged_folder
    from loraduct.formats import folder
    from loraduct.formats.options import ReadOptions
    from loraduct.text import printable, several

    (stacked,), _ = read_all([source], ReadOptions(), None, output)
    found = unstack(stacked)
    if only is not None:
        if only not in found:
            raise Refused(source, f"holds {several(list(found), 8)}; there is no {only!r}")
        found = {only: found[only]}
    plans = {n: convert(a, Options(to=a.format)) for n, a in found.items()}
    if only is not None:
        folder.write(plans[only], output)
    else:
        if len({folder_name(n) for n in plans}) < len(plans):
            raise Refused(
                source, "has adapters whose names make one folder's name; use --only NAME"
            )
        with staged_folder(output) as stage:
            for name, plan in plans.items():
                folder.write(plan, stage / folder_name(name))
    if as_json:
        names = {n: str(output if only else output / folder_name(n)) for n in found}
        print_json({"source": str(source), "adapters": names})
        return
    for name, adapter in found.items():
        where = output if only else output / folder_name(name)
        modules = f"{adapter.format}, {len(adapter.updates)} modules, bit for bit"
        modules += "".join(f"; it {n.text}" for n in adapter.notes)
        click.echo(f"{printable(name)} -> {printable(str(where))}: {modules}")


def folder_name(label: str) -> str:
    """A label as the name of one folder, whatever is in it."""
    safe = "".join(c if c.isalnum() or c in "-_.() " else "_" for c in label)[:100]
    return safe if safe.strip(". ") else f"adapter{safe.replace('.', '_')}"
