"""Fusing into MLX's packed weights: stock mlx-lm loads it, and the report is a dense computation."""

from __future__ import annotations

import json
import shutil

import fusing
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model
from safetensors.torch import load_file, save_file

from loraduct.converters import fuse_folder
from loraduct.validation.effect import effect as effect_of

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = ("weight", "scales", "biases")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(name, bits, group) -> (the base, the same packed by stock mlx-lm)."""
    made = {}

    def get(name="llama", bits=4, group=32, **more):
        key = name, bits, group, *more
        if key not in made:
            folder = tmp_path_factory.mktemp("base")
            plain = fusing.saved(name, folder / "plain", torch.float16)
            (plain / "tokenizer_config.json").write_text("{}")
            packed = folder / "packed"
            if name == "qwen3_next":
                fusing.edited(plain, partial_rotary_factor=0.25, full_attention_interval=2)
            if name.startswith("qwen3_"):  # mlx-lm reads old keys
                theta = json.loads((plain / "config.json").read_text())["rope_parameters"][
                    "rope_theta"
                ]
                fusing.edited(plain, num_experts=3, rope_theta=theta)
            _pack(plain, packed, bits, group, **more)
            made[key] = plain, packed
        return made[key]

    return get


def _pack(plain, packed, bits, group, mixed=False):
    """As mlx_lm.convert does, without a tokenizer; ``mixed``: one layer in 8 bits."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    model, config = load_model(plain)

    def own(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        return {"group_size": 32, "bits": 8} if mixed and "down_proj" in path else True

    model, config = quantize_model(model, config, group, bits, quant_predicate=own)
    packed.mkdir()
    save_model(packed, model)
    save_config(config, packed / "config.json")


def dense(folder, module):
    """What mx.dequantize gives, in float32 arithmetic, as float64; plain weights as they are."""
    held = {k: v for f in folder.glob("*.safetensors") for k, v in mx.load(str(f)).items()}
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    settings = settings.get(module, settings)
    w, s, b = (held[f"{module}.{p}"] for p in PARTS)
    wide = mx.dequantize(w, s.astype(mx.float32), b.astype(mx.float32),
                         group_size=settings["group_size"], bits=settings["bits"])  # fmt: skip
    return np.array(wide).astype(np.float64)


def small(base, folder, size=0.02, **config):
    """An adapter whose update is about this share of the weights."""
    fusing.trained(base, folder, target_modules=ALL, **config)
    file = folder / "adapter_config.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps(given | {"lora_alpha": 6 * size / 0.3}))
    return folder


def fused(cli, packed, adapter, out, *words):
    done = cli("fuse", adapter, "--base", packed, "-o", out, "--json", *words)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64), (8, 32), (6, 64)])
@pytest.mark.parametrize("remedy", ["none", "compensate", "bits"])
def test_the_report_is_a_dense_computation(cli, bases, tmp_path, bits, group, remedy):
    plain, packed = bases(bits=bits, group=group)
    adapter = small(plain, tmp_path / "a")
    said = fused(cli, packed, adapter, tmp_path / "out", "--remedy", remedy, "--growth", 0.4)
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    sums = np.zeros(3)
    reported = {m["module"]: m for m in said["survival"]["modules"]}
    for module, (a, b) in fusing.factors(adapter).items():
        delta = alpha / 4 * b @ a
        before = dense(packed, module)
        moved = dense(tmp_path / "out", module) - before
        one = reported[f"{module}.weight"]
        inner = (moved * delta).sum(), (delta**2).sum(), (moved**2).sum()
        sums += inner
        assert one["share"] == pytest.approx(inner[0] / inner[1], abs=1e-5)
        assert one["cosine"] == pytest.approx(
            inner[0] / max(np.sqrt(inner[1] * inner[2]), 1e-30), abs=1e-5
        )
        assert one["size"] == pytest.approx(np.sqrt(inner[1] / (before**2).sum()), rel=1e-5)
    assert said["survival"]["share"] == pytest.approx(sums[0] / sums[1], abs=1e-5)
    model, _ = load_model(tmp_path / "out")  # strict
    wanted = np.array(model(mx.array(fusing.IDS.numpy()))[0].astype(mx.float32))
    assert np.isfinite(wanted).all()
    if remedy == "bits" and bits < 8:
        own = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
        assert {v["bits"] for v in own.values() if isinstance(v, dict)} == {8}
        assert said["bytes"]["before"] < said["bytes"]["after"] <= 1.4 * said["bytes"]["before"]
    else:
        assert said["bytes"]["before"] == said["bytes"]["after"]


