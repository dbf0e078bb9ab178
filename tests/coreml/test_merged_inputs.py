"""Adapters merged into a package's weights, or given as arguments, against stock PEFT."""

import families
import numpy as np
import pytest
import stock

from loraduct.converters import coreml, extract
from loraduct.converters.neutral import neutral
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats import read
from loraduct.formats.safetensors_file import read_header
from loraduct.tensor import Tensor

TOLERANCE = 2e-3
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CASES = {
    "lora": {"target_modules": ALL},
    "dora": {"target_modules": ALL, "use_dora": True},
    "rslora with patterns": {
        "target_modules": ALL, "use_rslora": True, "rank_pattern": {"layers.1.*q_proj": 7},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = families.saved(name, tmp_path_factory.mktemp("base"))
        return made[name]

    return get


def delta(u):
    """dW of a linear layer."""
    return np.float32(u.scale) * (u.b.read() @ u.a.read())


def neutrals(base, *folders):
    return [(neutral(read(f), base), weight) for f, weight in folders]


def merged(base, path, *folders):
    coreml.build(
        base,
        path,
        coreml.Options(context=families.CONTEXT),
        merged=("both", neutrals(base, *folders)),
    )
    return path


@pytest.mark.parametrize("name", ["llama", "llama llama3", "qwen2", "gemma2"])
@pytest.mark.parametrize("case", CASES)
def test_merged(bases, tmp_path, name, case):
    model, folder = bases(name)
    one = stock.trained(model, tmp_path / "a", 1, **CASES[case])
    ids = families.tokens(24)
    wanted = stock.logits(folder, [(one, 1.0)], ids)
    plain = stock.logits(folder, [], ids)
    path = merged(base_folder.read(folder), tmp_path / "x.mlpackage", (one, 1.0))
    found = families.run(path, ids)
    assert families.off(found, wanted) <= TOLERANCE
    assert np.abs(wanted - plain).max() > 20 * np.abs(found - wanted).max()


def test_merged_fused_projections(bases, tmp_path):
    model, folder = bases("phi3")
    one = stock.trained(model, tmp_path / "a", 1, target_modules=FUSED)
    ids = families.tokens(24)
    path = merged(base_folder.read(folder), tmp_path / "x.mlpackage", (one, 1.0))
    wanted = stock.logits(folder, [(one, 1.0)], ids)
    assert families.off(families.run(path, ids), wanted) <= TOLERANCE


def test_merged_with_weights(bases, tmp_path):
    model, folder = bases("llama")
    one = stock.trained(model, tmp_path / "a", 1, target_modules=ALL)
    two = stock.trained(model, tmp_path / "b", 2, target_modules=["q_proj", "down_proj"], r=3)
    both = [(one, 0.5), (two, -1.5)]
    ids = families.tokens(24)
    path = merged(base_folder.read(folder), tmp_path / "x.mlpackage", *both)
    assert families.off(families.run(path, ids), stock.logits(folder, both, ids)) <= TOLERANCE


@pytest.mark.parametrize("turned", [False, True])
def test_merged_with_dora_among_them(bases, tmp_path, turned):
    """PEFT's DoRA multiplies what stands before it: the order counts, and is kept."""
    model, folder = bases("llama")
    one = stock.trained(model, tmp_path / "a", 1, target_modules=ALL)
    two = stock.trained(model, tmp_path / "b", 2, target_modules=ALL, use_dora=True)
    both = [(two, 1.0), (one, 0.5)] if turned else [(one, 0.5), (two, 1.0)]
    ids = families.tokens(24)
    path = merged(base_folder.read(folder), tmp_path / "x.mlpackage", *both)
    assert families.off(families.run(path, ids), stock.logits(folder, both, ids)) <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "says"),
    [("dora", "is DoRA.*weight other than 1"), ("norms", "replaces this weight: weighted by 0.5")],
)
def test_what_has_no_weight_is_refused(bases, tmp_path, case, says):
    model, folder = bases("llama")
    one = stock.trained(model, tmp_path / "a", 1, **CASES[case])
    with pytest.raises(Refused, match=says):
        merged(base_folder.read(folder), tmp_path / "x.mlpackage", (one, 0.5))
    assert not (tmp_path / "x.mlpackage").exists()


def arguments(path, rank, base, given, name="both"):
    coreml.build(
        base, path, coreml.Options(context=families.CONTEXT, max_rank=rank), inputs={name: given}
    )
    held = read_header(path.with_name(f"x.{name}.safetensors"))[0]
    return {n: t.read().astype(np.float16) for n, t in held.items()}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_arguments(bases, tmp_path, name):
    model, folder = bases(name)
    one = stock.trained(model, tmp_path / "a", 1, target_modules=ALL, r=3)
    two = stock.trained(
        model, tmp_path / "b", 2, target_modules=["q_proj"], layers_to_transform=[1]
    )
    base, ids = base_folder.read(folder), families.tokens(24)
    both = [(one, 1.0), (two, 0.7)]
    path = tmp_path / "x.mlpackage"
    extra = arguments(path, 8, base, neutrals(base, *both))
    assert extra["lora_a_q_proj"].shape[:2] == (3, 8)
    assert (
        families.off(families.run(path, ids, extra=extra), stock.logits(folder, both, ids))
        <= TOLERANCE
    )
    zeros = {n: np.zeros_like(a) for n, a in extra.items()}
    plain = stock.logits(folder, [], ids)
    assert families.off(families.run(path, ids, extra=zeros), plain) <= TOLERANCE


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"target_modules": ALL, "r": 9},
            "rank 9, the package takes up to 8; build it with --max-rank 9",
        ),
        ({"target_modules": ALL, "use_dora": True}, "is DoRA"),
        ({"target_modules": ["embed_tokens"]}, "only linear layers of the blocks"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "a whole parameter"),
    ],
)
def test_what_is_no_argument_is_refused(bases, tmp_path, config, says):
    model, folder = bases("llama")
    one = stock.trained(model, tmp_path / "a", 1, **config)
    base = base_folder.read(folder)
    with pytest.raises(Refused, match=says):
        arguments(tmp_path / "x.mlpackage", 8, base, neutrals(base, (one, 1.0)))
    assert not (tmp_path / "x.mlpackage").exists()


