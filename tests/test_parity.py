"""Two adapters against each other: the proof sees small errors, and says what it can't see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

Cli = Callable[..., Any]
Edit = Callable[[dict[str, Any]], None]
WEIGHTS = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
HEAD = "base_model.model.lm_head.weight"


def adapter(base: Path, to: Path, **config: Any) -> Path:
    """A PEFT adapter with random values, as stock PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | config
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
        elif parameter.requires_grad:
            parameter.data = parameter.data * (1 + 0.05 * torch.randn_like(parameter))
    model.save_pretrained(to, save_embedding_layers=False)
    return to


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny llamas (plain, tied, packed) and adapters on them; tests must not change them."""
    from click.testing import CliRunner
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from loraduct.cli import main

    here = tmp_path_factory.mktemp("parity")
    for name, tied in (("base", False), ("tied", True)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0}, initializer_range=0.2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(here / name)
        edited = json.loads((here / name / "config.json").read_text()) | {"rope_theta": 500.0}
        (here / name / "config.json").write_text(json.dumps(edited))
    adapter(here / "base", here / "peft")
    adapter(here / "base", here / "dora-peft", use_dora=True)
    for name in ("", "dora-"):
        words = ["convert", here / f"{name}peft", "--to", "mlx", "-o", here / f"{name}mlx"]
        done = CliRunner().invoke(main, [str(w) for w in [*words, "--base", here / "base"]])
        assert done.exit_code == 0, done.stderr
    model, settings = quantize_model(*load_model(here / "base"), 32, 4)
    (here / "packed").mkdir()
    save_model(here / "packed", model)
    save_config(settings, here / "packed" / "config.json")
    return here


def changed(folder: Path, to: Path, edit: Edit) -> Path:
    """A copy of an adapter with its tensors edited; other tools keep no record of ours."""
    shutil.copytree(folder, to)
    file = next(to / n for n in WEIGHTS.values() if (to / n).exists())
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt" if file.name == WEIGHTS["peft"] else "mlx"})
    return to


def cast(*, to: torch.dtype, factor: float = 1.0) -> Edit:
    """Cast every tensor, every ``b`` scaled before."""

    def edit(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            scaled = tensor.double() * (factor if ".lora_b" in name.lower() else 1.0)
            tensors[name] = scaled.to(to)

    return edit


@pytest.fixture
def proof(shop: Path, cli: Cli) -> Callable[..., dict[str, Any]]:
    """Validate, in strict JSON; the document, its checks by (name, status)."""

    def run(*args: object, base: Path | None = None) -> dict[str, Any]:
        result = cli("validate", *args, "--base", base or shop / "base", "--json")
        assert result.exit_code in (0, 3), result.output + str(result.exception)

        def constant(text: str) -> None:
            pytest.fail(f"the JSON holds {text}")

        document: dict[str, Any] = json.loads(result.stdout, parse_constant=constant)
        assert document["passed"] == (result.exit_code == 0)
        return document | {"by": {(c["name"], c["status"]): c for c in document["checks"]}}

    return run


# --- how much may be off --------------------------------------------------------------------


def test_a_small_scale_error_in_16_bits_fails(
    shop: Path, proof: Callable[..., Any], tmp_path: Path
) -> None:
    right = changed(shop / "peft", tmp_path / "right", cast(to=torch.bfloat16))
    wrong = changed(shop / "peft", tmp_path / "wrong", cast(to=torch.bfloat16, factor=1.007))
    d = proof(right, wrong)
    assert ("dW", "failed") in d["by"]
    assert ("logits", "failed") in d["by"]


@pytest.mark.parametrize("side", ["peft", "mlx"])
def test_widening_is_exact_and_gets_no_allowance(
    shop: Path, proof: Callable[..., Any], tmp_path: Path, side: str
) -> None:
    """bf16 against float32 of the same values; then off by less than dW's bounds can see."""
    narrow = changed(shop / "peft", tmp_path / "narrow", cast(to=torch.bfloat16))

    def widened(factor: float) -> Edit:
        def edit(tensors: dict[str, Any]) -> None:
            cast(to=torch.bfloat16)(tensors)
            cast(to=torch.float32, factor=factor)(tensors)

        return edit

    d = proof(narrow, changed(shop / side, tmp_path / "wide", widened(1.0)))
    assert d["passed"]
    n = d["parity"]
    usual = max(3 * n["base_max_difference"], 1e-3 * n["effect"]) if side == "mlx" else 1e-4
    assert n["bound"] == pytest.approx(usual)
    d = proof(narrow, changed(shop / side, tmp_path / "off", widened(1.0025)))
    assert ("dW", "passed") in d["by"]
    detail = d["by"]["logits", "failed"]["detail"]
    assert "dW agrees" not in detail
    assert "the module that differs most is model.layers." in detail
    assert "relative error 2.5e-03" in detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["peft", "mlx"])
