"""Every model type of the table that the other tests don't run: both ways, by the stock libraries.

What PEFT adapts is looked for in the live model, not in the table: all linear layers of all blocks,
the experts' parameters, and routers. What can't be carried is listed in zoo_more.py, and must be
refused by name. A model type of the table is in one of the zoos, or in NOT_RUN with the reason.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import zoo_moe
import zoo_more as more
from zoo import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore")
Convert = Callable[..., Path]
HERE = Path(__file__).parent


NAMES = sorted(more.MORE)
TRAINED = sorted(more.MORE.keys() - more.UNTRAINED.keys())
BACK = [(name, pattern) for name in TRAINED for pattern in more.MORE[name].refused_back]
REFUSED = [(name, pattern) for name in NAMES for pattern in more.MORE[name].refused]
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")
VISION = re.compile(r"vision|visual|projector|image")
# PEFT 0.21.2 takes these names for the experts' parameters: a linear layer so called can only be
# adapted by its weight (peft/utils/transformers_weight_conversion.py)
TAKEN = {
    "minimax_m2": {"gate", "w1", "w2", "w3"},
    **dict.fromkeys(
        (
            "afmoe",
            "deepseek_v2",
            "deepseek_v32",
            "ernie4_5_moe",
            "exaone_moe",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "mellum",
            "qwen3_next",
            "solar_open",
        ),
        frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
    ),
}


def test_every_model_type_is_in_one_list() -> None:
    """Nothing in the table is left out in silence."""
    table = json.loads((HERE.parents[1] / "core" / "architectures.json").read_bytes())["models"]
    lists = [
        set(ARCHITECTURES),
        set(zoo_moe.MOE),
        set(more.MORE),
        set(more.NOT_RUN),
    ]
    assert sum(map(len, lists)) == len(set.union(*lists))
    assert set.union(*lists) == set(table)


# -- what there is to adapt -----------------------------------------------------------------------


def targets(model: torch.nn.Module, name: str) -> tuple[list[str], list[str]]:
    """Paths of modules and of parameters that PEFT can adapt in the language part's blocks."""
    from transformers.pytorch_utils import Conv1D

    modules, parameters = [], []
    for path, module in model.named_modules():
        if not BLOCK.search(path) or VISION.search(path):
            continue
        linear = isinstance(module, torch.nn.Linear | Conv1D)
        plain = isinstance(module, Conv1D) or type(module).forward is torch.nn.Linear.forward
        if linear and plain and path.rpartition(".")[2] not in TAKEN.get(name, ()):
            modules.append(path)
            continue
        for leaf, value in module.named_parameters(recurse=False):
            expert = "experts" in path.split(".") and value.ndim > 1 and "bias" not in leaf
            router = path.rpartition(".")[2] in ("gate", "router") and value.ndim == 2
            if expert or (leaf == "weight" and (linear or router)):
                parameters.append(f"{path}.{leaf}")
    return modules, parameters


def matching(paths: list[str], patterns: tuple[str, ...], wanted: bool) -> list[str]:
    """The paths (of parameters, without .weight) that match one of the patterns, or none."""
    return [
        path
        for path in paths
        if any(re.search(p, path.removesuffix(".weight")) for p in patterns) == wanted
    ]


def lora(peers: ModuleType, modules: list[str], parameters: list[str]) -> Any:
    """A LoRA of exactly these."""
    return peers.lora(modules, lora_dropout=0.0, target_parameters=sorted(parameters))


