"""How fast targets run on this machine, each in a process of its own, in turns.

A B A B ...: what disturbs the machine for a while disturbs both alike, so the ratio of two targets
is taken round by round. The first round of each is thrown away. A median stands with the lowest and
highest round beside it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loraduct.errors import MissingExtra, Refused
from loraduct.text import printable
from loraduct.validation.runtimes import RuntimeFailed

if TYPE_CHECKING:
    from loraduct.validation.suites import Context, Suite

CHILD = "loraduct.validation.latency_child"
ROUNDS = 5


@dataclass(frozen=True)
class Target:
    """What is measured. ``base``: a base folder, or a package; ``adapter``: its folder, or the name
    of a package's function.
    """

    name: str
    runtime: str  # torch, mlx, coreml
    base: Path
    adapter: str | None = None
    dtype: str = "stored"
    units: str = "ALL"
    vocabulary: int = 0
    most: int | None = None  # tokens it was made for


@dataclass(frozen=True)
class Measured:
    """One target at one context; times in milliseconds. ``spread``: field -> (lowest, highest)."""

    name: str
    runtime: str
    context: int
    generate: int
    ttft_ms: float
    ms_per_prompt_token: float
    tokens_per_second: float
    load_s: float
    swap_ms: float | None
    peak_bytes: int
    rounds: int
    spread: dict[str, tuple[float, float]]
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        own = {k: v for k, v in self.__dict__.items() if k not in ("spread", "facts")}
        return {**own, "spread": {k: list(v) for k, v in self.spread.items()}, **self.facts}


@dataclass(frozen=True)
class Ratio:
    """The second target's time over the first's, round by round: median, lowest, highest."""

    context: int
    what: str
    median: float
    low: float
    high: float

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return dict(self.__dict__)


class Child:
    """A process that runs one target."""

    def __init__(self, target: Target, contexts: Sequence[int], generate: int) -> None:
        self.target = target
        job = {
            "runtime": target.runtime,
            "base": str(target.base),
            "adapter": target.adapter,
            "dtype": target.dtype,
            "units": target.units,
            "vocabulary": target.vocabulary,
            "contexts": list(contexts),
            "generate": generate,
        }
        self.log: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_WAIT_POLICY": "PASSIVE",  # the one that waits must not spin beside the other
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", CHILD, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise
        self.load_s = float(self.facts.pop("load_s"))

    def ask(self, what: str) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are the answer
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        who = f"{self.target.runtime} did not run {printable(self.target.name, 200)}"
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            rows = self.log.read().decode(errors="replace").strip().splitlines()
            last = f": {printable(rows[-1], 300)}" if rows else ""
            raise RuntimeFailed(f"{who}: its process ended with exit code {code}{last}")
        found: dict[str, Any] = json.loads(line)
        if "missing" in found:
            what = f"measuring with {self.target.runtime} ({found['missing']})"
            raise MissingExtra(self.target.runtime, what)
        if "error" in found:
            raise RuntimeFailed(f"{who}: {printable(found['error'], 600)}")
        return found

    def close(self) -> None:
        """End it, however it stands."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()


def measure(
    targets: Sequence[Target],
    contexts: Sequence[int],
    generate: int,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Measured], list[Ratio]]:
    """One or two targets, in turns. Raises Refused for a context that a target can't hold,
    RuntimeFailed, MissingExtra.
    """
    for target in targets:
        check_context(target.name, target.most, contexts, generate)
    children: list[Child] = []
    try:
        for target in targets:
            progress(f"loading {target.name}")
            children.append(Child(target, contexts, generate))
        for child in children:
            progress(f"warming up {child.target.name}")
            child.ask("round")
        rows: list[list[dict[str, Any]]] = [[] for _ in children]
        for i in range(rounds):
            progress(f"round {i + 1} of {rounds}")
            for child, kept in zip(children, rows, strict=True):
                kept.append(child.ask("round"))
        peaks = [int(child.ask("end")["peak_bytes"]) for child in children]
    finally:
        for child in children:
            child.close()
    done = [
        _measured(child, kept, peak, i, context, generate)
        for child, kept, peak in zip(children, rows, peaks, strict=True)
        for i, context in enumerate(contexts)
    ]
    return done, _ratios(rows, contexts) if len(children) == 2 else []


def check_context(name: str, most: int | None, contexts: Sequence[int], generate: int) -> None:
    """Raises Refused where a prompt and what follows it exceed what the model was made for."""
    longest = max(contexts) + generate
    if most is not None and longest > most:
        what = f"a context of {max(contexts)} and {generate} tokens more are {longest}"
        raise Refused(None, f"{what}; {printable(name, 200)} was made for {most}")


