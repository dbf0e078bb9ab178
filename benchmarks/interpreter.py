"""The Core ML reference interpreter against torch: SmolLM2-135M, 64 tokens, one thread each.

One thread, because a BLAS that spins while it waits for a busy core says more about the machine's
other work than about either competitor. Cold is the time from the start of the process, imports
and weights included; warm is a further run of the same process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from measure import (
    Run,
    Sample,
    Table,
    Target,
    best,
    interleaved,
    largest,
    median,
    run_child,
    script,
    show,
)

REPO = Path(__file__).resolve().parent.parent
BASE = REPO / ".cache" / "smollm2-135m-instruct"
PACKAGE = REPO / ".cache" / "bench" / "smollm2-64.mlpackage"
TOKENS, WARM, ROUNDS = 64, 5, 3
OURS, THEIRS = "loraduct interpreter", "torch eager, float32"
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def ours() -> None:
    """A child: every precision, the default cold, then warm."""
    from loraduct.formats.coreml import package
    from loraduct.validation import coreml, mil

    session = coreml.session(package.read(PACKAGE))
    _report("", session.feed)
    for precision in (mil.STRICT, mil.FULL):
        session.precision = precision
        _report(f"{precision} ", session.feed)


def theirs() -> None:
    """A child: transformers' model of the same base."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()

    def forward(ids: list[int]) -> None:
        with torch.no_grad():
            model(torch.tensor([ids]), use_cache=False)

    _report("", forward)


def _report(label: str, forward: object) -> None:
    """Print when the first run was done and the best of further ones."""
    assert callable(forward)
    ids = list(range(100, 100 + TOKENS))
    times = []
    for _ in range(WARM + 1):
        begin = time.perf_counter()
        forward(ids)
        times.append(time.perf_counter() - begin)
        if len(times) == 1:
            print(f"{label}first={time.time()}", flush=True)
    print(f"{label}warm={min(times[1:])}", flush=True)


def child(name: str) -> Run:
    """A run of one competitor: its wall time to the first result, and its best warm run."""

    def run() -> Sample:
        begin = time.time()
        sample, text = run_child([sys.executable, __file__, name])
        found = dict(line.rsplit("=", 1) for line in text.splitlines() if "=" in line)
        cold = float(found["first"]) - begin
        warm = {k: float(v) for k, v in found.items() if k.endswith("warm")}
        return {"cold": cold, "rss": sample["rss"], **warm}

    return run


def prepare() -> bool:
    """Whether there is a base; then its package too: no cache, 64 tokens a call."""
    if not BASE.exists():
        return False
    if not PACKAGE.exists():
        PACKAGE.parent.mkdir(parents=True, exist_ok=True)
        options = ["--stateless", "--shapes", str(TOKENS), "--context", "512"]
        command = [script("loraduct"), "package", "--base", BASE, *options, "-o", PACKAGE]
        subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
    return True


def measure_all() -> tuple[list[Table], list[Target]]:
    """The table and the targets; nothing where there is no base (`make demo` makes one)."""
    if not prepare():
        print(f"skipped: the interpreter needs {BASE} (run `make demo`)", file=sys.stderr)
        return [], []
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"), HF_HUB_OFFLINE="1")
    samples = interleaved({n: child(n) for n in (OURS, THEIRS)}, ROUNDS)
    mine, torch = samples[OURS], samples[THEIRS]
    base = best(torch, "warm")
    rows = [
        [OURS, *_row(mine, "warm", base), f"{largest(mine, 'rss'):.0f}"],
        *(
            [f"{OURS}, {p}", "", *_row(mine, f"{p} warm", base)[1:], ""]
            for p in ("fp16-strict", "fp32")
        ),
        [THEIRS, *_row(torch, "warm", base), f"{largest(torch, 'rss'):.0f}"],
    ]
    title = f"Core ML interpreter, SmolLM2-135M, {TOKENS} tokens, one thread, {ROUNDS} runs each"
    header = ["", "cold s", "warm s", "median s", "warm / torch", "peak MB"]
    targets: list[Target] = [
        ("interpreter: cold s", best(mine, "cold"), "<=", 4.0),
        ("interpreter: warm / torch", best(mine, "warm") / base, "<=", 8.0),
    ]
    return [(title, header, rows)], targets


def _row(samples: list[Sample], key: str, base: float) -> list[str]:
    warm = best(samples, key)
    return [
        f"{best(samples, 'cold'):.2f}",
        f"{warm:.3f}",
        f"{median(samples, key):.3f}",
        f"{warm / base:.2f}",
    ]


def main() -> None:
    """`python interpreter.py`."""
    if sys.argv[1:]:
        {OURS: ours, THEIRS: theirs}[sys.argv[1]]()
        return
    show(*measure_all())


if __name__ == "__main__":
    main()
