"""Lookup tables against coremltools': errors, processes, memory; on SmolLM2's weights.

    python benchmarks/palettize.py [--all] [--bits 4 ...] [--large]

Errors are compared with coremltools' own function (``_get_kmeans_lookup_table_and_weight``), in one
child. For float16 tensors of 10,000 values and more it is exact; for smaller groups it needs
scikit-learn (1.5.1 at most), and without that its exact solver is asked for instead, which coremltools
itself does not use there. Processes are whole ones, start-up included, on one package: ``loraduct
compress`` with a thread per core, ``palettize_weights`` with its one worker (its default),
scikit-learn's threads as they come; it is stopped, its time a lower bound, at twice the target. ``--large``
compresses a random base of 1.0e9 weights (2 GB) and measures memory alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    warm_page_cache,
)
from synthetic import CACHE

MODEL = Path(__file__).resolve().parent.parent / ".cache/smollm2-135m-instruct"
WORK = CACHE / "palettize"
SOURCE, OURS, THEIRS = (WORK / f"{n}.mlpackage" for n in ("source", "ours", "theirs"))
BLOBS = Path("Data") / "com.apple.CoreML" / "weights" / "weight.bin"
ROUNDS = 3
GROUP = 16
BITS = (2, 3, 4, 6, 8)
LIMITS = {0: {2: 1.00001, 3: 1.00001, 4: 1.00001}, GROUP: {2: 1.0005, 3: 1.0005, 4: 1.0005}}
WIDE_LIMITS = {0: 1.001, GROUP: 1.01}  # 6 and 8 bits
FASTER = {0: 20.0, GROUP: 15.0}  # whole processes, 4 bits
ENOUGH = 2.0  # times its target, and the peer is stopped
MEMORY, LARGE_MEMORY = 500.0, 1000.0  # MB
PEER = importlib.util.find_spec("coremltools") is not None
LEARN = PEER and importlib.util.find_spec("sklearn") is not None
MODES = {  # what users ask for -> whether coremltools' process is run beside it, and its group
    "--palettize 4": 0,
    f"--palettize 4 --group-size {GROUP}": GROUP,
    "--palettize 4 --per-channel-scale": None,
    "--palettize 8": None,
    "--bits-per-weight 3.7": None,
    "--quantize int8": None,
    "--quantize int4 --group-size 32": None,
}
LARGE_CONFIG = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 21, "num_attention_heads": 32, "num_key_value_heads": 4,
    "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
PEER_SCRIPT = """
import sys
import coremltools as ct
import coremltools.optimize.coreml as cto
source, target, group = sys.argv[1:]
fine = {"granularity": "per_grouped_channel", "group_size": int(group)} if int(group) else {}
how = cto.OpPalettizerConfig(mode="kmeans", nbits=4, **fine)
model = ct.models.MLModel(source, skip_model_load=True)
cto.palettize_weights(model, cto.OptimizationConfig(global_config=how)).save(target)
"""


# --- in children: numpy and coremltools are loaded there ---


def weights(path: Path) -> dict[str, Any]:
    """The model's matrices, mapped from the file, largest first."""
    import numpy as np

    from loraduct.formats import safetensors_file

    found = {
        name: np.memmap(path, np.float16, "r", tensor.offset, tensor.shape)
        for name, tensor in safetensors_file.read_header(path)[0].items()
        if len(tensor.shape) == 2
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].size))


def theirs(w: Any, bits: int, group: int) -> Any:
    """coremltools' tables and indices, read back."""
    import numpy as np
    from coremltools.models.neural_network import quantization_utils as ct

    out = np.empty_like(w)
    for at in range(0, len(w), group or len(w)):
        part = np.asarray(w[at : at + (group or len(w))])
        exact = not LEARN and part.size < 10_000
        lut, chosen = ct._get_kmeans_lookup_table_and_weight(bits, part, exact)
        out[at : at + len(part)] = lut.astype(np.float16)[chosen].reshape(part.shape)
    return out


