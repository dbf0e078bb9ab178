"""Write synthetic PEFT adapters for the benchmarks.

Real adapters of the sizes that matter (all seven projections of a 3B model, rank 16 and 256)
are not something a benchmark should have to download, and their values do not change the cost
of converting them. So they are made here: seeded, streamed tensor by tensor (a rank-256 adapter
is 778 MB and a small machine must be able to make it), and kept in `.cache/bench/`.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from measure import run_child

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "bench"
SMALL = CACHE / "peft-small"  # one layer: converted to load everything a conversion needs
BASE = "synthetic/llama-3b"
LAYERS = 28
HIDDEN = 3072
INTERMEDIATE = 8192
KV = 1024
ALPHA = 32
DEVIATION = 0.02
SEED = 20250
RANKS = (16, 256)
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# experts as Qwen3-30B-A3B has them
MOE, MOE_BASE = CACHE / "peft-experts", CACHE / "base-experts"
EXPERTS, MOE_RANK, MOE_LAYERS, MOE_HIDDEN, MOE_INTERMEDIATE = 128, 16, 40, 2048, 768

# module path inside a layer -> (inputs, outputs)
MODULES: dict[str, tuple[int, int]] = {
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, KV),
}


def tensor_shapes(rank: int, layers: int = LAYERS) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor, in the (sorted) order in which PEFT stores them."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        for module, (inputs, outputs) in MODULES.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{stem}.lora_A.weight"] = (rank, inputs)
            shapes[f"{stem}.lora_B.weight"] = (outputs, rank)
    return dict(sorted(shapes.items()))


def adapter_config(rank: int) -> dict[str, object]:
    """The configuration that PEFT 0.21.2 saves next to such an adapter, with every key."""
    unset = (
        "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules"
        " kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config"
        " megatron_config modules_to_save monteclora_config revision target_parameters"
        " trainable_token_indices use_bdlora velora_config"
    )
    config: dict[str, object] = dict.fromkeys(unset.split())
    config |= {
        "alpha_pattern": {},
        "base_model_name_or_path": BASE,
        "bias": "none",
        "ensure_weight_tying": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": ALPHA,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "target_modules": [name.rpartition(".")[2] for name in MODULES],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    return dict(sorted(config.items()))


def safetensors_header(shapes: dict[str, tuple[int, int]]) -> bytes:
    """Length and JSON header of a float16 safetensors file, padded to 8 bytes like its writer's."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (rows, columns) in shapes.items():
        end = offset + rows * columns * 2
        entries[name] = {
            "dtype": "F16",
            "shape": [rows, columns],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_values(file: BinaryIO, shapes: dict[str, tuple[int, int]], seed: int) -> None:
    """Write one tensor after the other, so that memory stays at one tensor's size.

    numpy is imported here so that importing this module is cheap: see `prepare`.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    for rows, columns in shapes.values():
        values = generator.standard_normal(rows * columns, dtype=np.float32)
        values *= DEVIATION
        file.write(values.astype("<f2").tobytes())


def is_complete(folder: Path, shapes: dict[str, tuple[int, int]]) -> bool:
    """Whether an earlier run left the adapter whole; the size tells, for the rename is last."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    if not (weights.is_file() and config.is_file()):
        return False
    values = sum(rows * columns * 2 for rows, columns in shapes.values())
    return weights.stat().st_size == len(safetensors_header(shapes)) + values


def write_adapter(folder: Path, rank: int, layers: int = LAYERS) -> Path:
    """Write the adapter of this rank unless it is there already; returns its folder."""
    return write_folder(folder, tensor_shapes(rank, layers), adapter_config(rank), SEED + rank)


def write_folder(
    folder: Path, shapes: dict[str, tuple[int, int]], config: dict[str, object], seed: int
) -> Path:
    """Write a PEFT folder of random values unless it is there already; returns it."""
    if is_complete(folder, shapes):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    partial = folder / (WEIGHTS + ".partial")
    with partial.open("wb") as file:
        file.write(safetensors_header(shapes))
        write_values(file, shapes, seed)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / WEIGHTS)
    return folder


def write_experts() -> Path:
    """An adapter of all experts of a 128-expert model, 1 GB, and its base's config."""
    shapes = {}
    for layer in range(MOE_LAYERS):
        stem = f"base_model.model.model.layers.{layer}.mlp.experts"
        for path, inner, out in (  # gate_up_proj is the inner one of PEFT's two wrappers
            (f"{stem}.base_layer", MOE_HIDDEN, 2 * MOE_INTERMEDIATE),
            (stem, MOE_INTERMEDIATE, MOE_HIDDEN),
        ):
            shapes[f"{path}.lora_A.weight"] = (EXPERTS * MOE_RANK, inner)
            shapes[f"{path}.lora_B.weight"] = (out, MOE_RANK * EXPERTS)
    config = adapter_config(MOE_RANK) | {
        "base_model_name_or_path": "synthetic/moe-30b",
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    base = MOE_BASE / "config.json"
    base.parent.mkdir(parents=True, exist_ok=True)
    fields = {"num_hidden_layers": MOE_LAYERS, "num_experts": EXPERTS, "hidden_size": MOE_HIDDEN}
    base.write_text(json.dumps({"model_type": "qwen3_moe", "tie_word_embeddings": False} | fields))
    return write_folder(MOE, dict(sorted(shapes.items())), config, SEED)


def adapter_folder(rank: int) -> Path:
    """Where the benchmark adapter of this rank is."""
    return CACHE / f"peft-r{rank}"


def prepare(ranks: Iterable[int]) -> None:
    """Make what is missing, in a child: the benchmark process must not load numpy itself."""
    run_child([sys.executable, __file__, *map(str, ranks)])


def main() -> None:
    """`python synthetic.py [RANK ...]`."""
    write_adapter(SMALL, min(RANKS), layers=1)
    if sys.argv[1:] == ["experts"]:
        write_experts()
        return
    for rank in [int(word) for word in sys.argv[1:]] or RANKS:
        folder = write_adapter(adapter_folder(rank), rank)
        print(f"{folder}  {(folder / WEIGHTS).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
