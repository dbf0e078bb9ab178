"""One test per known trap of the MLX side: each fails for a converter that walks into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[[str], Any]
Convert = Callable[..., Path]
Refused = Callable[..., str]
KEYS = ["self_attn.q_proj", "mlp.down_proj"]


@pytest.fixture
def train(tiny: Tiny, zoo: ModuleType, peers: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """train(num_layers=2, ...) -> a folder saved by stock mlx-lm on a tiny base."""

    def make(base: str = "llama", **options: Any) -> Path:
        peers.save_mlx(tiny(base).path, tmp_path / "mlx", zoo.TOKENS, **options)
        return tmp_path / "mlx"

    return make


@pytest.fixture
def exact(tiny: Tiny, peers: ModuleType, convert: Convert) -> Callable[..., Path]:
    """Convert to PEFT; every module must move as mlx-lm moves it. Returns the result."""

    def check(source: Path, base: str = "llama", expected: Any = None) -> Path:
        path = tiny(base).path
        result = convert(source, "peft", "--base", path)
        wanted = peers.mlx_deltas(path, source) if expected is None else expected
        peers.assert_same_deltas(peers.peft_deltas(path, result), wanted)
        return result

    return check


def _by_hand(peers: ModuleType, source: Path, scale: float) -> Any:
    """scale * (a @ b).T per module, straight from the file."""
    tensors = peers.float64_tensors(source / peers.MLX_WEIGHTS)
    return {
        name.removesuffix(".lora_a"): scale
        * (a @ tensors[name.removesuffix("lora_a") + "lora_b"]).T
        for name, a in tensors.items()
        if name.endswith(".lora_a")
    }


def test_trap_13_dora_of_an_embedding(
    train: Callable[..., Path], refused: Refused, tiny: Tiny
) -> None:
    """One magnitude a token, which PEFT can't say: its own is per dimension."""
    source = train(kind="dora", num_layers=1, keys=[*KEYS, "model.embed_tokens"])
    refused(source, "peft", "--base", tiny("llama").path, saying="magnitude is per token")


@pytest.mark.parametrize("num_layers", [0, -1, -5, 3, 99])
def test_trap_19_no_layers_means_all_layers(
    num_layers: int, train: Callable[..., Path], exact: Callable[..., Path], peers: ModuleType
) -> None:
    """layers[-0:] is the whole list, and so is every negative or too large number."""
    source = train(num_layers=num_layers, keys=KEYS)
    assert len(peers.raw_tensors(source / peers.MLX_WEIGHTS)) == 2 * 2 * 3
    exact(source)


def test_trap_20_a_bare_key_adapts_nothing(
    train: Callable[..., Path], attempt: Callable[..., Any], peers: ModuleType
) -> None:
    """PEFT would match "q_proj" by its end, mlx-lm doesn't, and its loader then refuses."""
    source = train(num_layers=2, keys=["self_attn.q_proj"])
    parameters = peers.read_json(source / peers.CONFIG)["lora_parameters"]
    peers.edit_json(source / peers.CONFIG, lora_parameters=parameters | {"keys": ["q_proj"]})
    outcome = attempt(source, "peft")
    assert "keys" in outcome.text
    assert "q_proj" in outcome.text
    if outcome.code == 0:
        expected = _by_hand(peers, source, parameters["scale"])
        assert len(peers.raw_tensors(outcome.path / peers.PEFT_WEIGHTS)) == 2 * len(expected)
    else:
        assert outcome.code == 1
        assert not outcome.path.exists()


def test_trap_20_we_never_write_bare_keys(
    peft_adapter: Callable[[str, str], Any], convert: Convert, peers: ModuleType
) -> None:
    """Every key we write hits a module of the model, in the block or from the root."""
    source = peft_adapter("llama", "patterns")
    result = convert(source.path, "mlx", "--base", source.base.path)
    model = peers.mlx_base(source.base.path)
    known = {name for name, _ in model.named_modules()}
    known |= {name for name, _ in model.layers[0].named_modules()}
    keys = peers.read_json(result / peers.CONFIG)["lora_parameters"]["keys"]
    assert keys
    assert set(keys) <= known


