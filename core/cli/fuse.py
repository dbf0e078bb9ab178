"""``loraduct fuse``: adapters into the weights of their base."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraduct.cli.common import (
    PATH,
    Number,
    base_option,
    json_option,
    need_output,
    print_json,
    reading_options,
    weighted,
)
from loraduct.cli.prompts import prompts_of

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.cli.fuse_report import Judge, Measured
    from loraduct.converters.fuse_folder import Options, Plan
    from loraduct.converters.fuse_package import Plan as PackagePlan
    from loraduct.formats.base import Base


def _bytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    from loraduct.converters.compress_wanted import bytes_of
    from loraduct.errors import Refused

    try:
        size = bytes_of(value)
    except Refused as e:
        raise click.BadParameter(str(e)) from None
    if size < 1:
        raise click.BadParameter(f"{value!r}: at least a byte is expected")
    return size


@click.command("fuse")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@base_option
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="Model folder, or package, to write (needed unless --dry-run).",
)
@click.option(
    "--dtype", type=click.Choice(["keep", "f32", "f16", "bf16"]), default="keep", show_default=True,
    help="Store the weights in this dtype.",
)  # fmt: skip
@click.option(
    "--shard-size",
    default="5GB",
    show_default=True,
    callback=_bytes,
    help="Bytes per file, at most.",
)
@click.option(
    "--remedy", type=click.Choice(["none", "rescale", "compensate", "bits", "auto"]), default="none",
    show_default=True, help="How a base in few bits keeps a small update; auto compares them.",
)  # fmt: skip
@click.option(
    "--growth", type=Number(0, 4), default=0.1, show_default=True,
    help="With --remedy bits: bytes that may be added, as a share of the base's.",
)  # fmt: skip
@click.option(
    "--report/--no-report", default=None, help="Measure what survives [on for a base in few bits]."
)
@click.option(
    "--prompts", type=PATH, metavar="FILE", help="Texts to measure the effect on, one a line."
)
@click.option(
    "--min-effect",
    type=Number(0, 1),
    help="Fail (exit 3) below this cosine of the effect.",
)
@click.option(
    "--allow-kin", is_flag=True, help="Accept a base that is a copy in another precision."
)
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@json_option
@reading_options
def command(
    adapters: Sequence[str],
    base: Path | None,
    output: Path | None,
    dtype: str,
    shard_size: int,
    remedy: str,
    growth: float,
    report: bool | None,
    prompts: Path | None,
    min_effect: float | None,
    allow_kin: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
) -> None:
    """Fuse ADAPTERs into their base, and say what of them survives in one of few bits.

    BASE is a model folder or a Core ML package, and OUT is of the same kind.
    """
    if base is None:
        raise click.UsageError("give --base BASE: the model that is fused into")
    need_output(output, dry_run)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # products are small: threads only wait
    from loraduct.converters import fuse_folder
    from loraduct.errors import Refused
    from loraduct.formats import read
    from loraduct.formats.options import ReadOptions

    specs = [weighted(spec) for spec in adapters]
    model, engine, packed = _opened(base, [Path(source) for source, _ in specs], output, force)
    reading = ReadOptions(scale, trained_on, allow_pickle, adapter_name, base=model)
    given = [(read(Path(source), reading), weight) for source, weight in specs]
    if remedy != "none" and not packed:
        what = f"is not packed: --remedy {remedy} has nothing to do; leave it out"
        raise Refused(model.path, what)
    options = fuse_folder.Options(
        dtype, shard_size, allow_kin, "none" if remedy == "auto" else remedy, growth
    )
    wanted = report if report is not None else packed
    wanted = wanted or min_effect is not None or prompts is not None or remedy == "auto"
    texts = prompts_of(prompts) if prompts else None
    made, measured = _run(
        engine,
        model,
        given,
        options,
        remedy,
        wanted,
        texts,
        min_effect,
        None if dry_run else output,
    )
    _say(model, made, measured, adapters, None if dry_run else output, as_json)


def _opened(
    base: Path, sources: Sequence[Path], output: Path | None, force: bool
) -> tuple[Base, Any, bool]:
    """(the base, what fuses into its kind, whether it holds weights in few bits), the output checked."""
    from loraduct.converters import fuse_folder, fuse_package
    from loraduct.errors import Refused
    from loraduct.files import resolved
    from loraduct.formats import base as base_folder
    from loraduct.formats import model_folder
    from loraduct.formats.coreml.package import is_package

    if is_package(base):
        from loraduct.converters.packaging import check_output

        held = fuse_package.opened(base)
        if output is not None:
            if resolved(output) == resolved(base):
                raise Refused(output, "is the base; choose another package to write")
            check_output(output, force, base)
        return held, fuse_package, fuse_package.compressed(held)
    model = base_folder.read(base)
    if output is not None:
        model_folder.check_target(output, [model.path, *sources], force)
    fuse_folder.check_base(model)
    return model, fuse_folder, model.quantization is not None


def _run(
    engine: Any,
    model: Base,
    given: list[tuple[Adapter, float]],
    options: Options,
    remedy: str,
    wanted: bool,
    texts: list[str] | None,
    least: float | None,
    output: Path | None,
) -> tuple[Plan | PackagePlan, list[Measured]]:
    """Plan, measure where that is wanted, and write; returns what was written and all that was tried."""
    from loraduct.cli import fuse_report
    from loraduct.files import staged_folder

    made = engine.plan(model, given, options)
    if not wanted and output is None:
        engine.read_through(made)
        return made, []
    judge = fuse_report.Judge(model, given, texts, needed=least is not None) if wanted else None
    with staged_folder(output) if output else tempfile.TemporaryDirectory() as held:
        stage = Path(held)
        if judge is not None and remedy == "auto":
            plans = {"none": made} | {
                name: engine.plan(model, given, replace(options, remedy=name))
                for name in engine.COMPARED
            }
            return _best(engine, plans, judge, least, stage)
        engine.write(made, stage)
        found = []
        if judge is not None:
            found = [judge.measure(options.remedy, made, stage)]
            fuse_report.gate(found[0], least)
    return made, found


def _best(
    engine: Any, plans: dict[str, Any], judge: Judge, least: float | None, stage: Path
) -> tuple[Plan | PackagePlan, list[Measured]]:
    """Write each plan once, and keep in ``stage`` the one to choose: two at most are there at a time."""
    from loraduct.cli import fuse_report
    from loraduct.files import lift, make_folder, remove_tree

    found: list[Measured] = []
    best: Measured | None = None
    for name, plan in plans.items():
        make_folder(stage / name)
        engine.write(plan, stage / name)
        found.append(judge.measure(name, plan, stage / name))
        before, best = best, fuse_report.chosen([*([best] if best else []), found[-1]], least)
        worse = before if best is found[-1] else found[-1]
        if worse is not None:
            remove_tree(stage / worse.remedy)
    assert best is not None
    fuse_report.gate(best, least)
    lift(stage / best.remedy)
    return plans[best.remedy], [best, *(m for m in found if m is not best)]


def _say(
    model: Base,
    made: Plan | PackagePlan,
    measured: list[Measured],
    specs: Sequence[str],
    output: Path | None,
    as_json: bool,
) -> None:
    """What was done, for people or for programs."""
    from loraduct.cli import fuse_report

    before = made.before
    if as_json:
        print_json(
            {
                "base": str(model.path),
                "adapters": list(specs),
                "output": None if output is None else str(output),
                "parameters": len(made.places.touched()),
                "bytes": {"before": before, "after": made.nbytes},
                "untied": made.untied,
                "notes": list(made.notes),
                **fuse_report.as_json(measured, made),
            }
        )
        return
    from loraduct.text import printable, size

    where = "nothing written (--dry-run)" if output is None else printable(str(output), 300)
    changed = len(made.places.touched())
    click.echo(f"{printable(str(model.path), 300)} -> {where}: {changed} of {len(made.tensors)} tensors"
               f" changed, {size(made.nbytes)}")  # fmt: skip
    for note in made.notes:
        click.echo(f"  note: {printable(note, 400)}")
    for line in fuse_report.lines(measured, made, before):
        click.echo(line)
