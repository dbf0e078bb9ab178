"""``loraduct extract``: a LoRA from a tuned model and its base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraduct.cli.common import (
    PATH,
    Number,
    json_option,
    need_output,
    print_json,
    writing_options,
)

if TYPE_CHECKING:
    from loraduct.converters.extract import Found
    from loraduct.formats.folder import Folder

_WORST = 5  # modules that are named


@click.command("extract")
@click.argument("tuned", type=PATH)
@click.argument("base", type=PATH)
@writing_options
@click.option("--rank", type=click.IntRange(1, 65536), help="Directions to keep of every module.")
@click.option(
    "--energy", type=Number(0, 1, min_open=True),
    help="Or as many as keep this share of the squared norm, such as 0.99.",
)  # fmt: skip
@click.option(
    "--to", type=click.Choice(["peft", "mlx"]), default="peft", show_default=True,
    help="Target format.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["f32", "f16", "bf16", "keep"]), default="keep", show_default=True,
    help="Store tensors in this dtype; keep is f32.",
)  # fmt: skip
@click.option(
    "--allow-approximate", is_flag=True, help="Accept more than rounding to be left over."
)
@json_option
def command(
    tuned: Path,
    base: Path,
    output: Path | None,
    rank: int | None,
    energy: float | None,
    to: str,
    dtype: str,
    allow_approximate: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make an adapter of what the model folder TUNED differs by from BASE.

    Without --rank and --energy each module gets the directions that stand out of rounding's noise.
    """
    need_output(output, dry_run)
    if rank is not None and energy is not None:
        raise click.UsageError("--rank and --energy both say how near: give one")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of small products threads only wait
    from loraduct.converters.approximate import Wanted
    from loraduct.converters.convert import Options, convert
    from loraduct.converters.extract_folder import extract
    from loraduct.formats import base as base_folder
    from loraduct.formats import folder

    models = base_folder.read(tuned), base_folder.read(base)
    if output is not None:
        for model in models:
            folder.check_target(output, model.path, force)
    made = extract(*models, Wanted(rank, energy, allow_approximate))
    plan = convert(made.adapter, Options(to=to, base=models[1], dtype=dtype))
    less = [f.rank for f in made.found.values() if f.rank and f.rank < (rank or 0)]
    if less:
        what = f"rank {rank} is more than {len(less)} modules have (at most {max(less)})"
        plan.account.notes.append(f"{what}: they are exact to what they are stored in")
    folder.write(plan, None if dry_run else output, allow_approximate=allow_approximate)
    _say(tuned, base, None if dry_run else output, made.found, plan, as_json)


def _say(
    tuned: Path,
    base: Path,
    output: Path | None,
    found: Mapping[str, Found],
    plan: Folder,
    as_json: bool,
) -> None:
    """What was found, for people or for programs."""
    low = {n: f for n, f in found.items() if f.rank}
    replaced = sorted(n for n, f in found.items() if not f.rank)
    if as_json:
        print_json(
            {
                "tuned": str(tuned),
                "base": str(base),
                "output": None if output is None else str(output),
                "modules": {n: _row(f) for n, f in low.items()},
                "replaced": replaced,
                "config": plan.account.fields,
                "notes": plan.account.notes,
                "files": plan.account.files,
            }
        )
        return
    from loraduct.text import printable, several, size

    where = "nothing written (--dry-run)" if output is None else printable(str(output), 300)
    ranks = sorted({f.rank for f in low.values()})
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    total = size(sum(plan.account.files.values()))
    click.echo(f"{printable(str(tuned), 300)} -> {where}: {len(low)} modules, {shown}, {total}")
    if replaced:
        click.echo(f"  {len(replaced)} parameters replaced whole: {several(replaced)}")
    click.echo("  left over, of the squared norm of what changed (rounding's share):")
    for name, f in sorted(low.items(), key=lambda kv: -kv[1].residual)[:_WORST]:
        click.echo(
            f"    {printable(name)}: rank {f.rank}, {f.residual**2:.2e} ({f.rounding**2:.2e})"
        )
    for note in plan.account.notes:
        click.echo(f"  note: {printable(note, 400)}")


def _row(f: Found) -> dict[str, Any]:
    return {
        "rank": f.rank,
        "residual_energy": f.residual**2,
        "rounding_energy": f.rounding**2,
        "whole": f.whole,
    }