def _measured(
    child: Child, rows: Sequence[dict[str, Any]], peak: int, i: int, context: int, generate: int
) -> Measured:
    ttft = [r["contexts"][i]["ttft_ms"] for r in rows]
    token = [statistics.median(r["contexts"][i]["token_ms"]) for r in rows]
    swaps = [r["swap_ms"] for r in rows if r["swap_ms"] is not None]
    spread = {
        "ttft_ms": (min(ttft), max(ttft)),
        "ms_per_prompt_token": (min(ttft) / context, max(ttft) / context),
        "tokens_per_second": (1e3 / max(token), 1e3 / min(token)),
    }
    if swaps:
        spread["swap_ms"] = (min(swaps), max(swaps))
    return Measured(
        child.target.name,
        child.target.runtime,
        context,
        generate,
        statistics.median(ttft),
        statistics.median(ttft) / context,
        1e3 / statistics.median(token),
        child.load_s,
        statistics.median(swaps) if swaps else None,
        peak,
        len(rows),
        spread,
        child.facts,
    )


def _ratios(rows: Sequence[Sequence[dict[str, Any]]], contexts: Sequence[int]) -> list[Ratio]:
    found = []
    for i, context in enumerate(contexts):
        for what, key in (("prompt", "ttft_ms"), ("decode", "token_ms")):
            one, two = ([_middle(r["contexts"][i][key]) for r in side] for side in rows)
            pairs = [b / a for a, b in zip(one, two, strict=True)]
            found.append(Ratio(context, what, statistics.median(pairs), min(pairs), max(pairs)))
    return found


def _middle(value: float | list[float]) -> float:
    return statistics.median(value) if isinstance(value, list) else value


def machine() -> dict[str, Any]:
    """What a measurement depends on; no host name."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return printable(line.partition(":")[2].strip(), 120)
    except OSError:
        pass
    if sys.platform == "darwin":
        done = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        )
        return printable(done.stdout.strip(), 120)
    return platform.processor() or "unknown"


# -- the suite of ``loraduct validate`` -------------------------------------------------------------

CONTEXT, GENERATE, SUITE_ROUNDS = 128, 16, 2
SLOW_CONTEXT, SLOW_GENERATE = 16, 4  # where MLX has only its CPU backend, a second for ten tokens


def run(context: Context) -> Suite:
    """What ships, and its source, measured here where that is possible, and forecast for all devices.

    Raises MissingExtra without the runtime.
    """
    from loraduct.validation import latency_targets, suites
    from loraduct.validation.checks import Check

    targets, checks = [], []
    ships = False  # whether the last target is what ships
    for label, adapter in zip("AB", context.adapters, strict=False):
        try:
            targets.append(latency_targets.of_adapter(adapter, context.base, str(adapter.path)))
            ships = True
        except Refused as e:
            checks.append(Check("latency", "skipped", str(e), None, label))
            ships = False
    slow = platform.system() != "Darwin" and any(t.runtime == "mlx" for t in targets)
    tokens = int(context.options.get("context") or (SLOW_CONTEXT if slow else CONTEXT))
    generate = int(context.options.get("generate") or (SLOW_GENERATE if slow else GENERATE))
    # a model for less is measured with less
    most = min((t.most for t in targets if t.most), default=tokens + generate)
    generate = max(1, min(generate, most // 4))
    tokens = max(1, min(tokens, most - generate))
    done: list[Measured] = []
    ratios: list[Ratio] = []
    if targets:
        try:
            progress = context.runs.progress
            done, ratios = measure(targets, [tokens], generate, SUITE_ROUNDS, progress)
        except RuntimeFailed as e:
            checks.append(Check("latency", "failed", str(e)))
    for m in done:
        what = f"{m.runtime}: {m.ms_per_prompt_token:.3g} ms per prompt token, {m.tokens_per_second:.3g}"
        checks.append(Check("latency", "passed", f"{m.name} in {what} tokens per second"))
    numbers: dict[str, Any] = {
        "targets": [m.as_json() for m in done],
        "ratios": [r.as_json() for r in ratios],
        "forecast": _forecasts(context, tokens),
        "machine": machine(),
    }
    if done and ships:
        numbers |= _ships(done[-1])
    return suites.suite("latency", checks, numbers)


def _ships(m: Measured) -> dict[str, Any]:
    """The numbers that gates hold for."""
    return {
        "ms_per_prompt_token": m.ms_per_prompt_token,
        "tokens_per_second": m.tokens_per_second,
        "first_token_ms": m.ttft_ms,
        "load_seconds": m.load_s,
        "peak_memory_bytes": m.peak_bytes,
    }


def _forecasts(context: Context, tokens: int) -> list[dict[str, Any]]:
    """Of what ships, for every device; none where its files don't tell what it costs."""
    from loraduct.formats.coreml.package import is_package
    from loraduct.validation import devices, forecast, workload

    adapter = context.adapters[-1]
    packaged = is_package(adapter.path)
    try:
        if packaged:
            load = workload.of_package(*workload.read_package(adapter.path, adapter.name))
        else:
            load = workload.with_adapter(workload.of_base(context.base), adapter, context.base)
        return [
            forecast.forecast(load, device, engine, tokens).as_json()
            for device in devices.built_in().values()
            for engine in forecast.engines_for(packaged)
        ]
    except Refused:
        return []