def test_measured_rounding_is_allowed_for(
    shop: Path, proof: Callable[..., Any], tmp_path: Path, side: str, dtype: torch.dtype
) -> None:
    rounded = changed(shop / side, tmp_path / "rounded", cast(to=dtype))
    d = proof(shop / "peft", rounded)
    assert d["passed"], d["checks"]
    assert d["parity"]["bound"] <= 8e-3 * d["parity"]["effect"]


# --- replaced weights -----------------------------------------------------------------------


@pytest.fixture
def headed(shop: Path, tmp_path: Path) -> Path:
    return adapter(shop / "base", tmp_path / "headed", modules_to_save=["lm_head"])


def base_head(shop: Path) -> Any:
    return load_file(shop / "base" / "model.safetensors")["lm_head.weight"]


def test_lost_training_of_a_saved_module_fails(
    shop: Path, headed: Path, proof: Callable[..., Any], tmp_path: Path
) -> None:
    """The head is 5 % away from the base's: without that, the whole weight is 5 % off, not 100 %."""
    assert proof(headed, headed)["passed"]
    lost = changed(headed, tmp_path / "lost", lambda t: t.update({HEAD: base_head(shop)}))
    d = proof(headed, lost)
    assert d["by"]["dW", "failed"]["module"] == "lm_head.weight"
    (delta,) = [m for m in d["parity"]["modules"] if m["module"] == "lm_head.weight"]
    assert delta["error"] == pytest.approx(1.0)
    assert delta["gain"] == pytest.approx(0.0)


@pytest.mark.parametrize(("moved", "status"), [(0.05, "passed"), (1e-4, "warning")])
def test_rounding_of_a_saved_module(
    shop: Path,
    headed: Path,
    proof: Callable[..., Any],
    tmp_path: Path,
    moved: float,
    status: str,
) -> None:
    """bf16 rounds the whole weight: beside a large update that is little, beside a small one all."""
    head = base_head(shop)
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(2))
    wide = changed(headed, tmp_path / "w", lambda t: t.update({HEAD: head * (1 + moved * noise)}))
    narrow = changed(wide, tmp_path / "n", lambda t: t.update({HEAD: t[HEAD].bfloat16()}))
    d = proof(wide, narrow)
    assert ("dW", "failed") not in d["by"]
    if status == "warning":
        assert d["by"]["dW", "warning"]["module"] == "lm_head.weight"
        assert "not decided" in d["by"]["dW", "warning"]["detail"]
        assert next(m for m in d["parity"]["modules"] if "lm_head" in m["module"])["fits"] is None
    else:
        assert ("dW", "warning") not in d["by"]


# --- logits ---------------------------------------------------------------------------------


def test_top1_compares_where_the_bound_leaves_no_doubt() -> None:
    from loraduct.validation.logits import top1

    x, swapped = np.array([[0.0, 1.0, 3.0]]), np.array([[0.0, 3.0, 1.0]])
    assert top1([(x, swapped)], 0.1) == (0.0, 1)
    assert top1([(x, x)], 0.1) == (1.0, 1)
    assert top1([(x, swapped)], 1.0) == (None, 0)


