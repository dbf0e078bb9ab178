"""Core ML's integers against coremltools' own quantisation and decompression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loraduct.converters.quantize import Options, expand, ios16, ios18, quantize
from loraduct.errors import Refused

pytest.importorskip("coremltools")
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops import (
    constexpr_affine_dequantize,
)
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (
    constexpr_blockwise_shift_scale,
)
from coremltools.optimize import _utils as ct_utils

pytest.importorskip("transformers")
import families
import mil_build as build

from loraduct.converters import coreml as builder
from loraduct.formats import base as base_folder
from loraduct.formats.coreml import package as packages
from loraduct.validation import mil

ALL = [
    Options(bits, signed, symmetric, granularity, block=16, search=search)
    for bits in (4, 8)
    for signed in (True, False)
    for symmetric in (True, False)
    for granularity in ("tensor", "channel", "block")
    for search in (True, False)
]


def weight(*shape: int, seed: int = 0, kind: str = "float16") -> Any:
    numbers = np.random.default_rng(seed).standard_t(5, shape) * 0.05 + 0.01
    return numbers.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)


def squared(w: Any, dense: Any) -> float:
    gap = w.astype(np.float64) - dense.astype(np.float64)
    return float((gap * gap).sum())


def of_coremltools(w: Any, o: Options) -> Any:
    blocks = {"tensor": [0, 0], "channel": [1, 0], "block": [1, o.block]}[o.granularity]
    found = ct_utils.compute_qparams_by_dtype(
        w.astype(np.float32),
        types.string_to_builtin(f"{'' if o.signed else 'u'}int{o.bits}"),
        "LINEAR_SYMMETRIC" if o.symmetric else "LINEAR",
        blocks,
    )
    return constexpr_blockwise_shift_scale.decompress(*found)


@pytest.mark.parametrize("o", ALL, ids=str)
def test_reads_back_as_coremltools_does_with_less_error(o: Options) -> None:
    w = weight(48, 64)
    found = quantize(w, o)
    dense = expand(found)
    args = {key: value for key, (_, value) in ios18(found).items()}
    theirs = constexpr_blockwise_shift_scale.decompress(
        args["data"], args["scale"], args.get("offset")
    )
    np.testing.assert_array_equal(dense, theirs)
    assert dense.dtype == np.float16
    assert found.error == pytest.approx(squared(w, dense), rel=1e-9)
    # ours rounds its scale to float16 before it is used; theirs is float32
    limit = 1.02 if not o.search else 1 if o.bits == 4 or o.granularity != "tensor" else 1.002
    assert squared(w, dense) <= limit * squared(w, of_coremltools(w, o))
    half = 1 << (o.bits - 1)
    low, high = (-half, half - 1) if o.signed else (0, 2 * half - 1)
    assert low <= found.data.min() <= found.data.max() <= high


@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_searching_helps(kind: str, bits: int, symmetric: bool) -> None:
    w = weight(32, 96, kind=kind)
    errors = [
        quantize(w, Options(bits, symmetric=symmetric, block=32, granularity=g, search=s)).error
        for g in ("tensor", "channel", "block")
        for s in (False, True)
    ]
    plain, searched = errors[::2], errors[1::2]
    assert all(s <= p for s, p in zip(searched, plain, strict=True))
    assert searched[1] < 0.95 * plain[1]
    assert searched == sorted(searched, reverse=True)  # more scales, less error


@pytest.mark.parametrize("bits", [4, 8])
def test_search_is_close_to_every_scale_tried(bits: int) -> None:
    w = weight(3, 200, kind="float32")
    found = quantize(w, Options(bits, scale="float32"))
    high = (1 << (bits - 1)) - 1
    for row, mine in zip(w.astype(np.float64), expand(found).astype(np.float64), strict=True):
        scales = np.linspace(0.1, 1.2, 4000)[:, None] * np.abs(row).max() / high
        tried = ((row - np.clip(np.rint(row / scales), -high - 1, high) * scales) ** 2).sum(1).min()
        assert ((row - mine) ** 2).sum() <= 1.05 * tried


@pytest.mark.parametrize("o", [
    o for o in ALL if o.bits == 8 and o.granularity != "block"
] + [Options(granularity="channel", axis=1)], ids=str)  # fmt: skip
def test_ios16_reads_back(o: Options) -> None:
    found = quantize(weight(48, 64), o)
    args = {key: value for key, (_, value) in ios16(found).items()}
    np.testing.assert_array_equal(constexpr_affine_dequantize.decompress(**args), expand(found))


@pytest.mark.parametrize(("o", "what"), [
    (Options(4), "4 bits"), (Options(granularity="block", block=16), "blocks")
])  # fmt: skip
def test_ios16_refuses_what_it_lacks(o: Options, what: str) -> None:
    with pytest.raises(Refused, match=f"w: has {what}, which need iOS18"):
        ios16(quantize(weight(48, 64), o), "w")


@pytest.mark.parametrize("o", ALL[::3], ids=str)
@pytest.mark.parametrize("fill", [0.0, 0.25, -3.0, 6e-8])
def test_constants(o: Options, fill: float) -> None:
    w = np.full((4, 32), fill, np.float16)
    step = max(abs(fill) / (2 ** (o.bits - 1)), 6e-8)
    assert np.abs(expand(quantize(w, o)) - w).max() <= step
    if fill == 0:
        assert not expand(quantize(w, o)).any()


def test_convolutions_have_blocks_of_input_channels() -> None:
    w = weight(8, 32, 3)
    found = quantize(w, Options(4, granularity="block", block=8))
    assert found.scale.shape == (8, 4, 1)
    theirs = constexpr_blockwise_shift_scale.decompress(found.data, found.scale, None)
    np.testing.assert_array_equal(expand(found), theirs)


@pytest.mark.parametrize(("w", "o", "what"), [
    (np.float16([[np.nan, 1]]), Options(), "holds NaN"),
    (np.float32([[np.inf, 1]]), Options(granularity="tensor"), "holds Inf"),
    (np.zeros((2, 30), np.float16), Options(granularity="block"), "blocks of 32 don't divide axis 1"),
    (np.zeros((2, 30), np.float16), Options(bits=3), "3 bits: Core ML's integers have 4 or 8"),
    (np.zeros((0, 3), np.float16), Options(), "nothing to compress"),
    (np.zeros((), np.float16), Options(), "nothing to compress"),
    (np.zeros((2, 2), np.int32), Options(), "is int32"),
    (np.full((2, 2), 1e9, np.float32), Options(), "beyond float16"),
])  # fmt: skip
def test_refusals(w: Any, o: Options, what: str) -> None:
    with pytest.raises(Refused, match=f"^w: .*{what}"):
        quantize(w, o, name="w")


# -- errors that count by input channel --------------------------------------------------------------

MOMENTS = np.random.default_rng(4).gamma(0.3, 9.0, 64)


def counted(w: Any, dense: Any) -> float:
    """sum_ij E[x_j^2] dW_ij^2, float64."""
    each = MOMENTS.reshape(1, -1, *[1] * (w.ndim - 2))
    return float(((w.astype(np.float64) - dense.astype(np.float64)) ** 2 * each).sum())


@pytest.mark.parametrize("shape", [(48, 64), (24, 64, 3)], ids=str)
@pytest.mark.parametrize("o", [o for o in ALL if o.signed and o.search], ids=str)
def test_importance_lessens_the_error_that_counts(o: Options, shape: tuple[int, ...]) -> None:
    w = weight(*shape)
    plain, found = quantize(w, o), quantize(w, o, importance=MOMENTS)
    assert found.error == pytest.approx(counted(w, expand(found)), rel=1e-6)
    assert found.norm == pytest.approx(counted(w, 0 * w), rel=1e-6)
    assert found.error < counted(w, expand(plain))
    args = {key: value for key, (_, value) in ios18(found).items()}
    theirs = constexpr_blockwise_shift_scale.decompress(
        args["data"], args["scale"], args.get("offset")
    )
    np.testing.assert_array_equal(expand(found), theirs)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weighted_search_is_close_to_every_scale_tried(bits: int) -> None:
    w = weight(6, 64, kind="float32")
    found = quantize(w, Options(bits, scale="float32"), importance=MOMENTS)
    high, best = (1 << (bits - 1)) - 1, 0.0
    for row in w.astype(np.float64):
        scales = np.linspace(0.1, 1.2, 4000)[:, None] * np.abs(row).max() / high
        gap = row - np.clip(np.rint(row / scales), -high - 1, high) * scales
        best += (gap**2 @ MOMENTS).min()
    assert found.error <= 1.1 * best


def test_inputs_that_never_occur_do_not_spoil_the_rest() -> None:
    w = weight(8, 64)
    w[:, ::2] *= 50
    seen = np.tile([0.0, 1.0], 32)
    found = expand(quantize(w, Options(8), importance=seen)).astype(np.float64)
    assert np.abs(found - w)[:, 1::2].max() <= np.abs(w[:, 1::2]).max() / 127
    nothing = quantize(w, Options(8), importance=0 * seen)
    np.testing.assert_array_equal(expand(nothing), expand(quantize(w, Options(8))))


@pytest.mark.parametrize("bad", [np.ones(63), np.full(64, np.nan), np.full(64, -1.0)], ids=str)
def test_importance_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(Refused, match=r"^w: .*importance"):
        quantize(weight(8, 64), Options(), importance=bad, name="w")


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of a tiny base, for iOS18 and iOS17, and a text in token numbers."""
    room = tmp_path_factory.mktemp("integers")
    base = base_folder.read(families.saved("llama", room / "base")[1])
    builder.build(base, room / "new.mlpackage", builder.Options(context=48))
    old = builder.Options(target="iOS17", stateless=True, context=48, shapes=(9,))
    builder.build(base, room / "old.mlpackage", old)
    rows = [families.tokens(n)[0].tolist() for n in (30, 31, 29)]
    (room / "ids.jsonl").write_text("".join(json.dumps({"ids": r}) + "\n" for r in rows))
    return room


