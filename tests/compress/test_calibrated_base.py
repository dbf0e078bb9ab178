"""Bases compressed with a text: what it says is lost, and what it gains, by stock transformers and mlx."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import families  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[2]
TEXT = ROOT / "examples" / "data" / "calibration.txt"
ROWS = [families.tokens(n)[0].tolist() for n in (30, 28, 26)]  # the third is for the check
LOUD = 40.0  # times the usual: what some channels of the inputs are


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a base some of whose channels are loud behind its norms, rows of tokens)."""
    room = tmp_path_factory.mktemp("calibrated")
    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**families.COMMON | sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[::8] *= LOUD
            elif parameter.dim() > 1:
                parameter.mul_(4.0)
            if name.split(".")[-2].split("_")[0] in ("q", "k", "v", "gate", "up"):
                parameter[:, ::8] /= LOUD / 4  # what reads loud channels is small
    model.save_pretrained(folder := room / "base")
    rows = room / "rows.jsonl"
    rows.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ROWS))
    return folder, rows


def logs(folder: Path, ids: list[int], weights: dict[str, Any] | None = None) -> Any:
    """Log-probabilities by stock transformers, (tokens, vocabulary) float64; with other weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in (weights or {}).items():
            own[name].copy_(torch.from_numpy(value))
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def divergence(p: Any, q: Any) -> float:
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))


def loss(logs_: Any, ids: list[int]) -> float:
    return float(-logs_[:-1].gather(1, torch.tensor(ids)[1:, None]).mean())


def mlx_values(folder: Path) -> dict[str, Any]:
    """What mlx computes with in place of each packed weight, by its name."""
    import mlx.core as mx

    said = json.loads((folder / "config.json").read_text())["quantization"]
    stored: Any = {}
    for file in folder.glob("*.safetensors"):
        stored |= mx.load(str(file))
    found = {}
    for name in [n.removesuffix(".scales") for n in stored if n.endswith(".scales")]:
        how = {"group_size": said["group_size"], "bits": said["bits"], **said.get(name, {})}
        parts = [stored[f"{name}.{p}"] for p in ("weight", "scales", "biases")]
        dense = mx.dequantize(*parts, how["group_size"], how["bits"])
        found[f"{name}.weight"] = np.array(dense.astype(mx.float32))
    return found


def compressed(cli: Cli, folder: Path, out: Path, *words: Any) -> dict[str, Any]:
    done = cli("compress", folder, "-o", out, "--json", *words)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("how", [
    ("--quantize", "mlx4", "--group-size", "32"),
    ("--bits-per-weight", "4.5", "--group-size", "32"),
])  # fmt: skip
def test_what_is_said_to_be_lost_is_what_torch_finds(
    world: tuple[Path, Path], cli: Cli, tmp_path: Path, how: tuple[str, ...]
) -> None:
    pytest.importorskip("mlx")
    folder, rows = world
    said = compressed(cli, folder, tmp_path / "out", *how, "--calibrate", rows)
    (quality,) = said["quality"]
    p, q = logs(folder, ROWS[2]), logs(folder, ROWS[2], mlx_values(tmp_path / "out"))
    assert quality["tokens"] == len(ROWS[2])
    assert quality["kl"] == pytest.approx(divergence(p, q), rel=1e-3)
    assert quality["before"] == pytest.approx(np.exp(loss(p, ROWS[2])), rel=1e-4)
    assert quality["after"] == pytest.approx(np.exp(loss(q, ROWS[2])), rel=1e-4)


@pytest.mark.parametrize("how", [
    ("--quantize", "mlx3", "--group-size", "32"),
    ("--palettize", "3", "--expanded"),
    ("--quantize", "int4", "--expanded"),
    ("--bits-per-weight", "4", "--expanded"),
])  # fmt: skip
def test_a_text_lessens_what_is_lost(
    world: tuple[Path, Path], cli: Cli, tmp_path: Path, how: tuple[str, ...]
) -> None:
    """Where inputs differ: on tokens that were not calibrated with."""
    pytest.importorskip("mlx")
    folder, rows = world
    p, lost = logs(folder, ROWS[2]), {}
    for name, more in {"without": [], "with": ["--calibrate", rows]}.items():
        out = tmp_path / name
        said = compressed(cli, folder, out, *how, *more)
        q = logs(out, ROWS[2]) if "--expanded" in how else logs(folder, ROWS[2], mlx_values(out))
        lost[name] = divergence(p, q)
        assert bool(said["quality"]) == bool(more)
    assert lost["with"] < 0.8 * lost["without"], lost


@pytest.fixture
def smollm2() -> tuple[Path, list[int]]:
    """The real base, and tokens of a page that is not calibrated with."""
    pytest.importorskip("mlx")
    from transformers import AutoTokenizer

    base = ROOT / ".cache" / "smollm2-135m-instruct"
    if not (base / "config.json").exists():
        pytest.skip("needs the base that `make demo` makes")
    page = (ROOT / "examples" / "data" / "page.txt").read_text()
    return base, AutoTokenizer.from_pretrained(base)(page)["input_ids"][:256]


@pytest.mark.heavy
def test_smollm2_packed_to_a_budget_loses_less_with_a_text(
    smollm2: tuple[Path, list[int]], cli: Cli, tmp_path: Path
) -> None:
    """With the values that mlx computes with; sizes as asked."""
    base, ids = smollm2
    p, lost = logs(base, ids), {}
    for name, more in {"without": [], "with": ["--calibrate", TEXT]}.items():
        said = compressed(cli, base, tmp_path / name, "--bits-per-weight", 3.7, *more)
        assert said["bits_per_weight"] <= 3.7
        lost[name] = divergence(p, logs(base, ids, mlx_values(tmp_path / name)))
    assert lost["with"] < 0.8 * lost["without"], lost


@pytest.mark.heavy
def test_smollm2_mixed_is_no_worse_than_one_width_of_its_size(
    smollm2: tuple[Path, list[int]], cli: Cli, tmp_path: Path
) -> None:
    """4.5 bits, which are 4 with scales and biases."""
    base, ids = smollm2
    p, lost = logs(base, ids), {}
    for name, how in {"mixed": ["--bits-per-weight", 4.5], "one": ["--quantize", "mlx4"]}.items():
        said = compressed(cli, base, tmp_path / name, *how, "--calibrate", TEXT)
        assert said["bits_per_weight"] <= 4.5
        lost[name] = divergence(p, logs(base, ids, mlx_values(tmp_path / name)))
    assert lost["mixed"] <= lost["one"], lost
