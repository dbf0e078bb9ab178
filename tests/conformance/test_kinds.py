"""LoRA beside linear layers, and the variants of LoRA: each against what stock PEFT computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Convert = Callable[..., Path]
Train = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def carried(
    tiny: Tiny, convert: Convert, zoo: ModuleType, peers: ModuleType
) -> Callable[..., Path]:
    """To MLX: the logits of stock mlx-lm are those of stock PEFT. Returns the MLX folder."""

    def check(source: Path, *options: object, base: str = "llama") -> Path:
        path = tiny(base).path
        expected = peers.torch_logits(
            peers.PeftModel.from_pretrained(peers.hf_base(path), source), zoo.TOKENS
        )
        plain = peers.torch_logits(peers.hf_base(path), zoo.TOKENS)
        there = convert(source, "mlx", "--base", path, *options)
        peers.assert_same_logits(peers.mlx_logits(path, there, zoo.TOKENS), expected, plain)
        return there

    return check


def test_embedding(
    train: Train, carried: Callable[..., Path], convert: Convert, tiny: Tiny, peers: ModuleType
) -> None:
    """lora_embedding_A and B have no .weight, and mlx-lm's lie the other way round (trap 14)."""
    source = train(["q_proj", "embed_tokens"])
    back = convert(carried(source), "peft", "--base", tiny("llama").path)
    changed = peers.changed_tensors(source / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS)
    assert set(changed.values()) == {"gone"}  # the copy of the base's own embedding
    assert all(name.endswith("base_layer.weight") for name in changed)


def test_embedding_of_a_tied_base(train: Train, refused: Callable[..., str], tiny: Tiny) -> None:
    """PEFT moves the input side only, mlx-lm would move both (trap 26)."""
    source = train(["q_proj", "embed_tokens"], base="qwen2")
    refused(source, "mlx", "--base", tiny("qwen2").path, saying="tie_word_embeddings")


def test_dora_of_an_embedding(train: Train, refused: Callable[..., str], tiny: Tiny) -> None:
    """One magnitude a dimension in PEFT, one a token in mlx-lm (trap 13)."""
    source = train(["q_proj", "embed_tokens"], use_dora=True)
    refused(source, "mlx", "--base", tiny("llama").path, saying="magnitude is per dimension")


class Mixed(nn.Module):
    """Everything PEFT's LoRA fits on, in one small model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.line = nn.Conv1d(6, 8, 3, padding=1)
        self.plane = nn.Conv2d(1, 5, (3, 2), padding=1)
        self.space = nn.Conv3d(1, 3, 2)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.line(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        x = x + self.plane(x[:, None])[:, 0, : x.shape[1], : x.shape[2]]
        cube = x[:, None, :, :, None].expand(-1, -1, -1, -1, 2)
        x = x + self.space(cube).mean((1, 2, 3, 4))[:, None, None]
        return self.last(self.attend(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("options", [[], ["--uniform"], ["--dtype", "f32"]])
@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_and_attention(
    dora: bool, options: list[str], convert: Convert, peers: ModuleType, tmp_path: Path
) -> None:
    """Other layouts stay what they are in PEFT, ranks and scales included."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def base() -> nn.Module:
        torch.manual_seed(3)
        return Mixed().eval()

    targets = ["embed", "line", "plane", "space", "last"] + ([] if dora else ["attend"])
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=targets, use_dora=dora,
        rank_pattern={"plane": 3, "embed": 4}, alpha_pattern={"line": 1},
    )  # fmt: skip
    model = get_peft_model(base(), config)
    peers.randomise_peft(model)
    model.save_pretrained(tmp_path / "peft")
    tokens = torch.arange(18).reshape(2, 9) % 11
    with torch.no_grad():
        expected, plain = model.eval()(tokens), base()(tokens)
    result = convert(tmp_path / "peft", "peft", *options)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base(), result).eval()(tokens)
    assert float((expected - plain).abs().max()) > 0.01
    assert float((found - expected).abs().max()) < 1e-5
    if options == ["--uniform"]:
        assert not peers.read_json(result / peers.CONFIG)["rank_pattern"]


