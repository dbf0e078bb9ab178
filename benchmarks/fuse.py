"""Fusing into a real base.

SmolLM2-135M in float16 with an adapter on all linear layers. Competitors are whole processes, as
somebody runs them: PEFT's from_pretrained, merge_and_unload, save_pretrained, and `mlx_lm.fuse`; `cp`
of the base is the floor.
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
    median,
    run_child,
    script,
    show,
    sync_file,
    warm_page_cache,
)
from synthetic import CACHE

ROUNDS = 3
REPO = CACHE.parents[1]
BASE, ADAPTER = REPO / ".cache" / "smollm2-135m-instruct", REPO / "examples" / "reply"
WORK = CACHE / "work-fuse"
WEIGHTS = "model.safetensors"
COPY, OURS, PEFT, MLX = "cp of the base", "loraduct fuse", "PEFT, merge and save", "mlx_lm.fuse"
ENDS = "loraduct fuse, embedding adapted too"

PEFT_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""

# the adapter with one more pair, of the embedding: a (r, tokens), b (hidden, r)
ENDS_SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
source, target = map(Path, sys.argv[1:])
target.mkdir(parents=True, exist_ok=True)
config = json.loads((source / "adapter_config.json").read_text())
config["target_modules"] = sorted({*config["target_modules"], "embed_tokens"})
(target / "adapter_config.json").write_text(json.dumps(config))
tensors = load_file(source / "adapter_model.safetensors")
rng, r = np.random.default_rng(0), config["r"]
name = "base_model.model.model.embed_tokens.lora_embedding_"
for side, shape in (("A", (r, 49152)), ("B", (576, r))):
    tensors[name + side] = (0.01 * rng.standard_normal(shape)).astype(np.float32)
save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
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


def run_ends() -> Sample:
    """Ours, of an adapter on the embedding as well: its weight is the largest."""
    out = emptied(WORK) / "out"
    words = ["fuse", str(CACHE / "ends"), "--base", str(BASE), "-o", str(out)]
    return run_child([script("loraduct"), *words])[0]


def prepare() -> None:
    """The adapter in mlx-lm's form, and one that adapts the embedding too."""
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not (BASE / WEIGHTS).exists():
        raise SystemExit(f"{BASE} is missing: make demo makes it")
    target = str(CACHE / "reply-mlx")
    words = ["convert", str(ADAPTER), "--to", "mlx", "--base", str(BASE), "-o", target, "--force"]
    run_child([script("loraduct"), *words])
    run_child([sys.executable, "-c", ENDS_SCRIPT, str(ADAPTER), str(CACHE / "ends")])
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


def largest_tensor() -> float:
    """MB of the base's largest."""
    from loraduct.formats import base as base_folder

    return max(t.nbytes for t in base_folder.read(BASE).tensors.values()) / 1e6


def measure_all() -> tuple[list[Table], list[Target]]:
    """A table and its targets."""
    prepare()
    fusing: dict[str, Run] = {COPY: run_copy, OURS: run_ours, PEFT: run_peft, MLX: run_mlx}
    try:
        fused = interleaved(fusing, ROUNDS)
        ends = interleaved({ENDS: run_ends}, 1)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    mine = best(fused[OURS], "wall")
    header = ["", "best s", "median s", "/ loraduct", "peak MB"]
    title = f"Fusing rank 4 on all layers into SmolLM2-135M, 269 MB, {ROUNDS} runs each"
    tables: list[Table] = [(title, header, rows(fused | ends, OURS))]
    targets: list[Target] = [
        ("fuse: PEFT / loraduct", best(fused[PEFT], "wall") / mine, ">=", 5.0),
        ("fuse: mlx_lm.fuse / loraduct", best(fused[MLX], "wall") / mine, ">=", 4.0),
        ("fuse: peak MB", largest(fused[OURS], "rss"), "<=", 64.0),
        ("fuse, embedding adapted: peak / largest tensor", largest(ends[ENDS], "rss") / largest_tensor(),
         "<=", 6.0),
    ]  # fmt: skip
    return tables, targets


def main() -> None:
    """`python fuse.py`."""
    show(*measure_all())


if __name__ == "__main__":
    main()
