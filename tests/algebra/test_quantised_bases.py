"""Bases that AutoAWQ, AutoGPTQ and bitsandbytes have packed: refused by every verb, with the way out.

The folders are made here as these tools write them: of each the one that transformers reads, with
``quantization_config`` in the config, and the older one. Layouts: AutoAWQ ``WQLinear_GEMM``,
AutoGPTQ ``QuantLinear``, bitsandbytes ``QuantState.as_dict(packed=True)`` and ``Linear8bitLt``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fusing
import numpy as np
import pytest
import safetensors.numpy as st

GROUP = 32
Arrays = dict[str, np.ndarray]


def words(codes: np.ndarray, order: list[int] | range) -> np.ndarray:
    """int32 of eight codes of 4 bits along the last axis; place i holds code order[i]."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)[..., list(order)].astype(np.uint32)
    return (eights << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)


def grouped(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes (in, out), zeros (groups, out), scales (groups, out)) in 4 bits, along the inputs."""
    parts = weight.T.reshape(-1, GROUP, len(weight))
    low, high = parts.min(1), parts.max(1)
    scales = (high - low) / 15
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint(parts / scales[:, None]) + zeros[:, None], 0, 15)
    return codes.reshape(weight.T.shape), zeros, scales.astype(np.float16)


def awq(name: str, weight: np.ndarray) -> Arrays:
    codes, zeros, scales = grouped(weight)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {f"{name}.qweight": words(codes, order), f"{name}.qzeros": words(zeros, order),
            f"{name}.scales": scales}  # fmt: skip


def gptq(name: str, weight: np.ndarray) -> Arrays:
    codes, zeros, scales = grouped(weight)
    return {f"{name}.qweight": np.ascontiguousarray(words(codes.T, range(8)).T),
            f"{name}.qzeros": words(np.maximum(zeros - 1, 0), range(8)), f"{name}.scales": scales,
            f"{name}.g_idx": (np.arange(weight.shape[1]) // GROUP).astype(np.int32)}  # fmt: skip


def nf4(name: str, weight: np.ndarray) -> Arrays:
    blocks = weight.reshape(-1, 64)
    most = np.abs(blocks).max(1)
    levels = np.linspace(-1, 1, 16, dtype=np.float32)  # their places don't matter here
    codes = np.abs((blocks / most[:, None])[..., None] - levels).argmin(-1).reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(weight.shape)}
    return {f"{name}.weight": (codes[:, :1] * 16 + codes[:, 1:]).astype(np.uint8),
            f"{name}.weight.absmax": most.astype(np.float32), f"{name}.weight.quant_map": levels,
            f"{name}.weight.quant_state.bitsandbytes__nf4":
                np.frombuffer(json.dumps(state).encode(), np.uint8)}  # fmt: skip


def int8(name: str, weight: np.ndarray) -> Arrays:
    most = np.abs(weight).max(1)
    return {f"{name}.weight": np.rint(weight * (127 / most)[:, None]).astype(np.int8),
            f"{name}.SCB": most.astype(np.float32),
            f"{name}.weight_format": np.zeros((), np.uint8)}  # fmt: skip


HF_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
          "version": "gemm", "modules_to_not_convert": None}  # fmt: skip
OLD_AWQ = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
HF_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False,
           "checkpoint_format": "gptq"}  # fmt: skip
OLD_GPTQ = {"bits": 4, "group_size": GROUP, "damp_percent": 0.01, "desc_act": False, "sym": False,
            "true_sequential": True}  # fmt: skip
HF_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
          "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float16"}  # fmt: skip
OLD_NF4 = {k: v for k, v in HF_NF4.items() if k != "quant_method"}
# name -> (method, packing, config's settings, other files, the weights' file, who says so)
LAYOUTS: dict[str, tuple[str, Any, dict[str, Any] | None, dict[str, Any], str, str]] = {
    "awq": ("awq", awq, HF_AWQ, {}, "model.safetensors", "config.json"),
    "awq, older": ("awq", awq, None, {"quant_config.json": OLD_AWQ}, "model.safetensors",
                   "quant_config.json"),
    "awq, tensors alone": ("awq", awq, None, {}, "model.safetensors", "model.safetensors"),
    "gptq": ("gptq", gptq, HF_GPTQ, {"quantize_config.json": OLD_GPTQ}, "model.safetensors",
             "config.json"),
    "gptq, older": ("gptq", gptq, None, {"quantize_config.json": OLD_GPTQ},
                    "gptq_model-4bit-32g.safetensors", "quantize_config.json"),
    "gptq, tensors alone": ("gptq", gptq, None, {}, "model.safetensors", "model.safetensors"),
    "nf4": ("bitsandbytes", nf4, HF_NF4, {}, "model.safetensors", "config.json"),
    "nf4, older": ("bitsandbytes", nf4, OLD_NF4, {}, "model.safetensors", "config.json"),
    "nf4, tensors alone": ("bitsandbytes", nf4, None, {}, "model.safetensors", "model.safetensors"),
    "int8": ("bitsandbytes", int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {},
             "model.safetensors", "config.json"),
    "int8, older": ("bitsandbytes", int8, {"load_in_8bit": True, "llm_int8_threshold": 6.0}, {},
                    "model.safetensors", "config.json"),
    "int8, tensors alone": ("bitsandbytes", int8, None, {}, "model.safetensors",
                            "model.safetensors"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in plain numbers and an adapter of it."""
    home = tmp_path_factory.mktemp("plain")
    base = fusing.saved("llama", home / "base")
    return base, fusing.trained(base, home / "adapter", target_modules=["q_proj", "down_proj"])


