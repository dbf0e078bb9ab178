"""Stacks do what their adapters do together, and give them back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as st
from hypothesis import given, settings
from hypothesis import strategies as hs

from loraduct.adapter import Adapter, LowRank
from loraduct.converters.stack import KEY, stack, unstack
from loraduct.formats import read
from loraduct.tensor import Tensor

Folders = Callable[..., Path]
WEIGHTS = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}


def stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    (file,) = (folder / n for n in WEIGHTS.values() if (folder / n).exists())
    return {k: (f"{v.dtype} {v.shape}", v.tobytes()) for k, v in st.load_file(file).items()}


def config(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


def total(folder: Path) -> dict[str, np.ndarray]:
    return {
        m: u.scale * (u.b.read().astype(np.float64) @ u.a.read())
        for m, u in read(folder).low_rank.items()
    }


@pytest.fixture
def three(peft_folder: Folders) -> list[Path]:
    """Scales 2, 5 / sqrt(6) and 2.5: ratios that round; one in float16."""
    made = [
        peft_folder("one"),
        peft_folder("two", r=6, lora_alpha=5, use_rslora=True),
        peft_folder("three", lora_alpha=10, dtype="float16"),
    ]
    for i, folder in enumerate(made):
        file = folder / WEIGHTS["peft"]
        rng = np.random.default_rng(i)
        changed = {
            k: rng.normal(size=v.shape).astype(v.dtype) for k, v in st.load_file(file).items()
        }
        st.save_file(changed, file, {"format": "pt", "name": f"number {i}"})
    return made


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_back_bit_for_bit(cli: Any, three: list[Path], tmp_path: Path, to: str) -> None:
    done = cli("stack", *three, "--to", to, "-o", tmp_path / "stack")
    assert done.exit_code == 0, done.output
    each = [total(f) for f in three]
    for module, found in total(tmp_path / "stack").items():
        wanted = sum(d[module] for d in each)
        assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted)
    done = cli("unstack", tmp_path / "stack", "-o", tmp_path / "back")
    assert done.exit_code == 0, done.output
    for folder in three:
        back = tmp_path / "back" / folder.name
        assert stored(back) == stored(folder)
        assert config(back) == config(folder)
        assert read(back).metadata["name"] == read(folder).metadata["name"]


def test_peft_and_mlx_together(cli: Any, three: list[Path], tmp_path: Path) -> None:
    assert cli("convert", three[1], "--to", "mlx", "-o", tmp_path / "m").exit_code == 0
    assert cli("stack", three[0], tmp_path / "m", "-o", tmp_path / "stack").exit_code == 0
    done = cli("unstack", tmp_path / "stack", "-o", tmp_path / "back")
    assert done.exit_code == 0, done.output
    for folder in (three[0], tmp_path / "m"):
        assert stored(tmp_path / "back" / folder.name) == stored(folder)
        assert config(tmp_path / "back" / folder.name) == config(folder)


@given(
    hs.floats(1e-3, 1e3), hs.floats(1e-3, 1e3), hs.sampled_from(["F32", "F16", "BF16"]),
    hs.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_scales_come_back(one: float, two: float, dtype: str, seed: int) -> None:
    """Values of every size, their bits drawn."""
    rng = np.random.default_rng(seed)

    def adapter(name: str, scale: float, kind: str) -> Adapter:
        def held(side: str, *shape: int) -> Tensor:
            if kind == "F32":
                raw = rng.integers(0x30000000, 0x40000000, shape, np.uint32)
                raw = (raw | rng.integers(0, 2, shape, np.uint32) << 31).view(np.float32)
            else:
                low, high = (0x0400, 0x4000) if kind == "F16" else (0x3000, 0x4000)
                raw = rng.integers(low, high, shape, np.uint16)
            return Tensor(side, kind, shape, data=raw)

        u = LowRank(held("a", 3, 5), held("b", 7, 3), scale)
        return Adapter(Path(name), Path(name), "peft", "lora", {"m.layers.0.q_proj": u}, {})

    both = [adapter("one", one, "F32"), adapter("two", two, dtype)]
    back = unstack(stack(both).adapter)
    for a in both:
        u, v = (x.low_rank["m.layers.0.q_proj"] for x in (a, back[a.path.name]))
        assert u.scale == v.scale
        for x, y in ((u.a, v.a), (u.b, v.b)):
            assert (x.dtype, x.raw().tobytes()) == (y.dtype, y.raw().tobytes())


def test_a_changed_stack_is_refused(cli: Any, three: list[Path], tmp_path: Path) -> None:
    cli("stack", *three, "-o", tmp_path / "stack")
    file = tmp_path / "stack" / WEIGHTS["peft"]
    metadata = read(tmp_path / "stack").metadata
    tensors = st.load_file(file)
    next(v for k, v in tensors.items() if "lora_B" in k)[0, 0] += 1
    st.save_file(tensors, file, dict(metadata))
    done = cli("unstack", tmp_path / "stack", "-o", tmp_path / "back")
    assert done.exit_code == 1
    assert "was changed since it was stacked" in done.stderr
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("record", ["", "{}", "[]", '{"adapters":[1]}', '{"adapters":[{"label":2}]}',
                                    '{"adapters":[{"label":"x","format":"peft","naming":"hf",'
                                    '"config":{},"modules":{"q":[1]}}]}'])  # fmt: skip
def test_broken_records_are_refused(
    cli: Any, peft_folder: Folders, tmp_path: Path, record: str
) -> None:
    folder = peft_folder()
    file = folder / WEIGHTS["peft"]
    st.save_file(st.load_file(file), file, {"format": "pt", KEY: record})
    done = cli("unstack", folder, "-o", tmp_path / "back")
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "back").exists()


def test_labels_stay_in_the_output_folder(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    folder = peft_folder("one")
    cli("stack", folder, peft_folder("two"), "-o", tmp_path / "stack")
    file = tmp_path / "stack" / WEIGHTS["peft"]
    metadata = dict(read(tmp_path / "stack").metadata)
    metadata[KEY] = metadata[KEY].replace('"label":"one"', '"label":"../../evil"')
    st.save_file(st.load_file(file), file, metadata)
    done = cli("unstack", tmp_path / "stack", "-o", tmp_path / "back")
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "back").iterdir())) == 2
    assert not list(tmp_path.parent.glob("evil"))


def test_what_cannot_be_taken_apart_is_refused(
    cli: Any, peft_folder: Folders, tmp_path: Path
) -> None:
    plain, dora = peft_folder("plain"), peft_folder("dora", use_dora=True)
    for args, says in (
        ([plain, dora], "DoRA"),
        ([plain], "two adapters or more"),
    ):
        done = cli("stack", *args, "-o", tmp_path / "out")
        assert done.exit_code in (1, 2)
        assert says in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()
    assert "no stack" in cli("unstack", plain, "-o", tmp_path / "out").stderr


def test_one_adapter_alone(cli: Any, three: list[Path], tmp_path: Path) -> None:
    cli("stack", *three, "-o", tmp_path / "stack")
    done = cli("unstack", tmp_path / "stack", "--only", "two", "-o", tmp_path / "back")
    assert done.exit_code == 0, done.output
    assert stored(tmp_path / "back") == stored(three[1])
    done = cli("unstack", tmp_path / "stack", "--only", "four", "-o", tmp_path / "other")
    assert "there is no" in done.stderr


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A tiny mixture of experts, and three adapters of it as `mlx_lm.lora` saves them: of different
    ranks and scales, one on a part of the modules, one in float16."""
    pytest.importorskip("mlx_lm")
    pytest.importorskip("peft")
    import mlx.core as mx
    import peers
    import zoo
    from zoo_moe import MOE

    home, moe = tmp_path_factory.mktemp("experts"), MOE["qwen3_moe"]
    kind = zoo.Architecture(zoo.rope() | moe.config, tuple(moe.modules), moe.mlx_config)
    base = zoo.build("qwen3_moe", home / "base", kind).path
    few = ["mlp.switch_mlp.gate_proj", "self_attn.q_proj"]
    for name, more in (
        ("a", {"rank": 4, "scale": 2.5}),
        ("b", {"rank": 3, "scale": 1.7}),
        ("c", {"rank": 2, "scale": 20.0, "keys": few}),
    ):
        peers.save_mlx(base, home / name, zoo.TOKENS, num_layers=2, **more)
    peers.cast_mlx(home / "b", mx.float16)
    return base, [home / n for n in "abc"]


