"""``loraduct bench``: speed and memory, measured here or forecast for a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraduct.cli.common import PATH, base_option, json_option, print_json

if TYPE_CHECKING:
    from loraduct.validation.devices import Device
    from loraduct.validation.forecast import Engine, Forecast
    from loraduct.validation.latency import Measured, Ratio
    from loraduct.validation.workload import Workload

SCHEMA = 1


def _contexts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """``128,1024``"""
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 128,1024") from None
    if min(found) < 1 or len(set(found)) < len(found):
        raise click.BadParameter(f"{value!r}: every context once, each of 1 token or more")
    return found


_OPTIONS = (
    click.option("--against", type=PATH, metavar="OTHER", help="A second target, in turns with it."),
    base_option,
    click.option(
        "--context", "contexts", default="128", callback=_contexts, metavar="N,M",
        help="Tokens of the prompts [128].",
    ),
    click.option("--generate", type=click.IntRange(1, 100_000), default=64, help="Tokens more [64]."),
    click.option("--rounds", type=click.IntRange(1, 1000), default=5, help="Rounds that count [5]."),
    click.option(
        "--runtime", type=click.Choice(["torch", "mlx", "coreml"]), help="What runs it."
    ),
    click.option(
        "--dtype", type=click.Choice(["stored", "float32", "float16", "bfloat16"]),
        help="Of the computation [torch: float32, else as stored].",
    ),
    click.option(
        "--units", type=click.Choice(["ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"]),
        default="ALL", help="Compute units of Core ML [ALL].",
    ),
    click.option(
        "--device", "device_names", multiple=True, metavar="NAME",
        help="Forecast for this device instead (repeatable; all: every one).",
    ),
    click.option("--devices", type=PATH, metavar="FILE", help="More devices, in TOML."),
    click.option(
        "--calibrate", type=PATH, metavar="FILE",
        help="Fit the forecast to what was measured on a device (docs/latency.md).",
    ),
    click.option("--fused", is_flag=True, help="Forecast the adapter as fused into its base."),
    click.option("--lint", is_flag=True, help="Of a package: what keeps it off the Neural Engine."),
    click.option("--max-ms-per-prompt-token", metavar="MS", help="Gate: most milliseconds."),
    click.option("--min-tokens-per-second", metavar="N", help="Gate: fewest generated."),
    click.option("--max-size", metavar="SIZE", help="Of the target's files, such as 60MB."),
    click.option("--max-memory", metavar="SIZE", help="Of the process, or of the forecast."),
    click.option(
        "--regress-from", type=PATH, metavar="FILE", help="An earlier --json of this: no worse."
    ),
    click.option("--tolerance", metavar="PERCENT", help="How much worse it may be [5%]."),
    json_option,
)  # fmt: skip


def _options(command: Any) -> Any:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command("bench")
@click.argument("target", type=PATH)
@_options
@click.pass_context
def command(ctx: click.Context, /, target: Path, **given: Any) -> None:
    """Measure TARGET (an adapter, a base, on a Mac a package), or forecast it with --device.

    A gate that does not hold ends with exit code 3.
    """
    from loraduct.validation import gates

    _check_options(ctx, given)
    kind = "forecast" if given["device_names"] else "targets"
    # contradictions come before anything is loaded
    limits = gates.limits_of(given, runs=bool(given["device_names"]) or not given["lint"])
    before = (
        gates.earlier(given["regress_from"], SCHEMA, kind)[kind] if given["regress_from"] else None
    )
    _check_targets(target, given, limits)
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {"schema": SCHEMA, "command": "bench", "target": str(target)}
    document["against"] = str(given["against"]) if given["against"] else None
    lint = _lint(target, as_json=given["as_json"]) if given["lint"] else None
    if given["device_names"]:
        rows = _forecast(target, given, document)
    elif lint is None:
        rows = _measure(target, given, document)
    if lint is not None:
        document["lint"] = lint
    size = gates.bytes_of(target)
    document["size_bytes"] = size
    checks = gates.judge(limits, rows, size)
    if before is not None:
        checks += gates.regressions(before, rows, limits.get("tolerance"))
    document["checks"] = [c.as_json() for c in checks]
    document["passed"] = all(c.status != "failed" for c in checks)
    if given["as_json"]:
        print_json(document)
    else:
        for check in checks:
            click.echo(check.line())
    if not document["passed"]:
        ctx.exit(3)


def _check_options(ctx: click.Context, given: dict[str, Any]) -> None:
    """Raises UsageError for an option that would change nothing of what is asked for."""
    default = click.core.ParameterSource.DEFAULT
    said = {name for name in given if ctx.get_parameter_source(name) is not default}
    forecast, lint = "device_names" in said, "lint" in said
    needs = {
        "calibrate": "it changes a forecast",
        "devices": "it adds devices to forecast for",
        "fused": "to measure, fuse the adapter and bench the result",
    }
    for name, why in needs.items():
        if name in said and not forecast:
            raise click.UsageError(f"--{name} needs --device: {why}")
    if lint and "against" in said:
        raise click.UsageError("--lint looks at one package")
    idle = ["runtime", "dtype", "units", "rounds"] if forecast or lint else []
    idle += ["contexts", "generate", "base"] if lint and not forecast else []
    for name in idle:
        if name in said:
            flag = f"--{name.removesuffix('s') if name == 'contexts' else name}"
            why = "--device forecasts, and runs nothing" if forecast else "--lint runs nothing"
            raise click.UsageError(f"{flag} changes nothing here: {why}")


def _check_targets(target: Path, given: dict[str, Any], limits: dict[str, float]) -> None:
    """Raises Refused for an option or a gate that has nothing to do with what the targets are."""
    from loraduct.errors import Refused
    from loraduct.formats import base as base_folder
    from loraduct.validation import latency_targets as kinds

    alone = [n for n in ("base", "fused") if given[n]]
    if alone and not any(kinds.is_adapter(p) for p in _paths(target, given)):
        raise Refused(target, f"is no adapter: --{alone[0]} changes nothing of it, leave it out")
    base = kinds.package_at(target) is None and not kinds.is_adapter(target)
    if "max_size" in limits and base and not base_folder.read(target).has_weights:
        raise Refused(target, "holds no weights (model*.safetensors), so --max-size says nothing")


def _lint(target: Path, *, as_json: bool) -> list[dict[str, Any]]:
    from loraduct.formats.coreml.package import read
    from loraduct.validation.ane_lint import lint
    from loraduct.validation.latency_targets import package_at
    from loraduct.validation.workload import functions_of

    path, name = package_at(target) or (target, None)
    package = read(path)
    checks = lint(package, functions_of(package, name) if name is not None else None)
    if not as_json:
        for check in checks:
            click.echo(check.line())
    return [c.as_json() for c in checks]


def _measure(target: Path, given: dict[str, Any], document: dict[str, Any]) -> list[dict[str, Any]]:
    """Run it; fills the document and prints, unless it is to be JSON."""
    from loraduct.errors import Refused
    from loraduct.validation import latency
    from loraduct.validation.gates import SIDES
    from loraduct.validation.latency_targets import target_of

    def one(path: Path) -> latency.Target:
        return target_of(path, given["base"], given["runtime"], given["dtype"], given["units"])

    targets = [one(path) for path in _paths(target, given)]
    if given["runtime"] is None and {t.runtime for t in targets} == {"torch", "mlx"}:
        # a base runs in either: in that of the adapter that it is compared with
        targets = [
            target_of(t.base, None, "mlx", given["dtype"])
            if t.runtime == "torch" and t.adapter is None
            else t
            for t in targets
        ]
    used = {t.runtime for t in targets}
    if given["units"] != "ALL" and "coreml" not in used:
        raise Refused(None, f"--units is for Core ML; this runs in {' and '.join(sorted(used))}")
    if given["dtype"] and used == {"coreml"}:
        raise Refused(None, "--dtype: Core ML computes as the package says; leave it out")
    said = _progress(given["as_json"])
    done, ratios = latency.measure(
        targets, given["contexts"], given["generate"], given["rounds"], said
    )
    # one row a context: TARGET's, then OTHER's
    rows = [{"side": SIDES[i // len(given["contexts"])], **m.as_json()} for i, m in enumerate(done)]
    document["machine"] = latency.machine()
    document["targets"], document["ratios"] = rows, [r.as_json() for r in ratios]
    if not given["as_json"]:
        _print_measured(document["machine"], done, ratios)
    return rows


def _paths(target: Path, given: dict[str, Any]) -> list[Path]:
    """The target, and what it is held against."""
    return [target, given["against"]] if given["against"] else [target]


def _progress(silent: bool) -> Any:
    def say(what: str) -> None:
        from loraduct.text import printable

        if not silent:
            click.echo(f"  {printable(what, 200)}", err=True)

    return say


def _print_measured(
    machine: dict[str, Any], done: Sequence[Measured], ratios: Sequence[Ratio]
) -> None:
    from loraduct.text import printable, size, table

    click.echo(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, load {machine['load']}"
    )
    rows = [["target", "runs in", "context", "first token", "ms/prompt token", "tokens/s", "load", "swap",
             "peak"]]  # fmt: skip
    for m in done:
        low, high = m.spread["tokens_per_second"]
        rows.append(
            [printable(m.name, 60), f"{m.runtime} {m.facts.get('dtype', '')}".strip(), str(m.context),
             f"{m.ttft_ms:.1f} ms", f"{m.ms_per_prompt_token:.3f}",
             f"{m.tokens_per_second:.1f} ({low:.1f} to {high:.1f})", f"{m.load_s:.2f} s",
             f"{m.swap_ms:.1f} ms" if m.swap_ms is not None else "-", size(m.peak_bytes)]
        )  # fmt: skip
    for line in table(rows):
        click.echo(line)
    for m in done:
        _print_placement(m)
    for r in ratios:
        click.echo(
            f"  {r.what} at {r.context}: the second takes {r.median:.3f} times the first's time"
            f" ({r.low:.3f} to {r.high:.3f} in {done[0].rounds} rounds)"
        )


def _print_placement(m: Measured) -> None:
    placed = m.facts.get("placement")
    if placed:
        shown = ", ".join(f"{unit} {count}" for unit, count in placed["operations"].items())
        click.echo(f"  operations by unit: {shown}; compiled in {m.facts['compile_s']:.2f} s")


# -- the forecast ----------------------------------------------------------------------------------


def _forecast(
    target: Path, given: dict[str, Any], document: dict[str, Any]
) -> list[dict[str, Any]]:
    from loraduct.validation import devices, forecast
    from loraduct.validation.gates import SIDES
    from loraduct.validation.latency import check_context

    known = devices.built_in() | (devices.own(given["devices"]) if given["devices"] else {})
    chosen = {d.name: d for name in given["device_names"] for d in devices.find(name, known)}
    paths = _paths(target, given)
    loads = [_load(p, given["base"], given["fused"]) for p in paths]
    own: dict[tuple[str, str], Engine] = {}
    if given["calibrate"]:
        engines = [e.name for e in forecast.engines_for(loads[0][1])]
        own = _calibrated(given["calibrate"], loads[0][0], known, list(chosen), engines)
    rows: list[tuple[str, Forecast]] = []
    for side, (load, packaged) in zip(SIDES, loads, strict=False):
        check_context(load.name, load.context, given["contexts"], given["generate"])
        for context in given["contexts"]:
            for device in chosen.values():
                for engine in forecast.engines_for(packaged):
                    used = own.get((device.name, engine.name), engine)
                    rows.append((side, forecast.forecast(load, device, used, context)))
    document["forecast"] = [{"side": side, **r.as_json()} for side, r in rows]
    document["loads"] = [load.as_json() for load, _ in loads]
    document["devices"] = {d.name: dict(d.sources) for d in chosen.values()}
    if not given["as_json"]:
        names = [load.name for load, _ in loads]
        if len(set(names)) < len(names):  # two folders of one name
            names = [str(p) for p in paths]
        shown = dict(zip(SIDES, names, strict=False))
        _print_loads(names, [load for load, _ in loads])
        _print_forecast([(shown[side], r) for side, r in rows], list(chosen.values()))
    return document["forecast"]  # type: ignore[no-any-return]


def _calibrated(
    file: Path, load: Workload, known: dict[str, Device], names: list[str], engines: list[str]
) -> dict[tuple[str, str], Engine]:
    """(device, engine) -> the engine fitted to a file. Raises Refused where no row of TARGET uses it."""
    from loraduct.errors import Refused
    from loraduct.text import several
    from loraduct.validation import forecast

    name, points = forecast.measured(file, load, known)
    device = points[0].device.name
    if device not in names or name not in engines:
        what = f"was measured on {device} with {name}; TARGET is forecast for"
        what += f" {several(names)} with {' and '.join(engines)}: nothing of it would be used"
        raise Refused(file, what)
    source = f"fitted to {file.name}, {len(points)} points"
    try:
        return {(device, name): forecast.refit(forecast.ENGINES[name], points, source)}
    except Refused as e:
        raise Refused(file, str(e)) from None


def _load(path: Path, base: Path | None, fused: bool) -> tuple[Workload, bool]:
    """What a target costs, and whether it is a package."""
    from loraduct.formats import base as base_folder
    from loraduct.validation import latency_targets, workload

    if package := latency_targets.package_at(path):
        return workload.of_package(*workload.read_package(*package)), True
    if path.name == "config.json" or latency_targets.is_base(path):
        return workload.of_base(base_folder.read(path)), False
    adapter, model = latency_targets.adapter_at(path, base)
    return workload.with_adapter(workload.of_base(model), adapter, model, fused=fused), False


def _print_loads(names: Sequence[str], loads: Sequence[Workload]) -> None:
    from loraduct.text import printable, size

    for name, load in zip(names, loads, strict=True):
        extra = (
            f", an adapter's {size(load.adapter_bytes)} in {load.adapter_ops} operations"
            if load.adapter_ops
            else ""
        )
        click.echo(
            f"{printable(name, 120)}: a token reads {size(load.weight_bytes)} of weights"
            f" ({load.macs / 1e6:.0f} M products) in {load.layers} blocks{extra}"
        )


def _print_forecast(rows: Sequence[tuple[str, Forecast]], chosen: Sequence[Device]) -> None:
    """``rows``: with what the target is called."""
    from loraduct.text import printable, size, table

    lines = [["target", "device", "engine", "context", "ms/prompt token", "tokens/s", "memory"]]
    for name, r in rows:
        over = " (too much)" if r.fits is False else ""
        lines.append(
            [printable(name, 50), printable(r.device, 40), r.engine, str(r.context),
             f"{r.ms_per_prompt_token:.3g} ({r.prompt_low:.3g} to {r.prompt_high:.3g})",
             f"{r.tokens_per_second:.1f} ({r.low:.1f} to {r.high:.1f})", f"{size(r.memory_bytes)}{over}"]
        )  # fmt: skip
    for line in table(lines):
        click.echo(line)
    for source in dict.fromkeys(f"{r.engine}: {r.source}" for _, r in rows):
        click.echo(f"  {printable(source, 400)}")
    guessed = {d.name: d.assumed for d in chosen if d.assumed}
    if guessed:
        shown = "; ".join(f"{n}: {', '.join(a)}" for n, a in list(guessed.items())[:4])
        more = f"; and {len(guessed) - 4} more (--json tells all)" if len(guessed) > 4 else ""
        click.echo(f"  assumed, without a source: {printable(shown, 400)}{more}")
