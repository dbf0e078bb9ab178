"""The command line: one module per verb, imported when the verb is called."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import Any

import click

from loraduct.errors import LoraductError
from loraduct.text import printable
from loraduct.version import __version__

# verb -> its one-line help, so that `loraduct --help` imports none of them
VERBS = {
    "inspect": "Say what an adapter is, for which base, and what is odd about it.",
    "convert": "Convert an adapter to another format, exactly or not at all.",
    "validate": "Prove an adapter against its base, or two adapters against each other.",
    "report": "Draw a saved validation as one HTML page.",
    "bench": "Measure speed and memory here, or forecast them for a phone or a Mac.",
    "merge": "Merge adapters into one: the exact weighted sum, or cut to a rank with the error said.",
    "stack": "Put adapters side by side in one, which unstack takes apart again.",
    "unstack": "Give the adapters of a stack back, bit for bit.",
    "resize": "Cut an adapter's ranks, as well as any of that size can be.",
    "diff": "Compare two adapters module by module, and forecast how they disturb each other.",
    "package": "Build a Core ML package of a base, and add, replace or remove its adapters.",
    "compress": "Give weights fewer bits: of a package, an adapter, or a base.",
    "decompress": "Write compressed weights out again as the values they stand for.",
    "fuse": "Fuse adapters into a base, and say what survives in a packed one.",
    "extract": "Make a LoRA of what a tuned model differs from its base by.",
    "annotate": "Write name, version, task, licence and description into an adapter.",
    "formats": "List the formats, and which extras are installed.",
}


class Verbs(click.Group):
    """Imports a verb on use and turns our errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = import_module(f"loraduct.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Verbs: {', '.join(VERBS)}."
            ctx.fail(f"No such verb {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LoraductError as e:
            if ctx.params.get("debug"):
                raise
            fail(str(e))
            ctx.exit(e.exit_code)
        except (OSError, MemoryError, RecursionError) as e:
            if ctx.params.get("debug") or isinstance(e, BrokenPipeError):
                raise
            name = getattr(e, "filename", None)
            where = (
                f"{printable(os.fsdecode(name), 300)}: " if isinstance(name, str | bytes) else ""
            )
            what = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else type(e).__name__
            fail(f"{where}{what}")
            ctx.exit(1)


def fail(message: str) -> None:
    """The one line for people on stderr."""
    click.echo(f"error: {message}", err=True)


@click.group(
    cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, "-V", "--version", message="loraduct %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Package and convert fine-tuning adapters: exact, or refused with the reason.

    \b
    Exit codes: 0 done, 1 refused, 2 wrong usage, 3 a validation failed.
    """


def run() -> None:
    """The console script."""
    gc.set_threshold(50_000)  # a short run makes hardly any cycles: looking for them costs 5 %
    # stderr and stdout of a terminal that can't show a character must not end in a traceback
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    main(prog_name="loraduct")