@pytest.fixture(scope="module")
def base(zoo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """base("gpt2") -> the folders of a tiny base."""

    @cache
    def get(name: str) -> Any:
        return more.build(name, tmp_path_factory.mktemp("every") / name, zoo._randomise)

    return get


@pytest.fixture(scope="module")
def hf_base(base: Callable[[str], Any]) -> Callable[[str], torch.nn.Module]:
    """hf_base("gpt2") -> the base by transformers, which PEFT may change."""

    def get(name: str) -> torch.nn.Module:
        auto = more.model_class(name)
        return auto.from_pretrained(base(name).hf, dtype=torch.float32).eval()  # type: ignore[no-any-return]

    return get


@pytest.fixture
def trained(
    hf_base: Callable[[str], torch.nn.Module], zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> Callable[..., tuple[Path, np.ndarray, np.ndarray]]:
    """trained("gpt2", patterns, wanted) -> folder saved by stock PEFT, its logits, the base's."""

    def make(
        name: str, patterns: tuple[str, ...], wanted: bool
    ) -> tuple[Path, np.ndarray, np.ndarray]:
        from peft import get_peft_model

        model = hf_base(name)
        plain = peers.torch_logits(model, zoo.TOKENS)
        found = [matching(paths, patterns, wanted) for paths in targets(model, name)]
        torch.manual_seed(0)
        peft = get_peft_model(model, lora(peers, *found))
        peers.randomise_peft(peft)
        peft.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", peers.torch_logits(peft, zoo.TOKENS), plain

    return make


# -- the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_from_peft(
    name: str,
    base: Callable[[str], Any],
    hf_base: Callable[[str], torch.nn.Module],
    trained: Callable[..., Any],
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
) -> None:
    """mlx-lm answers as PEFT does, as closely as the bases agree, and the way back is exact."""
    from peft import PeftModel

    source, expected, plain = trained(
        name, more.MORE[name].refused + more.MORE[name].not_in_peft, False
    )
    there = convert(source, "mlx", "--base", base(name).hf)
    found = peers.mlx_logits(base(name).mlx, there, zoo.TOKENS)
    adapted = lambda: PeftModel.from_pretrained(hf_base(name), source)
    peers.assert_same_logits(found, expected, plain, adapted)
    back = convert(there, "peft", "--base", base(name).hf)
    changed = peers.changed_tensors(source / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS)
    assert [n for n in changed if not re.search(more.MORE[name].lost, n)] == []
    assert peers.read_json(back / peers.CONFIG) == peers.read_json(source / peers.CONFIG)
    if changed:
        model = PeftModel.from_pretrained(hf_base(name), back).eval()
        assert np.array_equal(peers.torch_logits(model, zoo.TOKENS), expected)


@pytest.mark.parametrize(("name", "pattern"), REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(
    name: str,
    pattern: str,
    base: Callable[[str], Any],
    trained: Callable[..., Any],
    attempt: Callable[..., Any],
) -> None:
    """An adapter of nothing else is refused, and the message has the module's name."""
    source, *_ = trained(name, (pattern,), True)
    outcome = attempt(source, "mlx", "--base", base(name).hf)
    assert outcome.code == 1, outcome.text
    assert re.search(pattern.replace("$", r"\b"), outcome.err), outcome.err


@pytest.mark.parametrize("name", sorted(more.PASSED_BY))
def test_what_has_no_effect_in_transformers_is_refused(
    name: str, base: Callable[[str], Any], trained: Callable[..., Any], attempt: Callable[..., Any]
) -> None:
    """PEFT takes such a layer without a word, and mlx-lm would give the adapter an effect."""
    source, adapted, plain = trained(name, (more.PASSED_BY[name],), True)
    assert np.array_equal(adapted, plain)
    outcome = attempt(source, "mlx", "--base", base(name).hf)
    assert outcome.code == 1, outcome.text
    assert "no effect in transformers" in outcome.err


def test_what_has_no_effect_and_was_trained_is_carried(
    base: Callable[[str], Any], trained: Callable[..., Any], convert: Convert, peers: ModuleType
) -> None:
    """Its B is still zero, as no gradient reaches it."""
    source, *_ = trained("jamba", (more.PASSED_BY["jamba"],), True)
    tensors = peers.load_file(source / peers.PEFT_WEIGHTS)
    zero = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    peers.rewrite_tensors(source / peers.PEFT_WEIGHTS, zero)
    there = peers.load_file(convert(source, "mlx", "--base", base("jamba").hf) / peers.MLX_WEIGHTS)
    assert len(there) == len(tensors)


@pytest.mark.parametrize("name", sorted(more.NOT_RUN))
def test_what_is_not_run_is_refused(
    name: str, refused: Callable[..., str], zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """Every linear layer of its blocks, one by one."""
    import transformers
    from peft import get_peft_model

    config = transformers.AutoConfig.for_model(name, **more.SMALL[name].config({}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    modules, parameters = targets(model, name)
    assert not parameters
    leaves = sorted({path.rpartition(".")[2] for path in modules})
    assert len(leaves) == 7
    for leaf in leaves:
        fresh = transformers.AutoModelForCausalLM.from_config(config)
        source = tmp_path / leaf / "peft"
        get_peft_model(fresh, peers.lora([leaf])).save_pretrained(source)
        refused(source, "mlx", "--base", tmp_path / "base", saying=leaf)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_from_peft_on_the_whole_model(
    name: str, base: Callable[[str], Any], convert: Convert, zoo: ModuleType, peers: ModuleType
) -> None:
    """Types that transformers also loads as text alone have other names with the vision part."""
    import transformers
    from peft import get_peft_model

    folder = base(name).hf
    auto = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model) is not type(more.model_class(name).from_pretrained(folder))
    plain = peers.torch_logits(model, zoo.TOKENS)
    peft = get_peft_model(model, lora(peers, *targets(model, name)))
    peers.randomise_peft(peft)
    source = folder.with_name(f"{name}-whole")
    peft.save_pretrained(source)
    there = convert(source, "mlx", "--base", folder)
    found = peers.mlx_logits(folder, there, zoo.TOKENS)
    peers.assert_same_logits(found, peers.torch_logits(peft, zoo.TOKENS), plain, lambda: peft)
    back = convert(there, "peft", "--base", folder)
    assert not peers.changed_tensors(source / peers.PEFT_WEIGHTS, back / peers.PEFT_WEIGHTS)


@pytest.mark.parametrize("name", sorted(more.UNTRAINED))
def test_what_mlx_lm_cannot_train(
    name: str, base: Callable[[str], Any], zoo: ModuleType, peers: ModuleType, tmp_path: Path
) -> None:
    """When this fails, mlx-lm has learnt it: take the type off the list."""
    with pytest.raises(AttributeError, match="_no_grad"):
        peers.save_mlx(base(name).mlx, tmp_path / "mlx", zoo.TOKENS)


@pytest.mark.parametrize("name", TRAINED)
def test_from_mlx(
    name: str,
    base: Callable[[str], Any],
    hf_base: Callable[[str], torch.nn.Module],
    convert: Convert,
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """What mlx-lm adapts by default in the last layers, loaded strictly by PEFT."""
    from peft import PeftModel, get_peft_model_state_dict

    keys = default_keys(peers.mlx_base(base(name).mlx), more.MORE[name].refused_back)
    expected = peers.save_mlx(base(name).mlx, tmp_path / "mlx", zoo.TOKENS, num_layers=3, keys=keys)
    result = convert(tmp_path / "mlx", "peft", "--base", base(name).hf)
    plain = peers.torch_logits(hf_base(name), zoo.TOKENS)
    with no_missing_keys():
        model = PeftModel.from_pretrained(hf_base(name), result).eval()
    used = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(peers.raw_tensors(result / peers.PEFT_WEIGHTS)) == set(used)
    found = peers.torch_logits(model, zoo.TOKENS)
    peers.assert_same_logits(found, expected, plain, lambda: model)
    again = convert(result, "mlx", "--base", base(name).hf)
    assert not peers.changed_tensors(
        tmp_path / "mlx" / peers.MLX_WEIGHTS, again / peers.MLX_WEIGHTS
    )


@pytest.mark.parametrize(("name", "pattern"), BACK)
def test_what_peft_cannot_have_is_refused_by_name(
    name: str,
    pattern: str,
    base: Callable[[str], Any],
    attempt: Callable[..., Any],
    zoo: ModuleType,
    peers: ModuleType,
    tmp_path: Path,
) -> None:
    """An adapter that mlx-lm has of nothing else."""
    keys = matching(linear_layers(peers.mlx_base(base(name).mlx)), (pattern,), True)
    assert keys
    peers.save_mlx(base(name).mlx, tmp_path / "mlx", zoo.TOKENS, num_layers=-1, keys=keys)
    outcome = attempt(tmp_path / "mlx", "peft", "--base", base(name).hf)
    assert outcome.code == 1, outcome.text
    assert re.search(pattern.replace("expert\\.", r"experts?\."), outcome.err), outcome.err


@contextmanager
def no_missing_keys() -> Iterator[None]:
    """PEFT only warns of what it doesn't find in the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [w for w in caught if "missing adapter keys" in str(w.message)]


def default_keys(model: Any, refused: tuple[str, ...]) -> list[str] | None:
    """None (mlx-lm's defaults), or its defaults but for what PEFT can't have."""
    return matching(linear_layers(model), refused, False) if refused else None


def linear_layers(model: Any) -> list[str]:
    """What mlx-lm adapts by default, relative to a block."""
    from mlx import nn
    from mlx_lm.models.switch_layers import SwitchLinear

    return sorted(
        {
            path
            for layer in model.layers
            for path, module in layer.named_modules()
            if isinstance(module, nn.Linear | SwitchLinear)
        }
    )