def test_another_base_is_refused(bases, tmp_path):
    model, _ = bases("llama")
    one = stock.trained(model, tmp_path / "a", 1, target_modules=ALL)
    other = base_folder.read(bases("qwen3")[1])
    with pytest.raises(Refused, match="made for another base"):
        neutral(read(one), other)


@pytest.mark.parametrize("rank", [None, 4])
def test_extracted_from_what_was_merged(bases, tmp_path, rank):
    """An update in 16-bit weights comes back: what is left over has the size of rounding."""
    model, folder = bases("llama")
    one = stock.trained(model, tmp_path / "a", 1, target_modules=["q_proj", "down_proj"])
    base = base_folder.read(folder)
    update = neutral(read(one), base)
    new = dict(base.tensors)
    for module, u in update.low_rank.items():
        name = f"{module}.weight"
        weight = new[name].read() + delta(u)
        new[name] = Tensor(name, "F32", weight.shape, data=weight).to("F16")
    found = extract.differences(new, base.tensors, extract.Wanted(rank=rank), folder)
    assert found.keys() == update.low_rank.keys()
    for module, one_found in found.items():
        wanted = delta(update.low_rank[module])
        got = delta(one_found.update)
        assert one_found.rank == 4
        assert one_found.whole
        error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        assert error < 2 * one_found.rounding


def test_there_and_back_on_the_command_line(bases, tmp_path, cli):
    """convert --to coreml, as a function and merged, and back to PEFT."""
    model, folder = bases("llama")
    one = stock.trained(model, tmp_path / "my-adapter", 1, target_modules=["q_proj", "up_proj"])
    wanted = read(one).low_rank
    for way in ([], ["--merged"]):
        path = tmp_path / f"x{len(way)}.mlpackage"
        made = cli("convert", one, "--to", "coreml", "--base", folder, "-o", path, *way)
        assert made.exit_code == 0, made.output
        source = path if way else f"{path}:my_adapter"
        with_base = ["--base", folder] if way else []
        back = cli(
            "convert", source, "--to", "peft", "-o", tmp_path / f"back{len(way)}", *with_base
        )
        assert back.exit_code == 0, back.output
        found = read(tmp_path / f"back{len(way)}").low_rank
        assert found.keys() == wanted.keys()
        for module, u in found.items():
            a, b = delta(u), delta(wanted[module])
            assert np.linalg.norm(a - b) <= (0.02 if way else 1e-7) * np.linalg.norm(b)
    refused = cli("convert", tmp_path / "x1.mlpackage", "--to", "peft", "-o", tmp_path / "no")
    assert refused.exit_code == 1
    assert "give --base BASE" in refused.output
    for wrong in (["--dtype", "f16"], ["--dry-run"], ["--uniform"]):
        used = cli(
            "convert",
            one,
            "--to",
            "coreml",
            "--base",
            folder,
            "-o",
            tmp_path / "y.mlpackage",
            *wrong,
        )
        assert used.exit_code == 2
    same = cli("convert", tmp_path / "x0.mlpackage", "--to", "peft", "-o", tmp_path / "z")
    assert same.exit_code == 0, same.output  # the only adapter needs no name


def test_what_is_there_is_not_written_over(bases, tmp_path, cli):
    model, folder = bases("llama")
    one = stock.trained(model, tmp_path / "one", 1, target_modules=["q_proj"])
    path, inputs = tmp_path / "x.mlpackage", ["--adapters", "inputs", "-a", f"one={one}"]

    def build(*more):
        return cli("package", "--base", folder, "-o", path, *more)

    for given, kind in (("x.one.safetensors", inputs), ("x.mlpackage", [])):
        (tmp_path / given).write_text("mine")
        result = build(*kind)
        assert result.exit_code == 1
        assert (tmp_path / given).read_text() == "mine"
        (tmp_path / given).unlink()
    beside = tmp_path / "x.tokenizer"
    beside.mkdir()
    (beside / "diary.txt").write_text("mine")
    for more in ([], ["--force"]):
        result = build(*more)
        assert result.exit_code == 1
        assert "x.tokenizer" in result.output
    assert not path.exists()
    (beside / "diary.txt").unlink()
    beside.rmdir()
    assert build(*inputs).exit_code == 0
    assert build(*inputs).exit_code == 1
    assert build(*inputs, "--force").exit_code == 0
