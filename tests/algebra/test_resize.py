"""Resizing against dense singular values."""

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

from loraduct.converters.resize import Wanted, ranks_for, resize
from loraduct.formats import read

Folders = Callable[..., Path]


def dense(folder: Path) -> dict[str, np.ndarray]:
    return {
        m: u.scale * (u.b.read().astype(np.float64) @ u.a.read())
        for m, u in read(folder).low_rank.items()
    }


@pytest.fixture
def uneven(peft_folder: Folders) -> Path:
    """Modules of norms and spectra of their own."""
    folder = peft_folder("uneven", r=8, lora_alpha=12, use_rslora=True)
    file = folder / "adapter_model.safetensors"
    rng = np.random.default_rng(5)
    tensors = {}
    for i, (k, v) in enumerate(st.load_file(file).items()):
        fall = np.exp(-rng.uniform(0, 1) * np.arange(8)) * (1 + i % 3)
        values = rng.normal(size=v.shape)
        tensors[k] = (values * (fall[:, None] if "lora_A" in k else fall)).astype(np.float32)
    st.save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_one_rank_is_the_optimum(cli: Any, uneven: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    done = cli("resize", uneven, "--rank", 3, "--to", to, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    said = {m["module"]: m["residual"] for m in json.loads(done.stdout)["modules"]}
    found = dense(out)
    for module, wanted in dense(uneven).items():
        size = np.linalg.norm(wanted)
        best = float((np.linalg.svd(wanted, compute_uv=False)[3:] ** 2).sum() ** 0.5 / size)
        assert np.linalg.norm(found[module] - wanted) / size == pytest.approx(
            best, rel=1e-5, abs=1e-6
        )
        assert said[module] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("error", [0.02, 0.2, 0.6])
def test_error_bounds_every_module(cli: Any, uneven: Path, tmp_path: Path, error: float) -> None:
    out = tmp_path / "out"
    done = cli("resize", uneven, "--error", error, "--per-module", "-o", out)
    assert done.exit_code == 0, done.output
    found, updates = dense(out), read(out).low_rank
    for module, wanted in dense(uneven).items():
        values = np.linalg.svd(wanted, compute_uv=False)
        size = np.linalg.norm(wanted)
        assert np.linalg.norm(found[module] - wanted) <= error * size * (1 + 1e-5)
        rank = updates[module].rank
        one_less = float((values[rank - 1 :] ** 2).sum() ** 0.5)
        assert rank == 1 or one_less > error * size
    if len({u.rank for u in updates.values()}) > 1:
        assert "read no patterns" in done.stdout


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_one_rank_for_the_energy_of_all(uneven: Path, energy: float) -> None:
    made = resize(read(uneven), Wanted(energy=energy))
    (rank,) = {m.rank for m in made.modules}
    squares = [np.linalg.svd(d, compute_uv=False)[:8] ** 2 for d in dense(uneven).values()]
    kept = np.cumsum(np.sum(squares, axis=0))
    assert kept[rank - 1] >= energy * kept[-1]
    assert rank == 1 or kept[rank - 2] < energy * kept[-1]


@given(hs.integers(0, 10_000), hs.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_a_budget_keeps_no_less_than_one_rank_for_all(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    spectra = {f"m{i}": np.sort(rng.exponential(size=6))[::-1] ** 2 * 3**i for i in range(4)}
    costs = dict.fromkeys(spectra, 10)
    ranks = ranks_for(spectra, costs, Wanted(rank=rank, per_module=True))
    kept = sum(float(s[: ranks[m]].sum()) for m, s in spectra.items())
    plain = sum(float(s[:rank].sum()) for s in spectra.values())
    assert sum(ranks.values()) <= 4 * min(rank, 6)
    assert min(ranks.values()) >= 1
    # at least one rank everywhere: only that can cost something
    least = sum(float(s[0]) for s in spectra.values())
    assert kept >= max(least, plain - 1e-9)


def test_uniform_has_one_rank_and_no_patterns(cli: Any, uneven: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("resize", uneven, "--error", 0.2, "--per-module", "--uniform", "-o", out)
    assert done.exit_code == 0, done.output
    config = json.loads((out / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert "read no patterns" not in done.stdout


def test_nothing_to_cut_changes_no_byte(cli: Any, uneven: Path, tmp_path: Path) -> None:
    done = cli("resize", uneven, "--rank", 9, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "nothing was cut" in done.stdout
    one, two = (st.load_file(f / "adapter_model.safetensors") for f in (uneven, tmp_path / "out"))
    assert one.keys() == two.keys()
    assert all(one[k].tobytes() == two[k].tobytes() for k in one)


@pytest.mark.parametrize(
    ("args", "code"), [([], 2), (["--rank", "2", "--energy", "0.5"], 2), (["--error", "0"], 2),
                       (["--energy", "1.5"], 2), (["--rank", "0"], 2),
                       (["--energy", "nan"], 2), (["--error", "nan"], 2)],
)  # fmt: skip
def test_bad_options(cli: Any, uneven: Path, tmp_path: Path, args: list[str], code: int) -> None:
    done = cli("resize", uneven, *args, "-o", tmp_path / "out")
    assert done.exit_code == code
    assert not (tmp_path / "out").exists()


def test_dora_needs_its_base(cli: Any, peft_folder: Folders, tmp_path: Path) -> None:
    done = cli("resize", peft_folder(use_dora=True), "--rank", 2, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "give --base" in done.stderr
