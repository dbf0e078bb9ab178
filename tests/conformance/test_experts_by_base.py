"""Experts whose names or orientation only the base's config tells.

That they are carried right, both ways, is shown by the stock libraries in
test_every_architecture.py; here is what happens when the base is missing, or is another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import zoo_more as more

pytestmark = pytest.mark.filterwarnings("ignore")
Refused = Callable[..., str]
Convert = Callable[..., Path]
WITHOUT = "granitemoehybrid without experts"
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]


@pytest.fixture(scope="module")
def base(zoo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    @cache
    def get(name: str) -> Any:
        return more.build(name, tmp_path_factory.mktemp("by_base") / "base", zoo._randomise)

    return get


@pytest.fixture
def saved(base: Callable[[str], Any], peers: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """saved(name, modules, parameters) -> a folder that stock PEFT saved."""
    from peft import get_peft_model

    def make(name: str, modules: list[str], parameters: list[str]) -> Path:
        auto = more.model_class(name)
        model = auto.from_pretrained(base(name).hf, dtype=torch.float32)
        config = peers.lora(modules, lora_dropout=0.0, target_parameters=parameters or None)
        peft = get_peft_model(model, config)
        peers.randomise_peft(peft)
        peft.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft"

    return make


def changed_base(base: Path, target: Path, **values: Any) -> Path:
    """The base's config alone, with other values (None: without the key)."""
    config = json.loads((base / "config.json").read_text()) | values
    target.mkdir()
    kept = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def modules_in(folder: Path, peers: ModuleType) -> set[str]:
    """What an MLX folder adapts, within a block."""
    tensors = peers.raw_tensors(folder / peers.MLX_WEIGHTS)
    return {re.sub(r".*layers\.\d+\.|\.lora_[ab]$", "", name) for name in tensors}


@pytest.mark.parametrize("name", [WITHOUT, "granitemoehybrid"])
def test_a_shared_expert_needs_the_base(name: str, saved: Any, refused: Refused) -> None:
    """The same two names are other modules of mlx-lm with and without experts beside them."""
    source = saved(name, ["input_linear", "output_linear"], [])
    said = refused(source, "mlx", saying="--base BASE")
    assert "shared_mlp" in said


def test_a_shared_expert_beside_experts_tells_the_base(
    saved: Any, convert: Convert, peers: ModuleType
) -> None:
    """Only a model with experts has both."""
    experts = ["block_sparse_moe.experts.down_proj"]
    source = saved("granitemoehybrid", ["shared_mlp.input_linear"], experts)
    found = modules_in(convert(source, "mlx"), peers)
    assert found == {"shared_mlp.input_linear", "block_sparse_moe.switch_mlp.down_proj"}


def test_a_base_that_does_not_say_how_many_experts_it_has(
    saved: Any, base: Any, refused: Refused, tmp_path: Path
) -> None:
    source = saved(WITHOUT, ["input_linear"], [])
    silent = changed_base(base(WITHOUT).hf, tmp_path / "base", num_local_experts=None)
    refused(source, "mlx", "--base", silent, saying="num_local_experts")


