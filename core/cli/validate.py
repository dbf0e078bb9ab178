"""``loraduct validate``: the proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraduct.cli.common import PATH, json_option, print_json, reading_options

if TYPE_CHECKING:
    from loraduct.formats.base import Base


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
    from loraduct.formats import base as base_folder
    from loraduct.formats import read
    from loraduct.formats.options import ReadOptions
    from loraduct.validation import runtimes, structure
    from loraduct.validation.checks import Check, passed

    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name, restore=False)
    names = _name_map(name_map)
    texts = _prompts(prompts) if prompts else list(runtimes.PROMPTS)
    model = base_folder.read(base)
    fixed = _fix(model) if fix_base_config else {}
    model = base_folder.read(base)
    adapters = [read(p, options) for p in (first, second) if p is not None]
    checks: list[Check] = []
    for adapter in adapters:
        checks += structure.check(adapter, model, names)
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
                "adapter": str(first),
                "base": str(base),
                "against": str(second) if second else None,
                "fixed_base_config": fixed,
                "checks": [c.as_json() for c in checks],
                "parity": result.as_json() if result else None,
            }
        )
    else:
        _print(first, second, model, fixed, checks, ok)
        if result is not None:
            from loraduct.validation import parity

            click.echo("\n".join(parity.lines(result)))
    if not ok:
        ctx.exit(3)


def _print(
    first: Path, second: Path | None, model: Base, fixed: object, checks: object, ok: bool
) -> None:
    from loraduct.text import printable

    against = f" against {second}" if second else ""
    click.echo(printable(f"{first}{against} on {model.path}", 400))
    if fixed:
        click.echo(f"  wrote into config.json: {printable(json.dumps(fixed), 300)}")
    for check in dict.fromkeys(checks):  # type: ignore[call-overload]
        click.echo(check.line())
    click.echo("passed" if ok else "FAILED")


def _fix(model: Base) -> dict[str, object]:
    """Write the old forms beside the new ones; returns what was added."""
    from loraduct.files import replace_file
    from loraduct.formats.base import misread_fields

    missing = misread_fields(model.config)
    if missing:
        text = json.dumps({**model.config, **missing}, indent=2) + "\n"
        replace_file(model.path / "config.json", [text.encode()])
    return missing


def _prompts(file: Path) -> list[str]:
    from loraduct.errors import Refused
    from loraduct.files import read_bytes

    try:
        rows = read_bytes(file, 4 << 20).decode().splitlines()
    except UnicodeDecodeError:
        raise Refused(file, "is not UTF-8") from None
    found = []
    for number, row in enumerate((r for r in rows if r.strip()), 1):
        if row.lstrip().startswith("{"):
            try:
                row = json.loads(row)["prompt"]
            except (ValueError, KeyError, RecursionError):
                raise Refused(file, f"line {number} is not an object with a prompt") from None
            if not isinstance(row, str):
                raise Refused(file, f"line {number}: prompt is not a text")
        found.append(row)
    if not found:
        raise Refused(file, "holds no prompts")
    return found
