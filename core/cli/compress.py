"""``loraduct compress``: fewer bits for a package, an adapter, or a base."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from loraduct.cli.common import PATH, Number, json_option, print_json

# what a target is -> the module that compresses it
KINDS = {
    "package": "loraduct.converters.compress_package",
    "adapter": "loraduct.converters.compress_adapter",
    "base": "loraduct.converters.compress_base",
}
CALIBRATED = {"package": "OfPackage", "base": "OfBase"}  # who measures what --calibrate is for


@click.command("compress")
@click.argument("target", metavar="TARGET", type=PATH)
@click.option("-o", "--output", type=PATH, help="Where to write (needed unless --plan).")
@click.option(
    "--palettize", type=click.Choice(["1", "2", "3", "4", "6", "8"]), metavar="BITS",
    help="Indices of 1, 2, 3, 4, 6 or 8 bits into tables of values.",
)  # fmt: skip
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4", "mlx2", "mlx3", "mlx4", "mlx5", "mlx6", "mlx8"]),
    help="Integers times a scale per channel; of a base's folder, packed for mlx-lm.",
)
@click.option(
    "--bits-per-weight", type=Number(0, 16, min_open=True),
    help="A width for every tensor, so that this is the average and the error the least.",
)  # fmt: skip
@click.option("--size", metavar="SIZE", help="The same, for a size of all in all, such as 60MB.")
@click.option(
    "--adapter-bits", type=click.Choice(["1", "2", "3", "4", "6", "8"]), metavar="BITS",
    help="Adapters too, of a package [left as they are].",
)  # fmt: skip
@click.option(
    "--group-size", type=click.IntRange(1), metavar="N",
    help="Channels per table; with --quantize, input channels per scale.",
)  # fmt: skip
@click.option(
    "--granularity", type=click.Choice(["tensor", "channel", "block"]),
    help="What shares a scale of int8 or int4 [channel; block with --group-size].",
)  # fmt: skip
@click.option(
    "--asymmetric", is_flag=True, help="int8 or int4 with offsets (coremltools' mode linear)."
)
@click.option("--per-channel-scale", is_flag=True, help="Scale channels before they share a table.")
@click.option(
    "--lut", type=click.Choice(["kmeans", "uniform", "unique"]), default="kmeans",
    show_default=True, help="How entries of tables are found.",
)  # fmt: skip
@click.option(
    "--cluster-dim",
    type=click.Choice(["1", "2"]),
    default="1",
    help="Numbers per entry of a table.",
)
@click.option(
    "--axis", type=click.Choice(["0", "1"]), default="0",
    help="Groups of output (0) or input (1) channels [0].",
)  # fmt: skip
@click.option(
    "--calibrate", type=PATH, metavar="FILE",
    help="Let errors count by what goes into the layers on this text (or JSONL), and measure on a"
    " part of it what is lost.",
)  # fmt: skip
@click.option(
    "--base", type=PATH, metavar="DIR", help="Whose tokenizer --calibrate takes [beside TARGET]."
)
@click.option("--plain", is_flag=True, help="Of a base: scales as mx.quantize has them.")
@click.option(
    "--expanded", is_flag=True, help="Of a base: a copy with the values that would be read back."
)
@click.option("--include", metavar="REGEX", help="Only tensors whose name it is found in.")
@click.option("--exclude", metavar="REGEX", help="No tensors whose name it is found in.")
@click.option("--plan", is_flag=True, help="Show widths, bytes and errors; write nothing.")
@click.option("--html", type=PATH, metavar="FILE", help="Draw the curve of a budget.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@json_option
def command(
    target: Path,
    output: Path | None,
    palettize: str | None,
    quantize: str | None,
    bits_per_weight: float | None,
    size: str | None,
    adapter_bits: str | None,
    group_size: int | None,
    granularity: str | None,
    asymmetric: bool,
    per_channel_scale: bool,
    lut: str,
    cluster_dim: str,
    axis: str,
    calibrate: Path | None,
    base: Path | None,
    plain: bool,
    expanded: bool,
    include: str | None,
    exclude: str | None,
    plan: bool,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compress TARGET: a Core ML package, an adapter's folder, or a base model's folder.

    Norms, masks, tables and small tensors are left as they are, and listed with the reason.
    """
    ways = (palettize, quantize, bits_per_weight, size)
    if sum(v is not None for v in ways) > 1:
        raise click.UsageError("give one of --palettize, --quantize, --bits-per-weight and --size")
    if all(v is None for v in (*ways, adapter_bits)):
        raise click.UsageError("how? --palettize 4, --quantize int8, --bits-per-weight or --size")
    if output is None and not plan:
        raise click.UsageError("give -o OUT, or --plan")
    if per_channel_scale and quantize:
        raise click.UsageError("--quantize has scales already: leave --per-channel-scale out")
    if html is not None and bits_per_weight is None and size is None:
        raise click.UsageError("--html draws the curve of --bits-per-weight or --size")
    from loraduct.converters.compress_wanted import Wanted, bytes_of

    how = module_of(target)
    of_adapter = how.__name__ == KINDS["adapter"]
    if base is not None and calibrate is None and not of_adapter:
        raise click.UsageError("--base is for the tokenizer of --calibrate FILE, or for adapters")
    if (plain or expanded) and how.__name__ == KINDS["package"]:
        raise click.UsageError("--plain and --expanded are for a base model's folder")
    if plain and expanded:
        raise click.UsageError("--plain is about packed weights: leave it or --expanded out")
    if html is not None and how.__name__ != KINDS["package"]:
        raise click.UsageError(f"--html draws the curve of a package; {target} is none")
    _check_page(html, output, force)
    text = None if calibrate is None else _calibration(
        target, calibrate, base, how, adapter_bits is not None, bool(bits_per_weight or size)
    )  # fmt: skip
    wanted = Wanted(
        palettize=int(palettize) if palettize else None,
        quantize=quantize,
        bits_per_weight=bits_per_weight,
        size=bytes_of(size) if size else None,
        adapter_bits=int(adapter_bits) if adapter_bits else None,
        group_size=group_size,
        granularity=granularity,
        asymmetric=asymmetric,
        per_channel_scale=per_channel_scale,
        lut=lut,
        cluster_dim=int(cluster_dim),
        axis=int(axis),
        calibration=text.calibration() if text else None,
        plain=plain,
        expanded=expanded,
        include=include,
        exclude=exclude,
        force=force,
    )
    whole = _effect(target, output, base, wanted) if of_adapter and base is not None else None
    made = how.compress(target, None if plan else output, wanted)
    if not of_adapter:
        _measured(made, text)
    if whole is not None:
        _effects(made, target, whole, wanted)
    if html is not None:
        from loraduct.converters.compress_curve import page
        from loraduct.files import replace_file

        replace_file(html, [page(made).encode()])
    say(made, as_json)


