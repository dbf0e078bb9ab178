"""``loraduct stack``: adapters side by side in one, to be taken apart again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from loraduct.cli.common import (
    PATH,
    base_option,
    json_option,
    need_output,
    print_json,
    reading_options,
    writing_options,
)


@click.command("stack")
@click.argument("sources", metavar="A B...", type=PATH, nargs=-1, required=True)
@click.option("--to", type=click.Choice(["peft", "mlx"]), help="Format [the first adapter's].")
@writing_options
@base_option
@json_option
@reading_options
def command(
    sources: tuple[Path, ...],
    to: str | None,
    output: Path | None,
    base: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
) -> None:
    """Put adapters into one that does what all of them do together; unstack gives them back."""
    need_output(output, dry_run)
    if len(sources) < 2:
        raise click.UsageError("give two adapters or more to stack")
    from loraduct.cli.combine import format_of, read_all
    from loraduct.converters.convert import Options, convert
    from loraduct.converters.stack import stack
    from loraduct.formats import folder
    from loraduct.formats.options import ReadOptions

    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name)
    adapters, model = read_all(sources, options, base, output, force)
    target = format_of(adapters[0], to)
    stacked = stack(adapters, model, target)
    plan = convert(stacked.adapter, Options(to=target, base=model))
    plan.account.notes += stacked.notes
    folder.write(plan, None if dry_run else output)
    if as_json:
        print_json(
            {
                "sources": [str(s) for s in sources],
                "labels": list(stacked.labels),
                "to": target,
                "output": None if dry_run else str(output),
                "modules": [asdict(m) for m in stacked.modules],
                **plan.account.as_json(),
            }
        )
        return
    from loraduct.text import printable

    where = "nothing written (--dry-run)" if dry_run else str(output)
    names = ", ".join(printable(n) for n in stacked.labels)
    click.echo(f"{names} -> {printable(where)}: stack, {target}, {len(stacked.modules)} modules")
    click.echo("\n".join(plan.account.lines()))
