"""``loraduct decompress``: the values that compressed weights stand for, written out again."""

from __future__ import annotations

from pathlib import Path

import click

from loraduct.cli.common import PATH, json_option


@click.command("decompress")
@click.argument("target", metavar="TARGET", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Where to write.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@json_option
def command(target: Path, output: Path, force: bool, as_json: bool) -> None:
    """Write TARGET with its compressed weights as plain ones: the same values, more bytes."""
    from loraduct.cli.compress import module_of, say

    say(module_of(target).decompress(target, output, force=force), as_json)