@pytest.mark.parametrize("kind", ["line", "attend"])
def test_what_mlx_lm_does_not_have(
    kind: str, refused: Callable[..., str], peers: ModuleType, tmp_path: Path
) -> None:
    """Convolutions and attention as one module, refused by name."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(Mixed(), LoraConfig(target_modules=[kind])).save_pretrained(tmp_path / "peft")
    names = tmp_path / "names.json"
    names.write_text('{"line": "line", "attend": "attend", "attend.base_layer.out_proj": "o"}')
    if kind == "line":
        names.write_text('{"line": "line"}')
    else:
        names.write_text(
            '{"attend": "attend", "attend.base_layer.out_proj": "attend.base_layer.out_proj"}'
        )
    saying = {"line": "convolution", "attend": "MultiheadAttention"}[kind]
    refused(tmp_path / "peft", "mlx", "--name-map", names, saying=saying)


def test_trained_tokens_stay(
    train: Train, convert: Convert, tiny: Tiny, zoo: ModuleType, peers: ModuleType
) -> None:
    """Replacement rows and their indices, from PEFT to PEFT (trap 9)."""
    source = train(["q_proj"], trainable_token_indices=[5, 9])
    result = convert(source, "peft", "--dtype", "f32")
    assert peers.read_json(result / peers.CONFIG)["trainable_token_indices"] == [5, 9]
    base = tiny("llama").path
    np.testing.assert_array_equal(
        peers.peft_logits(base, result, zoo.TOKENS), peers.peft_logits(base, source, zoo.TOKENS)
    )


def test_trained_tokens_without_their_indices(
    train: Train, refused: Callable[..., str], peers: ModuleType
) -> None:
    """The file has rows, the config one index fewer: which rows they are can't be told."""
    source = train(["q_proj"], trainable_token_indices=[5, 9])
    peers.edit_json(source / peers.CONFIG, trainable_token_indices=[5])
    refused(source, "peft", saying="trainable_token_indices")


def test_trap_32_alora(
    train: Train, convert: Convert, attempt: Callable[..., Any], tiny: Tiny, peers: ModuleType
) -> None:
    """It acts after its invocation only: kept in PEFT, made always-on for MLX only when asked."""
    base = tiny("llama").path
    source = train(["q_proj"], alora_invocation_tokens=[5, 6])
    kept = convert(source, "peft", "--dtype", "f32")
    assert peers.read_json(kept / peers.CONFIG)["alora_invocation_tokens"] == [5, 6]
    outcome = attempt(source, "mlx", "--base", base)
    assert outcome.code == 1
    assert "aLoRA" in outcome.err
    there = convert(source, "mlx", "--base", base, "--always-on")
    peers.edit_json(source / peers.CONFIG, alora_invocation_tokens=None)
    peers.assert_same_deltas(peers.mlx_deltas(base, there), peers.peft_deltas(base, source))


def test_trap_33_layer_replication(train: Train, convert: Convert, peers: ModuleType) -> None:
    """Layers are counted in the repeated base: the config that says so stays."""
    source = train(["q_proj"], layer_replication=[[0, 2], [1, 3]])
    result = convert(source, "peft", "--dtype", "f32")
    assert peers.read_json(result / peers.CONFIG)["layer_replication"] == [[0, 2], [1, 3]]
    assert not peers.changed_tensors(source / peers.PEFT_WEIGHTS, result / peers.PEFT_WEIGHTS)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("way", ["pissa", "olora", "pissa_niter_2"])
