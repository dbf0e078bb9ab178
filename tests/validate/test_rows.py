"""One wrong row or column of dW within a matrix that is right as a whole; and none in sound roundings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loraduct.adapter import Dense, LowRank, Replacement
from loraduct.formats.base import Base
from loraduct.tensor import Tensor
from loraduct.validation.delta import compare

torch = pytest.importorskip("torch")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NO_BASE: Any = type("NoBase", (), {"has_weights": False})()


def stored(values: Any, dtype: str) -> Tensor:
    """A tensor of a file, as torch rounds to that dtype."""
    values = torch.tensor(np.asarray(values, np.float32)).to(DTYPES[dtype])
    raw = values.view(torch.int16).numpy().view(np.uint16) if dtype != "F32" else values.numpy()
    return Tensor("x", dtype, tuple(values.shape), data=raw)


def lora(a: Any, b: Any, dtype: str, scale: float = 2.0, **more: Any) -> LowRank:
    return LowRank(stored(a, dtype), stored(b, dtype), scale, **more)


def factors(seed: int = 0, rank: int = 8) -> tuple[Any, Any]:
    """a (r, 96), b (64, r); rows of b of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(1e-4, 1, 64)[:, None]
    return rng.normal(size=(rank, 96)), rng.normal(size=(64, rank)) * sizes


def off(a: Any, b: Any, c: Any, d: Any) -> float:
    """||d c - b a|| / ||b a||, by multiplying them out."""
    return float(np.linalg.norm(d @ c - b @ a) / np.linalg.norm(b @ a))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("change", ["flip", "scale", "zero", "column"])
def test_a_row_that_no_rounding_explains(dtype: str, change: str) -> None:
    a, b = (np.asarray(stored(x, dtype).read(), np.float64) for x in factors())
    c, d = a.copy(), b.copy()
    if change == "column":
        c[:, 5] *= -1
    else:
        d[5] *= {"flip": -1, "scale": 1.15 if dtype == "BF16" else 1.02, "zero": 0}[change]
    bound = {"BF16": 8e-3, "F16": 1e-3, "F32": 1e-6}[dtype]
    if change != "column" and dtype != "F32":
        assert off(a, b, c, d) < bound  # as a whole it is within
    found = compare("m", lora(a, b, dtype), lora(c, d, dtype), NO_BASE)
    assert found.fits is False
    assert found.lines
    assert f"{'column' if change == 'column' else 'row'} 5 is off by" in found.note
    assert found.as_json()["lines"] == found.lines


@pytest.mark.parametrize("layout", ["experts", "embedding", "conv"])
def test_of_every_layout(layout: str) -> None:
    """Of the second expert; a convolution's kernel belongs to its inputs."""
    a, b = factors(1)
    d = None
    if layout == "experts":
        a, b = np.stack([a, a]), np.stack([b, b])
        d = b.copy()
        d[1, 5] *= -1
    elif layout == "conv":
        a, b = a.reshape(8, 6, 4, 4), b.reshape(64, 8, 1, 1)
    if d is None:
        d = b.copy()
        d[5] *= -1
    one, two = (lora(a, x, "BF16", layout=layout) for x in (b, d))
    found = compare("m", one, two, NO_BASE)
    assert found.fits is False
    assert ("row 5 of expert 1" if layout == "experts" else "row 5") in found.note
    assert compare("m", one, lora(a, b, "BF16", layout=layout), NO_BASE).fits


@pytest.mark.parametrize("seed", range(4))
def test_sound_roundings_have_no_wrong_row(seed: int) -> None:
    """Small ranks, rows that cancel, zeros, subnormal numbers, folded scales, every pair of dtypes."""
    rng = np.random.default_rng(seed)
    for _ in range(150):
        rank, high, wide = int(rng.choice([1, 2, 3, 8, 32])), *map(int, rng.integers(1, 90, 2))
        sizes = 10.0 ** rng.uniform(-6, 1, 2)
        a, b = rng.normal(size=(rank, wide)) * sizes[0], rng.normal(size=(high, rank)) * sizes[1]
        kind = rng.integers(4)
        if kind == 0 and rank > 1:
            a[1], b[:, 1] = a[0] * (1 + 1e-3 * rng.normal(size=wide)), -b[:, 0]
        if kind == 1:
            b *= 10.0 ** rng.uniform(-5, 0, (high, 1))
        if kind == 2:
            a *= 10.0 ** rng.uniform(-5, 0, (1, wide))
            b[rng.random(b.shape) < 0.5] = 0
        one, two = (str(d) for d in rng.choice(list(DTYPES), 2))
        scale, ratio = float(10.0 ** rng.uniform(-1, 2)), float(rng.choice([1, 2, 0.5, 3, 1 / 3]))
        source = lora(a, b, one, scale)
        if rng.random() < 0.5:  # of what was stored, or of what both are copies of
            a, b = source.a.read(), source.b.read()
        made = lora(a, np.asarray(b) * ratio, two, scale / ratio)
        assert not compare("m", source, made, NO_BASE).lines, (rank, kind, one, two, scale, ratio)


