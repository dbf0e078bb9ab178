"""Adapters of a Core ML package, added and removed in place, against coremltools' own way.

The base has SmolLM2-135M's shapes and random values. coremltools combines functions of whole
packages (`save_multifunction`), which have to be converted first: here both functions lie ready, so
that only the combining is timed, once. The floor of compacting, which writes the weights again and
frees the old ones, is `cp`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
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
    sync_file,
    warm_page_cache,
)
from synthetic import CACHE, adapter_config, write_folder

ROUNDS = 5
BASE, ADAPTER = CACHE / "base-135m", CACHE / "peft-135m"
ALONE, FULL = CACHE / "alone.mlpackage", CACHE / "full.mlpackage"
BLOBS = Path("Data") / "com.apple.CoreML" / "weights" / "weight.bin"
LAYERS, HIDDEN, INTERMEDIATE, KV, VOCABULARY, RANK, MANY = 30, 576, 1536, 192, 49152, 8, 8
MODULES = {  # (outputs, inputs)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
COPY, ADD, CALL, NINTH = "cp + fsync", "add", "add, past start-up", "add a ninth, past start-up"
REMOVE, COMPACT, COMBINE = "remove", "compact", "coremltools save_multifunction"
BUILD = "build from the base's folder"

# Adds once to load everything, then again; what it added is taken out. Prints seconds and MB.
CALL_SCRIPT = """
import json, resource, sys, time
from loraduct.cli import main
small, package, adapter = sys.argv[1:]
unit = 1 if sys.platform == "darwin" else 1024
def call(*words):
    main(["package", *words], standalone_mode=False)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
call("add", small, "new=" + adapter)
before, begin = peak(), time.perf_counter()
call("add", package, "new=" + adapter)
work = time.perf_counter() - begin
grown = peak() - before
begin = time.perf_counter()
call("remove", package, "new")
gone = time.perf_counter() - begin
call("remove", small, "new")
print()
print(json.dumps({"work": work, "grown": grown, "gone": gone}))
"""
COMBINE_SCRIPT = """
import json, sys, time
import coremltools as ct
begin = time.perf_counter()
both = ct.utils.MultiFunctionDescriptor()
both.add_function(sys.argv[1], "base", "base")
both.add_function(sys.argv[1], "new", "new")
both.default_function_name = "base"
ct.utils.save_multifunction(both, sys.argv[2])
print()
print(json.dumps({"work": time.perf_counter() - begin}))
"""


def base_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of the base."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        stem = f"model.layers.{i}."
        shapes |= {f"{stem}{name}.weight": shape for name, shape in MODULES.items()}
        shapes |= {
            f"{stem}{norm}.weight": (HIDDEN,)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
    return dict(sorted({**shapes, "model.norm.weight": (HIDDEN,)}.items()))


def write_base(folder: Path, layers: int) -> None:
    """A base folder of random FLOAT16 values."""
    import numpy as np

    shapes, offset = base_shapes(layers), 0
    entries: dict[str, object] = {}
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(entries).encode()
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for shape in shapes.values():
            values = rng.standard_normal(shape, dtype=np.float32) * 0.02
            file.write(values.astype("<f2").tobytes())
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_adapter(folder: Path, layers: int, seed: int) -> None:
    """A PEFT adapter of all linear layers."""
    shapes = {}
    for i in range(layers):
        for name, (rows, columns) in MODULES.items():
            stem = f"base_model.model.model.layers.{i}.{name}"
            shapes[f"{stem}.lora_A.weight"] = (RANK, columns)
            shapes[f"{stem}.lora_B.weight"] = (rows, RANK)
    write_folder(folder, dict(sorted(shapes.items())), adapter_config(RANK), seed)


def write_all() -> None:
    """What the benchmark needs and is not there yet; in a child, because it loads numpy."""
    if not (BASE / "config.json").exists():
        write_base(BASE, LAYERS)
    for n in range(MANY + 1):
        write_adapter(ADAPTER.with_name(f"{ADAPTER.name}-{n}"), LAYERS, n)


def loraduct(*words: object) -> Sample:
    """The command as a user runs it."""
    return run_child([script("loraduct"), "package", *map(str, words)])[0]


def adapter(n: int) -> Path:
    """One of the adapters."""
    return ADAPTER.with_name(f"{ADAPTER.name}-{n}")


def copied(source: Path, target: Path) -> Path:
    """A package to be edited."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    sync_file(target / BLOBS)  # else the first edit would wait for the copy
    return target


def run_copy(source: Path, target: Path) -> Sample:
    """cp of the weights without sharing blocks, until they are on the disk."""
    target.unlink(missing_ok=True)
    options = [] if sys.platform == "darwin" else ["--reflink=never"]
    begin = time.perf_counter()
    sample, _ = run_child(["cp", *options, str(source), str(target)])
    sync_file(target)
    return sample | {"wall": time.perf_counter() - begin}


