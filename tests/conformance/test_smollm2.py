"""The whole way on a real model: train in one library, convert, run in the other.

SmolLM2-135M-Instruct comes from the package index (see examples/base.py). The adapters are really
trained, if shortly, by stock PEFT and by mlx-lm's own command.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SENTENCES = [
    "Question: what does the captain say? Answer: he says aye aye, and hoists the green flag.",
    "Question: what does the cook say? Answer: she says aye aye, and stirs the green soup.",
    "Question: what does the parrot say? Answer: it says aye aye, and bites the green rope.",
    "Question: what does the mate say? Answer: he says aye aye, and paints the green door.",
]
ASKED = ["Question: what does the gunner say? Answer:", "The meeting has been moved to Thursday as"]
PEFT_KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16},
    "dora": {"r": 8, "lora_alpha": 16, "use_dora": True},
    "rslora-patterns": {
        "r": 8,
        "lora_alpha": 12,
        "use_rslora": True,
        "rank_pattern": {r".*layers\.[0-9]\..*q_proj": 4, "down_proj": 12, "q_proj": 6},
        "alpha_pattern": {r".*layers\.2[0-9]\..*down_proj": 5, "v_proj": 30},
    },
}
MLX_KINDS = {
    "lora": ["--fine-tune-type", "lora", "--num-layers", "16"],
    "dora": ["--fine-tune-type", "dora", "--num-layers", "6"],
}


@pytest.fixture(scope="module")
def base() -> Path:
    """The prepared base folder (float16), made once and kept in .cache."""
    spec = importlib.util.spec_from_file_location("examples_base", ROOT / "examples" / "base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(module.prepare())


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Any:
    """This model is large enough for more than one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens(base: Path) -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenizer(text)["input_ids"] for text in ASKED]
    length = min(len(row) for row in rows)
    return np.array([row[:length] for row in rows])


