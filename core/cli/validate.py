"""``loraduct validate``: the proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraduct.cli.common import PATH, json_option, print_json, reading_options

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.formats.base import Base
    from loraduct.formats.options import ReadOptions
    from loraduct.validation.checks import Check


@click.command("validate")
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="[B]", type=PATH, required=False)
@click.option("--base", type=PATH, required=True, help="The base model's folder.")
@click.option(
    "--prompts",
    type=PATH,
    metavar="FILE",
    help="Prompts: one a line, or JSONL with a prompt field.",
)
@click.option(
    "--fix-base-config",
    is_flag=True,
    help="Write rope settings into the base's config.json in both forms.",
)
@click.option(
    "--name-map", type=PATH, metavar="FILE", help="JSON of transformers' to mlx-lm's module names."
)
@json_option
@reading_options
@click.pass_context
def command(
    ctx: click.Context,
    first: Path,
    second: Path | None,
    base: Path,
    prompts: Path | None,
    fix_base_config: bool,
    name_map: Path | None,
    as_json: bool,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
) -> None:
    """Check the adapter A against its base; with B, that B computes what A computes.

    Exit code 3 when a check fails.
    """
    from loraduct.cli.convert import _name_map
    from loraduct.errors import Refused
    from loraduct.formats import base as base_folder
    from loraduct.formats.options import ReadOptions
    from loraduct.validation import align, runtimes, structure
    from loraduct.validation.checks import Check, passed, verdict

    model = base_folder.read(base)
    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name, restore=False, base=model)
    table = _name_map(name_map)
    names = align.NameMap(name_map, table) if name_map and table is not None else None
    texts = _prompts(prompts) if prompts else list(runtimes.PROMPTS)
    paths = [p for p in (first, second) if p is not None]
    adapters = _adapters(paths, options)
    if len(adapters) == 2 and not model.has_weights:
        raise Refused(
            model.path,
            "holds no weights (model*.safetensors): two adapters are compared by running them on the"
            " base; give a base with its weights",
        )
    fixed = _fix(model) if fix_base_config else {}
    model = base_folder.read(base)
    labels = ["A", "B"] if len(adapters) == 2 else [None]
    checks: list[Check] = []
    for label, adapter in zip(labels, adapters, strict=True):
        checks += structure.check(adapter, model, names, label)
    checks.append(structure.config(model))
    result = None
    if len(adapters) == 2 and passed(checks):
        from loraduct.validation import parity

        result = parity.check(adapters[0], adapters[1], model, texts, names)
        checks += result.checks
    elif len(adapters) == 2:
        checks.append(Check("parity", "skipped", "the structure is broken"))
    ok = passed(checks)
    if as_json:
        print_json(
            {
                "schema": 1,
                "passed": ok,
                "verdict": verdict(checks),
                "adapter": str(first),
                "base": str(base),
                "against": str(second) if second else None,
                "weights": [str(a.weights) for a in adapters],
                "fixed_base_config": fixed,
                "checks": [c.as_json() for c in checks],
                "parity": result.as_json() if result else None,
            }
        )
    else:
        _print(paths, adapters, model, fixed, checks)
        if result is not None:
            from loraduct.validation import parity

            click.echo("".join(f"{line}\n" for line in parity.lines(result)), nl=False)
        click.echo(verdict(checks))
    if not ok:
        ctx.exit(3)


def _adapters(paths: Sequence[Path], options: ReadOptions) -> list[Adapter]:
    """A and B, each with the options that are meant for it.

    --scale belongs to an old .npz without a config; where neither is one, reading refuses it.
    --adapter chooses in A, and in B where B holds several.
    """
    from loraduct.errors import Refused
    from loraduct.formats import read

    old = [_is_old(p, options) for p in paths]
    found = []
    for path, own in zip(paths, old, strict=True):
        chosen = options if own or not any(old) else replace(options, scale=None)
        try:
            found.append(read(path, chosen))
        except Refused:
            if not found or options.adapter is None:
                raise
            found.append(read(path, replace(chosen, adapter=None)))
    return found


def _is_old(path: Path, options: ReadOptions) -> bool:
    """Whether an old .npz without a config would be read there."""
    from loraduct.formats import CONFIG, locate, mlx

    folder, found = locate(path, options)
    if (folder / CONFIG).exists():
        return False
    newer = found.weights or folder / mlx.WEIGHTS
    return newer.suffix == ".npz" or (not newer.exists() and (folder / mlx.OLD_WEIGHTS).exists())


def _print(
    paths: Sequence[Path],
    adapters: Sequence[Adapter],
    model: Base,
    fixed: object,
    checks: Sequence[Check],
) -> None:
    from loraduct.text import printable
    from loraduct.validation.runtimes import usual_weights

    click.echo(printable(f"{' against '.join(map(str, paths))} on {model.path}", 400))
    for path, adapter in zip(paths, adapters, strict=True):
        if not usual_weights(adapter):
            click.echo(printable(f"  {path}: its weights are {adapter.weights}", 400))
    if fixed:
        click.echo(f"  wrote into config.json: {printable(json.dumps(fixed), 300)}")
    for check in dict.fromkeys(checks):
        click.echo(check.line())


def _fix(model: Base) -> dict[str, object]:
    """Write the old forms beside the new ones; returns what was added."""
    from loraduct.errors import Refused
    from loraduct.files import replace_file
    from loraduct.formats.base import misread_fields, rope_conflicts

    file = model.path / "config.json"
    for field, (old, new) in rope_conflicts(model.config).items():
        raise Refused(
            file,
            f"has {field}={old} and, in rope_parameters, {new}: which one the weights were trained"
            " with can't be told; correct it by hand. Nothing was written",
        )
    missing = misread_fields(model.config)
    if missing:
        text = json.dumps({**model.config, **missing}, indent=2) + "\n"
        replace_file(file, [text.encode()])
    return missing


def _prompts(file: Path) -> list[str]:
    """Prompts, one a line; in a .jsonl, and where every line is an object, its prompt field."""
    from loraduct.errors import Refused
    from loraduct.files import read_bytes

    try:
        rows = read_bytes(file, 4 << 20).decode().split("\n")
    except UnicodeDecodeError:
        raise Refused(file, "is not UTF-8") from None
    lines = {n: row.rstrip("\r") for n, row in enumerate(rows, 1) if row.strip()}
    if not lines:
        raise Refused(file, "holds no prompts")
    values = {n: _object(row) for n, row in lines.items()}
    if file.suffix != ".jsonl" and None in values.values():
        return list(lines.values())
    found = []
    for number, row in lines.items():
        value = values[number]
        if value is None and row.lstrip().startswith("{"):
            raise Refused(file, f"line {number} is not a JSON object")
        prompt = row if value is None else value.get("prompt")
        if not isinstance(prompt, str):
            raise Refused(file, f"line {number} is not an object with a prompt that is a text")
        found.append(prompt)
    return found


def _object(row: str) -> dict[str, Any] | None:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