def run_call(small: Path, package: Path) -> Sample:
    """Only the adding, in a process that has loaded everything."""
    words = [str(small), str(package), str(adapter(MANY))]
    sample, output = run_child([sys.executable, "-c", CALL_SCRIPT, *words])
    figures: Sample = json.loads(output.strip().splitlines()[-1])
    return sample | figures


def run_combine(package: Path, target: Path) -> Sample | None:
    """coremltools, where it is installed."""
    if importlib.util.find_spec("coremltools") is None:
        return None
    words = [sys.executable, "-c", COMBINE_SCRIPT, str(package), str(target)]
    sample, output = run_child(words)
    figures: Sample = json.loads(output.strip().splitlines()[-1])
    return sample | figures


def measure(work: Path) -> tuple[dict[str, list[Sample]], float]:
    """All runs, and the bytes of an adapter beyond its tensors'."""
    builds = [loraduct("--base", BASE, "-o", ALONE, "--force") for _ in range(ROUNDS)]
    full = copied(ALONE, FULL)
    names = [f"a{n}={adapter(n)}" for n in range(MANY)]
    loraduct("add", full, *names)
    sizes = [sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in (ALONE, full)]
    tensors = (adapter(0) / "adapter_model.safetensors").stat().st_size
    beyond = (sizes[1] - sizes[0]) / MANY - tensors
    edited, small = (
        copied(ALONE, work / "edited.mlpackage"),
        copied(ALONE, work / "small.mlpackage"),
    )
    called = copied(ALONE, work / "called.mlpackage")
    for path in (edited, small, called, full):
        warm_page_cache(path / BLOBS)
    new = adapter(MANY)
    runs: dict[str, Run] = {
        COPY: lambda: run_copy(ALONE / BLOBS, work / "copy.bin"),
        ADD: lambda: loraduct("add", edited, f"new={new}"),
        REMOVE: lambda: loraduct("remove", edited, "new"),
        COMPACT: lambda: loraduct("compact", edited),
        CALL: lambda: run_call(small, called),
        NINTH: lambda: run_call(small, full),
    }
    samples = {BUILD: builds, **interleaved(runs, ROUNDS)}
    loraduct("add", edited, f"new={new}")
    combined = run_combine(edited, work / "combined.mlpackage")
    if combined is not None:
        samples[COMBINE] = [combined]
    return samples, beyond


def table(samples: dict[str, list[Sample]]) -> Table:
    """Seconds and memory of every run."""
    rows = []
    for name, runs in samples.items():
        key = "work" if "work" in runs[0] else "wall"
        peak = "grown" if "grown" in runs[0] else "rss"
        figures = [f"{best(runs, key):.3f}", f"{median(runs, key):.3f}"]
        rows.append([name, *figures, f"{largest(runs, peak):.0f}"])
    size = (ALONE / BLOBS).stat().st_size / 1e6
    title = (
        f"Core ML package, {size:.0f} MB of weights, adapters of rank {RANK}, {ROUNDS} runs each"
    )
    return title, ["", "best s", "median s", "peak MB (past start-up: growth)"], rows


def measure_all() -> tuple[list[Table], list[Target]]:
    """The table, and all targets."""
    run_child([sys.executable, __file__, "prepare"])
    work = CACHE / "package-work"
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    try:
        samples, beyond = measure(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(FULL, ignore_errors=True)
    call, compact = best(samples[CALL], "work"), best(samples[COMPACT], "wall")
    targets: list[Target] = [
        ("package build, s", best(samples[BUILD], "wall"), "<=", 10.0),
        ("package build, MB", largest(samples[BUILD], "rss"), "<=", 1200.0),
        ("package add, past start-up, s", call, "<=", 0.5),
        ("package add of a ninth, past start-up, s", best(samples[NINTH], "work"), "<=", 0.5),
        ("package remove, past start-up, s", best(samples[CALL], "gone"), "<=", 0.1),
        ("package add, growth past start-up, MB", largest(samples[NINTH], "grown"), "<=", 100.0),
        ("package: an adapter beyond its tensors, MB", beyond / 1e6, "<=", 1.0),
        ("package compact, s", compact, "<=", 1.5),
    ]
    if COMBINE in samples:
        ratio = best(samples[COMBINE], "work") / call
        targets.append(("coremltools save_multifunction / package add", ratio, ">=", 100.0))
    return [table(samples)], targets


def main() -> None:
    """`python package.py`."""
    if sys.argv[1:] == ["prepare"]:
        write_all()
        return
    show(*measure_all())


if __name__ == "__main__":
    main()
