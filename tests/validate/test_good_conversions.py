"""A hundred sound conversions, drawn at random: `validate` finds fault with none of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Judge

from loraduct.validation import suites

COUNT, QUICK = 100, 10
MODULES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (64, 96), "mlp.up_proj": (64, 96),
    "mlp.down_proj": (96, 64),
}  # fmt: skip
WAYS = ("mlx", "mlx", "back", "packed", "coreml", "coreml-lut")


@pytest.fixture(scope="module")
def judge(world: Any) -> Judge:
    return Judge(world.base, ["the old", "red river"])


@pytest.fixture(scope="module")
def package(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base alone."""
    path = tmp_path_factory.mktemp("package") / "x.mlpackage"
    run("package", "--base", world.base, "--context", 64, "-o", path)
    return path


def run(*words: object) -> None:
    from click.testing import CliRunner

    from loraduct.cli import main

    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exit_code == 0, f"{words}: {done.output}"


def drawn(base: Path, to: Path, rng: Any) -> str:
    """A PEFT adapter: kind, ranks, scales, targets, dtype and sizes by chance; returns what it is."""
    import torch
    from safetensors.torch import save_file

    kind = rng.choice(["lora", "rslora", "dora", "patterns"])
    dtype = [torch.float32, torch.float16, torch.bfloat16][rng.integers(3)]
    rank = int(rng.integers(1, 17))
    chosen = [n for n in MODULES if rng.random() < 0.6] or ["self_attn.q_proj"]
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "bias": "none",
        "lora_alpha": int(rng.integers(1, 65)), "target_modules": [n.split(".")[-1] for n in chosen],
        "base_model_name_or_path": base.name, "rank_pattern": {}, "alpha_pattern": {},
        "use_rslora": bool(kind == "rslora"), "use_dora": bool(kind == "dora"),
        "init_lora_weights": True,
    }  # fmt: skip
    if kind == "patterns":
        for n in chosen:
            if rng.random() < 0.5:
                config["rank_pattern"][n.split(".")[-1]] = int(rng.integers(1, 17))
            if rng.random() < 0.5:
                config["alpha_pattern"][f"layers.1.{n}"] = int(rng.integers(1, 65))
    size = float(rng.choice([0.02, 0.05, 0.1, 0.3]))
    tensors = {}
    for layer in range(2):
        for n in chosen:
            inner, out = MODULES[n]
            r = config["rank_pattern"].get(n.split(".")[-1], rank)
            stem = f"base_model.model.model.layers.{layer}.{n}"
            for part, shape in (("lora_A", (r, inner)), ("lora_B", (out, r))):
                values = torch.from_numpy(rng.normal(size=shape) * size)
                tensors[f"{stem}.{part}.weight"] = values.to(dtype).contiguous()
            if kind == "dora":
                m = torch.from_numpy(rng.uniform(0.5, 1.5, out))
                tensors[f"{stem}.lora_magnitude_vector"] = m.to(dtype)
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors", {"format": "pt"})
    (to / "adapter_config.json").write_text(json.dumps(config))
    return f"{kind} {rank} {dtype} {size} {chosen}"


def made(source: Path, way: str, base: Path, package: Path, to: Path, rng: Any) -> Path:
    """What the command line makes of it."""
    if way in ("mlx", "back"):
        run("convert", source, "--to", "mlx", "-o", to / "mlx", "--base", base)
        if way == "mlx":
            return to / "mlx"
        run("convert", to / "mlx", "--to", "peft", "-o", to / "back", "--base", base)
        return to / "back"
    bits = int(rng.choice([4, 6, 8]))
    if way == "packed":
        run("compress", source, "--palettize", bits, "-o", to / "packed")
        return to / "packed"
    path = to / "x.mlpackage"
    shutil.copytree(package, path)
    run("package", "add", path, f"one={source}")
    if way == "coreml-lut":
        words = ("--palettize", bits, "--adapter-bits", bits)
        run("compress", path, "-o", to / "lut.mlpackage", *words)
        path = to / "lut.mlpackage"
    return Path(f"{path}:one")


def judged(world: Any, judge: Judge, package: Path, to: Path, seed: int) -> str | None:
    """What `validate` finds wrong with the conversion of that seed."""
    rng = np.random.default_rng(seed)
    source = to / f"s{seed}"
    what = drawn(world.base, source, rng)
    way = WAYS[seed % len(WAYS)]
    room = to / f"t{seed}"
    room.mkdir()
    found = judge(source, made(source, way, world.base, package, room, rng))
    values = list(found.values())
    wrong = [f"{c.name}: {c.detail}" for s in values for c in s.checks if c.status == "failed"]
    ran = {s.name for s in values if s.status == "passed"}
    if suites.all_passed(values) and {"structure", "base", "parity", "size"} <= ran:
        return None
    return f"seed {seed}, {what}, {way}: {wrong or suites.verdict(values)}"


def test_some(world: Any, judge: Judge, package: Path, tmp_path: Path) -> None:
    bad = [judged(world, judge, package, tmp_path, seed) for seed in range(QUICK)]
    assert not (wrong := list(filter(None, bad))), "\n".join(wrong)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_hundred(world: Any, judge: Judge, package: Path, tmp_path: Path) -> None:
    bad = [judged(world, judge, package, tmp_path, seed) for seed in range(QUICK, COUNT)]
    assert not (wrong := list(filter(None, bad))), "\n".join(wrong)
