"""``loraduct fuse``: adapters into the weights of their base."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraduct.cli.common import PATH, base_option, json_option, print_json, reading_options

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.cli.fuse_report import Measured
    from loraduct.converters.fuse_folder import Options, Plan
    from loraduct.formats.base import Base

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def _bytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", value.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise click.BadParameter(f"{value!r} is no size, such as 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[(match[2] or "").upper()]))


def parsed(spec: str) -> tuple[Path, float]:
    """ADAPTER[:WEIGHT] -> (path, weight). Raises UsageError for weights that are no numbers."""
    if os.path.lexists(spec):
        return Path(spec), 1.0
    path, colon, text = spec.rpartition(":")
    if not colon or not os.path.lexists(path):
        return Path(spec), 1.0
    try:
        weight = float(text)
    except ValueError:
        return Path(spec), 1.0  # PACKAGE:NAME, or an error that reading it explains
    if not math.isfinite(weight):
        raise click.UsageError(f"{spec}: the weight must be a finite number")
    return Path(path), weight


@click.command("fuse")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@base_option
@click.option("-o", "--output", type=PATH, help="Model folder to write (needed unless --dry-run).")
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
    show_default=True, help="How a packed (MLX) base keeps a small update; auto compares them.",
)  # fmt: skip
@click.option(
    "--growth", type=click.FloatRange(0, 4), default=0.1, show_default=True,
    help="With --remedy bits: bytes that may be added, as a share of the base's.",
)  # fmt: skip
@click.option(
    "--report/--no-report", default=None, help="Measure what survives [on for a packed base]."
)
@click.option(
    "--prompts", type=PATH, metavar="FILE", help="Texts to measure the effect on, one a line."
)
@click.option(
    "--min-effect",
    type=click.FloatRange(0, 1),
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
    """Fuse ADAPTERs into their base, and say what of them survives in a packed one."""
    if base is None:
        raise click.UsageError("give --base BASE: the model that is fused into")
    if output is None and not dry_run:
        raise click.UsageError("give -o OUT, or --dry-run")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # products are small: threads only wait
    from loraduct.converters import fuse_folder
    from loraduct.errors import Refused
    from loraduct.formats import base as base_folder
    from loraduct.formats import model_folder, read
    from loraduct.formats.options import ReadOptions

    model = base_folder.read(base)
    specs = [parsed(spec) for spec in adapters]
    if output is not None:
        model_folder.check_target(output, [model.path, *(p for p, _ in specs)], force)
    fuse_folder.check_base(model)
    reading = ReadOptions(scale, trained_on, allow_pickle, adapter_name, base=model)
    given = [(read(path, reading), weight) for path, weight in specs]
    if remedy != "none" and model.quantization is None:
        what = f"is not packed: --remedy {remedy} has nothing to do; leave it out"
        raise Refused(model.path, what)
    options = fuse_folder.Options(
        dtype, shard_size, allow_kin, "none" if remedy == "auto" else remedy, growth
    )
    wanted = report if report is not None else model.quantization is not None
    wanted = wanted or min_effect is not None or prompts is not None or remedy == "auto"
    texts = _prompts(prompts)
    made, measured = _run(
        model, given, options, remedy, wanted, texts, min_effect, None if dry_run else output
    )
    _say(model, made, measured, adapters, None if dry_run else output, as_json)


def _prompts(file: Path | None) -> list[str] | None:
    if file is None:
        return None
    from loraduct.errors import Refused
    from loraduct.files import CONFIG_LIMIT, read_bytes

    try:
        lines = read_bytes(file, CONFIG_LIMIT).decode().splitlines()
    except UnicodeDecodeError:
        raise Refused(file, "is not a text in UTF-8") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise Refused(file, "holds no text: one prompt a line is expected")
    return texts


def _run(
    model: Base,
    given: list[tuple[Adapter, float]],
    options: Options,
    remedy: str,
    wanted: bool,
    texts: list[str] | None,
    least: float | None,
    output: Path | None,
) -> tuple[Plan, list[Measured]]:
    """Plan, measure where that is wanted, and write; returns what was written and all that was tried."""
    from loraduct.converters import fuse_folder
    from loraduct.files import staged_folder

    made = fuse_folder.plan(model, given, options)
    if not wanted:
        if output is None:
            fuse_folder.read_through(made)
        else:
            with staged_folder(output) as stage:
                fuse_folder.write(made, stage)
        return made, []
    from loraduct.cli import fuse_report

    judge = fuse_report.Judge(model, given, texts, needed=least is not None)
    found: list[Measured] = []
    if remedy == "auto":
        plans = {"none": made}
        for name in ("compensate", "bits"):  # rescaling costs ten times as long, and keeps less
            plans[name] = fuse_folder.plan(model, given, replace(options, remedy=name))
        for name, one in plans.items():
            with tempfile.TemporaryDirectory(dir=output.parent if output else None) as folder:
                fuse_folder.write(one, Path(folder))
                found.append(judge.measure(name, one, Path(folder)))
        best = fuse_report.chosen(found, least)
        made = plans[best.remedy]
        fuse_report.gate(best, least)
        if output is not None:
            with staged_folder(output) as stage:
                fuse_folder.write(made, stage)
        return made, [best, *(m for m in found if m is not best)]
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            fuse_folder.write(made, Path(folder))
            found.append(judge.measure(options.remedy, made, Path(folder)))
            fuse_report.gate(found[0], least)
        return made, found
    with staged_folder(output) as stage:
        fuse_folder.write(made, stage)
        found.append(judge.measure(options.remedy, made, stage))
        fuse_report.gate(found[0], least)
    return made, found


def _say(
    model: Base,
    made: Plan,
    measured: list[Measured],
    specs: Sequence[str],
    output: Path | None,
    as_json: bool,
) -> None:
    """What was done, for people or for programs."""
    from loraduct.cli import fuse_report

    before = sum(t.nbytes for t in model.tensors.values())
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
