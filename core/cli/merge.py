"""``loraduct merge``: several adapters as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
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
    writing_options,
)

if TYPE_CHECKING:
    from loraduct.converters.merge import Merged, Settings

# loraduct.converters.merge.METHODS, which would load the arithmetic for --help; a test compares
METHODS = [
    "cat",
    "linear",
    "svd",
    "ties",
    "dare",
    "dare-ties",
    "magnitude",
    "peft-cat",
    "peft-svd",
    "peft-linear",
    "peft-ties",
    "peft-dare-linear",
    "peft-dare-ties",
    "peft-magnitude-prune",
]


@click.command("merge")
@click.argument("sources", metavar="A B...", type=PATH, nargs=-1)
@click.option("--weights", metavar="W,W,...", help="One for each adapter [1 each].")
@click.option("--method", type=click.Choice(METHODS), help="How [linear: the weighted sum].")
@click.option("--rank", type=click.IntRange(1, 65536), help="Cut the result to this rank.")
@click.option(
    "--energy",
    type=Number(0, 1, min_open=True),
    help="Or to the rank that keeps this share of the squared norm, such as 0.99.",
)
@click.option(
    "--density",
    type=Number(0, 1, min_open=True),
    help="Share of entries that TIES, DARE and magnitude keep.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of the methods that draw.")
@click.option(
    "--sign-method",
    type=click.Choice(["total", "frequency"]),
    help="How TIES elects a sign: by size or by number [total].",
)
@click.option(
    "--replacements",
    type=click.Choice(["refuse", "average", "first"]),
    help="Where replaced parameters differ [refuse].",
)
@click.option("--recipe", type=PATH, metavar="FILE", help="YAML: adapters, weights, method.")
@click.option("--to", type=click.Choice(["peft", "mlx"]), help="Format [the first adapter's].")
@writing_options
@base_option
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16", "keep"]),
    help="Store tensors in this dtype [keep].",
)
@click.option("--uniform", is_flag=True, help="PEFT with one r and one alpha, no patterns.")
@click.option(
    "--allow-approximate", is_flag=True, help="Accept a measured loss that is otherwise refused."
)
@json_option
@reading_options
def command(
    sources: tuple[Path, ...],
    weights: str | None,
    recipe: Path | None,
    to: str | None,
    output: Path | None,
    base: Path | None,
    dtype: str | None,
    uniform: bool,
    dry_run: bool,
    allow_approximate: bool,
    force: bool,
    as_json: bool,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
    **told: Any,
) -> None:
    """Merge adapters of one base into one, and say what that loses.

    cat and linear are the exact weighted sum; svd its best approximation of a rank. ties, dare,
    dare-ties and magnitude act on the entries of dW and need --rank or --energy. peft-* give what
    PEFT's add_weighted_adapter gives, which mixes the factors of different adapters.
    """
    need_output(output, dry_run)
    if uniform and to == "mlx":
        raise click.UsageError("MLX is always uniform (one rank, one scale): leave --uniform out")
    from loraduct.converters import merge as merging
    from loraduct.converters import recipe as recipes
    from loraduct.formats import folder
    from loraduct.formats.options import ReadOptions

    each: Sequence[recipes.Weight] = _numbers(weights, len(sources))
    if recipe is not None:
        if sources or weights:
            raise click.UsageError("--recipe names adapters and weights: leave them out")
        given = recipes.read(recipe)
        sources, each, base = given.models, given.weights, base or given.base
        renamed = {"sign_method" if k == "sign" else k: v for k, v in given.settings.items()}
        told = {k: renamed.get(k) if v is None else v for k, v in told.items()}
        told["method"] = told["method"] or _one_of(given.method, METHODS, "merge_method", recipe)
        dtype = dtype or _dtype(given.dtype, recipe)
    elif not sources:
        raise click.UsageError("give adapters to merge, or --recipe FILE")
    settings, drawn = _settings(told)
    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name)
    from loraduct.cli.combine import format_of, read_all

    adapters, model = read_all(sources, options, base, output, force)
    target = format_of(adapters[0], to)
    merged = merging.merge(adapters, each, settings, model, target, recipe)
    from loraduct.converters.convert import Options, convert

    plan = convert(
        merged.adapter,
        Options(to=target, base=model, dtype=dtype or "keep", uniform=uniform),
    )
    plan.account.notes += [*merged.notes, *([f"drew the seed {settings.seed}"] if drawn else [])]
    folder.write(plan, None if dry_run else output, allow_approximate=allow_approximate)
    if as_json:
        print_json(_document(merged, settings, sources, target, None if dry_run else output, plan))
        return
    where = "nothing written (--dry-run)" if dry_run else str(output)
    _print(merged, settings, target, where)
    click.echo("\n".join(plan.account.lines()))


def _numbers(text: str | None, count: int) -> list[float]:
    """--weights as numbers, one for each adapter."""
    if text is None:
        return [1.0] * count
    try:
        found = [float(w) for w in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--weights must be numbers with commas between: {text!r}") from None
    if not all(math.isfinite(w) for w in found):
        raise click.UsageError(f"--weights must be finite numbers: {text!r}")
    if count and len(found) != count:
        raise click.UsageError(f"--weights gives {len(found)}, for {count} adapters")
    return found


def _one_of(value: str | None, known: Sequence[str], field: str, file: Path) -> str | None:
    from loraduct.errors import Refused
    from loraduct.text import printable

    if value is not None and value not in known:
        raise Refused(file, f"{field} is {printable(repr(value))}; known are {', '.join(known)}")
    return value


def _dtype(value: str | None, file: Path) -> str | None:
    """mergekit writes float16 where our option says f16."""
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(value or "", value)
    return _one_of(short, ("f32", "f16", "bf16", "keep"), "dtype", file)


def _settings(told: dict[str, Any]) -> tuple[Settings, bool]:
    """What was told, checked; and whether a seed was drawn because none was given."""
    from loraduct.converters.merge import METHODS as methods
    from loraduct.converters.merge import Settings

    told = {"sign" if k == "sign_method" else k: v for k, v in told.items() if v is not None}
    method = methods[told.get("method", "linear")]
    name = told.get("method", "linear")
    if told.get("rank") is not None and told.get("energy") is not None:
        raise click.UsageError("--rank and --energy both say how near: give one")
    _within(told)
    if method.dense and told.get("rank") is None and told.get("energy") is None:
        raise click.UsageError(f"{name} needs --rank N or --energy 0.99: how near it is to be")
    if method.density and told.get("density") is None:
        raise click.UsageError(f"{name} needs --density: the share of entries that it keeps")
    for field, allowed in (("density", method.density), ("seed", method.random)):
        if told.get(field) is not None and not allowed:
            raise click.UsageError(f"{name} has no use for --{field}: leave it out")
    cut = name in ("linear", "svd", "peft-svd") or method.on == "entries"
    if not cut and (told.get("rank") or told.get("energy")):
        raise click.UsageError(
            f"{name} keeps every rank: leave --rank and --energy out, or use svd"
        )
    if name == "peft-svd" and told.get("energy"):
        raise click.UsageError("peft-svd takes --rank only, as PEFT does")
    drawn = method.random and told.get("seed") is None
    if drawn:
        import secrets

        told["seed"] = secrets.randbits(32)
    known = {f.name for f in fields(Settings)}
    return Settings(**{k: v for k, v in told.items() if k in known}), drawn


def _within(told: dict[str, Any]) -> None:
    """Bounds that click checks of options, for what a recipe gives."""
    for field in ("energy", "density"):
        if told.get(field) is not None and not 0 < told[field] <= 1:
            raise click.UsageError(f"{field} is {told[field]}, expected a number over 0, up to 1")
    if told.get("rank") is not None and not 1 <= told["rank"] <= 65536:
        raise click.UsageError(f"rank is {told['rank']}, expected 1 to 65536")
    if told.get("seed") is not None and not 0 <= told["seed"] < 2**63:
        raise click.UsageError(f"seed is {told['seed']}, expected 0 or more")
    for field, known in (
        ("sign", ("total", "frequency")),
        ("replacements", ("refuse", "average", "first")),
    ):
        if told.get(field) is not None and told[field] not in known:
            raise click.UsageError(
                f"{field} is {told[field]!r}, expected one of {', '.join(known)}"
            )


def _print(merged: Merged, settings: Settings, to: str, where: str) -> None:
    from loraduct.cli.combine import residual_of
    from loraduct.text import printable

    names = ", ".join(printable(n) for n in merged.labels)
    click.echo(
        f"{names} -> {printable(where)}: {settings.method}, {to}, {len(merged.modules)} modules"
    )
    ranks = [m.rank for m in merged.modules]
    shown = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    click.echo(
        f"  ranks     {shown} (together {max(m.rank_before for m in merged.modules)} at most)"
    )
    if any(m.residual for m in merged.modules):
        click.echo(residual_of(merged))


def _document(
    merged: Merged,
    settings: Settings,
    sources: Sequence[Path],
    to: str,
    output: Path | None,
    plan: Any,
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "sources": [str(s) for s in sources],
        "settings": asdict(settings),
        "to": to,
        "output": str(output) if output else None,
        "modules": [asdict(m) for m in merged.modules],
        **plan.account.as_json(),
    }