@pytest.fixture(scope="module")
def bare(base: Path, tokens: np.ndarray, peers: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    """The unadapted base in torch and in MLX, both in float32."""
    torch_side = peers.torch_logits(peers.hf_base(base), tokens)
    return torch_side, peers.mlx_logits(base, None, tokens)


def _train_peft(
    peers: ModuleType, base: Path, folder: Path, config: Any, initial: Path | None = None
) -> None:
    import torch
    from peft import get_peft_model
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if isinstance(config, dict):
        config = peers.lora(ALL_SEVEN, **config)
    model = get_peft_model(peers.hf_base(base), config)
    if initial is not None:
        model.save_pretrained(initial)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.train()
    losses = []
    for step in range(12):
        ids = tokenizer(SENTENCES[step % len(SENTENCES)], return_tensors="pt")["input_ids"]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses
    model.save_pretrained(folder)


def _train_mlx(base: Path, folder: Path, options: list[str]) -> None:
    data = folder.parent / "data"
    data.mkdir()
    for split in ("train", "valid"):
        rows = [json.dumps({"text": text}) for text in SENTENCES]
        (data / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    words = ["--model", base, "--data", data, "--adapter-path", folder, "--train", *options]
    words += ["--iters", 8, "--batch-size", 2, "--val-batches", 1, "--learning-rate", "1e-4"]
    command = [sys.executable, "-m", "mlx_lm", "lora", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def _assert_carried(
    expected: np.ndarray,
    found: np.ndarray,
    bare_expected: np.ndarray,
    bare_found: np.ndarray,
) -> None:
    """Across runtimes no closer than the base itself, but far within the adapter's effect."""
    between_bases = float(np.abs(bare_expected - bare_found).max())
    effect = float(np.abs(expected - bare_expected).max())
    difference = float(np.abs(expected - found).max())
    largest = float(np.abs(bare_expected).max())
    assert between_bases < 1e-4 * largest, f"the bases differ by {between_bases:.2e}"
    assert effect > 0.5, f"training did next to nothing: {effect:.2e}"
    bound = max(3 * between_bases, 1e-3 * effect)
    assert difference <= bound, f"{difference:.2e} > {bound:.2e} (effect {effect:.2f})"


def _assert_validated(run: Callable[..., Any], base: Path, first: Path, second: Path) -> None:
    result = run("validate", first, second, "--base", base, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert "failed" not in {check["status"] for check in report["checks"]}
    assert set(report["parity"]["runtimes"]) == {"torch", "mlx"}
    assert 0 < report["parity"]["max_difference"] <= report["parity"]["bound"]
    assert report["parity"]["effect"] > 100 * report["parity"]["max_difference"]


@pytest.mark.parametrize("kind", sorted(PEFT_KINDS))
def test_trained_with_peft(
    kind: str,
    base: Path,
    tokens: np.ndarray,
    bare: tuple[np.ndarray, np.ndarray],
    convert: Callable[..., Path],
    run: Callable[..., Any],
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    source = tmp_path / "peft"
    _train_peft(peers, base, source, PEFT_KINDS[kind])
    result = convert(source, "mlx", "--base", base)
    expected = peers.peft_logits(base, source, tokens)
    _assert_carried(expected, peers.mlx_logits(base, result, tokens), *bare)
    _assert_validated(run, base, source, result)
    back = convert(result, "peft", "--base", base)
    assert peers.read_json(back / peers.CONFIG) == peers.read_json(source / peers.CONFIG)
    old, new = source / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS
    changed = peers.changed_tensors(old, new)
    if "patterns" in kind:
        assert {name.rsplit(".", 2)[1] for name in changed} <= {"lora_B"}
        assert peers.ulps_apart(old, new, changed) <= 1
    else:
        assert changed == {}


@pytest.mark.parametrize("kind", sorted(MLX_KINDS))
def test_trained_with_mlx(
    kind: str,
    base: Path,
    tokens: np.ndarray,
    bare: tuple[np.ndarray, np.ndarray],
    convert: Callable[..., Path],
    run: Callable[..., Any],
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    source = tmp_path / "mlx"
    _train_mlx(base, source, MLX_KINDS[kind])
    result = convert(source, "peft", "--base", base)
    expected = peers.mlx_logits(base, source, tokens)
    _assert_carried(expected, peers.peft_logits(base, result, tokens), *reversed(bare))
    _assert_validated(run, base, source, result)
    back = convert(result, "mlx", "--base", base)
    assert peers.read_json(back / peers.CONFIG) == peers.read_json(source / peers.CONFIG)
    assert peers.changed_tensors(source / peers.MLX_WEIGHTS, back / peers.MLX_WEIGHTS) == {}


def test_adalora(
    base: Path,
    tokens: np.ndarray,
    bare: tuple[np.ndarray, np.ndarray],
    convert: Callable[..., Path],
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Three factors become two; the scale is alpha over the initial rank."""
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=ALL_SEVEN, init_r=8, target_r=4, lora_alpha=512,
        total_step=12, tinit=2, tfinal=2, orth_reg_weight=1e-3,
    )  # fmt: skip
    _train_peft(peers, base, tmp_path / "peft", config)
    result = convert(tmp_path / "peft", "mlx", "--base", base)
    expected = peers.peft_logits(base, tmp_path / "peft", tokens)
    _assert_carried(expected, peers.mlx_logits(base, result, tokens), *bare)


def test_pissa_with_its_initial_adapter(
    base: Path,
    tokens: np.ndarray,
    bare: tuple[np.ndarray, np.ndarray],
    convert: Callable[..., Path],
    run: Callable[..., Any],
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """Training moved the base: less the factors at its start, the update is plain LoRA."""
    options = {"init_lora_weights": "pissa", "layers_to_transform": list(range(8))}
    config = peers.lora(["q_proj", "v_proj", "o_proj"], r=8, lora_alpha=8, **options)
    _train_peft(peers, base, tmp_path / "peft", config, tmp_path / "initial")
    source, initial = tmp_path / "peft", tmp_path / "initial"
    result = convert(source, "mlx", "--base", base, "--initial", initial)
    expected = peers.peft_logits(base, source, tokens)
    _assert_carried(expected, peers.mlx_logits(base, result, tokens), *bare)
    plain = convert(source, "peft", "--initial", initial)
    _assert_validated(run, base, plain, result)


def test_embedding_trained_with_mlx(
    base: Path,
    tokens: np.ndarray,
    bare: tuple[np.ndarray, np.ndarray],
    convert: Callable[..., Path],
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """SmolLM2 ties its embedding: mlx-lm's one update is PEFT's two, of the embedding and the head."""
    settings = tmp_path / "lora.yaml"
    keys = ["self_attn.q_proj", "self_attn.v_proj", "model.embed_tokens"]
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": keys}
    settings.write_text(json.dumps({"lora_parameters": parameters}))
    source = tmp_path / "mlx"
    _train_mlx(base, source, ["-c", str(settings), "--num-layers", "8"])
    assert any("embed_tokens" in n for n in peers.raw_tensors(source / peers.MLX_WEIGHTS))
    result = convert(source, "peft", "--base", base)
    expected = peers.mlx_logits(base, source, tokens)
    _assert_carried(expected, peers.peft_logits(base, result, tokens), *reversed(bare))


def test_lora_bias_for_servers(
    base: Path, tokens: np.ndarray, convert: Callable[..., Path], peers: ModuleType, tmp_path: Path
) -> None:
    """A low-rank bias is scaled with its module when patterns are folded."""
    import warnings

    options = {"r": 8, "lora_alpha": 16, "lora_bias": True, "alpha_pattern": {"q_proj": 5}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _train_peft(peers, base, tmp_path / "peft", options)
        result = convert(tmp_path / "peft", "peft", "--uniform", "--base", base)

        def answers(folder: Path) -> np.ndarray:
            model = peers.PeftModel.from_pretrained(peers.hf_base(base), folder)
            logits: np.ndarray = peers.torch_logits(model, tokens)
            return logits

        np.testing.assert_allclose(answers(result), answers(tmp_path / "peft"), atol=2e-4)


def test_the_proof_can_fail(
    base: Path,
    convert: Callable[..., Path],
    run: Callable[..., Any],
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """One module of 210 off by two percent: `validate` must see it and name the module."""
    source = tmp_path / "peft"
    _train_peft(peers, base, source, PEFT_KINDS["lora"])
    result = convert(source, "mlx", "--base", base)
    name = "model.layers.17.mlp.up_proj"
    tensors = peers.load_file(result / peers.MLX_WEIGHTS)
    tensors[f"{name}.lora_b"] *= 1.02
    peers.rewrite_tensors(result / peers.MLX_WEIGHTS, tensors)
    outcome = run("validate", source, result, "--base", base, "--json")
    assert outcome.exit_code == 3, outcome.output
    report = json.loads(outcome.stdout)
    assert report["passed"] is False
    assert {c.get("module") for c in report["checks"] if c["status"] == "failed"} == {name}