@pytest.mark.parametrize("size", [0.003, 0.1])
def test_rescale_errs_least(cli, bases, tmp_path, size):
    """Group by group: than mx.quantize's scales, and than the base's own with the nearest codes."""
    plain, packed = bases()
    adapter = small(plain, tmp_path / "a", size)
    fused(cli, packed, adapter, tmp_path / "out", "--remedy", "rescale", "--no-report")
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    held = mx.load(str(packed / "model.safetensors"))
    own = others = 0
    for module, (a, b) in fusing.factors(adapter).items():
        total = dense(packed, module) + alpha / 4 * b @ a

        def error(values, total=total):
            return np.square(values - total).reshape(len(total), -1, 32).sum(2)

        s, low = (np.repeat(np.array(held[f"{module}.{p}"], np.float64), 32, 1) for p in PARTS[1:])
        kept = error(np.clip(np.rint((total - low) / np.where(s, s, 1)), 0, 15) * s + low)
        w, *steps = mx.quantize(mx.array(total.astype(np.float32)), group_size=32, bits=4)
        s, low = (x.astype(mx.float16).astype(mx.float32) for x in steps)  # as they are stored
        theirs = error(np.array(mx.dequantize(w, s, low, group_size=32, bits=4), np.float64))
        got = error(dense(tmp_path / "out", module))
        assert (got <= 1.0001 * np.minimum(kept, theirs) + 1e-12).all()
        own += (got >= 0.9999 * kept).sum()
        others += (got < 0.9999 * kept).sum()
    assert own if size < 0.01 else others > own  # both are met with


def test_packed_as_mlx_packs(cli, bases, tmp_path):
    """Remedy none: bit for bit what mx.quantize makes of the float32 sum."""
    plain, packed = bases(mixed=True)
    adapter = small(plain, tmp_path / "a")
    fused(cli, packed, adapter, tmp_path / "out", "--no-report")
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    settings = json.loads((packed / "config.json").read_text())["quantization"]
    held = mx.load(str(tmp_path / "out" / "model.safetensors"))
    same = total = 0
    for module, (a, b) in fusing.factors(adapter).items():
        own = settings.get(module) or settings
        own = settings if own is True else own
        total_ = (dense(packed, module) + alpha / 4 * b @ a).astype(np.float32)
        w, s, bias = mx.quantize(mx.array(total_), group_size=own["group_size"], bits=own["bits"])
        for part, wanted in zip(PARTS, (w, s, bias), strict=True):
            got = held[f"{module}.{part}"]
            assert got.shape == wanted.shape
            if part == "weight":
                same += int((np.array(got) == np.array(wanted)).sum())
                total += got.size
            else:
                assert np.allclose(
                    np.array(got.astype(mx.float32)), np.array(wanted), rtol=2e-3, atol=1e-6
                )
    assert same > 0.98 * total  # float32 sums of another order fall on the other side of a half
    for name, tensor in mx.load(str(packed / "model.safetensors")).items():
        if "embed" in name or "norm" in name or "lm_head" in name:
            assert np.array_equal(
                np.array(tensor.view(mx.uint8)), np.array(held[name].view(mx.uint8))
            )


