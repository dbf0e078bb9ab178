"""``loraduct validate``: the proof."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loraduct.cli.common import PATH, json_option, print_json, reading_options, strict
from loraduct.cli.prompts import prompts_of
from loraduct.cli.report import check_output
from loraduct.validation.suites import SUITES
from loraduct.validation.thresholds import THRESHOLDS

if TYPE_CHECKING:
    from loraduct.adapter import Adapter
    from loraduct.formats.base import Base
    from loraduct.formats.options import ReadOptions
    from loraduct.validation.runs import Runs
    from loraduct.validation.suites import Suite

F = TypeVar("F", bound=Callable[..., Any])
OUTPUTS = {
    "--junit": "Write JUnit XML.",
    "--markdown": "Write Markdown for a pull request.",
    "--html": "Write the report, one self-contained page.",
}


def _many(command: F) -> F:
    """The gates and the files to write."""
    for name, text in reversed(OUTPUTS.items()):
        command = click.option(name, type=PATH, metavar="FILE", help=text)(command)
    for name, t in reversed(THRESHOLDS.items()):
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, metavar=t.metavar, help=t.help)(command)
    return command


@click.command("validate")
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="[B]", type=PATH, required=False)
@click.option("--base", type=PATH, required=True, help="The base model's folder.")
@click.option(
    "--suite",
    "wanted",
    type=click.Choice(list(SUITES)),
    multiple=True,
    help="Only this suite (several times); else all that can run: of these, latency and swap run the"
    " models for a while.",
)
@click.option(
    "--prompts",
    type=PATH,
    metavar="FILE",
    help="Prompts: one a line, or JSONL with a prompt field.",
)
@click.option(
    "--text", type=PATH, metavar="FILE", help="Text or JSONL on which quality is measured."
)
@click.option(
    "--text-tokens",
    type=click.IntRange(1),
    help="How much of it, in tokens: whole texts from its start [512; 256 where MLX has no GPU].",
)
@click.option(
    "--beside", type=PATH, multiple=True, metavar="ADAPTER", help="One more adapter for swap."
)
@click.option("--config", type=PATH, metavar="FILE", help="Thresholds; else ./loraduct.toml.")
@_many
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
    /,
    first: Path,
    second: Path | None,
    base: Path,
    wanted: tuple[str, ...],
    prompts: Path | None,
    text: Path | None,
    text_tokens: int | None,
    beside: tuple[Path, ...],
    config: Path | None,
    fix_base_config: bool,
    name_map: Path | None,
    as_json: bool,
    adapter_name: str | None,
    scale: float | None,
    trained_on: str | None,
    allow_pickle: bool,
    **more: Any,
) -> None:
    """Check the adapter A against its base; with B, that B computes what A computes.

    All that inputs and installed extras allow is done: minutes, for a model of 135 M parameters up to
    three. --suite shortens it. Exit code 3 when a check fails.
    """
    from loraduct.cli.convert import _name_map
    from loraduct.converters.pool import AdapterPool
    from loraduct.errors import Refused
    from loraduct.formats import base as base_folder
    from loraduct.formats import read as read_adapter
    from loraduct.formats.options import ReadOptions
    from loraduct.validation import align, runtimes, suites, texts, thresholds
    from loraduct.validation import runs as run_once
    from loraduct.validation.document import document, named

    outputs = {k: more.pop(k) for k in ("junit", "markdown", "html")}
    _check_outputs(outputs)
    flags = thresholds.from_flags(more)
    gates = {**thresholds.from_file(config), **flags}
    limits = thresholds.settled(gates, wanted)
    before = thresholds.previous(Path(limits["regress_from"])) if limits["regress_from"] else None
    for option, value, suite in (("--text", text, "quality"), ("--beside", beside, "swap")):
        if value and wanted and suite not in wanted:
            raise Refused(None, f"{option} is for the suite {suite}, which --suite leaves out")
    model = base_folder.read(base)
    options = ReadOptions(scale, trained_on, allow_pickle, adapter_name, restore=False, base=model)
    table = _name_map(name_map)
    names = align.NameMap(name_map, table) if name_map and table is not None else None
    said = prompts_of(prompts) if prompts else list(runtimes.PROMPTS)
    rows = texts.objects(text) if text else []
    paths = [p for p in (first, second) if p is not None]
    adapters = _adapters(paths, options)
    others = [read_adapter(p, ReadOptions(restore=False, base=model)).path for p in beside]
    given = [text, prompts, config or Path(thresholds.CONFIG), limits["regress_from"], name_map]
    given += [base, model.path, *beside, *others, *_parts(paths, adapters)]
    _check_inputs(outputs, [Path(p) for p in given if p])
    runs_parity = not wanted or "parity" in wanted
    if len(adapters) == 2 and runs_parity and not model.has_weights:
        raise Refused(
            model.path,
            "holds no weights (model*.safetensors): two adapters are compared by running them on the"
            " base; give a base with its weights",
        )
    fixed = _fix(model) if fix_base_config else {}
    model = base_folder.read(base)
    progress = _progress if sys.stderr.isatty() else _silent
    runs = run_once.Runs(
        model,
        said,
        file=prompts,
        text=text,
        rows=rows,
        most=text_tokens or run_once.most_tokens(adapters),
        adapters=adapters,
        progress=lambda what: progress(f"  {what}"),
    )
    if not any(a.format == "coreml" for a in adapters):
        _tokenize(runs, wanted)
    files = {"text": named(text), "prompts": named(prompts)}
    context = suites.Context(
        tuple(adapters),
        model,
        runs,
        beside=beside,
        given=frozenset(gates),
        names=names,
        wanted=frozenset(wanted),
        options={"pool": AdapterPool},
    )
    found = suites.run(context, progress)
    found = thresholds.gated(found, limits, context.given)
    if before is not None:
        found = thresholds.regressed(found, before, limits["tolerance"], files["text"])
    words = ["loraduct", *sys.argv[1:]]
    made = strict(document(found, adapters, paths, model, limits, words, fixed, files))
    if as_json:
        print_json(made)
    else:
        _print(paths, adapters, model, fixed, found)
        click.echo(made["verdict"])
    _write(outputs, made)
    if not made["passed"]:
        ctx.exit(3)


def _progress(what: str) -> None:
    """A line on stderr for people who wait."""
    from loraduct.text import printable

    click.echo(click.style(f"... {printable(what, 200)}", dim=True), err=True)


def _silent(what: str) -> None:
    """Nobody is there to see it."""


def _check_outputs(outputs: dict[str, Path | None]) -> None:
    """Refuse now what could not be written after minutes of running."""
    from loraduct.errors import Refused

    seen: dict[Path, str] = {}
    for kind, path in outputs.items():
        if path is None:
            continue
        check_output(path, f"--{kind}")
        if other := seen.get(path.resolve()):
            raise Refused(path, f"--{kind} can't be written: --{other} goes there, too")
        seen[path.resolve()] = kind
    if outputs["html"]:
        from loraduct.validation import report_plots

        report_plots.available()


def _parts(paths: Sequence[Path], adapters: Sequence[Adapter]) -> list[Path]:
    """What is read of the adapters: folders, or of a file, beside which others may lie, its config, too."""
    from loraduct.formats import CONFIG

    found = [*paths, *(a.weights for a in adapters)]
    for path, adapter in zip(paths, adapters, strict=True):
        found.append(path.parent / CONFIG if path.is_file() else adapter.path)
    return found


def _check_inputs(outputs: dict[str, Path | None], inputs: Sequence[Path]) -> None:
    """Refuse to write over what is read, or into a folder that is."""
    from loraduct.errors import Refused

    read = {p.resolve() for p in inputs}
    for kind, path in outputs.items():
        if path is None:
            continue
        for place in (path.resolve(), *path.resolve().parents):
            if place in read:
                what = "that is read" if place == path.resolve() else f"in {place}, which is read"
                raise Refused(path, f"--{kind} can't be written: it is a file {what}")


def _tokenize(runs: Runs, wanted: Sequence[str]) -> None:
    """Refuse now the texts and prompts that no model could be given, after minutes of running others.

    What is not installed, or a tokenizer that can't be used, is for the suites to say.
    """
    from contextlib import suppress

    from loraduct.errors import MissingExtra
    from loraduct.validation.runtimes import RuntimeFailed

    with suppress(MissingExtra, RuntimeFailed):
        if runs.text is not None and (not wanted or "quality" in wanted):
            _ = runs.texts
        elif runs.file is not None:
            _ = runs.ids


def _write(outputs: dict[str, Path | None], document: dict[str, Any]) -> None:
    """The files that were asked for; all are made before the first is written."""
    from loraduct.files import replace_file
    from loraduct.validation import verdict_out

    made: dict[Path, str] = {}
    for kind, path in outputs.items():
        if path is None:
            continue
        if kind == "html":
            from loraduct.validation import report

            made[path] = report.html(document)
        else:
            made[path] = {"junit": verdict_out.junit, "markdown": verdict_out.markdown}[kind](
                document
            )
    for path, text in made.items():
        replace_file(path, [text.encode()])


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
    found: Sequence[Suite],
) -> None:
    from loraduct.text import printable
    from loraduct.validation import parity
    from loraduct.validation.runtimes import usual_weights

    click.echo(printable(f"{' against '.join(map(str, paths))} on {model.path}", 400))
    for path, adapter in zip(paths, adapters, strict=True):
        if not usual_weights(adapter):
            click.echo(printable(f"  {path}: its weights are {adapter.weights}", 400))
    if fixed:
        click.echo(f"  wrote into config.json: {printable(json.dumps(fixed), 300)}")
    for suite in found:
        if suite.status == "skipped":
            click.echo(f"{suite.name}: skipped: {printable(suite.reason, 300)}")
            continue
        click.echo(f"{suite.name}: {suite.status} ({suite.seconds:.1f} s)")
        for check in dict.fromkeys(suite.checks):
            click.echo(check.line())
        if suite.name == "parity":
            for line in parity.lines(suite.numbers.get("greedy_text", {})):
                click.echo(line)


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
