"""Fusing into a real base, and extracting what was fused.

SmolLM2-135M in float16 with an adapter on all linear layers. Competitors are whole processes, as
somebody runs them: PEFT's from_pretrained, merge_and_unload, save_pretrained, and `mlx_lm.fuse`; `cp`
of the base is the floor. Extraction is compared with a dense SVD of every difference (float64, one
thread), which gives the best residual there is.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from measure import (
    Run,
    Sample,
    Table,
    Target,
    best,
    interleaved,
    largest,
    machine,
    median,
    run_child,
    script,
    sync_file,
    table_text,
    target_table,
    warm_page_cache,
)
from synthetic import CACHE

ROUNDS = 3
REPO = CACHE.parents[1]
BASE, ADAPTER = REPO / ".cache" / "smollm2-135m-instruct", REPO / "examples" / "reply"
WORK = CACHE / "work-fuse"
WEIGHTS = "model.safetensors"
COPY, OURS, PEFT, MLX = "cp of the base", "loraduct fuse", "PEFT, merge and save", "mlx_lm.fuse"
EXTRACT, DENSE = "loraduct extract --rank 4", "dense SVD of every difference"
MODULES = 21  # differences that the dense SVD is timed on; the rest is extrapolated

PEFT_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
DENSE_SCRIPT = """
import sys, time, numpy as np
from safetensors import safe_open
tuned, base, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
seconds = lost = whole = 0.0
with safe_open(tuned, "numpy") as new, safe_open(base, "numpy") as old:
    names = sorted(n for n in old.keys() if ".layers." in n and "_proj" in n)
    chosen = names[:: len(names) // most][:most]
    for name in chosen:
        begin = time.perf_counter()
        d = new.get_tensor(name).astype(np.float64) - old.get_tensor(name)
        values = np.linalg.svd(d, full_matrices=False)[1]
        seconds += time.perf_counter() - begin
print("seconds", seconds * len(names) / len(chosen))
"""


def emptied(folder: Path) -> Path:
    """The folder, new and empty, without the previous run's output."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def synced(sample: Sample, folder: Path) -> Sample:
    """Other tools' files must reach the disk too, as ours have."""
    import time

    begin = time.perf_counter()
    for file in folder.rglob("*.safetensors"):
        sync_file(file)
    return sample | {"wall": sample["wall"] + time.perf_counter() - begin}


def run_copy() -> Sample:
    """What moving the bytes costs."""
    target = emptied(WORK) / WEIGHTS
    return synced(run_child(["cp", "--reflink=never", str(BASE / WEIGHTS), str(target)])[0], WORK)


def run_ours() -> Sample:
    """The command as a user runs it."""
    out = emptied(WORK) / "out"
    return run_child(
        [script("loraduct"), "fuse", str(ADAPTER), "--base", str(BASE), "-o", str(out)]
    )[0]


def run_peft() -> Sample:
    """Stock PEFT."""
    out = emptied(WORK) / "out"
    words = [sys.executable, "-c", PEFT_SCRIPT, str(BASE), str(ADAPTER), str(out)]
    return synced(run_child(words)[0], out)


def run_mlx() -> Sample:
    """Stock mlx-lm, with the adapter in its own form."""
    out = emptied(WORK) / "out"
    words = [
        "--model",
        str(BASE),
        "--adapter-path",
        str(CACHE / "reply-mlx"),
        "--save-path",
        str(out),
    ]
    return synced(run_child([sys.executable, "-m", "mlx_lm", "fuse", *words])[0], out)


def run_extract() -> Sample:
    """The command as a user runs it."""
    out = emptied(WORK) / "out"
    words = ["extract", str(CACHE / "reply-fused"), str(BASE), "--rank", "4", "--allow-approximate"]
    return run_child([script("loraduct"), *words, "-o", str(out)])[0]


def run_dense() -> Sample:
    """The time of the decompositions alone."""
    files = [str(CACHE / "reply-fused" / WEIGHTS), str(BASE / WEIGHTS), str(MODULES)]
    sample, text = run_child([sys.executable, "-c", DENSE_SCRIPT, *files])
    return sample | {"wall": float(text.split("seconds")[1])}


def prepare() -> None:
    """What is compared: the adapter in mlx-lm's form, the fused model to extract from."""
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not (BASE / WEIGHTS).exists():
        raise SystemExit(f"{BASE} is missing: make demo makes it")
    words = {
        "reply-mlx": ["convert", str(ADAPTER), "--to", "mlx", "--base", str(BASE)],
        "reply-fused": ["fuse", str(ADAPTER), "--base", str(BASE)],
    }
    for name, command in words.items():
        run_child([script("loraduct"), *command, "-o", str(CACHE / name), "--force"])
    warm_page_cache(BASE / WEIGHTS)


def rows(samples: dict[str, list[Sample]], ours: str) -> list[list[str]]:
    """One row a competitor; ratios to ``ours``."""
    mine = best(samples[ours], "wall")
    return [
        [
            name,
            f"{best(found, 'wall'):.2f}",
            f"{median(found, 'wall'):.2f}",
            f"{best(found, 'wall') / mine:.1f}",
            f"{largest(found, 'rss'):.0f}",
        ]
        for name, found in samples.items()
    ]


def measure_all() -> tuple[list[Table], list[Target]]:
    """Two tables and their targets."""
    prepare()
    fusing: dict[str, Run] = {COPY: run_copy, OURS: run_ours, PEFT: run_peft, MLX: run_mlx}
    extracting: dict[str, Run] = {EXTRACT: run_extract, DENSE: run_dense}
    try:
        fused, extracted = interleaved(fusing, ROUNDS), interleaved(extracting, 1)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    mine, other = best(fused[OURS], "wall"), best(extracted[EXTRACT], "wall")
    header = ["", "best s", "median s", "/ loraduct", "peak MB"]
    tables: list[Table] = [
        (f"Fusing rank 4 on all layers into SmolLM2-135M, 269 MB, {ROUNDS} runs each", header, rows(fused, OURS)),
        ("Extracting it again, 210 modules", header, rows(extracted, EXTRACT)),
    ]  # fmt: skip
    targets: list[Target] = [
        ("fuse: PEFT / loraduct", best(fused[PEFT], "wall") / mine, ">=", 5.0),
        ("fuse: mlx_lm.fuse / loraduct", best(fused[MLX], "wall") / mine, ">=", 4.0),
        ("fuse: peak MB", largest(fused[OURS], "rss"), "<=", 64.0),
        ("extract: dense SVD / loraduct", best(extracted[DENSE], "wall") / other, ">=", 5.0),
    ]
    return tables, targets


def main() -> None:
    """`python fuse.py`."""
    tables, targets = measure_all()
    for table in [*tables, target_table(targets)]:
        print(table_text(table))
    print("\n".join(machine()))


if __name__ == "__main__":
    main()