def test_remedies_compared_and_one_recommended(cli, bases, tmp_path, monkeypatch):
    """Each is written once, and what is left is what the chosen one writes alone."""
    plain, packed = bases()
    adapter = small(plain, tmp_path / "a", 0.02)
    write, written = fuse_folder.write, []

    def counted(made, stage):
        written.append(stage.name)
        return write(made, stage)

    with monkeypatch.context() as patched:
        patched.setattr(fuse_folder, "write", counted)
        said = fused(cli, packed, adapter, tmp_path / "out", "--remedy", "auto")
    assert sorted(written) == ["bits", "compensate", "none"]
    alone = tmp_path / "alone"
    fused(cli, packed, adapter, alone, "--remedy", said["remedy"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in alone.iterdir()
    }
    assert {p.name for p in tmp_path.iterdir()} == {"a", "out", "alone"}
    rows = {r["remedy"]: r for r in said["remedies"]}
    assert rows.keys() == {"none", "compensate", "bits"}
    assert all(r["effect"] is not None for r in rows.values())
    assert rows["none"]["effect"]["cosine"] < max(r["effect"]["cosine"] for r in rows.values())
    assert said["recommended"] in {*rows, "side path"}
    assert (
        said["side_path_bytes"]
        == sum(a.size + b.size for a, b in fusing.factors(adapter).values()) * 4
    )
    text = cli("fuse", adapter, "--base", packed, "--dry-run", "--remedy", "auto").stdout
    assert "recommended:" in text
    assert "side path" in text


def test_more_bits_keep_more(cli, bases, tmp_path):
    plain, packed = bases()
    adapter = small(plain, tmp_path / "a", 0.02)
    effects = [
        fused(cli, packed, adapter, tmp_path / f"out{g}", "--remedy", "bits", "--growth", g)[
            "effect"
        ]
        for g in (0.1, 1)
    ]
    assert effects[0]["cosine"] < effects[1]["cosine"]
    assert effects[1]["cosine"] > 0.9
    assert effects[1]["kl"] < 0.2 * effects[1]["base_kl"]


def test_the_gate_fails_with_3_and_writes_nothing(cli, bases, tmp_path):
    plain, packed = bases()
    adapter = small(plain, tmp_path / "a", 0.003)
    done = cli("fuse", adapter, "--base", packed, "-o", tmp_path / "out", "--min-effect", 0.8)
    assert done.exit_code == 3
    assert "--min-effect 0.8: cosine" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    enough = ("--min-effect", 0.8, "--remedy", "bits", "--growth", 1)
    large = small(plain, tmp_path / "b", 0.1)
    assert cli("fuse", large, "--base", packed, "-o", tmp_path / "out", *enough).exit_code == 0


def test_effect_is_that_of_the_logits():
    rng = np.random.default_rng(0)
    base = [rng.standard_normal((5, 11)), rng.standard_normal((3, 11))]
    move = [rng.standard_normal(b.shape) for b in base]
    unfused = [b + m for b, m in zip(base, move, strict=True)]
    half = [b + m / 2 for b, m in zip(base, move, strict=True)]
    exact = effect_of(base, unfused, unfused)
    level = [u + rng.standard_normal((len(u), 1)) for u in unfused]  # which softmax does not see
    assert effect_of(base, unfused, level).cosine == pytest.approx(1)
    assert effect_of(base, unfused, level).size == pytest.approx(1)
    assert (exact.cosine, exact.size, exact.kl) == pytest.approx((1, 1, 0), abs=1e-12)
    assert effect_of(base, unfused, half).cosine == pytest.approx(1)
    assert effect_of(base, unfused, half).size == pytest.approx(0.5)
    assert effect_of(base, unfused, base).cosine == 0
    p, q = (torch.log_softmax(torch.tensor(np.concatenate(x)), -1) for x in (unfused, half))
    wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item() / 8
    assert effect_of(base, unfused, half).kl == pytest.approx(wanted)


def test_tied_and_packed_gets_a_head_of_its_own(cli, bases, tmp_path):
    plain, packed = bases("qwen2")
    adapter = fusing.trained(plain, tmp_path / "a", target_modules=["lm_head"])
    said = fused(cli, packed, adapter, tmp_path / "out", "--no-report")
    assert said["untied"] == "lm_head.weight"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    (a, b) = fusing.factors(adapter)["lm_head"]
    before = dense(packed, "model.embed_tokens")
    assert np.array_equal(dense(tmp_path / "out", "model.embed_tokens"), before)
    moved = dense(tmp_path / "out", "lm_head") - before
    delta = 1.5 * b @ a
    assert (moved * delta).sum() / (delta**2).sum() == pytest.approx(1, abs=0.1)
    load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "words", "says"),
    [
        (
            {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
            (),
            "is packed as mxfp4",
        ),
        ({"quantization": {"bits": 7, "group_size": 32}}, (), "is not packed as MLX packs"),
        ({"quantization": {"bits": 8, "group_size": 32}}, (), "does not fit scales"),
        ({}, ("--dtype", "f16"), "is packed: its dtype is kept"),
    ],
)
def test_refused(cli, bases, tmp_path, fields, words, says):
    plain, packed = bases()
    base = shutil.copytree(packed, tmp_path / "base")
    fusing.edited(base, **fields)
    adapter = small(plain, tmp_path / "a")
    done = cli("fuse", adapter, "--base", base, "-o", tmp_path / "out", *words)
    assert done.exit_code == 1
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_remedy_for_what_is_not_packed(cli, bases, tmp_path):
    plain, _ = bases()
    adapter = small(plain, tmp_path / "a")
    done = cli("fuse", adapter, "--base", plain, "-o", tmp_path / "out", "--remedy", "bits")
    assert done.exit_code == 1
    assert "is not packed" in done.stderr


