"""What a package's functions compute, against stock PEFT in float32."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from loraduct.converters import coreml, package
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats import read

pytest.importorskip("peft")

import adapters
import families
import stock

TOLERANCE = 1e-2  # of the logits' scale, FLOAT16 throughout; random adapters move them a lot
EXACT = 1.5e-3  # only the weights, scales and norms in FLOAT16
ALL = "all-linear"
# kind -> PEFT's options
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {r"layers\.1\..*down_proj": 7}, "alpha_pattern": {"o_proj": 3}},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "biases": {"bias": "all"},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "norms saved": {"modules_to_save": ["model.norm", "input_layernorm"]},
}
PAIRS = [("llama", kind) for kind in KINDS]  # a head of its own, biases
PAIRS += [
    (n, k) for n in ("llama llama3", "gemma2") for k in ("dora", "head saved", "embedding saved")
]
PAIRS += [("phi3", "lora"), ("phi3", "dora"), ("qwen2", "biases")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Name -> (model, base, its package, tokens), each made once."""
    made = {}

    def get(name, **options):
        key = (name, *sorted(options))
        if key not in made:
            room = tmp_path_factory.mktemp("world")
            model, folder = families.saved(name, room / "base")
            base = base_folder.read(folder)
            options = coreml.Options(context=families.CONTEXT, **options)
            coreml.build(base, room / "x.mlpackage", options)
            made[key] = (model, base, room / "x.mlpackage", families.tokens(12))
        return made[key]

    return get


@pytest.fixture
def fresh(world, tmp_path):
    """A copy of a package to be edited."""

    def get(name, **options):
        model, base, path, ids = world(name, **options)
        return model, base, Path(shutil.copytree(path, tmp_path / "x.mlpackage")), ids

    return get


def check(path, name, ids, model, tolerance=TOLERANCE):
    wanted = families.reference(model, ids)
    assert families.off(adapters.logits(path, name, ids), wanted) <= tolerance
    assert families.off(adapters.logits(path, name, ids, precision="fp32"), wanted) <= EXACT


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_one_adapter_computes_what_peft_does(fresh, tmp_path, name, kind):
    model, _, path, ids = fresh(name)
    made = adapters.trained(model, adapters.config(ALL, **KINDS[kind]), 3)
    folder = adapters.save(made, tmp_path / "peft")
    package.add(path, {"one": [package.Member(str(folder))]})
    wanted = families.reference(made, ids)
    assert families.off(wanted, families.reference(model, ids)) > 5 * TOLERANCE, "shows nothing"
    check(path, "one", ids, made)
    check(path, None, ids, model)  # the base is as it was


@pytest.mark.parametrize("name", ["llama", "llama llama3", "gemma2"])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_side_of_the_vocabulary(fresh, tmp_path, name, module):
    """On a tied base the embedding's LoRA moves the input alone, and the head's the output."""
    model, _, path, ids = fresh(name)
    made = adapters.trained(model, adapters.config(["q_proj", module]), 4)
    folder = adapters.save(made, tmp_path / "peft")
    package.add(path, {"one": [package.Member(str(folder))]})
    check(path, "one", ids, made)


def test_dora_on_an_embedding(fresh, tmp_path):
    model, _, path, ids = fresh("llama")
    made = adapters.trained(model, adapters.config(["embed_tokens"], use_dora=True), 5)
    folder = adapters.save(made, tmp_path / "peft")
    package.add(path, {"one": [package.Member(str(folder))]})
    check(path, "one", ids, made)


def check_stack(path, name, ids, base, parts):
    wanted = stock.logits(base.path, parts, ids)
    assert families.off(adapters.logits(path, name, ids), wanted) <= TOLERANCE
    assert families.off(adapters.logits(path, name, ids, precision="fp32"), wanted) <= EXACT


@pytest.mark.parametrize("second", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_stack_is_what_peft_runs(fresh, tmp_path, name, second):
    """Against stock PEFT with both adapters active, in this order."""
    model, base, path, ids = fresh(name)
    one = adapters.trained(model, adapters.config(ALL), 6)
    two = adapters.trained(model, adapters.config(ALL, r=3, **second), 7)
    folders = [adapters.save(m, tmp_path / f"p{i}") for i, m in enumerate((one, two))]
    package.add(path, {"one": [package.Member(str(folders[0]))]})
    both = [package.Member("one", 0.5), package.Member(str(folders[1]))]
    package.add(path, {"both": both})
    check_stack(path, "both", ids, base, [(folders[0], 0.5), (folders[1], 1.0)])
    check(path, "one", ids, one)


def test_two_doras_in_a_stack(fresh, tmp_path):
    model, base, path, ids = fresh("llama")
    made = [adapters.trained(model, adapters.config(ALL, use_dora=True), s) for s in (8, 9)]
    folders = [adapters.save(m, tmp_path / f"p{i}") for i, m in enumerate(made)]
    package.add(path, {f"n{i}": [package.Member(str(f))] for i, f in enumerate(folders)})
    package.add(path, {"both": [package.Member("n0"), package.Member("n1")]})
    package.add(path, {"turned": [package.Member("n1"), package.Member("n0")]})
    check_stack(path, "both", ids, base, [(f, 1.0) for f in folders])
    check_stack(path, "turned", ids, base, [(f, 1.0) for f in reversed(folders)])
    with pytest.raises(Refused, match="weight can only be 1"):
        package.add(path, {"half": [package.Member("n0", 0.5), package.Member("n1")]})


@pytest.mark.parametrize("options", [{"shapes": (1, 8)}, {"stateless": True}])
def test_fixed_shapes_and_stateless(fresh, tmp_path, options):
    """With fixed shapes an adapter is a function for each of them."""
    model, _, path, ids = fresh("llama", **options)
    made = adapters.trained(model, adapters.config(ALL), 10)
    folder = adapters.save(made, tmp_path / "peft")
    report = package.add(path, {"one": [package.Member(str(folder))]})
    assert report.functions["one"] == (["one_q1", "one_q8"] if "shapes" in options else ["one"])
    check(path, "one", ids, made)


@pytest.mark.parametrize("alpha", [8 * 2.0**13, 8 * 2.0**-15, 8 * 300.7, 1.7, -8, 0])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_scales_far_out(fresh, tmp_path, alpha, dtype):
    """b is as much smaller as the scale is larger: the update stays of one size."""
    import torch

    model, _, path, ids = fresh("llama")
    made = adapters.trained(model, adapters.config(["q_proj", "up_proj"], lora_alpha=alpha), 11)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name and alpha:
                parameter.mul_(4 / abs(alpha))
                parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    folder = adapters.save(made, tmp_path / "peft", dtype)
    package.add(path, {"one": [package.Member(str(folder))]})
    check(path, "one", ids, made)
    (update,) = [u for m, u in read(Path(f"{path}:one")).low_rank.items() if "1.mlp" in m]
    before = read(folder).low_rank["model.layers.1.mlp.up_proj"]
    assert update.scale == before.scale
    if dtype == "float16":
        assert update.b.raw().tobytes() == before.b.raw().tobytes()
    elif dtype == "bfloat16":  # its eight bits are FLOAT16's too, times a power of two
        assert (
            np.abs(update.b.read() - before.b.read()).max() <= 1e-7 * np.abs(before.b.read()).max()
        )
    else:  # rounded once
        wanted = before.b.read()
        assert np.allclose(update.b.read(), wanted, rtol=2**-10, atol=1e-4 * abs(wanted).max())
