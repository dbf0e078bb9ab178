"""``loraduct inspect``: what is this folder?"""

from __future__ import annotations

from pathlib import Path

import click

from loraduct.cli.common import PATH, json_option, print_json, reading_options


@click.command("inspect")
@click.argument("path", type=PATH, required=False)
@json_option
@click.option(
    "--stats", is_flag=True, help="Read the values: norms of dW, effective rank, NaN and Inf."
)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--estimate",
    type=PATH,
    metavar="CONFIG",
    help="Without an adapter: the size of one for this base (a folder or its config.json).",
)
@click.option("--rank", type=click.IntRange(1, 65536), help="Rank for --estimate.")
@click.option(
    "--targets",
    default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    show_default=True,
    help="Modules for --estimate.",
)
@reading_options
def command(
    path: Path | None,
    as_json: bool,
    stats: bool,
    tensors: bool,
    estimate: Path | None,
    rank: int | None,
    targets: str,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
) -> None:
    """Say what the adapter at PATH is: method, base, ranks, scales, targets, size, traps.

    PATH is a folder, a file in it, or a folder of several adapters.
    """
    if estimate is not None:
        _estimate(estimate, rank or 16, targets, as_json)
        return
    if path is None:
        raise click.UsageError("give a PATH, or --estimate CONFIG")
    from loraduct import describe
    from loraduct.formats import adapters_in, detect, read
    from loraduct.formats.options import ReadOptions
    from loraduct.text import printable

    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name)
    several = adapters_in(path) if path.is_dir() and not adapter_name else {}
    if several and detect(path) is None and len(several) > 1:
        found = [describe.describe(read(p, options)) for p in several.values()]
        if as_json:
            print_json({"path": str(path), "adapters": found})
        else:
            click.echo(f"{len(found)} adapters in {printable(str(path))}\n")
            click.echo("\n\n".join("\n".join(describe.lines(d)) for d in found))
        return
    adapter = read(path, options)
    document = describe.describe(adapter, tensors=tensors)
    if len(several) > 1:
        document["other_adapters"] = [n for n in several if n != "default"]
    if stats:
        from loraduct.converters.stats import stats_of

        document["stats"] = stats_of(adapter)
    if as_json:
        print_json(document)
    else:
        click.echo("\n".join(describe.lines(document)))


def _estimate(config: Path, rank: int, targets: str, as_json: bool) -> None:
    from loraduct.formats.estimate import estimate, lines

    document = estimate(config, rank, [t.strip() for t in targets.split(",") if t.strip()])
    if as_json:
        print_json(document)
    else:
        click.echo("\n".join(lines(document)))
