"""``loraduct inspect``: what is this folder?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraduct.cli.common import PATH, base_option, json_option, print_json, reading_options

if TYPE_CHECKING:
    from loraduct.adapter import Adapter, Note
    from loraduct.formats.base import Base
    from loraduct.formats.options import ReadOptions


@click.command("inspect")
@click.argument("path", type=PATH, required=False)
@json_option
@click.option(
    "--stats", is_flag=True, help="Read the values: norms of dW, effective rank, NaN and Inf."
)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@base_option
@click.option(
    "--estimate",
    type=PATH,
    metavar="CONFIG",
    help="Without an adapter: the size of one for this base (a folder or its config.json).",
)
@click.option("--rank", type=click.IntRange(1, 65536), help="Rank for --estimate [16].")
@click.option(
    "--targets",
    metavar="NAMES",
    help="Modules for --estimate, with commas [all-linear: attention and feed-forward].",
)
@reading_options
def command(
    path: Path | None,
    as_json: bool,
    stats: bool,
    tensors: bool,
    base: Path | None,
    estimate: Path | None,
    rank: int | None,
    targets: str | None,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
) -> None:
    """Say what the adapter at PATH is: method, base, ranks, scales, targets, size, traps.

    PATH is a folder, a file in it, or a folder of several adapters; of a Core ML package it says
    what is in it, and PACKAGE:NAME is one of its adapters.
    """
    of_adapter = {
        "PATH": path is not None,
        "--stats": stats,
        "--tensors": tensors,
        "--base": base is not None,
        "--adapter": adapter_name is not None,
        "--scale": scale is not None,
        "--trained-on": trained_on is not None,
        "--allow-pickle": allow_pickle,
    }
    of_estimate = {"--rank": rank is not None, "--targets": targets is not None}
    if estimate is not None:
        if given := [name for name, there in of_adapter.items() if there]:
            raise click.UsageError(f"--estimate needs no adapter: leave {', '.join(given)} out")
        _estimate(estimate, rank or 16, targets, as_json)
        return
    if given := [name for name, there in of_estimate.items() if there]:
        raise click.UsageError(f"{', '.join(given)}: only with --estimate CONFIG")
    if path is None:
        raise click.UsageError("give a PATH, or --estimate CONFIG")
    from loraduct.formats import adapters_in, detect
    from loraduct.formats.options import ReadOptions
    from loraduct.text import printable

    model = None
    if base is not None:  # the update of some of PEFT's methods depends on it
        from loraduct.formats.base import read as read_base

        model = read_base(base)
    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name, restore=False, base=model)
    if adapter_name is None and path.is_dir() and detect(path) == "coreml":
        _package(path, as_json)
        return
    several = adapters_in(path) if path.is_dir() and not adapter_name else {}
    if several and detect(path) is None and len(several) > 1:
        found = [_document(p, options, stats, tensors) for p in several.values()]
        if as_json:
            print_json({"path": str(path), "adapters": found})
        else:
            click.echo(f"{len(found)} adapters in {printable(str(path))}\n")
            click.echo("\n\n".join(map(_text, found)))
        return
    document = _document(path, options, stats, tensors)
    if len(several) > 1:
        document["other_adapters"] = [n for n in several if n != "default"]
    if as_json:
        print_json(document)
    else:
        click.echo(_text(document))


def _package(path: Path, as_json: bool) -> None:
    """A Core ML package as a whole; one of its adapters is asked for by name."""
    from loraduct.formats.coreml import describe, package

    document = describe.describe(package.read(path))
    if as_json:
        print_json(document)
    else:
        click.echo("\n".join(describe.lines(document)))


def _document(path: Path, options: ReadOptions, stats: bool, tensors: bool) -> dict[str, Any]:
    from loraduct import describe
    from loraduct.formats import read

    adapter = read(path, options)
    adapter = replace(adapter, notes=(*adapter.notes, *_on_base(adapter, options.base)))
    document = describe.describe(adapter, tensors=tensors)
    if adapter.format == "coreml":  # one of several in one place
        document["path"] = f"{path}:{options.adapter}" if options.adapter else str(path)
    if stats:
        from loraduct.converters.stats import stats_of

        document["stats"] = stats_of(adapter)
    return document


def _on_base(adapter: Adapter, base: Base | None) -> list[Note]:
    """What mlx-lm can't do with an MLX adapter on its base: the one given, or the one it names."""
    if adapter.format != "mlx" or adapter.method == "full":
        return []
    from loraduct.adapter import Note
    from loraduct.formats import packed

    if base is None:
        return packed.hints(adapter)
    problems = packed.unfit(adapter, base)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return [Note("packed-base", f"{p}{more}") for p in problems[:1]]


def _text(document: dict[str, Any]) -> str:
    from loraduct import describe
    from loraduct.formats import FORMATS

    return "\n".join(describe.lines(document, usual=FORMATS[document["format"]][0]))


def _estimate(config: Path, rank: int, targets: str | None, as_json: bool) -> None:
    from loraduct.formats.estimate import estimate, lines

    names = None if targets is None else [t.strip() for t in targets.split(",") if t.strip()]
    if names == []:
        raise click.UsageError("--targets is empty: give names, or leave it out for all-linear")
    document = estimate(config, rank, names)
    if as_json:
        print_json(document)
    else:
        click.echo("\n".join(lines(document)))