def test_no_decided_position_is_skipped_not_passed(
    shop: Path, proof: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraduct.validation.parity.SAME_RUNTIME", 1e6)
    d = proof(shop / "peft", shop / "peft")
    assert ("top-1", "skipped") in d["by"]
    assert d["parity"]["top1_agreement"] is None
    assert "top-1 was not compared" in d["verdict"]


@pytest.mark.filterwarnings("ignore:.*overflow.*:RuntimeWarning")
def test_logits_that_are_no_numbers_fail(
    shop: Path, proof: Callable[..., Any], tmp_path: Path
) -> None:
    """Finite factors whose product is not: both sides agree, and both are useless."""
    huge = changed(shop / "peft", tmp_path / "huge", cast(to=torch.float32, factor=1e38))
    d = proof(huge, huge)
    assert not d["passed"]
    assert "A computes NaN or Inf" in d["by"]["logits", "failed"]["detail"]
    assert ("top-1", "failed") in d["by"]
    assert d["parity"]["max_difference"] is None


def test_equal_dw_with_unequal_logits_blames_the_runtimes(
    shop: Path, proof: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraduct.validation.parity.EFFECT_FACTOR", 0.0)
    monkeypatch.setattr("loraduct.validation.parity.BASE_FACTOR", 0.0)
    d = proof(shop / "peft", shop / "mlx")
    assert "dW agrees in every module" in d["by"]["logits", "failed"]["detail"]


# --- a packed base --------------------------------------------------------------------------


def test_dora_on_a_packed_base_is_compared_by_its_parts(
    shop: Path, proof: Callable[..., Any], tmp_path: Path
) -> None:
    def scaled(factor: float) -> Edit:
        name = "model.layers.1.mlp.down_proj.m"
        return lambda t: t.update({name: t[name] * factor})

    source, base = shop / "dora-mlx", shop / "packed"
    d = proof(source, source, base=base)
    assert d["passed"]
    assert all(m["note"] == "DoRA, by its parts" for m in d["parity"]["modules"])
    d = proof(source, changed(source, tmp_path / "far", scaled(1.05)), base=base)
    assert d["by"]["dW", "failed"]["module"] == "model.layers.1.mlp.down_proj"
    assert "magnitudes" in d["by"]["dW", "failed"]["detail"]
    d = proof(source, changed(source, tmp_path / "near", cast(to=torch.bfloat16)), base=base)
    assert "dW was not compared" in d["by"]["dW", "skipped"]["detail"]
    assert next(m for m in d["parity"]["modules"] if m["fits"] is None)["error"] is None
    assert d["verdict"].startswith("FAILED") or "dW was not compared" in d["verdict"]


def test_a_packed_base_computes_in_float32(
    shop: Path, proof: Callable[..., Any], tmp_path: Path
) -> None:
    """Scales stored in 16 bits would pull the whole computation down to 16 bits."""
    from loraduct.formats import base as base_folder
    from loraduct.validation import runtimes

    base = tmp_path / "base"
    shutil.copytree(shop / "packed", base)
    tensors = {
        k: v.bfloat16() if v.is_floating_point() else v
        for k, v in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", {"format": "mlx"})
    (logits,) = runtimes.run("mlx", base_folder.read(base), None, [[1, 2, 3]]).logits
    assert not np.array_equal(logits, torch.from_numpy(logits).bfloat16().float().numpy())
    assert proof(shop / "mlx", shop / "mlx", base=base)["passed"]


def test_torch_is_not_asked_to_load_a_packed_base(shop: Path, proof: Callable[..., Any]) -> None:
    d = proof(shop / "peft", shop / "mlx", base=shop / "packed")
    assert ("dW", "passed") in d["by"]
    assert "packed by mlx-lm" in d["by"]["logits", "skipped"]["detail"]
    assert d["verdict"].startswith("passed, but logits were not compared")


# --- which file is run ----------------------------------------------------------------------


def test_a_checkpoint_is_what_the_runtime_loads(
    shop: Path, proof: Callable[..., Any], cli: Cli, tmp_path: Path
) -> None:
    """The folder's own weights are something else than the checkpoint that is asked about."""
    folder = changed(
        shop / "mlx", tmp_path / "m", lambda t: t.update({k: v * 2 for k, v in t.items()})
    )
    checkpoint = folder / "0000100_adapters.safetensors"
    shutil.copy(shop / "mlx" / WEIGHTS["mlx"], checkpoint)
    d = proof(shop / "peft", checkpoint)
    assert d["passed"], d["checks"]
    assert d["weights"][1] == str(checkpoint)
    shutil.copy(folder / WEIGHTS["mlx"], checkpoint)
    shutil.copy(shop / "mlx" / WEIGHTS["mlx"], folder)
    assert ("logits", "failed") in proof(shop / "peft", checkpoint)["by"]
    text = cli("validate", checkpoint, "--base", shop / "base").stdout
    assert f"its weights are {checkpoint}" in text


def test_an_old_npz_is_proven_with_its_scale(
    shop: Path, proof: Callable[..., Any], cli: Cli, tmp_path: Path
) -> None:
    tensors = load_file(shop / "mlx" / WEIGHTS["mlx"])
    scale = json.loads((shop / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    np.savez(tmp_path / "adapters.npz", **{k: v.numpy() for k, v in tensors.items()})
    d = proof(shop / "peft", tmp_path, "--scale", scale["scale"])
    assert d["passed"], d["checks"]
    assert ("logits", "passed") in d["by"]
    assert ("dW", "failed") in proof(tmp_path, shop / "mlx")["by"]
    result = cli("validate", shop / "mlx", "--base", shop / "base", "--scale", 3)
    assert result.exit_code == 1
    assert "--scale is for an old adapters.npz" in result.stderr


# --- what PEFT makes of it ------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "saved"],
)
def test_a_tied_head(
    shop: Path, proof: Callable[..., Any], tmp_path: Path, config: dict[str, Any]
) -> None:
    """Stock PEFT gives the head an adapter of its own though its weight is the embedding's."""
    tied = shop / "tied"
    one = adapter(tied, tmp_path / "one", **config)
    assert proof(one, base=tied)["passed"]
    d = proof(one, one, base=tied)
    assert d["passed"], d["checks"]
    assert d["parity"]["effect"] > 0.1

    def edit(tensors: dict[str, Any]) -> None:
        name = next(n for n in tensors if "lm_head" in n and "lora_A" not in n)
        tensors[name] = tensors[name] * 1.1

    d = proof(one, changed(one, tmp_path / "two", edit), base=tied)
    assert d["by"]["dW", "failed"]["module"].startswith("lm_head")


def test_modules_without_tensors(shop: Path, proof: Callable[..., Any], tmp_path: Path) -> None:
    """PEFT warns of them; they have no effect, unless they start at random."""

    def edit(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if "layers.1.mlp" in n]:
            del tensors[name]

    fewer = changed(shop / "peft", tmp_path / "fewer", edit)
    d = proof(fewer, fewer)
    assert d["passed"], d["checks"]
    assert d["by"]["targets", "warning"]["adapter"] in ("A", "B")
    file = fewer / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": False}))
    d = proof(fewer, fewer)
    assert d["by"]["targets", "failed"]["module"] == "model.layers.1.mlp.down_proj"
    assert "random numbers" in d["by"]["targets", "failed"]["detail"]


def test_an_adapter_name_in_the_keys_fails(
    shop: Path, proof: Callable[..., Any], tmp_path: Path
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".mine.weight")] = tensors.pop(name)

    named = changed(shop / "peft", tmp_path / "named", edit)
    d = proof(shop / "peft", named)
    assert "convert --to peft" in d["by"]["logits", "failed"]["detail"]