def test_trap_11_with_the_initial_adapter(
    way: str,
    rslora: bool,
    tiny: Tiny,
    carried: Callable[..., Path],
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """The factors before training are subtracted: plain LoRA of twice the rank, exactly."""
    from peft import get_peft_model

    base = tiny("llama").path
    torch.manual_seed(0)
    config = peers.lora(["q_proj", "v_proj"], init_lora_weights=way, use_rslora=rslora)
    model = get_peft_model(peers.hf_base(base), config)
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
                )
    model.save_pretrained(tmp_path / "peft")
    expected = peers.torch_logits(model, zoo.TOKENS)
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    there = convert(tmp_path / "peft", "mlx", "--base", base, "--initial", tmp_path / "initial")
    peers.assert_same_logits(peers.mlx_logits(base, there, zoo.TOKENS), expected, plain)
    plainly = convert(tmp_path / "peft", "peft", "--initial", tmp_path / "initial")
    assert peers.read_json(plainly / peers.CONFIG)["init_lora_weights"] is True
    peers.assert_same_logits(peers.peft_logits(base, plainly, zoo.TOKENS), expected, plain)
    if way != "pissa_niter_2":  # a random projection: not to be had a second time
        again = convert(tmp_path / "peft", "mlx", "--base", base)
        peers.assert_same_logits(peers.mlx_logits(base, again, zoo.TOKENS), expected, plain)


def _qalora_forward(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What stock PEFT adds to a layer's output: its variant, which it uses on GPTQ layers only."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.variants import QALoraLinearVariant

    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["0"], use_qalora=True, qalora_group_size=16
    )
    layer = nn.Sequential(nn.Linear(x.shape[1], b.shape[0]))
    module = get_peft_model(layer, config).double().eval().base_model.model[0]
    QALoraLinearVariant.init(module, "default", config)
    with torch.no_grad():
        module.lora_A["default"].weight = nn.Parameter(torch.from_numpy(a))
        module.lora_B["default"].weight = nn.Parameter(torch.from_numpy(b))
        found = QALoraLinearVariant.forward(module, "default", torch.from_numpy(x), torch.zeros(1))
    return np.asarray(found)


def test_trap_12_qalora(
    train: Train, convert: Convert, tiny: Tiny, zoo: ModuleType, peers: ModuleType
) -> None:
    """Inputs pooled by groups: plain LoRA with every column of A repeated. PEFT can't merge it."""
    source = train(["q_proj", "v_proj"])
    path = source / peers.PEFT_WEIGHTS
    tensors = peers.load_file(path)
    pooled = {n: t[:, ::16].clone() if "lora_A" in n else t for n, t in tensors.items()}
    peers.rewrite_tensors(path, pooled)
    peers.edit_json(source / peers.CONFIG, use_qalora=True, qalora_group_size=16)
    result = convert(source, "peft")
    module = f"{peers.PEFT_PREFIX}{Q}"
    old, new = peers.float64_tensors(path), peers.float64_tensors(result / peers.PEFT_WEIGHTS)
    a, b = old[f"{module}.lora_A.weight"], old[f"{module}.lora_B.weight"]
    x = np.random.default_rng(0).normal(size=(5, 64))
    y = _qalora_forward(a, b, x)
    config = peers.read_json(result / peers.CONFIG)
    scale = config["lora_alpha"] / config["r"]
    found = x @ new[f"{module}.lora_A.weight"].T @ new[f"{module}.lora_B.weight"].T * scale
    np.testing.assert_allclose(found, y, rtol=1e-6)
    assert not config.get("use_qalora")


def test_trap_12_bdlora(
    tiny: Tiny, carried: Callable[..., Path], peers: ModuleType, zoo: ModuleType, tmp_path: Path
) -> None:
    """Only the blocks on the diagonal are stored, of A for some modules and of B for others."""
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
    config = peers.lora(["q_proj", "o_proj"], use_bdlora=blocks, lora_dropout=0.0)
    peers.save_peft(tiny("llama").path, tmp_path / "peft", config, zoo.TOKENS)
    carried(tmp_path / "peft")


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_trap_11_in_half_precision(
    way: str, tiny: Tiny, convert: Convert, peers: ModuleType, tmp_path: Path
) -> None:
    """B0 A0 is as large as the base's weight: rounded to 16 bits it would drown the update."""
    from peft import get_peft_model

    base = tiny("llama").path
    torch.manual_seed(0)
    model = get_peft_model(peers.hf_base(base), peers.lora(["q_proj"], init_lora_weights=way))
    residual = model.get_submodule(f"base_model.model.{Q}").base_layer.weight.double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "peft")
    peers.cast_tensors(tmp_path / "peft" / peers.PEFT_WEIGHTS, torch.float16)
    stored = peers.float64_tensors(tmp_path / "peft" / peers.PEFT_WEIGHTS)
    stem = f"{peers.PEFT_PREFIX}{Q}"
    adapted = residual.detach().numpy() + 2.5 * (
        stored[f"{stem}.lora_B.weight"] @ stored[f"{stem}.lora_A.weight"]
    )
    plain = peers.hf_base(base).get_submodule(Q).weight.double().detach().numpy()
    there = convert(tmp_path / "peft", "mlx", "--base", base)
    found = peers.mlx_deltas(base, there)[Q]
    expected = adapted - plain
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 1e-4, f"{error:.1e}"


