"""Merging against dense sums in float64, made from the files by safetensors and numpy alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as st

from loraduct.cli.merge import METHODS as CLI_METHODS
from loraduct.converters.merge import METHODS, Settings, merge
from loraduct.formats import read

Folders = Callable[..., Path]


def dense(folder: Path) -> dict[str, np.ndarray]:
    """Module -> dW in float64: alpha / r, patterns by their suffix, or mlx-lm's scale."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    if "lora_parameters" in config:
        tensors = st.load_file(folder / "adapters.safetensors")
        for name, a in tensors.items():
            if name.endswith(".lora_a"):
                module = name.removesuffix(".lora_a")
                b = tensors[f"{module}.lora_b"]
                product = a.astype(np.float64) @ b.astype(np.float64)
                found[module] = config["lora_parameters"]["scale"] * product.T
        return found
    tensors = st.load_file(folder / "adapter_model.safetensors")

    def lookup(field: str, module: str, usual: Any) -> Any:
        for key, value in (config.get(field) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return usual

    for name, a in tensors.items():
        if ".lora_A.weight" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
            r = lookup("rank_pattern", module, config["r"])
            alpha = lookup("alpha_pattern", module, config["lora_alpha"])
            scale = alpha / r**0.5 if config.get("use_rslora") else alpha / r
            found[module] = scale * (b @ a.astype(np.float64))
    return found


def summed(folders: list[Path], weights: list[float]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, value in dense(folder).items():
            total[module] = total.get(module, 0) + weight * value
    return total


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture
def folders(peft_folder: Folders) -> list[Path]:
    """Other ranks, scales, methods and targets, and other values."""
    made = [
        peft_folder("one"),
        peft_folder("two", r=6, lora_alpha=5, use_rslora=True),
        peft_folder("three", ranks={"self_attn.v_proj": 2}, rank_pattern={"v_proj": 2}),
    ]
    for i, folder in enumerate(made):
        file = folder / "adapter_model.safetensors"
        rng = np.random.default_rng(i)
        tensors = {
            k: rng.normal(size=v.shape).astype(np.float32) for k, v in st.load_file(file).items()
        }
        if i == 2:
            tensors = {k: v for k, v in tensors.items() if "up_proj" not in k}
            config = folder / "adapter_config.json"
            fields = json.loads(config.read_text())
            config.write_text(json.dumps(fields | {"target_modules": ["q_proj", "v_proj"]}))
        st.save_file(tensors, file, {"format": "pt"})
    return made


WEIGHTS = [0.5, -0.3, 1.7]


@pytest.mark.parametrize("method", ["cat", "linear", "peft-cat-like"])
@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_sum_is_exact(cli: Any, folders: list[Path], tmp_path: Path, method: str, to: str) -> None:
    if method == "peft-cat-like":  # a float that is no power of two everywhere
        method, weights = "cat", [1 / 3, 1 / 7, -0.1]
    else:
        weights = WEIGHTS
    out = tmp_path / "out"
    text = ",".join(map(str, weights))
    done = cli("merge", *folders, "--weights", text, "--method", method, "--to", to, "-o", out)
    assert done.exit_code == 0, done.output
    wanted = summed(folders, weights)
    found = dense(out)
    assert found.keys() == wanted.keys()
    for module in wanted:
        assert off(found[module], wanted[module]) < 1e-6, module


@pytest.mark.parametrize("rank", [1, 3, 5, 100])
def test_svd_is_the_optimum_and_says_so(
    cli: Any, folders: list[Path], tmp_path: Path, rank: int
) -> None:
    out = tmp_path / "out"
    done = cli("merge", *folders, "--weights", "0.5,-0.3,1.7", "--method", "svd", "--rank", rank,
               "-o", out, "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    said = {m["module"]: m for m in json.loads(done.stdout)["modules"]}
    found = dense(out)
    for module, wanted in summed(folders, WEIGHTS).items():
        values = np.linalg.svd(wanted, compute_uv=False)
        best = float((values[rank:] ** 2).sum() ** 0.5 / np.linalg.norm(wanted))
        assert off(found[module], wanted) == pytest.approx(best, rel=1e-6, abs=1e-6)
        assert said[module]["residual"] == pytest.approx(best, rel=1e-6, abs=1e-6)
        assert np.linalg.matrix_rank(found[module], tol=1e-4) <= rank


def test_energy_takes_the_smallest_rank_that_keeps_it(
    cli: Any, folders: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = cli("merge", *folders, "--method", "svd", "--energy", 0.9, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    said = {m["module"]: m["rank"] for m in json.loads(done.stdout)["modules"]}
    for module, wanted in summed(folders, [1, 1, 1]).items():
        kept = np.cumsum(np.linalg.svd(wanted, compute_uv=False) ** 2)
        assert said[module] == int(np.searchsorted(kept, 0.9 * kept[-1])) + 1


def test_mixed_formats(cli: Any, folders: list[Path], tmp_path: Path) -> None:
    assert cli("convert", folders[1], "--to", "mlx", "-o", tmp_path / "m").exit_code == 0
    out = tmp_path / "out"
    done = cli("merge", folders[0], tmp_path / "m", "--weights", "0.25,3", "-o", out)
    assert done.exit_code == 0, done.output
    for module, wanted in summed(folders[:2], [0.25, 3.0]).items():
        assert off(dense(out)[module], wanted) < 1e-6


# the same on dW, by PEFT's own functions on dense tensors
ORACLES = {
    "ties": lambda m, t, w, d, s: m.ties(t, w, d, s),
    "magnitude": lambda m, t, w, d, s: m.magnitude_prune(t, w, d),
}


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("method", sorted(ORACLES))
@pytest.mark.filterwarnings("ignore:The density")
def test_entries_as_peft_has_them(
    folders: list[Path], method: str, density: float, sign: str
) -> None:
    """At full rank nothing is cut: what is left is the method itself."""
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    import torch

    settings = Settings(method, rank=100, density=density, sign=sign)
    weights = [0.5, 0.3, 1.7]
    merged = merge([read(f) for f in folders], weights, settings)
    each = [dense(f) for f in folders]
    for module, u in merged.adapter.low_rank.items():
        held = [(d[module], w) for d, w in zip(each, weights, strict=True) if module in d]
        tensors = [torch.from_numpy(d.astype(np.float32)) for d, _ in held]
        w = torch.tensor([w for _, w in held])
        wanted = ORACLES[method](merge_utils, tensors, w, density, sign).double().numpy()
        found = u.scale * (u.b.read().astype(np.float64) @ u.a.read())
        assert off(found, wanted) < 1e-5, module


def test_negative_weights_vote_for_the_other_sign(peft_folder: Folders) -> None:
    """ties of A and -1 * (-A) is A: all entries agree."""
    one, two = peft_folder("one"), peft_folder("two")
    file = two / "adapter_model.safetensors"
    turned = {k: -v if "lora_B" in k else v for k, v in st.load_file(file).items()}
    st.save_file(turned, file, {"format": "pt"})
    merged = merge([read(one), read(two)], [1.0, -1.0], Settings("ties", rank=50, density=1.0))
    for module, wanted in dense(one).items():
        u = merged.adapter.low_rank[module]
        assert off(u.b.read().astype(np.float64) @ u.a.read(), wanted) < 1e-5


def test_residual_of_ties_is_what_the_result_lacks(folders: list[Path]) -> None:
    adapters = [read(f) for f in folders]
    whole = merge(adapters, WEIGHTS, Settings("ties", rank=100, density=0.3)).adapter.low_rank
    cut = merge(adapters, WEIGHTS, Settings("ties", rank=3, density=0.3))
    for module in cut.modules:
        u, v = whole[module.module], cut.adapter.low_rank[module.module]
        wanted = u.b.read().astype(np.float64) @ u.a.read()
        best = float((np.linalg.svd(wanted, compute_uv=False)[3:] ** 2).sum() ** 0.5)
        lacks = off(v.b.read().astype(np.float64) @ v.a.read(), wanted)
        assert module.residual == pytest.approx(lacks, rel=1e-5)
        assert lacks >= best / np.linalg.norm(wanted) * (1 - 1e-6)


def test_large_matrices_go_block_by_block_and_come_out_the_same(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraduct.converters import lowrank, merge_dense

    adapters = [read(f) for f in folders]
    settings = Settings("ties", rank=2, density=0.37)
    whole = merge(adapters, WEIGHTS, settings).modules
    monkeypatch.setattr(merge_dense, "BLOCK", 50)
    monkeypatch.setattr(merge_dense, "HELD", 0)
    monkeypatch.setattr(lowrank, "OVERSAMPLING", 1)  # so that a random range is drawn
    for one, two in zip(whole, merge(adapters, WEIGHTS, settings).modules, strict=True):
        assert two.residual == pytest.approx(one.residual, rel=0.02)
        assert two.residual >= one.residual * (1 - 1e-6)


def test_dare_drops_at_random_and_keeps_the_mean(peft_folder: Folders) -> None:
    """One adapter, full rank: every entry is gone or divided by the density."""
    folder = peft_folder()
    adapter = read(folder)

    def entries(seed: int) -> dict[str, np.ndarray]:
        made = merge([adapter], [1.0], Settings("dare", rank=100, density=0.4, seed=seed))
        low = made.adapter.low_rank
        return {m: u.b.read().astype(np.float64) @ u.a.read() for m, u in low.items()}

    first, again, other = entries(1), entries(1), entries(2)
    kept = count = 0
    for module, wanted in dense(folder).items():
        gone = np.abs(first[module]) < 1e-4
        assert np.allclose(first[module][~gone], wanted[~gone] / 0.4, atol=1e-4)
        assert np.array_equal(first[module], again[module])
        assert not np.allclose(first[module], other[module])
        kept, count = kept + int((~gone).sum()), count + gone.size
    assert kept / count == pytest.approx(0.4, abs=4 * (0.24 / count) ** 0.5)


def test_a_drawn_seed_is_recorded_and_gives_the_same_bytes(
    cli: Any, peft_folder: Folders, tmp_path: Path
) -> None:
    folder = peft_folder()
    out = tmp_path / "out"
    args = ["merge", folder, folder, "--method", "dare", "--density", 0.5, "--rank", 4]
    done = cli(*args, "-o", out)
    assert done.exit_code == 0, done.output
    seed = int(re.search(r"drew the seed (\d+)", done.stdout)[1])  # type: ignore[index]
    again = cli(*args, "--seed", seed, "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert str(seed).encode() in (out / name).read_bytes()[:20_000]


def test_merging_into_16_bits_rounds_once(cli: Any, folders: list[Path], tmp_path: Path) -> None:
    done = cli("merge", *folders, "--dtype", "f16", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for module, wanted in summed(folders, [1, 1, 1]).items():
        assert 1e-6 < off(dense(tmp_path / "out")[module], wanted) < 1e-3


def test_the_merged_config_selects_its_modules_and_no_source(
    cli: Any, folders: list[Path], tmp_path: Path
) -> None:
    cli("merge", *folders, "--method", "svd", "--rank", 2, "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (2, False)
    assert cli("inspect", tmp_path / "out").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "some/base" in card


def test_the_tables_of_methods_agree() -> None:
    assert list(CLI_METHODS) == list(METHODS)


def test_companions_and_metadata_of_all(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    one, two = peft_folder("one"), peft_folder("two")
    for folder, name, text in (
        (one, "vocab.txt", "a"),
        (two, "vocab.txt", "b"),
        (two, "LICENSE", "c"),
    ):
        (folder / name).write_text(text)
    (one / "README.md").write_text("the card of one")
    file = two / "adapter_model.safetensors"
    st.save_file(st.load_file(file), file, {"format": "pt", "license": "mit"})
    done = cli("merge", one, two, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a"
    assert (tmp_path / "out" / "LICENSE").read_text() == "c"
    assert "card of one" not in (tmp_path / "out" / "README.md").read_text()
    assert "is not the vocab.txt that is carried along" in done.stdout
    assert "left out: license" in done.stdout


# --- replaced parameters ----------------------------------------------------------------------


@pytest.fixture
def saving(peft_folder: Folders) -> Callable[[str, float], Path]:
    def make(name: str, value: float) -> Path:
        weight = {"base_model.model.lm_head.weight": np.full((6, 16), value, np.float32)}
        return peft_folder(name, extra=weight, modules_to_save=["lm_head"])

    return make


def head(folder: Path) -> np.ndarray:
    return st.load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"]


def test_replaced_parameters(
    cli: Any, saving: Callable[[str, float], Path], tmp_path: Path
) -> None:
    one, same, other = saving("one", 1.0), saving("same", 1.0), saving("other", 3.0)
    assert cli("merge", one, same, "--weights", "0.5,0.5", "-o", tmp_path / "a").exit_code == 0
    assert (head(tmp_path / "a") == 1).all()
    refused = cli("merge", one, other, "-o", tmp_path / "b")
    assert refused.exit_code == 1
    assert "lm_head.weight: replaces this parameter otherwise" in refused.stderr
    assert not (tmp_path / "b").exists()
    for how, value in (("first", 1.0), ("average", 2.5)):
        done = cli("merge", one, other, "--weights", "1,3", "--replacements", how,
                   "-o", tmp_path / how)  # fmt: skip
        assert done.exit_code == 0, done.output
        assert (head(tmp_path / how) == value).all()
    done = cli("merge", one, other, "--weights", "1,-1", "--replacements", "average", "--dry-run")
    assert "no average" in done.stderr
