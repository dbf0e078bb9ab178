"""``loraduct formats``: what reads, what writes, which extras are installed."""

from __future__ import annotations

import click

from loraduct.cli.common import json_option, print_json

EXTRAS = {
    "torch": ("torch", "transformers", "peft"),
    "mlx": ("mlx", "mlx-lm"),
    "coreml": ("coremltools",),
    "report": ("matplotlib",),
}
USES = {
    "torch": "validate PEFT adapters and packages; read .bin",
    "mlx": "validate MLX adapters",
    "coreml": "run packages on a Mac (building and editing need nothing)",
    "report": "draw a validation as a page",
}


@click.command("formats")
@json_option
def command(as_json: bool) -> None:
    """List the formats, and which extras are installed."""
    from importlib.metadata import PackageNotFoundError, version

    from loraduct.formats import FORMATS
    from loraduct.text import table

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    extras = {extra: {p: installed(p) for p in packages} for extra, packages in EXTRAS.items()}
    if as_json:
        formats = {
            n: {"reads": True, "writes": True, "what": what} for n, (_, what) in FORMATS.items()
        }
        print_json({"formats": formats, "extras": extras})
        return
    rows = [["format", "reads", "writes", "what"]]
    rows += [[n, "yes", "yes", what] for n, (_, what) in FORMATS.items()]
    click.echo("\n".join(table(rows)))
    click.echo()
    rows = [["extra", "for", "packages"]]
    for extra, packages in extras.items():
        shown = ", ".join(f"{p} {v}" if v else f"{p} not installed" for p, v in packages.items())
        rows.append([extra, USES[extra], shown])
    click.echo("\n".join(table(rows)))
