"""Merging against stock PEFT: its add_weighted_adapter, and its merged weights for DoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from loraduct.converters.merge import Settings, merge  # noqa: E402
from loraduct.formats import base as base_folder  # noqa: E402
from loraduct.formats import read  # noqa: E402

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return Path(folder)


@pytest.fixture
def trained(model: Any, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, seed: int, **config: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | config
        made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for n, p in made.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                if "magnitude" in n:
                    p.mul_(1 + 0.2 * noise)
                elif "lora_" in n:
                    p.copy_(0.3 * noise)
        made.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def merged_weights(model: Any, folder: Path) -> dict[str, Any]:
    """Module -> the weight that stock PEFT merges the adapter into."""
    whole = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    return {
        n.removesuffix(".weight"): p.detach().double().numpy()
        for n, p in whole.named_parameters()
        if p.dim() == 2
    }


def deltas(model: Any, folder: Path) -> dict[str, Any]:
    old = {
        n.removesuffix(".weight"): p.detach().double().numpy() for n, p in model.named_parameters()
    }
    return {m: w - old[m] for m, w in merged_weights(model, folder).items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "cat": {},
    "svd": {"svd_rank": 3},
    "linear": {},
    "ties": {"density": 0.4, "majority_sign_method": "frequency"},
    "magnitude_prune": {"density": 0.4},
}


@pytest.mark.parametrize("weights", [[0.5, 1.25], [0.7, -0.3]])
@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_factor_formulas_are_pefts(
    model: Any, trained: Callable[..., Path], method: str, weights: list[float]
) -> None:
    one, two = trained("one", 1), trained("two", 2, lora_alpha=3)
    both = peft.PeftModel.from_pretrained(copy.deepcopy(model), one, adapter_name="one")
    both.load_adapter(two, "two")
    options = OPTIONS[method]
    both.add_weighted_adapter(["one", "two"], weights, "sum", combination_type=method, **options)
    settings = Settings(
        "peft-" + method.replace("_", "-"),
        rank=options.get("svd_rank"),
        density=options.get("density"),
        sign=options.get("majority_sign_method", "total"),
    )
    ours = merge([read(one), read(two)], weights, settings).adapter.low_rank
    assert len(ours) == 6
    for module, u in ours.items():
        layer = both.base_model.model.get_submodule(module)
        wanted = layer.get_delta_weight("sum").detach().double().numpy()
        found = u.scale * (u.b.read().astype(np.float64) @ u.a.read())
        bound = 1e-5 if method == "svd" else 2e-6  # PEFT takes its SVD in float32
        assert np.linalg.norm(found - wanted) < bound * np.linalg.norm(wanted), module


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_on_factors_draws_as_torch_does(trained: Callable[..., Path], method: str) -> None:
    """One module after torch.manual_seed, by PEFT's own functions in the order PEFT calls them."""
    from peft.utils import merge_utils

    one, two = (
        trained(n, s, target_modules=["layers.0.self_attn.q_proj"])
        for n, s in (("one", 1), ("two", 2))
    )
    adapters, weights = [read(one), read(two)], [0.5, 1.25]
    name = "peft-" + method.replace("_", "-")
    ours = merge(adapters, weights, Settings(name, density=0.6, seed=11)).adapter.low_rank
    (module,) = ours
    roots = torch.tensor([(w * 1.5) ** 0.5 for w in weights])
    torch.manual_seed(11)
    for side in ("a", "b"):
        tensors = [
            torch.from_numpy(getattr(x.low_rank[module], side).read().copy()) for x in adapters
        ]
        wanted = getattr(merge_utils, method)(tensors, roots, 0.6).numpy()
        assert np.allclose(getattr(ours[module], side).read(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("kinds", "weights"),
    [(("dora", "dora"), [0.7, 0.4]), (("dora", "lora"), [1.0, -0.5]), (("dora",), [0.3])],
)
@pytest.mark.parametrize("method", ["cat", "linear"])
def test_sums_of_dora_are_exact(
    cli: Any, model: Any, base: Path, trained: Callable[..., Path], tmp_path: Path,
    kinds: tuple[str, ...], weights: list[float], method: str,
) -> None:  # fmt: skip
    folders = [
        trained(f"{k}{i}", i, use_dora=k == "dora", target_modules=TARGETS[i:])
        for i, k in enumerate(kinds)
    ]
    out = tmp_path / "out"
    text = ",".join(map(str, weights))
    done = cli("merge", *folders, "--weights", text, "--method", method, "--base", base, "-o", out)
    assert done.exit_code == 0, done.output
    each = [deltas(model, f) for f in folders]
    for module, found in deltas(model, out).items():
        wanted = sum(w * d[module] for w, d in zip(weights, each, strict=True))
        size = np.linalg.norm(wanted)
        assert np.linalg.norm(found - wanted) <= 3e-6 * size + 1e-6 * (size > 0), module


def test_dora_cut_to_a_rank_loses_what_is_said(
    cli: Any, model: Any, base: Path, trained: Callable[..., Path], tmp_path: Path
) -> None:
    """W + g W + L with L cut: what PEFT merges differs from the sum by L - L_k, which is reported."""
    folders = [trained("one", 1, use_dora=True), trained("two", 2, use_dora=True)]
    adapters = [read(f) for f in folders]
    settings = Settings("svd", rank=3)
    merged = merge(adapters, [0.7, 0.4], settings, base_folder.read(base))
    done = cli("merge", *folders, "--weights", "0.7,0.4", "--method", "svd", "--rank", 3,
               "--base", base, "-o", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    each = [deltas(model, f) for f in folders]
    found = deltas(model, tmp_path / "out")
    old = {
        n.removesuffix(".weight"): p.detach().double().numpy() for n, p in model.named_parameters()
    }
    for module in merged.modules:
        name, u = module.module, [a.low_rank[module.module] for a in adapters]
        pieces = []
        for x, w in zip(u, (0.7, 0.4), strict=True):
            v = x.scale * (x.b.read().astype(np.float64) @ x.a.read())
            c = x.magnitude.read() / np.linalg.norm(old[name] + v, axis=1)
            pieces.append(w * c[:, None] * v)
        low = sum(pieces)
        values = np.linalg.svd(low, compute_uv=False)
        best = float((values[3:] ** 2).sum() ** 0.5)
        wanted = 0.7 * each[0][name] + 0.4 * each[1][name]
        assert np.linalg.norm(found[name] - wanted) == pytest.approx(best, rel=1e-4)
        assert module.residual == pytest.approx(best / np.linalg.norm(low), rel=1e-6)


def test_ties_of_dora_acts_on_what_dora_changes(
    model: Any, base: Path, trained: Callable[..., Path]
) -> None:
    folder = trained("one", 1, use_dora=True)
    settings = Settings("ties", rank=100, density=1.0)
    made = merge([read(folder)], [1.0], settings, base_folder.read(base)).adapter.low_rank
    for module, u in made.items():
        wanted = deltas(model, folder)[module]
        found = u.b.read().astype(np.float64) @ u.a.read()
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_low_rank_biases_add_up(
    model: Any, trained: Callable[..., Path], cli: Any, tmp_path: Path
) -> None:
    one = trained("one", 1, lora_bias=True, target_modules=["q_proj"])
    two = trained("two", 2, target_modules=["q_proj", "v_proj"])
    out = tmp_path / "out"
    done = cli("merge", one, two, "--weights", "0.5,2", "-o", out)
    assert done.exit_code == 0, done.output
    tokens = torch.arange(9)[None]

    def hidden(folder: Path) -> Any:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
        q = loaded.base_model.model.model.layers[0].self_attn.q_proj
        with torch.no_grad():
            x = model.model.embed_tokens(tokens)
            return (q(x) - q.base_layer(x)).double().numpy()

    wanted = 0.5 * hidden(one) + 2 * hidden(two)
    assert np.allclose(hidden(out), wanted, atol=1e-6 * np.abs(wanted).max() + 1e-7)


def test_embeddings_and_head(
    model: Any, trained: Callable[..., Path], cli: Any, tmp_path: Path
) -> None:
    targets = ["embed_tokens", "lm_head"]
    one, two = (trained(n, s, target_modules=targets, r=s + 1) for n, s in (("one", 1), ("two", 2)))
    out = tmp_path / "out"
    done = cli("merge", one, two, "--weights", "0.5,2", "-o", out)
    assert done.exit_code == 0, done.output
    each = [deltas(model, f) for f in (one, two)]
    for module, found in deltas(model, out).items():
        wanted = 0.5 * each[0][module] + 2 * each[1][module]
        assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted) + 1e-9, module


@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_experts(method: str) -> None:
    """Factors with an axis of experts, against a sum expert by expert."""
    from loraduct.adapter import Adapter, LowRank
    from loraduct.tensor import Tensor

    def adapter(seed: int, r: int) -> Adapter:
        rng = np.random.default_rng(seed)
        a, b = (rng.normal(size=s).astype(np.float32) for s in ((3, r, 12), (3, 10, r)))
        held = [Tensor(n, "F32", x.shape, data=x) for n, x in (("a", a), ("b", b))]
        u = LowRank(*held, 0.5 * seed, layout="experts")
        where = Path("adapter")
        return Adapter(
            where, where, "peft", "lora", {"model.layers.0.mlp.experts.down_proj": u}, {}
        )

    adapters = [adapter(1, 2), adapter(2, 3)]
    settings = Settings(method, rank=None if method == "linear" else 5 if method == "svd" else 10,
                        density=1.0 if method == "ties" else None)  # fmt: skip
    ((_, u),) = merge(adapters, [0.3, 0.8], settings).adapter.low_rank.items()
    found = u.scale * (u.b.read().astype(np.float64) @ u.a.read())
    parts = []
    for x, w in zip(adapters, (0.3, 0.8), strict=True):
        ((_, v),) = x.low_rank.items()
        parts.append(w * v.scale * (v.b.read().astype(np.float64) @ v.a.read()))
    wanted = sum(parts)
    if method == "ties":
        first, second = parts
        votes = first / 0.3 + second / 0.8
        agree = [np.sign(p) == np.where(votes >= 0, 1, -1) for p in parts]
        wanted = (first * agree[0] + second * agree[1]) / np.maximum(agree[0] * 1 + agree[1], 1)
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
