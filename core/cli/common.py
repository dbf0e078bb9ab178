"""Options that mean the same in every verb."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
base_option = click.option(
    "--base", type=PATH, help="The base model's folder (transformers' or mlx-lm's)."
)


class Number(click.FloatRange):
    """A finite number, within bounds: click takes NaN for within any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Fails for NaN and infinities."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{found} is not a finite number", param, ctx)
        return found


_READING = (
    click.option("--adapter", "adapter_name", metavar="NAME", help="Which of several adapters."),
    click.option(
        "--scale",
        type=Number(),
        help="Scale of an old adapters.npz without a config [20].",
    ),
    click.option(
        "--trained-on",
        metavar="TEXT",
        help="Precision of the base in training: nf4, gptq, ... or none.",
    ),
    click.option(
        "--allow-pickle", is_flag=True, help="Read a .bin, in a child process, weights only."
    ),
)


def reading_options(command: F) -> F:
    """Options of every verb that reads an adapter."""
    for option in reversed(_READING):
        command = option(command)
    return command


_WRITING = (
    click.option("-o", "--output", type=PATH, help="Folder to write (needed unless --dry-run)."),
    click.option("--dry-run", is_flag=True, help="Do everything but write."),
    click.option("--force", is_flag=True, help="Replace an existing adapter folder."),
)


def writing_options(command: F) -> F:
    """Options of verbs that write an adapter: output, dry_run, force."""
    for option in reversed(_WRITING):
        command = option(command)
    return command


def need_output(output: Path | None, dry_run: bool) -> None:
    """Raises UsageError where nothing says what to write."""
    if output is None and not dry_run:
        raise click.UsageError("give -o OUT, or --dry-run")


def weighted(spec: str) -> tuple[str, float]:
    """ADAPTER[:WEIGHT] -> (adapter, weight). Raises UsageError for a weight that is not finite.

    What follows a colon and is no number belongs to the adapter (PACKAGE:NAME).
    """
    source, _, text = spec.rpartition(":")
    if os.path.lexists(spec) or not source:
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        return spec, 1.0
    if not math.isfinite(weight):
        raise click.UsageError(f"{text} is no weight: a finite number is expected")
    return source, weight


def print_json(value: Any) -> None:
    """One JSON document on stdout; JSON has no NaN and no Infinity, so they become null."""
    click.echo(json.dumps(strict(value), indent=2, allow_nan=False))


def strict(value: Any) -> Any:
    """``value`` with null for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    return [strict(v) for v in value] if isinstance(value, list | tuple) else value
