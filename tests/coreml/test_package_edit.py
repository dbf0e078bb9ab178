"""Packages edited in place: what goes in comes out, nothing else moves, and what can't go in."""

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from loraduct.converters import coreml, package
from loraduct.errors import LoraductError, Refused
from loraduct.formats import base as base_folder
from loraduct.formats.coreml.edit import Ops
from loraduct.formats.coreml.package import read

pytest.importorskip("peft")

import adapters
import families

ALL = "all-linear"
KINDS = {
    "plain": (ALL, {}),
    "patterns": (ALL, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"1\.mlp": 5}, "use_rslora": True}),
    "dora": (["q_proj", "down_proj"], {"use_dora": True}),
    "biased": (["v_proj"], {"lora_bias": True, "lora_alpha": 2.0**14}),
    "more": (["v_proj", "embed_tokens", "lm_head"], {"lora_alpha": 2.0**-14}),
    "saved": (["v_proj"], {"modules_to_save": ["lm_head"], "bias": "lora_only"}),
    "some layers": (["v_proj", "o_proj"], {"layers_to_transform": [0, 2], "lora_dropout": 0.1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, its package, and an adapter of each kind in FLOAT16, all made once."""
    room = tmp_path_factory.mktemp("world")
    model, folder = families.saved("llama", room / "base")
    coreml.build(base_folder.read(folder), room / "x.mlpackage", coreml.Options(context=48))
    for i, (kind, (targets, options)) in enumerate(KINDS.items()):
        made = adapters.trained(model, adapters.config(targets, **options), i)
        adapters.save(made, room / kind, copies=False)
    return room


@pytest.fixture
def x(world, tmp_path):
    """A package of the base alone, to be edited."""
    return Path(shutil.copytree(world / "x.mlpackage", tmp_path / "x.mlpackage"))


def weights(path):
    return path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def members(*sources):
    return [package.Member(str(s)) for s in sources]


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_in_comes_out(world, x, tmp_path, cli, kind):
    """PEFT -> package -> PEFT: the same bytes of every tensor, the same config."""
    assert cli("package", "add", x, f"one={world / kind}").exit_code == 0
    done = cli("package", "extract", x, "one", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert adapters.tensors(tmp_path / "out") == adapters.tensors(world / kind)
    before, after = (
        json.loads((f / "adapter_config.json").read_text())
        for f in (world / kind, tmp_path / "out")
    )
    assert before == after
    assert cli("package", "compact", x).exit_code == 0
    assert cli("convert", f"{x}:one", "--to", "peft", "-o", tmp_path / "again").exit_code == 0
    assert adapters.tensors(tmp_path / "again") == adapters.tensors(world / kind)


@pytest.mark.parametrize("kind", ["plain", "dora", "some layers"])
def test_to_mlx_and_through_mlx(world, x, tmp_path, cli, kind):
    """An adapter of a package becomes the MLX folder that the PEFT folder becomes; and back."""
    base = ["--base", world / "base"]
    done = cli("convert", world / kind, "--to", "mlx", "-o", tmp_path / "mlx", *base)
    assert done.exit_code == 0, done.output
    for name, source in (("a", world / kind), ("b", tmp_path / "mlx")):
        assert cli("package", "add", x, f"{name}={source}").exit_code == 0
        out = tmp_path / f"{name}-mlx"
        done = cli("convert", f"{x}:{name}", "--to", "mlx", "-o", out, *base)
        assert done.exit_code == 0, done.output
        config = "adapter_config.json"
        assert (out / config).read_text() == (tmp_path / "mlx" / config).read_text()
    done = cli("convert", f"{x}:b", "--to", "peft", "-o", tmp_path / "peft")
    assert done.exit_code == 0, done.output
    assert adapters.tensors(tmp_path / "peft") == adapters.tensors(world / kind)


def test_other_dtypes_are_rounded_once(world, x, tmp_path, cli):
    import torch
    from safetensors.torch import load_file, save_file

    wide = Path(shutil.copytree(world / "plain", tmp_path / "wide"))
    file = wide / "adapter_model.safetensors"
    tensors = {k: v.float() * 1.0001 for k, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    done = cli("package", "add", x, f"one={wide}")
    assert "rounded" in done.output
    assert cli("package", "extract", x, "one", "-o", tmp_path / "out").exit_code == 0
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.half().float()), name


def test_only_what_must_changes(world, x):
    """The old weights stay where they are; the program alone is new, and what is new is behind."""
    before = adapters.snapshot(x)
    package.add(x, {"one": members(world / "plain")})
    after = adapters.snapshot(x)
    assert after.keys() == before.keys()
    name = str(weights(x).relative_to(x))
    assert after[name][64:].startswith(before[name][64:])
    changed = {n for n in after if after[n] != before[n]}
    assert changed == {name, "Data/com.apple.CoreML/model.mlmodel"}


def test_the_same_adapter_costs_no_weights_twice(world, x):
    package.add(x, {"one": members(world / "plain")})
    size = weights(x).stat().st_size
    package.add(x, {"two": members(world / "plain"), "half": [package.Member("one", 0.5)]})
    package.add(x, {"both": members("one", world / "patterns")})
    grown = weights(x).stat().st_size - size
    alone = sum(len(data) for _, data in adapters.tensors(world / "patterns").values())
    assert 0 < grown <= alone + 128 * len(adapters.tensors(world / "patterns"))
    size = weights(x).stat().st_size
    package.add(x, {"again": members("one", "both_2")})
    assert weights(x).stat().st_size == size


def test_compact_is_as_if_never_added(world, x, tmp_path):
    """Removed, compacted: byte for byte what adding only the others would have made."""
    clean = Path(shutil.copytree(x, tmp_path / "clean.mlpackage"))
    package.add(x, {"one": members(world / "plain"), "two": members(world / "dora")})
    package.add(x, {"three": members(world / "saved")})
    full = weights(x).stat().st_size
    package.remove(x, ["two"])
    assert weights(x).stat().st_size == full
    report = package.compact(x)
    assert report.after < report.before
    package.add(clean, {"one": members(world / "plain")})
    package.add(clean, {"three": members(world / "saved")})
    assert adapters.snapshot(x) == adapters.snapshot(clean)
    package.compact(x)
    assert adapters.snapshot(x) == adapters.snapshot(clean)


def test_replaced_is_as_if_added(world, x, tmp_path):
    clean = Path(shutil.copytree(x, tmp_path / "clean.mlpackage"))
    package.add(x, {"one": members(world / "plain")})
    package.add(x, {"one": members(world / "dora")}, over=True)
    package.add(clean, {"one": members(world / "dora")})
    package.compact(x)
    assert adapters.snapshot(x) == adapters.snapshot(clean)


def test_removing_everything_leaves_the_base(world, x):
    before = adapters.snapshot(x)
    package.add(x, {"one": members(world / "plain"), "two": members("one", world / "more")})
    package.remove(x, ["one", "two"])
    package.compact(x)
    after = read(x)
    assert list(after.functions) == ["base"]
    name = str(weights(x).relative_to(x))
    assert adapters.snapshot(x)[name] == before[name]


def test_what_others_share_stays(world, x, tmp_path, cli):
    package.add(x, {"one": members(world / "plain")})
    package.add(x, {"both": members("one", world / "dora")})
    ids = families.tokens(8)
    before = adapters.logits(x, "both", ids)
    package.remove(x, ["one"])
    package.compact(x)
    assert np.array_equal(adapters.logits(x, "both", ids), before)
    assert cli("package", "extract", x, "one", "-o", tmp_path / "out").exit_code == 0
    assert adapters.tensors(tmp_path / "out") == adapters.tensors(world / "plain")
    with pytest.raises(Refused, match=r"is taken|is there"):
        package.add(x, {"one": members(world / "dora")})
    with pytest.raises(Refused, match="is not in the package"):
        package.remove(x, ["one"])


def test_a_part_of_a_stack_is_replaced_with_it(world, x):
    package.add(x, {"one": members(world / "plain")})
    package.add(x, {"both": members("one", world / "patterns")})
    with pytest.raises(Refused, match="is part of both"):
        package.add(x, {"one": members(world / "dora")}, over=True)
    wanted = {"one": members(world / "dora"), "both": members("one", world / "patterns")}
    with pytest.raises(Refused, match="is part of both"):
        package.add(x, dict(reversed(wanted.items())), over=True)
    package.add(x, wanted, over=True)


def test_same_input_same_bytes(world, x, tmp_path):
    other = Path(shutil.copytree(x, tmp_path / "y.mlpackage"))
    for path, seed in ((x, "1"), (other, "2")):
        words = ["package", "add", path, f"one={world / 'dora'}", f"two={world / 'saved'}:1"]
        run = [sys.executable, "-m", "loraduct", *map(str, words)]
        subprocess.run(
            run, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True
        )
    assert adapters.snapshot(x) == adapters.snapshot(other)


@pytest.fixture(scope="module")
def ct():
    """coremltools, without what it says while it is imported."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        coremltools = pytest.importorskip("coremltools")
        logging.disable(logging.NOTSET)
    return coremltools


def test_coremltools_takes_every_function(world, x, ct):
    """It makes every operation anew, infers its types, and reads the weights that we wrote."""
    from coremltools.converters.mil.frontend.milproto.load import load

    for kind in KINDS:
        package.add(x, {kind.replace(" ", "_"): members(world / kind)})
    package.add(x, {"stack": members("plain", "dora", "patterns")})
    package.remove(x, ["plain"])
    package.compact(x)
    names = sorted(read(x).functions)
    assert len(names) == len(KINDS) + 1
    for name in names:
        model = ct.models.MLModel(str(x), skip_model_load=True, function_name=name)
    spec_ = model.get_spec()
    program = load(spec_, specification_version=9, file_weights_dir=model.weights_dir)
    assert sorted(program.functions) == names
    declared = {
        o.name: o.type
        for op in spec_.mlProgram.functions["stack"].block_specializations["CoreML8"].operations
        for o in op.outputs
    }
    for op in program.functions["stack"].operations:
        for out in op.outputs:
            if out.name in declared and out.shape is not None:
                assert len(out.shape) == declared[out.name].tensorType.rank, out.name
    a = next(
        op for op in program.functions["dora"].operations if op.name == "A0_0"
    ).outputs[0].val  # fmt: skip
    stored = adapters.tensors(world / "dora")
    assert a.tobytes() == next(v for k, v in stored.items() if "lora_A" in k)[1]


NAMES = {
    "base": "base", "Base": "base", "a-b": "Core ML refuses", "1a": "Core ML refuses",
    "a b": "Core ML refuses", "ä": "Core ML refuses", "one": "package replace", "ONE": "is taken",
    "a" * 81: "Core ML refuses", "x\x1b[2J": "Core ML refuses",
}  # fmt: skip


def test_names(world, x):
    package.add(x, {"one": members(world / "plain")})
    before = adapters.snapshot(x)
    for name, what in NAMES.items():
        with pytest.raises(Refused, match=what):
            package.add(x, {name: members(world / "plain")})
    with pytest.raises(Refused, match="package add"):
        package.add(x, {"two": members(world / "plain")}, over=True)
    with pytest.raises(Refused, match="is the base"):
        package.remove(x, ["base"])
    assert adapters.snapshot(x) == before


def changed(folder, to, **config):
    """A copy of an adapter with other fields in its config."""
    made = Path(shutil.copytree(folder, to))
    file = made / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return made


def test_what_has_no_place(world, x, tmp_path):
    """Refused by name, and the package is as it was."""
    before = adapters.snapshot(x)
    configs = {
        "moved the base": {"init_lora_weights": "pissa"},
        "aLoRA": {"alora_invocation_tokens": [1, 2]},
        "repeats layers": {"layer_replication": [[0, 2], [1, 3]]},
    }
    cases = {
        what: members(changed(world / "plain", tmp_path / str(i), **config))
        for i, (what, config) in enumerate(configs.items())
    }
    cases |= {
        "can't be added to another": members(world / "saved", world / "plain"),
        "weight can only be 1": [package.Member(str(world / "dora"), 0.5)],
        "FLOAT16 can't hold": [package.Member(str(world / "plain"), 1e9)],
    }
    for what, given in cases.items():
        with pytest.raises(LoraductError, match=what):
            package.add(x, {"one": given})
    with pytest.raises(LoraductError, match="twice"):
        package.add(x, {"one": members(world / "plain"), "two": members("one", "one")})
    assert adapters.snapshot(x) == before
    for layout in ("experts", "conv", "parameter", "embedding"):
        with pytest.raises(Refused, match=r"layers\.0\.mlp\.up_proj: .*leave it out"):
            Ops(read(x).functions["base"], read(x)).site("model.layers.0.mlp.up_proj", layout)


@pytest.mark.parametrize(
    ("targets", "key", "shape"),
    [
        ("q_proj", "model.layers.7.self_attn.q_proj", 48),
        ("q_proj", "model.layers.0.self_attn.q_proj", 50),
        ("other", "model.layers.0.self_attn.other", 48),
    ],
)
def test_another_base(world, x, tmp_path, targets, key, shape):
    from safetensors.numpy import save_file

    folder = changed(world / "plain", tmp_path / "p", target_modules=[targets])
    stem = f"base_model.model.{key}"
    tensors = {
        f"{stem}.lora_A.weight": np.ones((4, shape), np.float16),
        f"{stem}.lora_B.weight": np.ones((48, 4), np.float16),
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    before = adapters.snapshot(x)
    with pytest.raises(LoraductError, match=r"another base|no linear layer"):
        package.add(x, {"one": members(folder)})
    assert adapters.snapshot(x) == before


def test_made_for_other_weights(world, x, tmp_path, cli):
    """The base's sample, recorded by a conversion, tells another base of the same shapes."""
    _, other = families.saved("llama yarn", tmp_path / "other")
    plain = ["q_proj", "v_proj"]
    model = families.model("llama yarn")
    made = adapters.save(adapters.trained(model, adapters.config(plain), 1), tmp_path / "p")
    done = cli("convert", made, "--to", "mlx", "-o", tmp_path / "mlx", "--base", other)
    assert done.exit_code == 0, done.output
    with pytest.raises(LoraductError, match="is not the base"):
        package.add(x, {"one": members(tmp_path / "mlx")})
