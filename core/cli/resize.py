"""``loraduct resize``: smaller ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from loraduct.cli.common import (
    PATH,
    Number,
    base_option,
    json_option,
    need_output,
    print_json,
    reading_options,
    writing_options,
)


@click.command("resize")
@click.argument("source", metavar="A", type=PATH)
@click.option("--rank", type=click.IntRange(1, 65536), help="Of every module (or on average).")
@click.option(
    "--energy",
    type=Number(0, 1, min_open=True),
    help="Share of the squared norm to keep, such as 0.95.",
)
@click.option(
    "--error",
    type=Number(0, 1, min_open=True, max_open=True),
    help="Share of the norm that may be lost, such as 0.05.",
)
@click.option("--per-module", is_flag=True, help="A rank of its own for every module.")
@click.option("--uniform", is_flag=True, help="PEFT with one r and one alpha, no patterns.")
@click.option("--to", type=click.Choice(["peft", "mlx"]), help="Format [the adapter's].")
@writing_options
@base_option
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16", "keep"]),
    default="keep",
    help="Store tensors in this dtype; what is cut is float32 else.",
)
@json_option
@reading_options
def command(
    source: Path,
    rank: int | None,
    energy: float | None,
    error: float | None,
    per_module: bool,
    uniform: bool,
    to: str | None,
    output: Path | None,
    base: Path | None,
    dtype: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
) -> None:
    """Cut the ranks of the adapter A: of every module the best approximation there is."""
    need_output(output, dry_run)
    if sum(v is not None for v in (rank, energy, error)) != 1:
        raise click.UsageError("give one of --rank, --energy and --error")
    from loraduct.cli.combine import format_of, read_all, residual_of
    from loraduct.converters.convert import Options, convert
    from loraduct.converters.resize import Wanted, resize
    from loraduct.formats import folder
    from loraduct.formats.options import ReadOptions

    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name)
    (adapter,), model = read_all([source], options, base, output, force)
    target = format_of(adapter, to)
    resized = resize(adapter, Wanted(rank, energy, error, per_module), model, target)
    if target == "mlx" and uniform:
        raise click.UsageError("MLX is always uniform (one rank, one scale): leave --uniform out")
    plan = convert(resized.adapter, Options(to=target, base=model, dtype=dtype, uniform=uniform))
    plan.account.notes += [] if uniform or target == "mlx" else resized.notes
    if target == "mlx" and len({m.rank for m in resized.modules}) > 1:
        plan.account.notes.append("MLX has one rank: smaller ones are padded to the largest")
    folder.write(plan, None if dry_run else output)
    where = "nothing written (--dry-run)" if dry_run else str(output)
    if as_json:
        print_json(
            {
                "source": str(source),
                "to": target,
                "output": None if dry_run else str(output),
                "modules": [asdict(m) for m in resized.modules],
                **plan.account.as_json(),
            }
        )
        return
    from loraduct.text import printable

    before, after = ([getattr(m, f) for m in resized.modules] for f in ("rank_before", "rank"))
    shown = f"ranks {_span(before)} -> {_span(after)}"
    click.echo(f"{printable(str(source))} -> {printable(where)}: {target}, {shown}")
    if resized.modules:
        click.echo(residual_of(resized))
    click.echo("\n".join(plan.account.lines()))


def _span(ranks: list[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