@pytest.mark.parametrize("given", [True, False], ids=["with its base", "without"])
def test_experts_of_mlx(
    cli: Any, experts: tuple[Path, list[Path]], tmp_path: Path, given: bool
) -> None:
    """Stock mlx-lm runs the stack as the base with each adapter's dW, by mlx-lm's own fuse, added."""
    import mlx.core as mx
    import peers
    import zoo

    base, folders = experts
    words = ["--base", base] if given else []
    done = cli("stack", *folders, *words, "-o", tmp_path / "stack")
    assert done.exit_code == 0, done.stderr
    held = st.load_file(tmp_path / "stack" / WEIGHTS["mlx"])
    switch = {k: v.shape for k, v in held.items() if "switch_mlp.gate_proj" in k}
    assert {s[0] for s in switch.values()} == {4}
    assert {s[1 if k.endswith("lora_a") else 2] for k, s in switch.items()} == {9}  # 4 + 3 + 2
    model = peers.mlx_base(base)
    for folder in folders:  # the same values in float32: mlx-lm fuses in the factors' precision
        wide = peers.copy_adapter(folder, tmp_path / "wide" / folder.name)
        peers.cast_mlx(wide, mx.float32)
        for name, delta in peers.mlx_deltas(base, wide).items():
            module = dict(model.named_modules())[name]
            module.weight = module.weight + mx.array(delta.astype(np.float32))
    found = peers.mlx_logits(base, tmp_path / "stack", zoo.TOKENS)
    plain = peers.mlx_logits(base, None, zoo.TOKENS)
    peers.assert_same_logits(found, peers.mlx_run(model, zoo.TOKENS), plain)
    done = cli("unstack", tmp_path / "stack", "-o", tmp_path / "back")
    assert done.exit_code == 0, done.stderr
    for folder in folders:
        assert stored(tmp_path / "back" / folder.name) == stored(folder)
        assert config(tmp_path / "back" / folder.name) == config(folder)