def test_values_beside_the_factors() -> None:
    """A trained bias and DoRA's magnitude, value by value."""
    a, b = factors()
    bias = np.geomspace(1e-3, 1, 64)
    wrong = bias.copy()
    wrong[3] *= -1
    for leaf, what in (("bias", "lora_bias 3"), ("magnitude", "magnitude 3")):
        one, two = (lora(a, b, "BF16", **{leaf: stored(v, "BF16")}) for v in (bias, wrong))
        found = compare("m", one, two, NO_BASE)
        assert found.fits is False
        assert what in found.note
    wide, narrow = (lora(a, b, "F32", magnitude=stored(bias, d)) for d in ("F32", "F16"))
    assert not compare("m", wide, narrow, NO_BASE).lines


def test_dora_against_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = factors()
    weight = np.random.default_rng(2).normal(size=(64, 96))
    monkeypatch.setattr("loraduct.validation.delta._own", lambda *_: stored(weight, "F32"))
    m = stored(np.linalg.norm(weight, axis=1), "F32")
    flipped = b.copy()
    flipped[5] *= -1
    one, two, same = (lora(a, x, "BF16", magnitude=m) for x in (b, flipped, b))
    found = compare("m", one, two, NO_BASE)
    assert found.fits is False
    assert "row 5" in found.note
    assert compare("m", one, same, NO_BASE).fits


def test_a_rounded_magnitude_moves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package has FLOAT16's: of a small update that is more than its factors may be off by."""
    a, b = factors()
    weight = np.random.default_rng(2).normal(size=(64, 96))
    monkeypatch.setattr("loraduct.validation.delta._own", lambda *_: stored(weight, "F32"))
    m = np.linalg.norm(weight, axis=1) * np.random.default_rng(3).uniform(0.99, 1.01, 64)
    wrong = m.copy()
    wrong[3] *= 1.002
    one, half, odd = (
        lora(a, b * 0.01, "F32", magnitude=stored(x, d))
        for x, d in ((m, "F32"), (m, "F16"), (wrong, "F16"))
    )
    found = compare("m", one, half, NO_BASE)
    assert found.error > 1e-3
    assert found.fits
    found = compare("m", one, odd, NO_BASE)
    assert found.fits is False
    assert "magnitude 3" in found.note


def test_of_full_rank_and_of_replaced_weights() -> None:
    a, b = (stored(x, "F32").read().astype(np.float64) for x in factors())
    whole = Dense(stored(2.0 * b @ a, "F32"), "IA3")
    flipped = b.copy()
    flipped[5] *= -1
    assert compare("m", whole, lora(a, b, "BF16"), NO_BASE).fits
    found = compare("m", whole, lora(a, flipped, "BF16"), NO_BASE)
    assert found.fits is False
    assert "row 5" in found.note
    weight = np.random.default_rng(3).normal(size=(64, 96)) * np.geomspace(1e-3, 1, 64)[:, None]
    wrong = weight.copy()
    wrong[5] *= -1
    one, two, rounded = (
        Replacement(stored(w, d), "modules_to_save")
        for w, d in ((weight, "F32"), (wrong, "BF16"), (weight, "BF16"))
    )
    found = compare("m.weight", one, two, NO_BASE)
    assert found.fits is False
    assert "row 5" in found.note
    assert compare("m.weight", one, rounded, NO_BASE).lines == 0


def base_of(sample: Any) -> Any:
    """A base of which these are the sampled weights."""
    found = Base(None, {})  # type: ignore[arg-type]
    found.__dict__["sample"] = np.asarray(sample, np.float32)
    return found


def test_a_copy_in_any_dtype_is_the_base() -> None:
    """Weights rounded once or twice, of every size; and one ULP of BF16 more is another base."""
    from loraduct.validation.base_model import beyond

    rng = np.random.default_rng(0)
    for size in (1, 0.02, 1e-4, 1e-7):
        w = torch.tensor(rng.standard_t(3, (2000, 32)) * size, dtype=torch.float32)
        ways = (w, w.half(), w.bfloat16(), w.half().bfloat16(), w.bfloat16().half())
        bases = [base_of(x.float().numpy()) for x in ways]
        assert not [
            (i, j) for i, x in enumerate(bases) for j, y in enumerate(bases) if beyond(x.kin, y)
        ]
    w = rng.normal(size=(8, 32)) * 0.02
    for share in (0.02, 0.05):
        noise = w + rng.normal(size=w.shape) * share * w.std()
        assert beyond(base_of(w).kin, base_of(noise)) > 50
