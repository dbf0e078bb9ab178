"""Comparison and forecast against dense matrices in float64."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as st

from loraduct.cli.diff_map import heat_map, picture
from loraduct.converters import diff as differ
from loraduct.formats import read

Folders = Callable[..., Path]


@pytest.fixture
def two(peft_folder: Folders) -> list[Path]:
    made = [peft_folder("one"), peft_folder("two", r=3, lora_alpha=5)]
    for i, folder in enumerate(made):
        file = folder / "adapter_model.safetensors"
        rng = np.random.default_rng(i)
        tensors = {
            k: rng.normal(size=v.shape).astype(np.float32) for k, v in st.load_file(file).items()
        }
        st.save_file(tensors, file, {"format": "pt"})
    return made


def dense(folder: Path) -> dict[str, np.ndarray]:
    return {
        m: u.scale * (u.b.read().astype(np.float64) @ u.a.read())
        for m, u in read(folder).low_rank.items()
    }


def on(first: np.ndarray, second: np.ndarray) -> float:
    """||second P|| / ||first||, P the projection on the row space of first, by its pseudoinverse."""
    return float(
        np.linalg.norm(second @ np.linalg.pinv(first, rcond=1e-6) @ first) / np.linalg.norm(first)
    )


def test_numbers_are_those_of_the_dense_matrices(cli: Any, two: list[Path]) -> None:
    done = cli("diff", *two, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    one, other = dense(two[0]), dense(two[1])
    assert len(said["modules"]) == 6
    for m in said["modules"]:
        a, b = one[m["module"]], other[m["module"]]
        sizes = np.linalg.norm(a), np.linalg.norm(b)
        assert m["cosine"] == pytest.approx(np.vdot(a, b) / (sizes[0] * sizes[1]), abs=1e-6)
        assert m["ratio"] == pytest.approx(sizes[1] / sizes[0], rel=1e-6)
        assert m["sign_conflict"] == pytest.approx(float((a * b < 0).mean()), abs=0.01)
        assert not m["sampled"]
        assert m["on_first"] == pytest.approx(on(a, b), rel=1e-4)
        assert m["on_second"] == pytest.approx(on(b, a), rel=1e-4)
        assert m["interference"] == max(m["on_first"], m["on_second"])
        ranks = [np.linalg.svd(x)[2][:r] for x, r in ((a, 4), (b, 3))]
        cosines = np.clip(np.linalg.svd(ranks[0] @ ranks[1].T, compute_uv=False), 0, 1)
        assert np.allclose(np.cos(np.radians(m["row_angles"])), cosines, atol=1e-6)
    whole = [np.concatenate([d[k].reshape(-1) for k in one]) for d in (one, other)]
    cosine = whole[0] @ whole[1] / (np.linalg.norm(whole[0]) * np.linalg.norm(whole[1]))
    assert said["cosine"] == pytest.approx(cosine, abs=1e-6)


def test_an_adapter_and_itself(two: list[Path]) -> None:
    found = differ.diff(read(two[0]), read(two[0]))
    assert found.cosine == pytest.approx(1)
    assert found.interference == pytest.approx(1)
    for m in found.modules:
        assert m.sign_conflict == 0
        assert max(m.row_angles) < 1e-5


def test_adapters_that_never_meet(two: list[Path]) -> None:
    """Inputs of disjoint coordinates: nothing of one acts on the other's."""
    for i, folder in enumerate(two):
        file = folder / "adapter_model.safetensors"
        tensors = st.load_file(file)
        for k, v in tensors.items():
            if "lora_A" in k:
                v[:, 8 * (1 - i) : 8 * (2 - i)] = 0
        st.save_file(tensors, file, {"format": "pt"})
    found = differ.diff(read(two[0]), read(two[1]))
    assert found.interference < 1e-9
    assert all(m.row_angles[0] == pytest.approx(90) for m in found.modules)


def test_a_sample_is_said_to_be_one(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = differ.diff(read(two[0]), read(two[1]))
    monkeypatch.setattr(differ, "SAMPLE", 200)
    guess = differ.diff(read(two[0]), read(two[1]))
    assert any(m.sampled for m in guess.modules)
    for m, n in zip(exact.modules, guess.modules, strict=True):
        assert n.sign_conflict == pytest.approx(m.sign_conflict, abs=0.25)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_heat_map_stands_alone_and_escapes(two: list[Path], cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    done = cli("diff", *two, "--html", file)
    assert done.exit_code == 0, done.output
    page = Page()
    page.feed(file.read_text())
    assert not [t for t, a in page.tags if t in ("script", "link", "img", "iframe") or "src" in a]
    assert sum("title" in a for t, a in page.tags if t == "td") == 3 * 6
    assert cli("diff", *two, "--html", file).exit_code == 1  # exists
    found = differ.diff(read(two[0]), read(two[1]))
    evil = "<script>alert(1)</script>"
    odd = [dataclasses.replace(m, module=m.module + evil) for m in found.modules]
    page = Page()
    page.feed(heat_map(dataclasses.replace(found, modules=tuple(odd)), [evil, evil]))
    assert "script" not in {t for t, _ in page.tags}


def pixels(png: bytes) -> np.ndarray:
    """(rows, columns, 3) bytes."""
    import io

    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(png)).convert("RGB"))