def test_experts_of_mlx_beside_others_are_refused(
    cli: Any, experts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """What is gate_proj and up_proj in one is one parameter in the other: said before it is written."""
    base, folders = experts
    done = cli("convert", folders[0], "--to", "peft", "--base", base, "-o", tmp_path / "p")
    assert done.exit_code == 0, done.stderr
    for pair, to in (((tmp_path / "p", folders[1]), "mlx"), (folders[:2], "peft")):
        done = cli("stack", *pair, "--base", base, "--to", to, "-o", tmp_path / "out")
        assert done.exit_code == 1
        assert "stack MLX adapters alone, with --to mlx, or convert it" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [True, False], ids=["with its base", "without"])
@pytest.mark.parametrize("method", ["linear", "svd"])
def test_experts_of_mlx_merged_and_resized(
    cli: Any, experts: tuple[Path, list[Path]], tmp_path: Path, given: bool, method: str
) -> None:
    """By their own modules, with or without a base: no rank but what the sum has, every expert optimal."""
    base, folders = experts
    words = ["--base", base] if given else []
    verbs = {
        "linear": ["merge", *folders[:2], "--weights", "0.5,-2", *words],
        "svd": ["resize", folders[0], "--rank", 2, *words],
    }
    done = cli(*verbs[method], "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    found = read(tmp_path / "out").low_rank
    one, two = (read(f).low_rank for f in folders[:2])
    assert found.keys() == one.keys()
    for module, u in found.items():
        held, first, second = (
            x.scale * (x.b.read().astype(np.float64) @ x.a.read())
            for x in (u, one[module], two[module])
        )
        if method == "linear":
            assert u.rank == 7
            wanted = 0.5 * first - 2 * second
            assert np.linalg.norm(held - wanted) < 1e-6 * np.linalg.norm(wanted)
            continue
        assert u.rank == 2
        tail = (np.linalg.svd(first, compute_uv=False)[..., 2:] ** 2).sum() ** 0.5
        assert np.linalg.norm(held - first) == pytest.approx(tail, rel=1e-6)


def test_copies_that_do_not_come_back_are_named(cli: Any, tmp_path: Path) -> None:
    """PEFT saves the base's own weight beside the adapter of an embedding."""
    pytest.importorskip("peft")
    import fusing

    base = fusing.saved("llama", tmp_path / "base")
    one = fusing.trained(base, tmp_path / "one", target_modules=["embed_tokens", "q_proj"])
    two = fusing.trained(base, tmp_path / "two", target_modules=["q_proj"])
    left = {k for k in stored(one) if "base_layer" in k}
    assert left
    done = cli("stack", one, two, "-o", tmp_path / "stack")
    assert done.exit_code == 0, done.output
    says = f"comes back without {len(left)} copies of weights"
    assert f"note: one: {says}" in done.stdout
    assert all(k in done.stdout for k in left)
    done = cli("unstack", tmp_path / "stack", "-o", tmp_path / "back")
    lines = done.stdout.splitlines()
    assert says in lines[0]
    assert lines[1].endswith("bit for bit")
    wanted = {k: v for k, v in stored(one).items() if k not in left}
    assert stored(tmp_path / "back" / "one") == wanted
    assert stored(tmp_path / "back" / "two") == stored(two)
