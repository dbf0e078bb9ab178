"""`loraduct extract`: what was fused comes back, from stock PEFT's merged weights too."""

from __future__ import annotations

import json
import shutil

import fusing
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loraduct.converters import extract
from loraduct.formats import read


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def get(name, dtype=torch.float32, **more):
        key = name, dtype
        if key not in made:
            made[key] = fusing.saved(name, tmp_path_factory.mktemp("base"), dtype, **more)
        return made[key]

    return get


def merged(base, adapter, out, dtype=torch.float32, **more):
    """What PEFT merges, saved by transformers."""
    model = PeftModel.from_pretrained(fusing.loaded(base), adapter).merge_and_unload()
    model.to(dtype).save_pretrained(out, **more)
    return out


def extracted(cli, tuned, base, out, *words):
    done = cli("extract", tuned, base, "-o", out, "--json", *words)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


CASES = {
    "linear": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "norms and biases": ("llama", {
        "target_modules": ["q_proj"], "bias": "lora_only", "modules_to_save": ["input_layernorm"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "experts": ("qwen3_moe", {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_peft_merged_comes_back(cli, bases, tmp_path, case):
    name, config = CASES[case]
    base = bases(name)
    adapter = fusing.trained(base, tmp_path / "a", **config)
    tuned = merged(base, adapter, tmp_path / "tuned")
    said = extracted(cli, tuned, base, tmp_path / "out")
    assert all(m["whole"] for m in said["modules"].values())
    wanted = fusing.logits(fusing.loaded(tuned))
    found = fusing.unfused(base, (tmp_path / "out", 1.0))
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(fusing.logits(fusing.loaded(base)) - wanted).max() > 0.01


def test_rank_is_what_stands_out_of_rounding(cli, bases, tmp_path):
    base = bases("llama", torch.float16)
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj", "down_proj"])
    tuned = merged(base, adapter, tmp_path / "tuned", torch.float16, max_shard_size="50KB")
    assert len(list(tuned.glob("*.safetensors"))) > 2
    said = extracted(cli, tuned, base, tmp_path / "out", "--to", "mlx")
    assert {m["rank"] for m in said["modules"].values()} == {4}
    back = read(tmp_path / "out")
    assert back.format == "mlx"
    assert back.base.kin
    for module, (a, b) in fusing.factors(adapter).items():
        u = back.low_rank[module]
        got = u.scale * u.b.read().astype(float) @ u.a.read()
        rounding = said["modules"][module]["rounding_energy"] ** 0.5
        assert np.linalg.norm(got - 1.5 * b @ a) < 2 * rounding * np.linalg.norm(1.5 * b @ a)


def test_the_base_is_recorded_and_fusing_gives_the_tuned_model(cli, bases, tmp_path):
    base = bases("llama", torch.float16)
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj"])
    tuned = merged(base, adapter, tmp_path / "tuned", torch.float16)
    extracted(cli, tuned, base, tmp_path / "out")
    done = cli("fuse", tmp_path / "out", "--base", base, "-o", tmp_path / "again")
    assert "byte for byte the one it was made for" in done.stdout
    left, right = (fusing.tensors(f) for f in (tuned, tmp_path / "again"))
    off = [(left[n].float() - right[n].float()).abs().max().item() for n in left]
    assert max(off) < 1e-3  # a rounding or so


def test_tied_embeddings(cli, bases, tmp_path):
    base = bases("qwen2")
    tuned = shutil.copytree(base, tmp_path / "tuned")
    held = load_file(tuned / "model.safetensors")
    move = 0.05 * torch.randn(96, 2) @ torch.randn(2, 64)
    held["model.embed_tokens.weight"] += move
    save_file(held, tuned / "model.safetensors", {"format": "pt"})
    said = extracted(cli, tuned, base, tmp_path / "out")
    assert list(said["modules"]) == ["model.embed_tokens"]
    wanted = fusing.logits(fusing.loaded(tuned))
    assert np.abs(fusing.unfused(base, (tmp_path / "out", 1.0)) - wanted).max() < 1e-4
    extracted(cli, tuned, base, tmp_path / "mlx", "--to", "mlx")
    assert list(read(tmp_path / "mlx").updates) == ["model.embed_tokens"]


def test_less_than_there_is_needs_a_flag(cli, bases, tmp_path):
    base = bases("llama")
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj"])
    tuned = merged(base, adapter, tmp_path / "tuned")
    done = cli("extract", tuned, base, "-o", tmp_path / "out", "--rank", 2)
    assert done.exit_code == 1
    assert "rank 2 leaves" in done.stderr
    assert not (tmp_path / "out").exists()
    said = extracted(cli, tuned, base, tmp_path / "out", "--rank", 2, "--allow-approximate")
    for module, (a, b) in fusing.factors(adapter).items():
        values = np.linalg.svd(1.5 * b @ a, compute_uv=False)
        lost = (values[2:] ** 2).sum() / (values**2).sum()
        assert said["modules"][module]["residual_energy"] == pytest.approx(lost, rel=1e-4)
    said = extracted(cli, tuned, base, tmp_path / "e", "--energy", 0.8, "--allow-approximate")
    for module, (a, b) in fusing.factors(adapter).items():
        values = np.linalg.svd(1.5 * b @ a, compute_uv=False) ** 2
        assert said["modules"][module]["rank"] == 1 + np.searchsorted(
            values.cumsum(), 0.8 * values.sum()
        )


def test_the_residual_is_a_dense_svds(bases):
    rng = np.random.default_rng(5)
    low = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 400))
    matrix = (low + 0.3 * rng.standard_normal((300, 400))).astype(np.float32)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    a, b, residual = extract.nearest(matrix, extract.Wanted(rank=6), 0.0)
    best = np.sqrt((values[6:] ** 2).sum())
    assert residual == pytest.approx(best, rel=1e-5)
    assert np.linalg.norm(matrix - b.astype(float) @ a) == pytest.approx(best, rel=1e-5)


def test_a_rank_beyond_the_matrix_is_explained(cli, bases, tmp_path):
    base = bases("llama")
    adapter = fusing.trained(base, tmp_path / "a", target_modules=["q_proj", "v_proj"])
    tuned = merged(base, adapter, tmp_path / "tuned")
    done = cli("extract", tuned, base, "-o", tmp_path / "out", "--rank", 6000)
    assert done.exit_code == 0, done.stderr
    assert "note: rank 6000 is more than 4 modules have (at most 64)" in done.stdout
    done = cli("extract", tuned, base, "-o", tmp_path / "no", "--energy", "nan")
    assert done.exit_code == 2
    assert "nan is not a finite number" in done.stderr
    assert not (tmp_path / "no").exists()


def _grown(tuned):
    held = load_file(tuned / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = torch.cat([held[name], held[name][:8]])
    save_file(held, tuned / "model.safetensors", {"format": "pt"})


def _nan(tuned):
    held = load_file(tuned / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"][1, 1] = float("nan")
    save_file(held, tuned / "model.safetensors", {"format": "pt"})


def _missing(tuned):
    held = load_file(tuned / "model.safetensors")
    held.pop("model.norm.weight")
    save_file(held, tuned / "model.safetensors", {"format": "pt"})


BROKEN = {
    "grown vocabulary": (_grown, "vocabulary went from 96 to 104 tokens"),
    "NaN": (_nan, "model.layers.0.mlp.up_proj.weight: holds NaN or Inf"),
    "a weight missing": (_missing, "model.norm.weight: has no such weight, which the base has"),
    "no difference": (lambda tuned: None, "there is nothing to extract"),
    "packed": (lambda tuned: fusing.edited(tuned, quantization={"bits": 4, "group_size": 64}),
               "is packed: unpack it first"),
    "another model": (lambda tuned: fusing.edited(tuned, model_type="mistral"), "not tuned from it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_refused_in_one_line_and_nothing_written(cli, bases, tmp_path, case):
    base = bases("llama")
    tuned = shutil.copytree(base, tmp_path / "tuned")
    change, says = BROKEN[case]
    change(tuned)
    done = cli("extract", tuned, base, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]


def test_target_exists(cli, bases, tmp_path):
    base = bases("llama")
    (tmp_path / "out").mkdir()
    done = cli("extract", base, base, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "exists; use --force" in done.stderr


def tuned_by(base, out, change):
    """What ``change`` makes of the model, saved by transformers."""
    torch.manual_seed(5)
    model = fusing.loaded(base)
    with torch.no_grad():
        change(model)
    model.save_pretrained(out)
    return out


def move(p):
    """Add a product of rank 2."""
    p.add_(0.05 * torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1]))


def _wpe(model):
    move(model.transformer.wpe.weight)
    move(model.transformer.h[0].attn.c_attn.weight)


def _opt(model):
    move(model.model.decoder.embed_positions.weight)
    move(model.model.decoder.layers[0].fc1.weight)


def _a_log(model):
    move(model.backbone.layers[0].mixer.A_log)
    move(model.backbone.layers[1].mixer.in_proj.weight)


def _expert_biases(model):
    for name, p in model.named_parameters():
        if "experts" in name and "bias" in name:
            p.add_(0.1)
        elif name.endswith(("q_proj.weight", "router.weight")):
            move(p)


def _head(model):
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    move(model.lm_head.weight)
    move(model.model.layers[0].self_attn.q_proj.weight)


def _both_ends(model):
    _head(model)
    move(model.model.embed_tokens.weight)


def _whole_head(model):
    _head(model)
    model.lm_head.weight.add_(0.1 * torch.randn_like(model.lm_head.weight))


# base, fields, what changes, low-rank modules, parameters that are replaced
ODD = {
    "square positions": ("gpt2", {}, _wpe, {"transformer.wpe", "transformer.h.0.attn.c_attn"}, set()),
    "positions": ("gpt2", {"n_positions": 32}, _wpe,
                  {"transformer.wpe", "transformer.h.0.attn.c_attn"}, set()),
    "OPT's positions": ("opt", {}, _opt, {"model.decoder.layers.0.fc1"},
                        {"model.decoder.embed_positions.weight"}),
    "A_log": ("mamba", {}, _a_log, {"backbone.layers.1.mixer.in_proj"}, {"backbone.layers.0.mixer.A_log"}),
    "biases of experts": ("gpt_oss", {}, _expert_biases, None, None),
    "tuned unties": ("qwen2", {}, _head, {"lm_head", "model.layers.0.self_attn.q_proj"}, set()),
    "tuned unties, both move": ("qwen2", {}, _both_ends, {
        "lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj"}, set()),
    "tuned unties, whole head": ("qwen2", {}, _whole_head, {"model.layers.0.self_attn.q_proj"},
                                 {"lm_head.weight"}),
}  # fmt: skip
MORE = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "tie_word_embeddings": True},
    "mamba": {"state_size": 16, "tie_word_embeddings": True},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16},
}


@pytest.fixture
def odd(monkeypatch):
    def get(name, out, **fields):
        monkeypatch.setitem(
            fusing.BASES, name, {**fusing.BASES.get(name, MORE.get(name)), **fields}
        )
        return fusing.saved(name, out)

    return get


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_linear_layer(cli, odd, tmp_path, case):
    """Stock PEFT computes what the tuned model does, and so does the base with it fused in."""
    name, fields, change, low, replaced = ODD[case]
    base = odd(name, tmp_path / "base", **fields)
    tuned = tuned_by(base, tmp_path / "tuned", change)
    said = extracted(cli, tuned, base, tmp_path / "out")
    if low is not None:
        assert set(said["modules"]) == low
        assert set(said["replaced"]) == replaced
    wanted = fusing.logits(fusing.loaded(tuned))
    effect = np.abs(fusing.logits(fusing.loaded(base)) - wanted).max()
    assert effect > 1e-3
    assert np.abs(fusing.unfused(base, (tmp_path / "out", 1.0)) - wanted).max() < 1e-3 * effect
    done = cli("fuse", tmp_path / "out", "--base", base, "-o", tmp_path / "fused")
    assert done.exit_code == 0, done.output
    assert np.abs(fusing.logits(fusing.loaded(tmp_path / "fused")) - wanted).max() < 1e-3 * effect


def test_tuned_ties_what_the_base_does_not(cli, bases, tmp_path):
    base = bases("llama")

    def tie(model):
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        move(model.model.layers[0].self_attn.q_proj.weight)

    tuned = tuned_by(base, tmp_path / "tuned", tie)
    said = extracted(cli, tuned, base, tmp_path / "out")
    assert said["replaced"] == ["lm_head.weight"]
    wanted = fusing.logits(fusing.loaded(tuned))
    found = fusing.unfused(base, (tmp_path / "out", 1.0))
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_parameters_around_an_adapted_layer_are_refused(cli, odd, tmp_path):
    base = odd("mamba", tmp_path / "base")

    def change(model):
        model.backbone.layers[0].mixer.D.add_(0.1)
        move(model.backbone.layers[0].mixer.in_proj.weight)

    tuned = tuned_by(base, tmp_path / "tuned", change)
    done = cli("extract", tuned, base, "-o", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert "mixer.in_proj: is adapted, and replaced with its whole module" in done.stderr
    assert "mixer.D)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_full_fine_tune_is_told_the_way_out(cli, bases, tmp_path):
    base = bases("llama")
    everything = tuned_by(
        base, tmp_path / "all",
        lambda m: [p.add_(0.05 * torch.randn_like(p)) for p in m.parameters()],
    )  # fmt: skip
    done = cli("extract", everything, base, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "--rank N --allow-approximate" in done.stderr
    extracted(cli, everything, base, tmp_path / "out", "--rank", 4, "--allow-approximate")
    norms = tuned_by(base, tmp_path / "norms", lambda m: m.model.norm.weight.mul_(1.2))
    done = cli("extract", norms, base, "-o", tmp_path / "no")
    assert done.exit_code == 1
    assert "of which no LoRA can be made" in done.stderr
