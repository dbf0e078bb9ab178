"""Another adapter on a live model: the pool against PEFT's two ways.

SmolLM2-135M in float32 on torch. A swap from disk is what it takes until the model computes with an
adapter that lies on disk: ours is `activate` of one that was evicted; PEFT's is load_adapter and set_adapter
(a layer for each module is made, and deleted again afterwards, outside of the clock), and
`hotswap_adapter`, which writes the values into the layers of an adapter of the same modules. Each in a
process of its own, since PEFT changes the model; peaks of memory include the model.
"""

from __future__ import annotations

import json
import os
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
    show,
)
from synthetic import CACHE

ROUNDS, SWAPS = 3, 6
REPO = CACHE.parents[1]
BASE = REPO / ".cache" / "smollm2-135m-instruct"
PAIRS = {
    "rank 4": [REPO / "examples" / "reply", REPO / "examples" / "summary"],
    "rank 64": [CACHE / "swap-a", CACHE / "swap-b"],
}
OURS, HELD, FUSED = "loraduct, from disk", "loraduct, from memory", "loraduct, fused, from memory"
LOAD, HOT = "PEFT load_adapter + set_adapter", "PEFT hotswap_adapter"


def prepare() -> None:
    """Two adapters of rank 64 on all linear layers, random, as PEFT saves them."""
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not (BASE / "model.safetensors").exists():
        raise SystemExit(f"{BASE} is missing: make demo makes it")
    for seed, folder in enumerate(PAIRS["rank 64"]):
        if not (folder / "adapter_model.safetensors").exists():
            run_child([sys.executable, __file__, "make", str(folder), str(seed)])


def make(folder: str, seed: str) -> None:
    """A child: one synthetic adapter."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(int(seed))
    config = LoraConfig(r=64, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(_model(), config).save_pretrained(folder)


def _model() -> object:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def ours(way: str, folders: list[str]) -> list[float]:
    """Seconds of each swap by the pool."""
    import loraduct

    pool = loraduct.AdapterPool(_model(), BASE, fused=way == FUSED)
    for folder in folders:
        pool.load(folder, folder)
    pool.activate(folders[1])
    times = []
    for i in range(SWAPS):
        name = folders[i % 2]
        if way == OURS:
            pool.evict(name)
        begin = time.perf_counter()
        pool.activate(name)
        times.append(time.perf_counter() - begin)
    pool.close()
    return times


def theirs(way: str, folders: list[str]) -> list[float]:
    """Seconds of each swap by PEFT."""
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    if way == HOT:  # refuses an adapter of other modules, as `summary` has them
        folders = folders[:1] * 2
    model = PeftModel.from_pretrained(_model(), folders[1], adapter_name="live").eval()
    times = []
    for i in range(SWAPS):
        folder = folders[i % 2]
        begin = time.perf_counter()
        if way == HOT:
            hotswap_adapter(model, folder, adapter_name="live")
            times.append(time.perf_counter() - begin)
            continue
        model.load_adapter(folder, adapter_name=f"n{i}")
        model.set_adapter(f"n{i}")
        times.append(time.perf_counter() - begin)
        model.delete_adapter("live" if i == 0 else f"n{i - 1}")
    return times


def child(way: str, folders: list[Path]) -> Run:
    """One process; its sample has the median swap of those it made, in ms."""

    def run() -> Sample:
        words = [sys.executable, __file__, "swap", way, *map(str, folders)]
        sample, text = run_child(words)
        times = sorted(json.loads(text.rsplit("times=", 1)[1]))
        return sample | {"ms": 1e3 * times[len(times) // 2]}

    return run


def measure_all() -> tuple[list[Table], list[Target]]:
    """One table for each pair of adapters, and the targets."""
    prepare()
    tables: list[Table] = []
    targets: list[Target] = []
    for pair, folders in PAIRS.items():
        ways = (OURS, HELD, FUSED, LOAD, HOT)
        found = interleaved({way: child(way, folders) for way in ways}, ROUNDS)
        mine = best(found[OURS], "ms")
        rows = [
            [
                way,
                f"{best(samples, 'ms'):.1f}",
                f"{median(samples, 'ms'):.1f}",
                f"{best(samples, 'ms') / mine:.2f}",
                f"{largest(samples, 'rss'):.0f}",
            ]
            for way, samples in found.items()
        ]
        header = ["", "best ms", "median ms", "/ loraduct", "peak MB"]
        title = f"Swapping adapters of {pair} on SmolLM2-135M, {ROUNDS} processes each"
        tables.append((title, header, rows))
        ratio = best(found[LOAD], "ms") / mine
        targets.append((f"swap from disk, {pair}: PEFT load + set / loraduct", ratio, ">=", 5.0))
    return tables, targets


def main() -> None:
    """`python swap.py`; the other words are its own children's."""
    if sys.argv[1:2] == ["make"]:
        return make(*sys.argv[2:])
    if sys.argv[1:2] == ["swap"]:
        way, folders = sys.argv[2], sys.argv[3:]
        times = (theirs if way in (LOAD, HOT) else ours)(way, folders)
        return print(f"times={json.dumps(times)}")
    show(*measure_all())


if __name__ == "__main__":
    main()