def ours(w: Any, bits: int, group: int) -> Any:
    """Our palette, its indices packed."""
    from loraduct.converters.palette import Options
    from loraduct.converters.palettize import palettize
    from loraduct.packing import packed

    found = palettize(w, Options(bits, group=group))
    packed(found.indices, bits)
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds)."""
    begin = time.perf_counter()
    return work(), time.perf_counter() - begin


def squared(w: Any, dense: Any) -> float:
    """The sum of squared errors."""
    import numpy as np

    gap = w.astype(np.float64) - dense
    return float(np.einsum("ij,ij->", gap, gap))


def compared(bits: tuple[int, ...], group: int, every: bool) -> Iterator[dict[str, float]]:
    """Per width: worst and mean ratio of errors, and of seconds on one thread."""
    from loraduct.converters.palette import expand

    layers = [f".{n}." for n in ((0, 15, 29) if not every else range(30))]
    found = weights(MODEL / "model.safetensors")
    some = [w for n, w in found.items() if every or any(layer in n for layer in layers)]
    for width in bits:
        ratios, seconds = [], [0.0, 0.0]
        for w in some:
            mine, quick = timed(lambda w=w, width=width: ours(w, width, group))
            other, slow = timed(lambda w=w, width=width: theirs(w, width, group))
            ratios.append(squared(w, expand(mine)) / squared(w, other))
            seconds = [seconds[0] + slow, seconds[1] + quick]
        yield {
            "bits": width, "group": group, "worst": max(ratios), "count": len(some),
            "mean": sum(ratios) / len(ratios), "faster": seconds[0] / seconds[1],
        }  # fmt: skip


def prepare() -> None:
    """A package of SmolLM2 with one function, which is all that ``palettize_weights`` takes."""
    from loraduct.formats.coreml.package import read

    loraduct("package", "--base", MODEL, "-o", SOURCE, "--force")
    package = read(SOURCE)
    said, program = package.model.description, package.model.mlProgram
    (one,) = said.functions
    for key in ("input", "output", "state"):
        getattr(said, key).extend(getattr(one, key))
    program.functions["main"].CopyFrom(program.functions[one.name])
    del program.functions[one.name]
    del said.functions[:]
    said.defaultFunctionName = ""
    said.metadata.userDefined.clear()
    package.spec_path.write_bytes(package.model.SerializeToString())


def prepare_large() -> None:
    """A package of a random base, written tensor by tensor."""
    import package

    names = {k: LARGE_CONFIG[k] for k in ("hidden_size", "intermediate_size", "vocab_size")}
    hidden, inner, package.VOCABULARY = names.values()
    package.HIDDEN = hidden
    kv = hidden * LARGE_CONFIG["num_key_value_heads"] // LARGE_CONFIG["num_attention_heads"]
    package.MODULES = {
        **{f"self_attn.{n}_proj": (hidden, hidden) for n in "qo"},
        **{f"self_attn.{n}_proj": (kv, hidden) for n in "kv"},
        **{f"mlp.{n}_proj": (inner, hidden) for n in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    package.CONFIG = LARGE_CONFIG
    package.write_base(WORK / "large", LARGE_CONFIG["num_hidden_layers"])
    loraduct("package", "--base", WORK / "large", "-o", WORK / "large.mlpackage", "--force")
    shutil.rmtree(WORK / "large")


# --- whole processes ---


def loraduct(*words: object) -> Sample:
    """The command as a user runs it."""
    return run_child([script("loraduct"), *map(str, words)])[0]


def compress(options: str) -> Sample:
    """`loraduct compress` of the package."""
    return loraduct("compress", SOURCE, "-o", OURS, "--force", *options.split())


def palettize_weights(group: int, limit: float) -> Sample:
    """coremltools' process, once, stopped after ``limit`` seconds: it takes a minute, or an hour."""
    shutil.rmtree(THEIRS, ignore_errors=True)
    words = [str(SOURCE), str(THEIRS), str(group)]
    return run_child([sys.executable, "-c", PEER_SCRIPT, *words], limit)[0]


def _peer(sample: Sample) -> tuple[str, str]:
    """Seconds and MB, as lower bounds where it was stopped."""
    more = "> " if "stopped" in sample else ""
    return f"{more}{sample['wall']:.1f}", f"{more}{sample['rss']:.0f}"


def processes() -> tuple[Table, list[Target]]:
    """Every mode; and coremltools beside those that it has."""
    warm_page_cache(SOURCE / BLOBS)
    runs: dict[str, Run] = {mode: lambda mode=mode: compress(mode) for mode in MODES}
    samples = interleaved(runs, ROUNDS)
    rows, targets = [], []
    for mode, group in MODES.items():
        mine = samples[mode]
        slow = None
        if group is not None and PEER and (LEARN or not group):
            slow = palettize_weights(group, ENOUGH * FASTER[group] * best(mine, "wall"))
            ratio = slow["wall"] / best(mine, "wall")
            targets.append((f"palettize_weights / compress {mode}", ratio, ">=", FASTER[group]))
        rows.append(
            [
                mode,
                f"{best(mine, 'wall'):.2f}",
                f"{median(mine, 'wall'):.2f}",
                f"{best(mine, 'cpu'):.2f}",
                f"{largest(mine, 'rss'):.0f}",
                *(_peer(slow) if slow else ("-", "-")),
            ]
        )
        targets.append((f"compress {mode}, MB", largest(mine, "rss"), "<=", MEMORY))
    size = (SOURCE / BLOBS).stat().st_size / 1e6
    title = (
        f"`loraduct compress` of SmolLM2's package ({size:.0f} MB), {min(4, os.cpu_count() or 1)}"
        f" threads, {ROUNDS} runs; palettize_weights with one worker, once"
    )
    header = ["", "best s", "median s", "CPU s", "peak MB", "coremltools s", "coremltools MB"]
    return (title, header, rows), targets