@pytest.mark.parametrize("rslora", [False, True])
def test_trap_12_kasa_has_a_diagonal_and_cuts_the_base(
    rslora: bool, train: Train, refused: Callable[..., str], convert: Convert, tiny: Tiny, run: Any,
    peers: ModuleType, zoo: ModuleType,
) -> None:  # fmt: skip
    """Without lora_diag A and B look like any LoRA; what PEFT cuts away is part of the update."""
    from peft.tuners.lora.config import KasaConfig

    base = tiny("llama").path
    source = train(["q_proj", "v_proj"], kasa_config=KasaConfig(), use_rslora=rslora)
    for to in ("mlx", "peft"):
        assert "KaSA" in refused(source, to, saying="--base BASE")
    assert "KaSA" in run("inspect", source).stdout
    expected = peers.torch_logits(
        peers.PeftModel.from_pretrained(peers.hf_base(base), source), zoo.TOKENS
    )
    plain = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    there = convert(source, "mlx", "--base", base)
    peers.assert_same_logits(peers.mlx_logits(base, there, zoo.TOKENS), expected, plain)
    plainly = convert(source, "peft", "--base", base)
    assert not peers.read_json(plainly / peers.CONFIG).get("kasa_config")
    peers.assert_same_logits(peers.peft_logits(base, plainly, zoo.TOKENS), expected, plain)


@pytest.mark.parametrize("way", ["kasa", "pissa", "olora"])
def test_validate_knows_what_the_base_is_moved_by(
    way: str, train: Train, convert: Convert, run: Any, tiny: Tiny, peers: ModuleType
) -> None:
    """PEFT's factors are relative to another base than the result's; a wrong module is found."""
    from peft.tuners.lora.config import KasaConfig

    base = tiny("llama").path
    options = {"kasa_config": KasaConfig()} if way == "kasa" else {"init_lora_weights": way}
    source = train(["q_proj", "v_proj"], **options)
    there = convert(source, "mlx", "--base", base)
    done = run("validate", source, there, "--base", base)
    assert done.exit_code == 0, done.output
    path = there / peers.MLX_WEIGHTS
    name = "model.layers.1.self_attn.v_proj"
    tensors = peers.load_file(path)
    tensors[f"{name}.lora_b"][0] *= 1.02
    peers.rewrite_tensors(path, tensors)
    done = run("validate", source, there, "--base", base)
    assert done.exit_code == 3
    assert name in done.output


def test_kasa_and_lora_are_not_taken_for_one_another(
    train: Train, refused: Callable[..., str], tiny: Tiny, peers: ModuleType
) -> None:
    """The diagonal and the config's word for it belong together."""
    from peft.tuners.lora.config import KasaConfig

    base = tiny("llama").path
    source = train(["q_proj", "v_proj"], kasa_config=KasaConfig())
    file = source / peers.PEFT_WEIGHTS
    whole = peers.load_file(file)
    name = next(n for n in whole if n.endswith("lora_diag"))
    peers.rewrite_tensors(file, {n: t for n, t in whole.items() if n != name})
    refused(source, "mlx", "--base", base, saying="has no lora_diag")
    peers.rewrite_tensors(file, {**whole, name: whole[name][:-1]})
    refused(source, "mlx", "--base", base, saying=name)
    peers.rewrite_tensors(file, whole)
    peers.edit_json(source / peers.CONFIG, kasa_config=None)
    refused(source, "mlx", "--base", base, saying="kasa_config is not set")
