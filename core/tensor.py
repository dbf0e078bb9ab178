"""A lazy tensor: a region of a file plus what is still to be done to it.

Nothing is read until :meth:`Tensor.rows` is called, and then only the rows asked for. What can be
done lazily is what adapter conversion needs: transpose, multiply by a factor, pad or crop with
zeros, change the dtype. These commute, so a handful of fields describe every order of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loraduct import stream
from loraduct.errors import Refused
from loraduct.text import number

if TYPE_CHECKING:
    from pathlib import Path

    from loraduct.files import Source

# Bits of every dtype the safetensors format names (safetensors 0.8, `tensor.rs`).
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
}
FLOATS = ("F32", "F16", "BF16")  # what adapters are stored in
UNIT_ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}  # all ones here: Inf or NaN
BLOCK = 2 << 20  # bytes handled at once where something is computed


@dataclass
class Loss:
    """Squared error and squared size of what rounding did to one tensor."""

    error: float = 0.0
    size: float = 0.0

    @property
    def relative(self) -> float:
        """Relative Frobenius error."""
        return math.sqrt(self.error / self.size) if self.size else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor of a file, lazily. ``shape`` and ``dtype`` describe the result, not the file."""

    name: str
    stored_dtype: str
    stored_shape: tuple[int, ...]
    source: Source | None = None
    offset: int = 0
    data: Any = field(default=None, repr=False, compare=False)  # an ndarray, when not from a file
    make: Callable[[], Any] | None = field(default=None, repr=False, compare=False)  # gives `data`
    inputs: tuple[Tensor, ...] = ()  # what `make` is made from; see loraduct.computed
    path: Path | None = None  # where it came from, for messages
    transposed: bool = False
    factor: float = 1.0
    size: tuple[int, ...] | None = None  # padded with zeros, or cropped (of zeros), to this
    cast: str | None = None

    @property
    def origins(self) -> tuple[Tensor, ...]:
        """The stored tensors that it holds values of: itself, unless it is computed."""
        return tuple(o for i in self.inputs for o in i.origins) if self.make else (self,)

    @property
    def dtype(self) -> str:
        """The dtype of the result, a safetensors name."""
        return self.cast or self.stored_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        if self.size is not None:
            return self.size
        return self.stored_shape[::-1] if self.transposed else self.stored_shape

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def stored_nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.stored_shape) * BITS[self.stored_dtype] // 8

    @property
    def rounds(self) -> bool:
        """Whether making the result may round values."""
        narrower = UNIT_ROUNDOFF.get(self.dtype, 0) > UNIT_ROUNDOFF.get(self.stored_dtype, 0)
        swapped = {self.dtype, self.stored_dtype} == {"F16", "BF16"}
        wide = self.dtype == "F32" and self.stored_dtype in ("F16", "BF16")
        return narrower or swapped or (not is_exact(self.factor, self.dtype) and not wide)

    @property
    def T(self) -> Tensor:
        """The transpose of a matrix."""
        size = self.size[::-1] if self.size else None
        return replace(self, transposed=not self.transposed, size=size)

    def times(self, factor: float) -> Tensor:
        """Multiplied by a number."""
        return replace(self, factor=self.factor * factor)

    def resized(self, *shape: int) -> Tensor:
        """Padded with zeros, or cropped, to ``shape``; what is cropped must be zero."""
        return self if shape == self.shape else replace(self, size=tuple(shape))

    def to(self, dtype: str) -> Tensor:
        """Rounded to, or widened to, ``dtype``."""
        return self if dtype == self.dtype else replace(self, cast=dtype)

    def rows(self, start: int, stop: int, *, loss: Loss | None = None, finite: bool = True) -> Any:
        """Rows ``start`` to ``stop`` of the result (of a matrix; any other shape: flat elements).

        An ndarray of raw storage: 16-bit floats come as unsigned integers, see ``as_float32``.
        Arithmetic is float32 with one rounding. With ``finite``, NaN and Inf in the file are
        refused, and so is a value that overflows the result's dtype.
        """
        import numpy as np

        shape = self.stored_shape
        if len(shape) != 2:
            return self._arithmetic(self._flat(start, stop), loss, finite)
        rows, cols = shape[::-1] if self.transposed else shape
        want_rows, want_cols = self.shape
        out = self._arithmetic(self._matrix(start, min(stop, rows)), loss, finite)
        if want_cols < cols or (want_rows < rows and stop == want_rows):
            self._check_cropped(out, want_rows, want_cols, rows)
            out = out[:, :want_cols]
        if out.shape != (stop - start, want_cols):
            padded = np.zeros((stop - start, want_cols), out.dtype)
            padded[: out.shape[0], : out.shape[1]] = out
            return padded
        return out

    def _check_cropped(self, out: Any, want_rows: int, want_cols: int, rows: int) -> None:
        extra = [out[:, want_cols:]]
        if want_rows < rows:
            extra.append(self._matrix(want_rows, rows))
        if any(e.any() for e in extra):
            raise Refused(
                self.path,
                "values beyond the rank recorded for this module are not zero: the file was"
                " changed since it was written; convert it with another tool's metadata removed",
                tensor=self.name,
            )

    def _flat(self, start: int, stop: int) -> Any:
        """Stored elements ``start:stop``, counted through the whole tensor."""
        import numpy as np

        if self.data is not None or self.make is not None:
            return self._values.reshape(-1)[start:stop]
        assert self.source is not None
        width = BITS[self.stored_dtype] // 8
        part = self.source.read(self.offset + start * width, (stop - start) * width, self.name)
        return np.frombuffer(part, _numpy_dtype(self.stored_dtype))

    @property
    def _values(self) -> Any:
        return self.data if self.make is None else self.make()

    def _matrix(self, start: int, stop: int) -> Any:
        """Rows ``start:stop`` of the stored matrix or, if transposed, of its transpose."""
        import numpy as np

        n_rows, n_cols = self.stored_shape
        stop = max(start, stop)
        if not self.transposed:
            return self._flat(start * n_cols, stop * n_cols).reshape(stop - start, n_cols)
        if self.source is None or stop - start == n_cols or n_rows == 1:
            whole = self._flat(0, n_rows * n_cols).reshape(n_rows, n_cols)
            return whole[:, start:stop].T
        assert self.source is not None
        out = np.empty((n_rows, stop - start), _numpy_dtype(self.stored_dtype))
        width = out.dtype.itemsize
        for i in range(n_rows):
            self.source.read_into(self.offset + (i * n_cols + start) * width, out[i], self.name)
        return out.T

    def _arithmetic(self, raw: Any, loss: Loss | None, finite: bool) -> Any:
        """Factor and cast, in float32, with the loss measured; the finiteness check."""
        import numpy as np

        if finite:
            self._require_finite(raw)
        if self.factor == 1.0 and self.dtype == self.stored_dtype:
            return raw
        exact = as_float32(raw, self.stored_dtype)
        if self.factor != 1.0:
            exact = (
                exact * np.float32(self.factor)
                if is_power_of_two(self.factor)
                else (exact.astype(np.float64) * self.factor)
            )
        with np.errstate(over="ignore"):
            out = from_float(exact, self.dtype)
        if finite and not is_finite(out, self.dtype):
            raise Refused(
                self.path,
                f"does not fit {self.dtype} (largest value {number(float(abs(exact).max()))});"
                " use --dtype bf16 or f32",
                tensor=self.name,
            )
        if loss is not None:
            error = as_float32(out, self.dtype).astype(np.float64) - exact
            loss.error += float(np.vdot(error, error))
            loss.size += float(np.vdot(exact.astype(np.float64), exact.astype(np.float64)))
        return out

    def raw(self) -> Any:
        """The whole result as raw storage (16-bit floats as unsigned integers), in its shape."""
        two = len(self.stored_shape) == 2
        return self.rows(0, self.shape[0] if two else math.prod(self.shape)).reshape(self.shape)

    def read(self, *, finite: bool = True) -> Any:
        """The whole result as float32."""
        if len(self.stored_shape) != 2:
            flat = self.rows(0, math.prod(self.shape), finite=finite)
            return as_float32(flat, self.dtype).reshape(self.shape)
        return as_float32(self.rows(0, self.shape[0], finite=finite), self.dtype)

    def is_zero(self) -> bool:
        """Whether all floats in the file are zero; False for values that are not from a file."""
        if self.source is None or self.stored_dtype not in FLOATS:
            return False
        step = 1 << 16
        for at in range(0, self.stored_nbytes, step):
            count = min(step, self.stored_nbytes - at)
            piece = self.source.read(self.offset + at, count, self.name)
            if piece.strip(b"\0\x80"):  # what -0.0 has too
                return False
            import numpy as np

            if as_float32(
                np.frombuffer(piece, _numpy_dtype(self.stored_dtype)), self.stored_dtype
            ).any():
                return False
        return True

    def read_into(self, out: Any) -> None:
        """The whole result as float32 in ``out``, a contiguous array of its shape."""
        as_stored = self.factor == 1.0 and self.size is None and self.stored_dtype == self.dtype
        if self.source is None or self.dtype != "F32" or self.transposed or not as_stored:
            out[...] = self.read().reshape(self.shape)
            return
        self.source.read_into(self.offset, out, self.name)
        self._require_finite(out)

    def chunks(self, loss: Loss | None = None, at: int = 0) -> Iterator[Any]:
        """The result's bytes in order, as C-contiguous arrays that hold until the next is asked for.

        ``at`` is where in the output file they will go; it only helps speed.
        """
        import numpy as np

        if self.make is not None:  # once, and held for as long as its pieces are asked for
            data = np.ascontiguousarray(self.make())
            yield from replace(self, data=data, make=None).chunks(loss, at)
            return
        changed = self.factor != 1.0 or self.dtype != self.stored_dtype or self.data is not None
        plain = not changed and self.size is None and self.source is not None
        if plain and len(self.stored_shape) == 2 and self.stored_nbytes <= stream.WHOLE:
            assert self.source is not None
            region = (self.source, self.offset, _numpy_dtype(self.stored_dtype), self.name)
            for piece in stream.matrix(*region, self.stored_shape, self.transposed, at):
                self._require_finite(piece)
                yield piece
            return
        shape = self.shape
        matrix = len(self.stored_shape) == 2
        rows, row_bytes = (
            (shape[0], self.nbytes // max(shape[0], 1))
            if matrix
            else (math.prod(shape), BITS[self.dtype] // 8)
        )
        step = max(1, BLOCK // max(row_bytes, 1))
        for start in range(0, rows, step):
            yield np.ascontiguousarray(self.rows(start, min(start + step, rows), loss=loss))

    def _require_finite(self, raw: Any) -> None:
        if not is_finite(raw, self.stored_dtype):
            raise Refused(
                self.path,
                "holds NaN or Inf: the file is broken; make it again, or repair it",
                tensor=self.name,
            )


def same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes.

    Whole, one after the other: the pieces of `chunks` share buffers, and two such streams at once
    would compare a buffer with itself.
    """
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return bool(one.raw().tobytes() == two.raw().tobytes())


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying a float by ``factor`` is exact (short of overflow and underflow)."""
    return abs(math.frexp(factor)[0]) == 0.5


def is_exact(factor: float, dtype: str) -> bool:
    """Whether ``factor`` times a trained value stays exact in ``dtype``.

    F16 has no room below: its normal numbers end at 6e-5, and factors of LoRA reach that.
    """
    return is_power_of_two(factor) and (abs(factor) >= 1 or dtype != "F16")


def _numpy_dtype(dtype: str) -> str:
    """Raw storage: 16-bit floats as unsigned integers, so that moving them costs nothing."""
    kinds = {"F16": "<u2", "BF16": "<u2", "F32": "<f4"}
    return kinds.get(dtype, f"<u{BITS[dtype] // 8}")


def is_finite(raw: Any, dtype: str) -> bool:
    """Whether raw storage of a float dtype holds no NaN and no Inf."""
    import numpy as np

    mask = _EXPONENT.get(dtype)
    if mask is None or raw.size == 0:
        return True
    if dtype == "F32":
        with np.errstate(invalid="ignore", over="ignore"):
            # NaN and Inf survive max and min, and these run at memory speed
            return bool(np.isfinite(raw.max()) and np.isfinite(raw.min()))
    # as unsigned, negative NaN and Inf are the largest numbers; as signed, positive ones are
    return bool(raw.max() < mask | 0x8000 and raw.view(np.int16).max() < mask)


def as_float32(raw: Any, dtype: str) -> Any:
    """Raw storage as float32."""
    import numpy as np

    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return raw


def from_float(values: Any, dtype: str) -> Any:
    """Floats rounded once, to nearest even, into raw storage of ``dtype``."""
    import numpy as np

    if dtype == "F32":
        return values.astype(np.float32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    import ml_dtypes

    # by way of float32 a float64 would be rounded twice
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)