def test_the_way_back_without_a_base(
    base: Any, saved: Any, convert: Convert, peers: ModuleType
) -> None:
    """mlx-lm's names tell which of the two it was, once a mixer is among them."""
    source = saved(WITHOUT, ["in_proj", "input_linear", "output_linear"], [])
    there = convert(source, "mlx", "--base", base(WITHOUT).hf)
    assert {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"} < modules_in(there, peers)
    back = convert(there, "peft")
    assert not peers.changed_tensors(source / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS)


def test_turned_experts_need_the_base(saved: Any, refused: Refused, base: Any) -> None:
    source = saved("llama4", ["q_proj"], EXPERTS)
    refused(source, "mlx", saying="give --base BASE")


def test_experts_the_other_way_round_are_noticed(
    saved: Any, refused: Refused, base: Any, peers: ModuleType
) -> None:
    """As a PEFT before 0.18 had them, which took the parameter for (experts, in, out)."""
    source = saved("llama4", ["q_proj"], EXPERTS)
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    for name in [n for n in tensors if ".experts." in n and "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        a3, b3 = a.reshape(4, -1, a.shape[1]), b.reshape(b.shape[0], -1, 4)
        tensors[name] = b3.permute(2, 1, 0).flatten(0, 1)
        tensors[other] = a3.permute(2, 1, 0).flatten(1, 2)
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, tensors)
    refused(source, "mlx", "--base", base("llama4").hf, saying="inputs for outputs")


def test_experts_of_another_width(saved: Any, refused: Refused, base: Any, tmp_path: Path) -> None:
    """The same names and number of experts, and a config of another size."""
    source = saved("llama4", ["q_proj"], EXPERTS)
    config = json.loads((base("llama4").hf / "config.json").read_text())["text_config"]
    wide = changed_base(
        base("llama4").hf, tmp_path / "base", text_config=config | {"hidden_size": 80}
    )
    refused(source, "mlx", "--base", wide, saying="hidden_size")


def test_the_proof_turns_experts_too(
    saved: Any, convert: Convert, run: Any, base: Any, peers: ModuleType
) -> None:
    """validate passes what is right, and names the projection of which one expert is wrong."""
    source, folder = saved("llama4", ["q_proj"], EXPERTS), base("llama4").hf
    there = convert(source, "mlx", "--base", folder)
    done = run("validate", source, there, "--base", folder)
    assert done.exit_code == 0, done.output
    path = there / peers.MLX_WEIGHTS
    name = "language_model.model.layers.1.feed_forward.experts.up_proj"
    tensors = peers.load_file(path)
    tensors[f"{name}.lora_b"][2] *= 1.1
    peers.rewrite_tensors(path, tensors)
    done = run("validate", source, there, "--base", folder)
    assert done.exit_code == 3
    assert name in done.output


def test_experts_in_rows_can_not_be_adapted_by_peft(
    saved: Any, refused: Refused, base: Any, zoo: ModuleType
) -> None:
    """dbrx: PEFT wraps the module, of which transformers reads the parameters from outside."""
    from peft import PeftModel

    source = saved("dbrx", ["Wqkv"], [f"ffn.experts.mlp.{leaf}" for leaf in ("w1", "v1", "w2")])
    model = more.model_class("dbrx").from_pretrained(base("dbrx").hf, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, source)
    with pytest.raises(AttributeError, match="ParamWrapper"):
        adapted(torch.tensor(zoo.TOKENS))
    refused(source, "mlx", "--base", base("dbrx").hf, saying="PEFT can't run")


def test_experts_without_effect(
    saved: Any, convert: Convert, refused: Refused, base: Any, peers: ModuleType, tmp_path: Path
) -> None:
    """LongCat's zero experts have rows in one parameter: how many tells the base alone."""
    from loraduct.formats import base as bases
    from loraduct.formats import read
    from loraduct.formats.options import ReadOptions
    from loraduct.validation.align import aligned
    from loraduct.validation.delta import compare

    folder = base("longcat_flash").hf
    source = saved("longcat_flash", ["o_proj"], ["mlp.experts.gate_up_proj"])
    refused(source, "mlx", saying="--base BASE")
    counts = dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), 5)
    more_experts = changed_base(folder, tmp_path / "base", **counts)
    refused(source, "mlx", "--base", more_experts, saying="has 4 experts")
    there = convert(source, "mlx", "--base", folder)
    same = convert(source, "peft", "--base", folder)
    assert not peers.changed_tensors(source / peers.PEFT_WEIGHTS, same / peers.PEFT_WEIGHTS)
    one, two = (aligned(read(f, ReadOptions()), bases.read(folder), None) for f in (source, there))
    assert one.keys() == two.keys()
    assert all(compare(n, one[n], two[n], bases.read(folder)).fits for n in one)


@pytest.mark.parametrize(
    ("name", "targets", "parameters"),
    [
        (WITHOUT, ["input_linear", "output_linear"], []),
        ("granitemoehybrid", ["shared_mlp.input_linear"], ["block_sparse_moe.experts.down_proj"]),
    ],
)
def test_builders_name_modules_as_convert_does(
    saved: Any, base: Any, convert: Convert, name: str, targets: list[str], parameters: list[str]
) -> None:
    """merge, fuse and package take MLX adapters by the same entry of the table."""
    from loraduct.converters.neutral import neutral
    from loraduct.formats import base as base_folder
    from loraduct.formats import read

    source = saved(name, targets, parameters)
    there = convert(source, "mlx", "--base", base(name).hf)
    found = neutral(read(there), base_folder.read(base(name).hf))
    assert found.low_rank.keys() == read(source).low_rank.keys()
