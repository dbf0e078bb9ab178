"""``loraduct report``: the page of a saved validation."""

from __future__ import annotations

from pathlib import Path

import click

from loraduct.cli.common import PATH


def check_output(path: Path, what: str) -> None:
    """Refuse a file that could not be written. ``what`` is to be in it."""
    from loraduct.errors import Refused

    if path.is_symlink():
        raise Refused(path, f"{what} can't be written: it is a link; name a file")
    if not path.absolute().parent.is_dir():
        raise Refused(path, f"{what} can't be written: its folder does not exist")
    if path.exists() and not path.is_file():
        raise Refused(path, f"{what} can't be written: it is a folder or a device, expected a file")


@click.command("report")
@click.argument("file", metavar="FILE.json", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="HTML", help="The file to write.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(file: Path, output: Path, force: bool) -> None:
    """Draw the document of ``loraduct validate --json`` as one HTML file, which needs nothing else.

    Exit code 0 also where that validation failed: the page says so.
    """
    from loraduct.errors import Refused
    from loraduct.files import read_bytes, replace_file
    from loraduct.formats.json_file import parse_object
    from loraduct.validation import report

    check_output(output, "the page")
    if output.exists() and not force:
        raise Refused(output, "exists; use --force to replace it, or choose another file")
    document = parse_object(read_bytes(file, report.MOST_JSON), file)
    replace_file(output, [report.html(document, file).encode()])