def test_picture_has_the_numbers_as_colours_and_a_free_margin(
    cli: Any, two: list[Path], tmp_path: Path
) -> None:
    """ColorBrewer's Reds and RdBu (colorbrewer2.org): their ends are looked for, by hand."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "map.png"
    done = cli("diff", two[0], two[0], "--png", file)
    assert done.exit_code == 0, done.output
    seen = pixels(file.read_bytes())
    dark_red, white, dark_blue = (103, 0, 13), (255, 245, 240), (5, 48, 97)

    def share(image: np.ndarray, colour: tuple[int, int, int]) -> float:
        return float((np.abs(image.astype(int) - colour).max(axis=-1) <= 2).mean())

    height = len(seen) // 3
    first, second, third = seen[:height], seen[height : 2 * height], seen[2 * height :]
    assert share(first, dark_red) > 0.2  # an adapter disturbs itself wholly,
    assert share(second, dark_blue) > 0.2  # has the cosine 1 with itself
    assert share(third, white) > 0.2  # and moves nothing the other way
    assert share(first, dark_blue) == share(third, dark_red) < 0.02
    edge = np.concatenate([seen[0], seen[-1], seen[:, 0], seen[:, -1]])
    assert (edge == 255).all()  # no text runs over
    again = cli("diff", *two, "--png", file)
    assert again.exit_code == 1
    assert "exists; use --force" in again.stderr


def test_picture_of_odd_names_and_of_many_modules(two: list[Path]) -> None:
    pytest.importorskip("matplotlib")
    found = differ.diff(read(two[0]), read(two[1]))
    odd = "x_{$日本\x1b[1m" + "long" * 40
    many = [dataclasses.replace(found.modules[0], module=f"model.layers.{n % 3}.{n}.{odd}", on_first=4.0)
            for n in range(500)]  # fmt: skip
    many.append(dataclasses.replace(found.modules[0], module="lm_head"))
    seen = pixels(picture(dataclasses.replace(found, modules=tuple(many)), [odd * 9, odd]))
    assert max(seen.shape) < 16_000
    assert (np.concatenate([seen[0], seen[-1], seen[:, 0], seen[:, -1]]) == 255).all()


def test_without_matplotlib_the_extra_is_named(
    cli: Any, two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("diff", *two, "--png", tmp_path / "map.png", "--html", tmp_path / "map.html")
    assert done.exit_code == 1
    assert "'loraduct[report]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("map.*"))


def test_drawings_are_both_written_or_neither(
    cli: Any, two: list[Path], tmp_path: Path, peft_folder: Folders
) -> None:
    pytest.importorskip("matplotlib")
    page, picture_, room = tmp_path / "map.html", tmp_path / "map.png", tmp_path / "room"
    room.mkdir()
    for html, png, code, says in (
        (page, page, 2, "name one file"),
        (page, tmp_path / "room" / ".." / "map.html", 2, "name one file"),
        (page, tmp_path / "no" / "map.png", 1, "would stand in a folder that isn't there"),
        (room, picture_, 1, "room: is a folder"),
    ):
        done = cli("diff", *two, "--html", html, "--png", png, "--force")
        assert done.exit_code == code
        assert says in done.stderr
        assert not page.exists()
        assert not picture_.exists()


def test_refusals(cli: Any, two: list[Path], peft_folder: Folders) -> None:
    apart = peft_folder("apart", layers=1)
    file = apart / "adapter_model.safetensors"
    st.save_file(
        {k.replace("layers.0", "layers.7"): v for k, v in st.load_file(file).items()}, file
    )
    assert "no module in common" in cli("diff", two[0], apart).stderr
    other = peft_folder("other", base_model_name_or_path="other/model")
    assert "is for the base other/model" in cli("diff", two[0], other).stderr


@pytest.fixture
def dora(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, DoRA and LoRA on it."""
    pytest.importorskip("peft")
    import fusing

    base = fusing.saved("llama", tmp_path / "base")
    targets = {"target_modules": ["q_proj", "down_proj"]}
    one = fusing.trained(base, tmp_path / "dora", 1, use_dora=True, **targets)
    return base, one, fusing.trained(base, tmp_path / "lora", 2, **targets)


def test_dora_with_its_base_is_what_peft_merges(cli: Any, dora: tuple[Path, Path, Path]) -> None:
    """dW of stock PEFT's merged weights, dense, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, *folders = dora
    plain = {k: v.double().numpy() for k, v in
             AutoModelForCausalLM.from_pretrained(base).state_dict().items()}  # fmt: skip
    changed = []
    for folder in folders:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        state = model.merge_and_unload().state_dict()
        changed.append({k: v.double().numpy() - plain[k] for k, v in state.items()})
    done = cli("diff", *folders, "--base", base, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said["modules"]) == 4
    assert "99.9%" in said["notes"][0]
    for m in said["modules"]:
        a, b = (c[f"{m['module']}.weight"] for c in changed)
        sizes = np.linalg.norm(a), np.linalg.norm(b)
        assert m["norms"] == pytest.approx(sizes, rel=1e-3)
        assert m["cosine"] == pytest.approx(np.vdot(a, b) / (sizes[0] * sizes[1]), abs=0.02)
        assert m["on_second"] == pytest.approx(on(b, a), rel=0.05)


def test_dora_without_its_base_is_compared_by_its_factors(
    cli: Any, dora: tuple[Path, Path, Path]
) -> None:
    said = json.loads(cli("diff", *dora[1:], "--json").stdout)
    one, two = (dense(f) for f in dora[1:])
    assert "low-rank part" in said["notes"][0]
    for m in said["modules"]:
        a, b = one[m["module"]], two[m["module"]]
        wanted = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
        assert m["cosine"] == pytest.approx(wanted, abs=1e-6)
    assert "note: dora is DoRA" in cli("diff", *dora[1:]).stdout
