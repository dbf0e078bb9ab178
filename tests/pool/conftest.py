"""Tiny bases and adapters of stock PEFT: those that the tests of fusing have."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="session")
def fusing():
    pytest.importorskip("peft")
    import torch

    torch.set_num_threads(1)
    import fusing

    return fusing


@pytest.fixture(scope="session")
def peers():
    pytest.importorskip("mlx_lm")
    import peers

    return peers


@pytest.fixture(scope="session")
def bases(fusing, tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = fusing.saved(name, tmp_path_factory.mktemp("base"))
            rope = json.loads((made[name] / "config.json").read_text()).get("rope_parameters") or {}
            experts = {"num_experts": 3} if name == "qwen3_moe" else {}
            old = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
            fusing.edited(made[name], **old, **experts)  # what mlx-lm reads
        return made[name]

    return get


@pytest.fixture(scope="module")
def adapters(fusing, bases, tmp_path_factory):
    """Name -> folder of an adapter on the tiny llama, made once."""
    wanted = {
        "one": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        "two": {"target_modules": ["q_proj", "up_proj"], "r": 3, "use_rslora": True},
        "dora": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
        "norms": {"target_modules": ["k_proj"], "modules_to_save": ["input_layernorm"]},
        "tokens": {"target_modules": ["k_proj"], "trainable_token_indices": [3, 44]},
    }
    home = tmp_path_factory.mktemp("adapters")
    return {
        name: fusing.trained(bases("llama"), home / name, seed, **config)
        for seed, (name, config) in enumerate(wanted.items(), 1)
    }


@pytest.fixture(scope="module")
def equal(fusing, bases, tmp_path_factory):
    """Five adapters of the same size, a to e."""
    home = tmp_path_factory.mktemp("equal")
    return {
        n: fusing.trained(bases("llama"), home / n, i, target_modules=["q_proj", "v_proj"])
        for i, n in enumerate("abcde", 11)
    }


@pytest.fixture
def model(fusing, bases):
    """The tiny llama, by transformers."""
    return fusing.loaded(bases("llama"))