def _check_page(html: Path | None, output: Path | None, force: bool) -> None:
    from loraduct.errors import Refused

    if html is not None and html.exists() and not force:
        raise Refused(html, "exists; use --force to replace it, or choose another file")
    if (
        html is not None
        and output is not None
        and html.absolute().is_relative_to(output.absolute())
    ):
        raise Refused(html, "lies in the output; choose another place")


def _calibration(
    target: Path, file: Path, base: Path | None, how: Any, adapters: bool, budget: bool
) -> Any:
    """What measures on the text. Raises UsageError for what can't be calibrated."""
    from loraduct.cli import calibration

    kind = next(k for k, module in KINDS.items() if module == how.__name__)
    if kind not in CALIBRATED:
        fit = " and ".join(f"{k}s" for k in CALIBRATED)
        raise click.UsageError(f"--calibrate is for {fit}; {target} is of the kind: {kind}")
    return getattr(calibration, CALIBRATED[kind])(target, file, base, adapters, budget)


def _effect(target: Path, output: Path | None, base: Path, wanted: Any) -> Any:
    """The adapter's effect on the base's logits, before anything is written. Raises Refused for a base
    that it isn't for."""
    from loraduct.converters.compress_adapter import opened
    from loraduct.formats import base as base_folder
    from loraduct.formats import read
    from loraduct.formats.options import ReadOptions
    from loraduct.validation.effect import Kept

    opened(target, output, wanted)  # what can be said without running a model is said at once
    model = base_folder.read(base)
    adapter = read(target, ReadOptions(restore=False, base=model))
    for problem in base_folder.differences(adapter, model):
        raise problem
    return Kept(model, target)


def _effects(made: Any, target: Path, whole: Any, wanted: Any) -> None:
    """What an adapter's compression leaves of its effect on the base's logits, and which width would
    leave enough where this one doesn't."""
    import tempfile
    from dataclasses import replace

    from loraduct.converters.compress_adapter import KEPT, WIDER, compress

    with tempfile.TemporaryDirectory(prefix="loraduct-") as room:

        def kept(name: str, way: Any) -> float:
            folder = made.output
            if folder is None or way is not wanted:
                folder = Path(room) / name
                compress(target, folder, way)
            return float(whole.cosine(folder))

        made.effects["as asked"] = kept("0", wanted)
        for width in WIDER if made.effects["as asked"] < KEPT else ():
            if width > min(m.bits for m in made.modules):
                fresh = {"quantize": None, "bits_per_weight": None, "size": None}
                way = replace(wanted, palettize=width, **fresh)
                made.effects[f"{width} bits"] = cosine = kept(str(width), way)
                if cosine >= KEPT:
                    break


def _measured(made: Any, text: Any) -> None:
    """What compression does to the model, or how to learn it."""
    if text is None:
        made.notes.append(
            "what the predictions lose was not measured: --calibrate FILE does, and lessens it"
        )
        return
    if text.text.note:
        made.notes.append(text.text.note)
    if made.output is not None:
        made.quality = text.quality(made.output)


def module_of(target: Path) -> Any:
    """The module for what the target is: by its files, as everywhere."""
    from loraduct.formats import adapters_in, detect
    from loraduct.formats.coreml.package import is_package

    if is_package(target):
        kind = "package"
    elif target.is_dir() and not detect(target) and (target / "config.json").exists():
        kind = "base"
    else:
        kind = "adapter"
        if target.is_dir() and not adapters_in(target):
            from loraduct.errors import NotRecognised

            what = "is no package, no adapter's folder and no base model's"
            raise NotRecognised(target, what)
    return import_module(KINDS[kind])


def say(outcome: Any, as_json: bool) -> None:
    """What was done, for people or for programs."""
    if as_json:
        print_json(outcome.as_json())
    else:
        click.echo("\n".join(outcome.lines()))
