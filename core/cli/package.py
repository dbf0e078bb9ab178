"""``loraduct package``: Core ML packages of a base and its adapters, built and edited in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from loraduct.cli.common import (
    PATH,
    base_option,
    json_option,
    print_json,
    reading_options,
    weighted,
)

if TYPE_CHECKING:
    from loraduct.converters.package import Member, Report
    from loraduct.converters.packaging import Built
    from loraduct.formats.options import ReadOptions

_SPECS = "NAME=ADAPTER[:WEIGHT][+...]"


@click.group("package", invoke_without_command=True)
@base_option
@click.option(
    "-a", "--adapter-function", "adapters", multiple=True, metavar=_SPECS,
    help="An adapter, or a weighted sum of several, as the function NAME; repeatable.",
)  # fmt: skip
@click.option("-o", "--output", type=PATH, help="Package to write.")
@click.option(
    "--adapters", "how", type=click.Choice(["functions", "merged", "inputs"]), default="functions",
    show_default=True, help="A function each, merged into the weights, or as arguments of a call.",
)  # fmt: skip
@click.option(
    "--shapes", metavar="Q[,Q...]", help="Fixed numbers of tokens per call, such as 1,64."
)
@click.option("--stateless", is_flag=True, help="Without a cache of keys and values.")
@click.option(
    "--target", type=click.Choice(["iOS18", "iOS17"]), default="iOS18", show_default=True,
    help="The oldest system that is to run it.",
)  # fmt: skip
@click.option("--context", type=click.IntRange(1), help="Positions it holds.")
@click.option("--max-rank", type=click.IntRange(1, 65536), help="With --adapters inputs.")
@click.option("--force", is_flag=True, help="Replace an existing package.")
@json_option
@reading_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    base: Path | None,
    adapters: Sequence[str],
    output: Path | None,
    how: str,
    shapes: str | None,
    stateless: bool,
    target: str,
    context: int | None,
    max_rank: int | None,
    force: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Build a Core ML package of BASE with adapters; or edit one (see the commands).

    An ADAPTER is a folder, PACKAGE:NAME, or the name of one that the package has already.
    """
    if ctx.invoked_subcommand is not None:
        if any(ctx.get_parameter_source(p) == ParameterSource.COMMANDLINE for p in ctx.params):
            raise click.UsageError(f"give options behind {ctx.invoked_subcommand}, not before it")
        return
    if base is None or output is None:
        raise click.UsageError("give --base BASE and -o OUT.mlpackage, or one of the commands")
    wanted = dict(parsed(spec) for spec in adapters)
    if len(wanted) < len(adapters):
        raise click.UsageError("two adapters have one name")
    if max_rank is not None and how != "inputs":
        raise click.UsageError("--max-rank goes with --adapters inputs")
    from loraduct.converters import coreml, packaging
    from loraduct.formats import base as base_folder

    options = coreml.Options(
        target=target,
        shapes=_shapes(shapes),
        stateless=stateless,
        context=context,
        max_rank=max_rank,
    )
    model = base_folder.read(base)
    built = packaging.package(model, output, wanted, how, options, _reading(reading), force=force)
    say_built(output, how, built, as_json)


def say_built(output: Path, how: str, built: Built, as_json: bool) -> None:
    """What was built, for people or for programs."""
    from loraduct.converters.package import size_of
    from loraduct.text import printable, size

    sizes = {str(p): size_of(p) if p.is_dir() else p.stat().st_size for p in built.written}
    if as_json:
        report = built.report
        print_json(
            {
                "package": str(output),
                "adapters": how,
                "functions": report.functions if report else {},
                "accounts": {n: a.as_json() for n, a in report.accounts.items()} if report else {},
                "notes": report.notes if report else [],
                "written": sizes,
            }
        )
        return
    if built.report is not None:
        _say(output, "built", built.report, as_json)
    for name, count in sizes.items():
        click.echo(f"wrote {printable(name, 300)}, {size(count)}")


@command.command("add")
@click.argument("package", type=PATH)
@click.argument("adapters", nargs=-1, required=True, metavar=f"{_SPECS}...")
@json_option
@reading_options
def add(package: Path, adapters: Sequence[str], as_json: bool, **reading: Any) -> None:
    """Add adapters to PACKAGE, each as a function."""
    _put(package, adapters, as_json, reading, over=False)


@command.command("replace")
@click.argument("package", type=PATH)
@click.argument("adapters", nargs=-1, required=True, metavar=f"{_SPECS}...")
@json_option
@reading_options
def replace(package: Path, adapters: Sequence[str], as_json: bool, **reading: Any) -> None:
    """Put other adapters in the place of those that functions of PACKAGE have."""
    _put(package, adapters, as_json, reading, over=True)


