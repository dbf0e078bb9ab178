"""Rotary frequencies of every kind against transformers' own."""

from pathlib import Path

import numpy as np
import pytest

from loraduct.converters.rope import rope_of, rotation
from loraduct.errors import Refused

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn with scales": YARN
    | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16, "truncate": False},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1 + i / 10 for i in range(32)],
        "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_transformers(kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 5e5, **KINDS[kind]},
    )
    theirs = LlamaRotaryEmbedding(config)
    ours = rope_of(config.to_dict(), 64, Path("config.json"))
    np.testing.assert_allclose(ours.frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
    assert ours.factor == pytest.approx(theirs.attention_scaling, rel=1e-9)
    assert ours.limit == {"dynamic": 2048, "longrope": 512}.get(kind)


def test_older_fields_say_the_same():
    new = {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "max_position_embeddings": 2048}
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 2048}
    file = Path("config.json")
    assert rope_of(new, 64, file) == rope_of(old, 64, file)


def test_rotation_is_a_rotation():
    rope = rope_of({"rope_theta": 1e4}, 8, Path("config.json"))
    cos, sin = rotation(rope, 50)
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    turned = x * cos + np.concatenate([x[:, 4:], x[:, :4]], 1) * sin
    pairs = x[:, :4] + 1j * x[:, 4:]
    wanted = pairs * np.exp(1j * np.arange(50)[:, None] * np.array(rope.frequencies))
    np.testing.assert_allclose(turned[:, :4] + 1j * turned[:, 4:], wanted, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "spiral"},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": "many"},
        {"rope_type": "longrope", "short_factor": [1.0], "original_max_position_embeddings": 8},
        {"rope_type": "llama3", "factor": 8.0},
    ],
)
def test_unknown_or_broken_settings_are_refused(settings):
    config = {"rope_parameters": settings, "max_position_embeddings": 64}
    with pytest.raises(Refused, match=r"config\.json"):
        rope_of(config, 64, Path("config.json"))