def test_a_packed_copy_of_the_recorded_base_needs_a_flag(cli, bases, tmp_path):
    plain, packed = bases()
    adapter, carried = small(plain, tmp_path / "a"), tmp_path / "mlx"
    assert cli("convert", adapter, "--to", "mlx", "--base", plain, "-o", carried).exit_code == 0
    words = ("--base", packed, "-o", tmp_path / "out", "--no-report")
    done = cli("fuse", carried, *words)
    assert done.exit_code == 1
    assert "near those the adapter records, not equal" in done.stderr
    assert cli("fuse", carried, *words, "--allow-kin").exit_code == 0
    other = shutil.copytree(packed, tmp_path / "other")
    held = {
        k: v[::-1] if v.ndim == 2 else v
        for k, v in mx.load(str(packed / "model.safetensors")).items()
    }
    mx.save_safetensors(str(other / "model.safetensors"), held)
    done = cli("fuse", carried, "--base", other, "-o", tmp_path / "no", "--allow-kin")
    assert done.exit_code == 1
    assert "sampled weights correlate" in done.stderr


def test_experts_by_mlx_names(cli, bases, tmp_path):
    """In 8 bits a large update of experts, which mlx-lm stacks, is there almost whole."""
    plain, packed = bases("qwen3_moe", bits=8)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = fusing.trained(
        plain, tmp_path / "a", target_modules=["q_proj"], target_parameters=targets
    )
    said = fused(cli, packed, adapter, tmp_path / "out")
    names = {m["module"] for m in said["survival"]["modules"]}
    assert "model.layers.1.mlp.switch_mlp.gate_proj.weight" in names
    assert said["survival"]["cosine"] > 0.999
    model, _ = load_model(tmp_path / "out")
    found = np.array(model(mx.array(fusing.IDS.numpy()))[0].astype(mx.float32))
    wanted = fusing.unfused(plain, (adapter, 1.0))
    bare = fusing.logits(fusing.loaded(plain))
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted - bare)


def test_a_base_in_mlx_layout_that_is_not_packed(cli, bases, tmp_path):
    from mlx_lm.utils import save_config, save_model

    plain, _ = bases("qwen3_moe", bits=8)
    model, config = load_model(plain)
    base = tmp_path / "mlx"
    base.mkdir()
    save_model(base, model)
    save_config(config, base / "config.json")
    adapter = fusing.trained(
        plain, tmp_path / "a", target_parameters=["mlp.experts.down_proj"], target_modules=[]
    )
    done = cli("fuse", adapter, "--base", base, "-o", tmp_path / "out", "--dtype", "f32")
    assert done.exit_code == 0, done.stderr
    found = load_model(tmp_path / "out")[0](mx.array(fusing.IDS.numpy()))[0]
    wanted = fusing.unfused(plain, (adapter, 1.0))
    assert np.abs(np.array(found.astype(mx.float32)) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_convolutions_by_rows_of_their_outputs():
    from functools import partial

    from loraduct.adapter import LowRank
    from loraduct.converters import fuse_stream
    from loraduct.tensor import Tensor

    rng = np.random.default_rng(1)

    def held(*shape):
        return Tensor("t", "F32", shape, data=rng.standard_normal(shape).astype(np.float32))

    base, a, b = held(6, 5, 3), held(2, 5, 3), held(6, 2, 1)
    u = LowRank(a, b, 0.5, layout="conv")
    read = partial(fuse_stream.read_blocks, base, conv=True)
    found = np.concatenate(list(fuse_stream.blocks(read, [(u, 2.0)]))).reshape(6, 5, 3)
    wanted = base.data + np.einsum("or,rik->oik", b.data[:, :, 0], a.data)
    assert np.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 44]},
    ],
    ids=["tied head", "norms", "biases", "tokens"],
)
@pytest.mark.parametrize("remedy", ["none", "auto"])
def test_what_mlx_can_not_hold_beside_the_base_is_fused(cli, bases, tmp_path, config, remedy):
    """By default too, where the report is made: of the effect it says that it can't be measured."""
    plain, packed = bases("qwen2", bits=8)
    adapter = fusing.trained(plain, tmp_path / "a", **config)
    said = fused(cli, packed, adapter, tmp_path / "out", "--remedy", remedy)
    assert said["effect"] is None
    assert "can't run this adapter beside the base" in said["effect_not_measured"]
    assert said["survival"]["share"] == pytest.approx(1, abs=0.1)
    found, before = (
        np.array(load_model(f)[0](mx.array(fusing.IDS.numpy()))[0].astype(mx.float32))
        for f in (tmp_path / "out", packed)
    )
    wanted = fusing.unfused(plain, (adapter, 1.0))
    bare = fusing.logits(fusing.loaded(plain))
    noise = np.linalg.norm(before - bare)  # of 8 bits
    assert np.linalg.norm(found - wanted) < 1.5 * noise < 0.6 * np.linalg.norm(wanted - bare)
    gate = cli("fuse", adapter, "--base", packed, "--dry-run", "--min-effect", 0.5)
    assert gate.exit_code == 3
    assert "the effect can't be measured" in gate.stderr


