"""Merging three adapters of a 3B llama block into one of the same rank: ours against PEFT's SVD.

Both merge factors that are in memory already, weights .5, .3, .2, rank 16 -> 16; ours on one
thread, PEFT on all. PEFT's ``add_weighted_adapter(combination_type="svd")`` makes the dense update
of each and takes its full SVD: minutes for a block, so its time is taken on the smallest of the
large matrices alone (q_proj), and the ratio is of that matrix. Both errors are measured against the
dense sum there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from measure import Sample, Table, Target, run_child, show

HIDDEN, KV, INNER, RANK = 3072, 1024, 8192, 16
BLOCK = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KV, HIDDEN),
    "v_proj": (KV, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
ONE = "q_proj"
WEIGHTS = [0.5, 0.3, 0.2]
ROUNDS = 9


def factors(module: str, adapter: int) -> tuple[Any, Any]:
    """a (rank, in), b (out, rank), float32, the same in every process."""
    import numpy as np

    out, inner = BLOCK[module]
    rng = np.random.default_rng([adapter, *module.encode()])
    a = rng.normal(size=(RANK, inner)).astype(np.float32)
    return a, rng.normal(size=(out, RANK)).astype(np.float32)


def error(a: Any, b: Any) -> float:
    """Relative Frobenius error of b @ a against the dense weighted sum of `ONE`."""
    import numpy as np

    wanted: Any = 0.0
    for i, w in enumerate(WEIGHTS):
        a0, b0 = factors(ONE, i)
        wanted = wanted + w * (b0.astype(np.float64) @ a0.astype(np.float64))
    found = b.astype(np.float64) @ a.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def ours() -> Sample:
    """Best of several runs on the whole block and on one matrix, and the error."""
    from pathlib import Path

    from loraduct.adapter import Adapter, LowRank
    from loraduct.converters.merge import Settings, merge
    from loraduct.tensor import Tensor

    def adapter(i: int, modules: list[str]) -> Adapter:
        updates = {}
        for m in modules:
            a, b = (
                Tensor(side, "F32", x.shape, data=x)
                for side, x in zip("ab", factors(m, i), strict=True)
            )
            updates[f"model.layers.0.{m}"] = LowRank(a, b, 1.0)
        return Adapter(Path("made"), Path("made"), "peft", "lora", updates, {})

    found: Sample = {}
    for name, modules in (("block", list(BLOCK)), ("one", [ONE])):
        adapters = [adapter(i, modules) for i in range(len(WEIGHTS))]
        times = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            merged = merge(adapters, WEIGHTS, Settings("svd", rank=RANK))
            made = [(u.a.read(), u.b.read()) for u in merged.adapter.low_rank.values()]
            times.append(time.perf_counter() - begin)
        found[name] = min(times)
    return found | {"error": error(*made[0])}


def peft() -> Sample:
    """One run on one matrix: it takes long enough not to need more."""
    import torch
    from peft import LoraConfig, get_peft_model

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[ONE])
    model = get_peft_model(Layer(), config, adapter_name="0")
    for i in range(1, len(WEIGHTS)):
        model.add_adapter(str(i), config)
    layer = model.base_model.model.q_proj
    for i in range(len(WEIGHTS)):
        a, b = factors(ONE, i)
        layer.lora_A[str(i)].weight.data = torch.from_numpy(a)
        layer.lora_B[str(i)].weight.data = torch.from_numpy(b)
    names = [str(i) for i in range(len(WEIGHTS))]
    begin = time.perf_counter()
    model.add_weighted_adapter(names, WEIGHTS, "sum", combination_type="svd", svd_rank=RANK)
    wall = time.perf_counter() - begin
    a, b = layer.lora_A["sum"].weight, layer.lora_B["sum"].weight
    return {"one": wall, "error": error(a.detach().numpy(), b.detach().numpy())}


SIDES = {"ours": ours, "peft": peft}


def measured(side: str) -> Sample:
    """One side in a process of its own."""
    if side == "ours":  # as the verb does: factors are thin, and threads cost more than they give
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
    _, text = run_child([sys.executable, os.path.abspath(__file__), "--side", side])
    found: Sample = json.loads(text.strip().rsplit("\n", 1)[-1])
    return found


def measure_all() -> tuple[list[Table], list[Target]]:
    """Tables and targets."""
    theirs, mine = measured("peft"), measured("ours")
    ratio = theirs["one"] / mine["one"]
    rows = [
        ["PEFT add_weighted_adapter svd", f"{theirs['one']:.1f} s", "-", f"{theirs['error']:.6f}"],
        ["loraduct merge svd", f"{mine['one'] * 1e3:.2f} ms", f"{mine['block'] * 1e3:.1f} ms",
         f"{mine['error']:.6f}"],
        ["ratio", f"{ratio:,.0f}", "", f"{theirs['error'] / mine['error']:.6f}"],
    ]  # fmt: skip
    title = "Merging 3 adapters of rank 16 by SVD to rank 16 (3B llama block, factors in memory)"
    table: Table = (title, ["", "q_proj 3072 x 3072", "all 7 matrices", "error (q_proj)"], rows)
    return [table], [
        ("svd merge of one 3072 x 3072 module, PEFT's time over ours", ratio, ">=", 5000.0),
        ("svd merge, our error over PEFT's", mine["error"] / theirs["error"], "<=", 1.000001),
    ]


def main() -> None:
    """Measure and print, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=sorted(SIDES))
    side = parser.parse_args().side
    if side:
        print(json.dumps(SIDES[side]()))
        return
    show(*measure_all())


if __name__ == "__main__":
    main()