@pytest.mark.parametrize("alpha", [3, 16, 160.0])
def test_trap_21_alpha_means_nothing_beside_scale(
    alpha: float, train: Callable[..., Path], exact: Callable[..., Path], peers: ModuleType
) -> None:
    """`scale` multiplies directly; people carry `alpha` over from other tools."""
    source = train(num_layers=2, keys=KEYS, scale=2.5)
    parameters = peers.read_json(source / peers.CONFIG)["lora_parameters"] | {"alpha": alpha}
    peers.edit_json(source / peers.CONFIG, lora_parameters=parameters)
    config = peers.read_json(exact(source) / peers.CONFIG)
    assert config["lora_alpha"] / config["r"] == 2.5


def test_trap_21_scale_is_mandatory(
    train: Callable[..., Path], refused: Refused, peers: ModuleType
) -> None:
    """With alpha alone mlx-lm raises KeyError: no scale may be made up."""
    source = train(num_layers=2, keys=KEYS)
    peers.edit_json(source / peers.CONFIG, lora_parameters={"rank": 4, "alpha": 8, "dropout": 0.0})
    refused(source, "peft", saying="scale")


@pytest.mark.parametrize("scale", [20.0, 2.0])
def test_trap_21_old_npz_adapters_hold_no_scale(
    scale: float,
    train: Callable[..., Path],
    convert: Convert,
    tiny: Tiny,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """mlx-examples wrote adapters.npz alone, for a scale fixed in the code that trained it."""
    import mlx.core as mx

    source = train(num_layers=2, keys=["self_attn.q_proj", "self_attn.v_proj"], scale=scale)
    expected = peers.mlx_deltas(tiny("llama").path, source)
    old = tmp_path / "old"
    old.mkdir()
    mx.savez(str(old / "adapters.npz"), **mx.load(str(source / peers.MLX_WEIGHTS)))
    for path in (old, old / "adapters.npz"):
        result = convert(path, "peft", "--scale", scale, "--base", tiny("llama").path)
        peers.assert_same_deltas(peers.peft_deltas(tiny("llama").path, result), expected)


def test_trap_21_an_old_npz_without_scale_is_no_guess(
    train: Callable[..., Path], attempt: Callable[..., Any], peers: ModuleType, tmp_path: Path
) -> None:
    """20 is only the usual value; whoever takes it must say so."""
    import mlx.core as mx

    source = train(num_layers=2, keys=["self_attn.q_proj"], scale=20.0)
    old = tmp_path / "old"
    old.mkdir()
    mx.savez(str(old / "adapters.npz"), **mx.load(str(source / peers.MLX_WEIGHTS)))
    outcome = attempt(old, "peft")
    assert "scale" in outcome.text
    if outcome.code == 0:
        config = peers.read_json(outcome.path / peers.CONFIG)
        assert config["lora_alpha"] / config["r"] == 20.0
    else:
        assert outcome.code in (1, 2)


def test_trap_22_ranks_that_differ_by_module(
    train: Callable[..., Path], attempt: Callable[..., Any], tiny: Tiny, peers: ModuleType
) -> None:
    """Older mlx-lm loaded such files and took each tensor's own rank; the scale is direct."""
    import torch

    source = train(num_layers=3, keys=["self_attn.q_proj"])
    path = source / peers.MLX_WEIGHTS
    tensors = peers.load_file(path)
    narrow = {
        name: (t[:, :2] if name.endswith("lora_a") else t[:2]) if "layers.1." in name else t
        for name, t in tensors.items()
    }
    peers.rewrite_tensors(path, narrow)
    assert all(t.dtype == torch.float32 for t in narrow.values())
    outcome = attempt(source, "peft", "--base", tiny("llama").path)
    if outcome.code == 0:
        found = peers.peft_deltas(tiny("llama").path, outcome.path)
        peers.assert_same_deltas(found, _by_hand(peers, source, 2.5))
    else:
        assert outcome.code == 1
        assert "layers.1.self_attn.q_proj" in outcome.err
        assert "rank" in outcome.err


def test_trap_22_we_pad_to_one_rank(
    peft_adapter: Callable[[str, str], Any], convert: Convert, peers: ModuleType
) -> None:
    """The current loader refuses a tensor of another rank than the config's."""
    source = peft_adapter("llama", "patterns")
    result = convert(source.path, "mlx")
    rank = peers.read_json(result / peers.CONFIG)["lora_parameters"]["rank"]
    tensors = peers.raw_tensors(result / peers.MLX_WEIGHTS)
    ranks = {shape[1] for name, (_, shape, _) in tensors.items() if name.endswith("lora_a")}
    ranks |= {shape[0] for name, (_, shape, _) in tensors.items() if name.endswith("lora_b")}
    assert ranks == {rank} == {7}


def test_trap_23_keys_without_tensors_are_no_targets(
    train: Callable[..., Path], exact: Callable[..., Path], peers: ModuleType
) -> None:
    """mlx-lm leaves them at zero in silence; PEFT would warn of missing keys (an error here)."""
    source = train(num_layers=2, keys=KEYS)
    parameters = peers.read_json(source / peers.CONFIG)["lora_parameters"]
    more = parameters | {"keys": [*KEYS, "self_attn.o_proj"]}
    peers.edit_json(source / peers.CONFIG, lora_parameters=more)
    result = exact(source)
    assert "o_proj" not in str(peers.read_json(result / peers.CONFIG)["target_modules"])


def test_trap_23_half_a_pair(
    train: Callable[..., Path], refused: Refused, peers: ModuleType
) -> None:
    """A lone lora_a is zero in MLX; it isn't what anybody trained."""
    source = train(num_layers=2, keys=KEYS)
    path = source / peers.MLX_WEIGHTS
    tensors = peers.load_file(path)
    del tensors["model.layers.1.mlp.down_proj.lora_b"]
    peers.rewrite_tensors(path, tensors)
    refused(source, "peft", saying="model.layers.1.mlp.down_proj")


def test_trap_24_square_factors_are_not_told_apart_by_shape(
    train: Callable[..., Path], exact: Callable[..., Path]
) -> None:
    """With rank == in == 64 nothing but the format's rule says which way round lora_a is."""
    exact(train(num_layers=2, keys=["self_attn.q_proj", "mlp.up_proj"], rank=64))


def test_trap_24_square_factors_from_peft(
    tiny: Tiny, convert: Convert, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """The same the other way; and rank 112 == in of down_proj beside it."""
    base = tiny("llama").path
    config = peers.lora(["q_proj", "o_proj", "down_proj"], r=64, rank_pattern={"down_proj": 112})
    peers.save_peft(base, tmp_path / "peft", config, zoo.TOKENS)
    result = convert(tmp_path / "peft", "mlx", "--base", base)
    expected = peers.peft_deltas(base, tmp_path / "peft")
    peers.assert_same_deltas(peers.mlx_deltas(base, result), expected)


def test_trap_26_lm_head_of_a_tied_base_is_a_no_op_in_mlx(
    train: Callable[..., Path], exact: Callable[..., Path], peers: ModuleType
) -> None:
    """The key trains nothing; in PEFT a target "lm_head" would adapt the head."""
    source = train("qwen2", num_layers=2, keys=[*KEYS, "lm_head"])
    result = exact(source, "qwen2")
    assert "lm_head" not in str(peers.read_json(result / peers.CONFIG)["target_modules"])


def test_trap_26_lm_head_of_a_tied_base_from_peft(
    tiny: Tiny, refused: Refused, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """PEFT adapts the head alone; MLX has no module for it, so the effect would be lost."""
    base = tiny("qwen2").path
    config = peers.lora(["q_proj", "lm_head"])
    peers.save_peft(base, tmp_path / "peft", config, zoo.TOKENS)
    refused(tmp_path / "peft", "mlx", "--base", base, saying="lm_head")


@pytest.mark.parametrize("base", ["qwen2", "llama"])
def test_trap_26_embeddings_move_the_head_too(
    base: str, train: Callable[..., Path], convert: Convert, tiny: Tiny, zoo: ModuleType,
    peers: ModuleType,
) -> None:  # fmt: skip
    """On a tied base MLX's version also moves the output head: PEFT gets both, each as its own."""
    source = train(base, num_layers=1, keys=[*KEYS, "model.embed_tokens"])
    path = tiny(base).path
    result = convert(source, "peft", "--base", path)
    expected = peers.mlx_logits(path, source, zoo.TOKENS)
    plain = peers.torch_logits(peers.hf_base(path), zoo.TOKENS)
    peers.assert_same_logits(peers.peft_logits(path, result, zoo.TOKENS), expected, plain)
    heads = [n for n in peers.raw_tensors(result / peers.PEFT_WEIGHTS) if "lm_head" in n]
    assert bool(heads) == (base == "qwen2")


def test_trap_26_lm_head_of_an_untied_base(
    train: Callable[..., Path], exact: Callable[..., Path]
) -> None:
    """There it is a linear module like any other."""
    exact(train("llama", num_layers=1, keys=[*KEYS, "lm_head"]))


@pytest.mark.parametrize("value", [..., "lora"])
def test_trap_29_no_fine_tune_type_means_lora(
    value: Any, train: Callable[..., Path], exact: Callable[..., Path], peers: ModuleType
) -> None:
    """As it does for mlx-lm."""
    source = train(num_layers=2, keys=KEYS)
    peers.edit_json(source / peers.CONFIG, fine_tune_type=value)
    exact(source)


def test_trap_29_an_unknown_fine_tune_type_is_refused(
    train: Callable[..., Path], refused: Refused, peers: ModuleType
) -> None:
    """mlx-lm takes any word for lora; the next kind of adapter would pass for one."""
    source = train(num_layers=2, keys=KEYS)
    peers.edit_json(source / peers.CONFIG, fine_tune_type="frob")
    refused(source, "peft", saying="frob")


def test_trap_29_dora_without_its_type(
    train: Callable[..., Path], attempt: Callable[..., Any], tiny: Tiny, peers: ModuleType
) -> None:
    """Stock mlx-lm stumbles over `m`; a converter must not drop it and go on."""
    source = train(kind="dora", num_layers=2, keys=KEYS)
    expected = peers.mlx_deltas(tiny("llama").path, source)
    peers.edit_json(source / peers.CONFIG, fine_tune_type=...)
    outcome = attempt(source, "peft", "--base", tiny("llama").path)
    if outcome.code == 0:
        found = peers.peft_deltas(tiny("llama").path, outcome.path)
        peers.assert_same_deltas(found, expected)
        assert "dora" in outcome.text.lower()
    else:
        assert outcome.code == 1
        assert "fine_tune_type" in outcome.err


def test_trap_29_dora_without_magnitudes(
    train: Callable[..., Path], refused: Refused, peers: ModuleType
) -> None:
    """mlx-lm takes the base's norm for them in silence."""
    source = train(kind="dora", num_layers=2, keys=KEYS)
    path = source / peers.MLX_WEIGHTS
    kept = {name: t for name, t in peers.load_file(path).items() if not name.endswith(".m")}
    peers.rewrite_tensors(path, kept)
    refused(source, "peft", saying="model.layers.1")


def test_trap_36_a_base_whose_rope_mlx_cannot_read(
    tiny: Tiny, convert: Convert, zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """transformers 5 writes rope_parameters only: then the *base* differs, not the adapter.

    Logits say nothing there, while the module deltas still agree.
    """
    base = peers.copy_adapter(tiny("qwen2").path, tmp_path / "base")
    peers.edit_json(base / "config.json", rope_theta=..., rope_scaling=...)
    here = peers.torch_logits(peers.hf_base(base), zoo.TOKENS)
    assert np.abs(here - peers.mlx_logits(base, None, zoo.TOKENS)).max() > 0.01
    peers.save_peft(base, tmp_path / "peft", peers.lora(tiny("qwen2").targets), zoo.TOKENS)
    result = convert(tmp_path / "peft", "mlx", "--base", base)
    expected = peers.peft_deltas(base, tmp_path / "peft")
    peers.assert_same_deltas(peers.mlx_deltas(base, result), expected)


@pytest.mark.parametrize(
    ("layers", "num_layers", "relative"),
    [(None, 3, True), ([2], 1, True), ([1, 2], 2, True), ([0, 2], None, False), ([0], None, False)],
)
def test_trap_38_relative_keys_wherever_they_say_it(
    layers: list[int] | None,
    num_layers: int | None,
    relative: bool,
    tiny: Tiny,
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """MLX's Swift runtime knows keys inside the block over the last layers, and nothing else.

    It also refuses keys that hit nothing, so exactly the adapted modules may be listed.
    """
    base = tiny("llama").path
    config = peers.lora(["q_proj", "down_proj"], layers_to_transform=layers)
    peers.save_peft(base, tmp_path / "peft", config, zoo.TOKENS)
    result = convert(tmp_path / "peft", "mlx", "--base", base)
    written = peers.read_json(result / peers.CONFIG)
    keys = set(written["lora_parameters"]["keys"])
    if relative:
        assert keys == set(KEYS)
        assert written["num_layers"] == num_layers
    else:
        assert keys == {f"model.layers.{layer}.{key}" for layer in layers or () for key in KEYS}
    adapted = set(peers.mlx_modules(peers.mlx_model(base, result)))
    wanted = range(3) if layers is None else layers
    assert adapted == {f"model.layers.{layer}.{key}" for layer in wanted for key in KEYS}