def large() -> tuple[Table, list[Target]]:
    """Memory for a base of 1e9 weights."""
    run_child([sys.executable, __file__, "prepare-large"])
    source, target = WORK / "large.mlpackage", WORK / "large-4bit.mlpackage"
    try:
        size = (source / BLOBS).stat().st_size / 1e9
        sample = loraduct("compress", source, "-o", target, "--palettize", "4", "--force")
    finally:
        for path in (source, target, WORK / "large.tokenizer"):
            shutil.rmtree(path, ignore_errors=True)
    row = ["--palettize 4", *(f"{sample[key]:.0f}" for key in ("wall", "cpu", "rss"))]
    title = f"`loraduct compress` of a random base's package, {size:.2f} GB of weights"
    target_row: Target = ("compress of 1e9 weights, MB", sample["rss"], "<=", LARGE_MEMORY)
    return (title, ["", "s", "CPU s", "peak MB"], [row]), [target_row]


def errors(bits: tuple[int, ...], every: bool) -> tuple[Table, list[Target]]:
    """Squared errors against coremltools'."""
    words = ["compare", *map(str, bits), *(["--all"] if every else [])]
    _, text = run_child([sys.executable, __file__, *words])
    rows, targets, count = [], [], 0
    for row in json.loads(text.strip().splitlines()[-1]):
        group, width, count = row["group"], row["bits"], row["count"]
        label = f"groups of {group}" if group else "per tensor"
        limit = LIMITS[group].get(width, WIDE_LIMITS[group])
        if LEARN or not group:  # else what is compared with is not what coremltools gives
            name = f"error, {width} bits, {label}, worst tensor"
            targets.append((name, row["worst"], "<=", limit))
        cells = [f"{row['worst']:.6f}", f"{row['mean']:.6f}", f"{row['faster']:.1f}x"]
        rows.append([label, str(width), *cells])
    header = ["tables", "bits", "error, worst", "error, mean", "faster, one thread"]
    peer = "coremltools" if LEARN else "coremltools, all of it exact (no scikit-learn here)"
    return (f"k-means tables against {peer}, {count} matrices", header, rows), targets


def measure_all(
    bits: tuple[int, ...] = BITS, every: bool = False, big: bool = False
) -> tuple[list[Table], list[Target]]:
    """Tables and targets. Needs SmolLM2 (`make demo`)."""
    if not (MODEL / "config.json").exists():
        raise SystemExit(f"{MODEL} is missing: make demo sets it up")
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(WORK)
    parts = []
    try:
        run_child([sys.executable, __file__, "prepare"])
        parts.append(processes())
        if PEER:
            parts.append(errors(bits, every))
        if big:
            parts.append(large())
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    return [table for table, _ in parts], [t for _, targets in parts for t in targets]


def main() -> int:
    """Measure, print, and name what was missed."""
    parser = argparse.ArgumentParser(description="Lookup tables against coremltools.")
    parser.add_argument("--all", action="store_true", help="compare all matrices (minutes)")
    parser.add_argument("--bits", type=int, action="append", choices=BITS)
    parser.add_argument("--large", action="store_true", help="a base of 2 GB too")
    options = parser.parse_args()
    return show(*measure_all(tuple(options.bits or BITS), options.all, options.large))


def child(words: list[str]) -> None:
    """What the benchmark runs in processes of its own."""
    if words[0] == "compare":
        bits = tuple(int(w) for w in words[1:] if w != "--all")
        found = [r for group in (0, GROUP) for r in compared(bits, group, "--all" in words)]
        print(json.dumps(found))
    elif words[0] == "prepare":
        prepare()
    else:
        prepare_large()


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("compare", "prepare", "prepare-large"):
        child(sys.argv[1:])
    else:
        sys.exit(main())