def test_a_head_that_mlx_always_ties_is_refused_with_a_way_out(cli, bases, tmp_path):
    plain, packed = bases("gemma2", bits=8)
    adapter = fusing.trained(plain, tmp_path / "a", target_modules=["embed_tokens"])
    done = cli("fuse", adapter, "--base", packed, "-o", tmp_path / "out", "--no-report")
    assert done.exit_code == 1
    assert "fuse it into the unpacked base" in done.stderr
    assert "--untie-base" not in done.stderr
    assert cli("fuse", adapter, "--base", plain, "-o", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("remedy", ["none", "auto"])
def test_a_zero_update_changes_nothing_and_nothing_is_said_of_it(cli, bases, tmp_path, remedy):
    """All of it zero, and one layer of several. Of nothing there is no share that could survive."""
    plain, packed = bases()
    adapter = small(plain, tmp_path / "a", 0.1)
    file = adapter / "adapter_model.safetensors"
    for zero in ("layers.0.", ""):
        held = load_file(file)
        save_file(
            {n: 0 * t if zero in n and "lora_B" in n else t for n, t in held.items()},
            file, {"format": "pt"},
        )  # fmt: skip
        out = tmp_path / f"out {zero}"
        said = fused(cli, packed, adapter, out, "--remedy", remedy)
        before, after = (mx.load(str(f / "model.safetensors")) for f in (packed, out))
        for row in said["survival"]["modules"]:
            if zero in row["module"]:
                assert row["share"] is row["cosine"] is None
                assert row["codes"] == 0
                for name in (row["module"].replace("weight", part) for part in PARTS):
                    assert np.array_equal(
                        *(np.array(x[name].view(mx.uint8)) for x in (before, after))
                    )
            else:
                assert row["share"] > 0.1
    assert said["survival"]["share"] is said["survival"]["cosine"] is None
    assert "n/a" in cli("fuse", adapter, "--base", packed, "--dry-run", "--remedy", remedy).stdout


@pytest.mark.parametrize("remedy", ["none", "rescale", "compensate", "bits"])
def test_what_is_beyond_the_scales_is_refused_with_a_way_out(cli, bases, tmp_path, remedy):
    plain, packed = bases()
    adapter = small(plain, tmp_path / "a", 0.1)
    words = ("--base", packed, "-o", tmp_path / "out", "--remedy", remedy, "--no-report")
    done = cli("fuse", f"{adapter}:1e8", *words)
    assert done.exit_code == 1
    assert (
        "does not fit F16 with the adapter in it; give the adapter a smaller weight" in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_norms_that_mlx_stores_with_one_added(cli, bases, tmp_path):
    """Those of linear attention it stores as they are."""
    plain, packed = bases("qwen3_next", bits=8)
    name = "model.layers.1.input_layernorm.weight"
    theirs = np.array(mx.load(str(packed / "model.safetensors"))[name].astype(mx.float32))
    ours = fusing.tensors(plain)[name].float().numpy()
    assert np.allclose(theirs, 1 + ours, atol=2e-3)
    config = {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}
    adapter = fusing.trained(plain, tmp_path / "a", **config)
    done = cli("fuse", adapter, "--base", packed, "-o", tmp_path / "out", "--no-report")
    assert done.exit_code == 1
    assert "has added 1; fuse into transformers' folder" in done.stderr
    assert cli("fuse", adapter, "--base", plain, "-o", tmp_path / "out").exit_code == 0
    other = fusing.trained(
        plain, tmp_path / "b", **config | {"modules_to_save": ["linear_attn.norm"]}
    )
    fused(cli, packed, other, tmp_path / "mlx", "--no-report")
    key = "model.layers.0.linear_attn.norm.weight"
    got = mx.load(str(tmp_path / "mlx" / "model.safetensors"))[key]
    held = fusing.tensors(other)[f"base_model.model.{key}"]
    assert np.allclose(np.array(got.astype(mx.float32)), held.float().numpy(), atol=2e-3)
