"""The lazy tensor against numpy's own arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraduct.errors import Refused
from loraduct.files import Source
from loraduct.formats.safetensors_file import read_header, serialized
from loraduct.tensor import Loss, Tensor, is_finite, is_power_of_two

NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def stored(path: Path, array: Any, dtype: str) -> Tensor:
    """A tensor over a raw file that holds ``array``."""
    path.write_bytes(b"pad!" + array.tobytes())
    return Tensor("t", dtype, array.shape, Source(path), 4, path=path)


def result(tensor: Tensor) -> Any:
    """The bytes that would be written, as an array of the result's dtype."""
    raw = b"".join(bytes(memoryview(c).cast("B")) for c in tensor.chunks())
    return np.frombuffer(raw, NUMPY[tensor.dtype]).reshape(tensor.shape)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    transposed=st.booleans(),
    factor=st.sampled_from([1.0, 0.5, 4.0, -2.0, 0.7071067811865476, 1.3]),
    source=st.sampled_from(sorted(NUMPY)),
    target=st.sampled_from(sorted(NUMPY)),
    seed=st.integers(0, 99),
)
def test_lazy_operations_are_numpys(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int, cols: int, pad: tuple[int, int], transposed: bool, factor: float,
    source: str, target: str, seed: int,
) -> None:  # fmt: skip
    array = np.random.default_rng(seed).normal(size=(rows, cols)).astype(NUMPY[source])
    tensor = stored(tmp_path_factory.mktemp("t") / "file", array, source)
    expected = array.astype(np.float64) * factor
    if transposed:
        tensor, expected = tensor.T, expected.T
    tensor = tensor.times(factor).resized(expected.shape[0] + pad[0], expected.shape[1] + pad[1])
    tensor = tensor.to(target)
    expected = np.pad(expected, ((0, pad[0]), (0, pad[1])))
    # one rounding, from the exact product: ml_dtypes and numpy round to nearest even
    expected = expected.astype(NUMPY[target])
    np.testing.assert_array_equal(result(tensor), expected)
    out = np.full(expected.shape, np.nan, np.float32)
    tensor.read_into(out)
    np.testing.assert_array_equal(out, expected.astype(np.float32))


@pytest.mark.parametrize("shape", [(3, 700_001), (700_001, 3), (1500, 1500)])
def test_large_transposes_in_blocks(tmp_path: Path, shape: tuple[int, int]) -> None:
    array = np.arange(shape[0] * shape[1], dtype=np.uint32).astype(np.uint16).reshape(shape)
    array &= 0x3BFF  # finite
    tensor = stored(tmp_path / "file", array.view(np.float16), "F16")
    np.testing.assert_array_equal(result(tensor.T).view(np.uint16), array.T)
    np.testing.assert_array_equal(result(tensor).view(np.uint16), array)


def test_crop_undoes_pad_and_refuses_lost_values(tmp_path: Path) -> None:
    array = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    padded = np.pad(array, ((0, 2), (0, 1)))
    tensor = stored(tmp_path / "file", padded, "F32")
    np.testing.assert_array_equal(result(tensor.resized(3, 4)), array)
    np.testing.assert_array_equal(result(tensor.T.resized(4, 3)), array.T)
    for shape in ((2, 5), (5, 3)):
        with pytest.raises(Refused, match="not zero"):
            result(tensor.resized(*shape))


@pytest.mark.parametrize("dtype", sorted(NUMPY))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(5, 3), (7,), (2, 2, 2)])
def test_not_finite_is_refused(tmp_path: Path, dtype: str, bad: float, shape: Any) -> None:
    array = np.ones(shape, NUMPY[dtype])
    assert is_finite(array.view(np.uint16) if dtype != "F32" else array, dtype)
    array.flat[-1] = bad
    tensor = stored(tmp_path / "file", array, dtype)
    with pytest.raises(Refused, match="NaN or Inf"):
        result(tensor)
    with pytest.raises(Refused, match="NaN or Inf"):
        tensor.read_into(np.empty(shape, np.float32))


def test_overflow_of_a_cast_is_refused(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "file", np.full((2, 2), 1e6, np.float32), "F32")
    with pytest.raises(Refused, match="does not fit F16"):
        result(tensor.to("F16"))
    assert result(tensor.to("BF16")).astype(np.float32)[0, 0] == pytest.approx(1e6, rel=2**-8)


def test_loss_is_the_relative_frobenius_error(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(64, 33)).astype(np.float32)
    tensor = stored(tmp_path / "file", array, "F32").to("F16")
    loss = Loss()
    for _ in tensor.chunks(loss):
        pass
    rounded = array.astype(np.float16).astype(np.float64)
    expected = np.linalg.norm(rounded - array) / np.linalg.norm(array.astype(np.float64))
    assert loss.relative == pytest.approx(expected, rel=1e-9)
    assert tensor.rounds
    assert not stored(tmp_path / "other", array, "F32").times(0.25).rounds


@given(st.integers(-60, 60))
def test_powers_of_two(exponent: int) -> None:
    assert is_power_of_two(2.0**exponent)
    assert is_power_of_two(-(2.0**exponent))
    assert not is_power_of_two(3 * 2.0**exponent)


def test_golden_bytes_of_the_container(tmp_path: Path) -> None:
    """The exact file layout, written out by hand."""
    array = np.array([[1.0, -2.0, 0.5]], np.float16)
    tensor = stored(tmp_path / "raw", array, "F16")
    got = b"".join(
        bytes(memoryview(c).cast("B")) for c in serialized({"x.a": tensor.T}, {"format": "mlx"}, {})
    )
    header = b'{"__metadata__":{"format":"mlx"},"x.a":{"dtype":"F16","shape":[3,1],"data_offsets":[0,6]}}'
    header += b" " * (-len(header) % 8)
    assert got == len(header).to_bytes(8, "little") + header + bytes.fromhex("003c00c00038")
    file = tmp_path / "golden.safetensors"
    file.write_bytes(got)
    tensors, metadata = read_header(file)
    assert metadata == {"format": "mlx"}
    assert tensors["x.a"].shape == (3, 1)
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(load_file(file)["x.a"], array.T)


def test_a_file_cut_while_it_is_read(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "file", np.ones((40, 40), np.float32), "F32")
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(Refused, match="ended while it was read"):
        result(tensor)


def test_matrices_that_differ_are_not_the_same(tmp_path: Path) -> None:
    """Streams of two tensors share buffers: compared side by side, all would be equal."""
    import numpy as np
    from safetensors.numpy import save_file

    from loraduct.formats.safetensors_file import read_header
    from loraduct.tensor import same

    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"a": values, "b": values + 1, "c": values.copy()}, tmp_path / "t.safetensors")
    tensors, _ = read_header(tmp_path / "t.safetensors")
    assert not same(tensors["a"], tensors["b"])
    assert not same(tensors["a"].T, tensors["b"].T)
    assert same(tensors["a"], tensors["c"])