LINEAR: list[tuple[str, str, tuple[int, ...], list[str]]] = [
    ("new", "int8", (1, 1), ["--granularity", "tensor"]),
    ("new", "int4", (-1, 1), []),
    ("new", "int4", (-1, 1), ["--granularity", "channel"]),
    ("new", "int4", (-1, 16), ["--group-size", "16"]),
    ("new", "int8", (-1, 16), ["--granularity", "block", "--group-size", "16"]),
    ("old", "int8", (), ["--granularity", "tensor"]),
    ("old", "int8", (-1,), []),
]


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("source", "kind", "scales", "words"), LINEAR, ids=str)
def test_coremltools_reads_back_what_the_command_wrote(
    cli: Any, room: Path, tmp_path: Path, asymmetric: bool,
    source: str, kind: str, scales: tuple[int, ...], words: list[str],
) -> None:  # fmt: skip
    """By coremltools' own reader and decompression; the shapes of scales are the granularity's."""
    small, dense = tmp_path / "small.mlpackage", tmp_path / "dense.mlpackage"
    words = [*words, "--quantize", kind, "--include", "mlp.*weight"]
    words += ["--asymmetric"] if asymmetric else []
    done = cli("compress", room / f"{source}.mlpackage", "-o", small, *words, "--json")
    assert done.exit_code == 0, done.output
    ways = {r["way"] for r in json.loads(done.output)["tensors"] if r["way"]}
    assert all(("with offsets" in way) == asymmetric for way in ways)
    assert cli("decompress", small, "-o", dense).exit_code == 0
    ours, ops = constants(dense), operations(small)
    before = constants(room / f"{source}.mlpackage")
    assert ops.keys() == {n for n in before if "mlp" in n}
    for name, op in ops.items():
        theirs = np.asarray(op.materialized_val_inference())
        np.testing.assert_array_equal(theirs, ours[name])
        norm, gap = (np.linalg.norm(x.astype(np.float64)) for x in (theirs, theirs - before[name]))
        assert 0 < gap < (0.2 if kind == "int4" else 0.03) * norm
        rows, inner = before[name].shape
        sizes = (rows, 1 if not scales or scales[-1] == 1 else inner // scales[-1])
        wanted = tuple(1 if s == 1 and not i else sizes[i] for i, s in enumerate(scales))
        assert op.scale.val.shape == wanted
        if source == "new":
            assert (op.offset is not None) == asymmetric
        elif not asymmetric:
            assert not np.any(op.zero_point.val)
        offsets = (op.offset if source == "new" else op.zero_point) if asymmetric else None
        if offsets is not None and -1 in scales:  # one for all may be 0
            assert np.any(offsets.val)


def operations(path: Path) -> dict[str, Any]:
    """coremltools' compressed constants, by name."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = build.ct.utils.load_spec(str(path))
    program = build.quietly(
        load, spec, spec.specificationVersion, str(path / "Data/com.apple.CoreML/weights")
    )
    held = (op for f in program.functions.values() for op in f.operations)
    return {op.outputs[0].name: op for op in held if op.op_type.startswith("constexpr_")}


def constants(path: Path) -> dict[str, np.ndarray]:
    """The matrices of a package's linear layers, by name."""
    weights = mil.Weights(packages.read(path))
    machine = mil.load(weights.package, None, weights)
    given = (s.arguments["weight"] for s in machine.program.steps if s.kind == "linear")
    return {g.name: weights.get(g) for g in given}


@pytest.mark.parametrize("words", [["int8"], ["int4", "--asymmetric"], ["int4", "--group-size", "16"]],
                         ids=str)  # fmt: skip
def test_a_text_lessens_the_error_of_outputs(
    cli: Any, room: Path, tmp_path: Path, words: list[str]
) -> None:
    """Errors from the packages' own weights, in float64, by the inputs that torch sees in float64."""
    total = {}
    model = families.saved("llama", tmp_path / "again")[0].double()
    rows = [json.loads(line)["ids"] for line in (room / "ids.jsonl").read_text().splitlines()]
    moments = hooked(model, rows[:2])
    before = constants(room / "new.mlpackage")
    for name, more in {"plain": [], "with": ["--calibrate", room / "ids.jsonl"]}.items():
        out = tmp_path / f"{name}.mlpackage"
        done = cli("compress", room / "new.mlpackage", "-o", out, "--include", "_proj_weight",
                   "--json", "--quantize", *words, *more)  # fmt: skip
        assert done.exit_code == 0, done.output
        made = constants(out)
        each = {
            n: ((made[n].astype(np.float64) - w) ** 2 @ moments[n]).sum()
            for n, w in before.items()
            if n.endswith("_proj_weight")
        }
        total[name] = sum(each.values())
    said = json.loads(done.output)
    assert total["with"] < 0.98 * total["plain"]
    assert said["weighted_tensors"] == len(each)
    assert said["quality"][0]["tokens"] == 29
    rows = {r["name"]: r["relative_error"] for r in said["tensors"] if r["way"]}
    for n, error in each.items():
        norm = (before[n].astype(np.float64) ** 2 @ moments[n]).sum()
        assert rows[n] == pytest.approx(np.sqrt(error / norm), rel=0.01)


def hooked(model: Any, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """E[x_j^2] of each linear layer's input by the name of its weight in packages, by torch."""
    import torch

    seen: dict[str, list[Any]] = {}
    for n, m in model.named_modules():
        if isinstance(m, torch.nn.Linear):
            m.register_forward_hook(
                lambda _, given, __, n=n: seen.setdefault(n, []).append(given[0][0])
            )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    return {
        n.replace(".", "_") + "_weight": (torch.cat(x) ** 2).mean(0).numpy()
        for n, x in seen.items()
    }


@pytest.mark.parametrize(("words", "what"), [
    ("new.mlpackage --palettize 4 --asymmetric", "--asymmetric goes with --quantize"),
    ("new.mlpackage --bits-per-weight 4 --granularity block", "--granularity goes with --quantize"),
    ("new.mlpackage --quantize int8 --granularity channel --group-size 8", "a scale per block"),
    ("new.mlpackage --quantize int4 --granularity tensor --group-size 8", "a scale per block"),
    ("old.mlpackage --quantize int8 --granularity block", "blocks need iOS18"),
    ("old.mlpackage --quantize int4 --asymmetric", "4 bits need iOS18"),
    ("base --quantize mlx4 --asymmetric", "a scale and a bias (so: asymmetric)"),
    ("base --quantize mlx4 --granularity tensor", "a scale and a bias"),
    ("base --quantize int8 --expanded --granularity tensor --group-size 8", "a scale per block"),
    ("base --palettize 4 --expanded --asymmetric", "--asymmetric goes with --quantize int8 or int4"),
    ("adapter --quantize int8 --asymmetric", "packed factors have symmetric integers"),
    ("adapter --quantize int8 --granularity tensor", "a scale per channel, or per --group-size"),
])  # fmt: skip
def test_where_they_do_not_apply_they_are_refused(
    cli: Any, room: Path, peft_folder: Any, monkeypatch: pytest.MonkeyPatch, words: str, what: str
) -> None:
    folder = peft_folder("adapter")
    monkeypatch.chdir(room)
    name, *rest = words.split()
    out = "out.mlpackage" if name.endswith(".mlpackage") else "out"
    done = cli("compress", folder if name == "adapter" else name, "-o", out, *rest)
    assert done.exit_code == 1, done.output
    assert what in done.output
    assert done.output.count("\n") == 1
    assert not (room / out).exists()
