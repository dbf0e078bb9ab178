"""``loraduct annotate``: facts for people, written into the artefact."""

from __future__ import annotations

import json
from pathlib import Path

import click

from loraduct.cli.common import PATH, json_option, print_json, reading_options

FIELDS = ("name", "version", "task", "license", "description")


@click.command("annotate")
@click.argument("path", type=PATH)
@click.option("--name", help="The adapter's name.")
@click.option("--version", "version_", metavar="TEXT", help="Its version.")
@click.option("--task", help="What it is for.")
@click.option("--license", "license_", metavar="SPDX", help="Its licence.")
@click.option("--description", help="A sentence about it.")
@json_option
@reading_options
def command(
    path: Path,
    name: str | None,
    version_: str | None,
    task: str | None,
    license_: str | None,
    description: str | None,
    as_json: bool,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
) -> None:
    """Write texts into the metadata of the adapter's safetensors file; an empty text removes one.

    The tensors stay as they are, byte for byte; conversions carry the texts along. --trained-on is
    written too: from then on the file says it itself.
    """
    from loraduct import origin
    from loraduct.errors import Refused
    from loraduct.files import replace_file
    from loraduct.formats import read
    from loraduct.formats.options import ReadOptions
    from loraduct.formats.safetensors_file import read_header, serialized
    from loraduct.text import printable

    texts = dict(zip(FIELDS, (name, version_, task, license_, description), strict=True))
    if trained_on is None and all(v is None for v in texts.values()):
        options = ", ".join(f"--{f}" for f in (*FIELDS, "trained-on"))
        raise click.UsageError(f"give at least one of {options}")
    adapter = read(path, ReadOptions(scale, trained_on, allow_pickle, adapter_name))
    if adapter.weights.suffix != ".safetensors":
        raise Refused(adapter.weights, "has no place for metadata; convert it to safetensors first")
    tensors, metadata = read_header(adapter.weights)
    for field, value in texts.items():
        if value == "":
            metadata.pop(field, None)
        elif value is not None:
            metadata[field] = value
    if trained_on is not None:
        _say_trained_on(metadata, adapter.format, trained_on)
    replace_file(adapter.weights, serialized(tensors, metadata, {}))
    shown = {k: v for k, v in metadata.items() if k in FIELDS}
    if said := (origin.parse(metadata) or {}).get("trained_on"):
        shown["trained_on"] = said
    if as_json:
        print_json({"path": str(adapter.weights), "metadata": shown})
    else:
        click.echo(printable(str(adapter.weights), 300))
        for key, value in shown.items():
            click.echo(f"  {key}: {printable(value, 500)}")


def _say_trained_on(metadata: dict[str, str], form: str, precision: str) -> None:
    """Record the base's precision where readers look for it; an empty text removes it.

    A file that no conversion wrote gets a record with an empty state: it describes no state of
    the file, so nothing is ever restored from it.
    """
    from loraduct import origin
    from loraduct.version import __version__

    record = origin.parse(metadata)
    if record is None:
        record = {"version": __version__, "format": form, "config": {}, "state": ""}
    if precision:
        record["trained_on"] = precision
    else:
        record.pop("trained_on", None)
    metadata[origin.KEY] = json.dumps(record, separators=(",", ":"))
    if not precision and not record["state"]:
        del metadata[origin.KEY]
