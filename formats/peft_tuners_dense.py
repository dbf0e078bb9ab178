"""PEFT's methods with an update of full rank that needs the base's shapes at most (peft 0.21.2).

As in `peft_tuners_low`: one function a method, PEFT's formula in the docstring.
"""

from __future__ import annotations

import math

import numpy as np

from loraduct.adapter import Dense
from loraduct.formats.peft_given import Array, Given, dense, integers, wide

_PLAIN_DRAWS = (1 << 32) // 20  # torch draws 64 bits each above this many


def fourierft(g: Given) -> Dense:
    """dW = scaling * Re(ifft2(S)); S (o, i) is zero but for the spectrum at places drawn by seed.

    tuners/fourierft/layer.py.
    """
    rows, cols = _places(g, "fourierft_spectrum", 1000)
    spectrum, scaling = g.find("fourierft_spectrum"), g.number("scaling", 150.0)

    def delta() -> Array:
        full = np.zeros(g.out_in)
        full[rows, cols] = wide(spectrum)
        return np.fft.ifft2(full).real * scaling

    return dense(g, ([spectrum], delta), g.out_in, "waves over the whole matrix")


def waveft(g: Given) -> Dense:
    """As FourierFT with wavelets: dW = scaling * inverse transform of S; or S itself.

    tuners/waveft/layer.py and waverec2d.py. Of the wavelets only db1 (Haar, PEFT's default): each
    two by two values are sums and differences of one value of each quarter of S.
    """
    family = g.config.get("wavelet_family", "db1")
    transformed = g.flag("use_idwt", True)
    if transformed and family != "db1":
        raise g.refuse(f"wavelet_family is {family!r}; only db1 is carried")
    rows, cols = _places(g, "waveft_spectrum", 2592)
    spectrum, scaling = g.find("waveft_spectrum"), g.number("scaling", 25.0)
    out, inner = g.out_in

    def delta() -> Array:
        if not transformed:
            full = np.zeros((out, inner))
            full[rows, cols] = wide(spectrum)
            return full * scaling
        full = np.zeros((out + out % 2, inner + inner % 2))
        full[rows, cols] = wide(spectrum)
        return _haar(full)[:out, :inner] * scaling

    return dense(g, ([spectrum], delta), (out, inner), "wavelets over the whole matrix")


def _haar(s: Array) -> Array:
    """The inverse Haar transform, of one level, of the quarters of ``s``."""
    down, across = s.shape[0] // 2, s.shape[1] // 2
    mean, h, v, d = s[:down, :across], s[:down, across:], s[down:, :across], s[down:, across:]
    made = np.empty_like(s)
    made[0::2, 0::2] = mean + h + v + d
    made[0::2, 1::2] = mean + h - v - d
    made[1::2, 0::2] = mean - h + v - d
    made[1::2, 1::2] = mean - h - v + d
    return made / 2


def _places(g: Given, leaf: str, default: int) -> tuple[Array, Array]:
    """(rows, columns) of the spectrum: the first values of torch's randperm by random_loc_seed."""
    out, inner = g.out_in
    g.sizes(**{leaf: "n"})
    (count,) = g.find(leaf).shape
    if not g.flag("proportional_parameters"):
        expected = g.pattern("n_frequency_pattern", g.count("n_frequency", default))
        if count != expected:
            raise g.refuse(f"{count} frequencies, the config says {expected:g}", leaf)
    seed = g.config.get("random_loc_seed", 777)
    if type(seed) is not int or not 0 <= seed < 1 << 32:
        raise g.refuse(f"random_loc_seed is {seed!r}, expected an integer below 2**32")
    if count > out * inner or out * inner >= _PLAIN_DRAWS:
        raise g.refuse(f"{count} of {out * inner} places can't be drawn as torch draws them")
    flat = first_of_randperm(out * inner, count, seed)
    return flat // inner, flat % inner