@pytest.fixture
def packed(plain: tuple[Path, Path], tmp_path: Path, layout: str) -> Path:
    _, pack, settings, files, file, _ = LAYOUTS[layout]
    folder = tmp_path / "packed"
    folder.mkdir()
    config = json.loads((plain[0] / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    for name, value in {"config.json": config, **files}.items():
        (folder / name).write_text(json.dumps(value))
    made: Arrays = {}
    for name, value in st.load_file(plain[0] / "model.safetensors").items():
        if value.ndim == 2 and ".layers." in name:
            made |= pack(name.removesuffix(".weight"), value)
        else:
            made[name] = value.astype(np.float16)
    st.save_file(made, folder / file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refused_by_every_verb_with_the_way_out(
    cli: Any, plain: tuple[Path, Path], packed: Path, tmp_path: Path, layout: str
) -> None:
    method, *_, says = LAYOUTS[layout]
    base, adapter = plain
    for verb in (
        ["fuse", adapter, "--base", packed],
        ["extract", packed, base, "--rank", 4],
        ["extract", base, packed, "--rank", 4],
    ):
        done = cli(*verb, "-o", tmp_path / "out")
        assert done.exit_code == 1, done.output
        assert done.stderr.startswith(f"error: {packed / says}: is quantised by {method}: give the")
        assert "unquantised model that it was made from" in done.stderr
        assert ("model.dequantize()" in done.stderr) == (method == "bitsandbytes")
        assert done.stderr.count("\n") == 1
        assert [p.name for p in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_beside_plain_weights_speak_of_others(
    cli: Any, plain: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """transformers reads the config alone, and so the weights are what they are."""
    base, adapter = plain
    there = tmp_path / "base"
    shutil.copytree(base, there)
    (there / name).write_text(json.dumps(OLD_GPTQ))
    done = cli("fuse", adapter, "--base", there, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    alone = cli("fuse", adapter, "--base", base, "-o", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_transformers_unpacks_what_we_say_it_does() -> None:
    """The way out that is named for bitsandbytes exists, and for AWQ and GPTQ it doesn't."""
    auto = pytest.importorskip("transformers.quantizers.auto")
    from transformers.quantizers.base import HfQuantizer

    found = {n: c._dequantize is not HfQuantizer._dequantize
             for n, c in auto.AUTO_QUANTIZER_MAPPING.items()}  # fmt: skip
    assert (found["bitsandbytes_4bit"], found["bitsandbytes_8bit"]) == (True, True)
    assert (found["awq"], found["gptq"]) == (False, False)