@command.command("remove")
@click.argument("package", type=PATH)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@json_option
def remove(package: Path, names: Sequence[str], as_json: bool) -> None:
    """Take functions out of PACKAGE; their weights stay in the file until `compact`."""
    from loraduct.converters.package import remove as taken_out

    _say(package, "removed", taken_out(package, names), as_json)


@command.command("compact")
@click.argument("package", type=PATH)
@json_option
def compact(package: Path, as_json: bool) -> None:
    """Write PACKAGE again without weights that no function refers to."""
    from loraduct.converters.package import compact as compacted

    _say(package, "compacted", compacted(package), as_json)


@command.command("list")
@click.argument("package", type=PATH)
@json_option
def list_(package: Path, as_json: bool) -> None:
    """List the adapters of PACKAGE; `inspect` says more."""
    from loraduct.formats.coreml import record
    from loraduct.formats.coreml.describe import adapter_table, describe
    from loraduct.formats.coreml.package import read

    found = read(package)
    record.read(found)
    document = describe(found)
    if as_json:
        print_json({k: document[k] for k in ("path", "base", "functions", "adapters")})
    elif document["adapters"]:
        click.echo("\n".join(adapter_table(document["adapters"])))
    else:
        click.echo("no adapters: the base alone")


@command.command("extract")
@click.argument("package", type=PATH)
@click.argument("name")
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@click.option(
    "--to",
    type=click.Choice(["peft", "mlx"]),
    default="peft",
    show_default=True,
    help="Its format.",
)
@click.option("--force", is_flag=True, help="Replace an existing adapter folder.")
@json_option
@click.pass_context
def extract(
    ctx: click.Context, package: Path, name: str, output: Path, to: str, force: bool, as_json: bool
) -> None:
    """Write the adapter NAME of PACKAGE as a folder, as `convert PACKAGE:NAME` does."""
    from loraduct.cli.convert import command as convert

    source = Path(f"{package}:{name}")
    ctx.invoke(convert, source=source, to=to, output=output, force=force, as_json=as_json)


def parsed(spec: str) -> tuple[str, list[Member]]:
    """``NAME=ADAPTER[:WEIGHT][+ADAPTER[:WEIGHT]...]``."""
    from loraduct.converters.package import Member

    name, equals, text = spec.partition("=")
    parts = [text] if os.path.lexists(text) else text.split("+")
    if not equals or not name or not all(parts):
        raise click.UsageError(f"{spec!r}: expected {_SPECS}")
    return name, [Member(*weighted(part)) for part in parts]


def _shapes(text: str | None) -> tuple[int, ...]:
    try:
        found = tuple(int(q) for q in text.split(",")) if text else ()
    except ValueError:
        found = (0,)
    if any(q < 1 for q in found) or len(set(found)) < len(found):
        raise click.UsageError(
            f"--shapes {text}: different numbers of tokens expected, such as 1,64"
        )
    return found


def _reading(given: Mapping[str, Any]) -> ReadOptions:
    """The options of `reading_options`."""
    from loraduct.formats.options import ReadOptions

    return ReadOptions(
        given["scale"], given["trained_on"], given["allow_pickle"], given["adapter_name"]
    )


def _put(
    package: Path, adapters: Sequence[str], as_json: bool, reading: dict[str, Any], *, over: bool
) -> None:
    wanted = [parsed(spec) for spec in adapters]
    if len(dict(wanted)) < len(wanted):
        raise click.UsageError("two adapters have one name")
    from loraduct.converters.package import add as put_in

    report = put_in(package, dict(wanted), _reading(reading), over=over)
    _say(package, "replaced" if over else "added", report, as_json)


def _say(package: Path, done: str, report: Report, as_json: bool) -> None:
    """What was done, for people or for programs."""
    if as_json:
        print_json(
            {
                "package": str(package),
                done: report.functions if report.functions else True,
                "adapters": {n: a.as_json() for n, a in report.accounts.items()},
                "notes": report.notes,
                "bytes": {"before": report.before, "after": report.after},
            }
        )
        return
    from loraduct.text import printable, several, size

    change = report.after - report.before
    grown = f"{'+' if change >= 0 else '-'}{size(abs(change))}"
    click.echo(f"{printable(str(package), 300)}: {done}, {size(report.after)} ({grown})")
    for name, functions in report.functions.items():
        click.echo(f"{printable(name)}: functions {several(functions, 8)}")
        if name in report.accounts:
            click.echo("\n".join(report.accounts[name].lines()))
    for name, account in report.accounts.items():
        if name not in report.functions:
            click.echo("\n".join([printable(name), *account.lines()]))
    for note in report.notes:
        click.echo(f"  note: {printable(note, 400)}")
