"""Options that mean the same in every verb."""

from __future__ import annotations

import json
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

_READING = (
    click.option("--adapter", "adapter_name", metavar="NAME", help="Which of several adapters."),
    click.option("--scale", type=float, help="Scale of an old adapters.npz without a config [20]."),
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


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))