def first_of_randperm(n: int, count: int, seed: int) -> Array:
    """The first ``count`` values of ``torch.randperm(n)`` by a CPU generator of this seed.

    torch 2.13, ATen/native/TensorFactories.cpp: place i is swapped with i + draw mod (n - i), the
    draws are 32 bits each of the Mersenne twister, seeded as in its reference implementation. The
    rest of the permutation is never made.
    """
    draws = np.random.RandomState(seed).randint(0, 1 << 32, count, dtype=np.uint32)
    moved: dict[int, int] = {}
    found = np.empty(count, np.int64)
    for i in range(count):
        j = i + int(draws[i]) % (n - i) if i < n - 1 else i
        found[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return found


def c3a(g: Given) -> Dense:
    """dW in blocks of b x b, each the circulant of its kernel, over i; kernel (o/b, i/b, b).

    tuners/c3a/layer.py and utils.py: block[x, y] = kernel[(y - x) mod b] / i.
    """
    n = g.sizes(c3a_kernel="m n b")
    expected = g.pattern("block_size_pattern", g.count("block_size", 256))
    if n["b"] != expected:
        raise g.refuse(f"block size {n['b']}, the config says {expected:g}", "c3a_kernel")
    kernel, b = g.find("c3a_kernel"), n["b"]
    out, inner = n["m"] * b, n["n"] * b
    g.check_shape(out, inner)

    def delta() -> Array:
        turn = (np.arange(b)[None, :] - np.arange(b)[:, None]) % b
        return wide(kernel)[:, :, turn].transpose(0, 2, 1, 3).reshape(out, inner) / inner

    return dense(g, ([kernel], delta), (out, inner), "circulant blocks")


def shira(g: Given) -> Dense:
    """dW is zero but for shira_weight (n,) at shira_indices (2, n): rows and columns.

    tuners/shira/layer.py.
    """
    out, inner = g.out_in
    count = g.count("r", 32) * (out + inner)
    g.sizes(shira_weight=f"{count}", shira_indices=f"2 {count}")
    values, places = g.find("shira_weight"), g.find("shira_indices")

    def delta() -> Array:
        rows, cols = integers(places)
        if min(rows.min(), cols.min()) < 0 or rows.max() >= out or cols.max() >= inner:
            raise g.refuse(f"an index is outside the weight {[out, inner]}", "shira_indices")
        full = np.zeros((out, inner))
        np.add.at(full, (rows, cols), wide(values))
        return full

    return dense(g, ([values, places], delta), (out, inner), "single entries of the weight")


def supertuning(g: Given) -> Dense:
    """dW is zero but for values (n,) at flat indices (n,); plus lora_alpha/r * B @ A, when r is set.

    tuners/supertuning/layer.py.
    """
    g.sizes(supertuning_values="n", supertuning_indices="n")
    values, places = g.find("supertuning_values"), g.find("supertuning_indices")
    out, inner = g.out_in
    factors = []
    scale = 0.0
    if g.config.get("r") is not None:
        r = g.count("r")
        lora = {"supertuning_lora_A__weight": f"{r} i", "supertuning_lora_B__weight": f"o {r}"}
        g.sizes(**lora)
        factors = [g.find(leaf.replace("__", ".")) for leaf in lora]
        scale = g.number("lora_alpha", 8) / r

    def delta() -> Array:
        where = integers(places)
        if where.min() < 0 or where.max() >= out * inner:
            raise g.refuse(f"an index is outside the weight {[out, inner]}", "supertuning_indices")
        full = np.zeros((out, inner))
        np.add.at(full.reshape(-1), where, wide(values))
        return full + scale * (wide(factors[1]) @ wide(factors[0])) if factors else full

    inputs = [values, places, *factors]
    return dense(g, (inputs, delta), (out, inner), "single entries of the weight")


def randlora(g: Given) -> Dense:
    """dW = alpha/r * B' @ A', A' = lambda[:, :, None] * A * gamma; transposed where o < i.

    tuners/randlora/layer.py. Shared A (r, 1, least), B (most, bases, r) are cut to the module's
    sizes; lambda (r, n), gamma (n, min(o, i)), n = ceil(min(o, i) / r). PEFT flattens B to columns
    (n, r) and A' to rows (r, n): not the same order, and so is it here.
    """
    out, inner = g.out_in
    least, most = min(out, inner), max(out, inner)
    r = g.count("r", 32)
    bases = math.ceil(least / r)
    g.sizes(randlora_lambda=f"{r} {bases}", randlora_gamma=f"{bases} {least}")
    a, b = (g.shared.get(leaf) for leaf in ("randlora_A", "randlora_B"))
    if a is None or b is None:
        raise g.refuse("has no shared randlora_A and randlora_B; the adapter is incomplete")
    fits = len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[2] == r
    if not fits or a.shape[1] != 1 or a.shape[2] < least or b.shape[0] < most or b.shape[1] < bases:
        raise g.refuse(f"shapes {list(a.shape)} and {list(b.shape)} don't fit", "randlora_A")
    strength, gamma = g.find("randlora_lambda"), g.find("randlora_gamma")
    scale = g.number("randlora_alpha", 640) / r

    def delta() -> Array:
        scaled = wide(strength)[:, :, None] * wide(a)[:, :, :least] * wide(gamma)
        left = wide(b)[:most, :bases].reshape(most, bases * r)
        made = left @ scaled.reshape(r * bases, least)
        return scale * (made if least == inner else made.T)

    inputs = [a, b, strength, gamma]
    return dense(g, (inputs, delta), (out, inner), "as many random bases as the weight has ranks")
