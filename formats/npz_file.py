"""numpy's ``.npz`` as older mlx-examples wrote adapters: small, read whole, no pickles."""

from __future__ import annotations

import zipfile
from pathlib import Path

from loraduct.errors import Refused
from loraduct.files import check_regular
from loraduct.tensor import Tensor
from loraduct.text import printable

LIMIT = 256 << 20  # bytes of all arrays together
# numpy has no bfloat16: mlx's arrays of it come as two raw bytes
_DTYPES = {"float32": "F32", "float16": "F16", "void16": "BF16"}


def read_npz(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Refuses pickled objects and archives that unpack to absurd sizes."""
    import numpy as np

    check_regular(path)
    found: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(m.file_size for m in members)
            if total > min(LIMIT, 64 * path.stat().st_size):
                raise Refused(path, f"unpacks to {total:,} bytes: refused unread")
            names = [m.filename.removesuffix(".npy") for m in members]
            if len(set(names)) != len(names):
                raise Refused(path, "holds two arrays of one name")
            for member, name in zip(members, names, strict=True):
                if not name.isprintable() or len(name) > 1024:
                    raise Refused(path, "array name holds control characters", tensor=name)
                with archive.open(member) as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                dtype = _DTYPES.get(array.dtype.name)
                if dtype is None:
                    raise Refused(
                        path,
                        f"dtype {array.dtype}, expected float32, float16 or bfloat16",
                        tensor=name,
                    )
                raw = np.ascontiguousarray(array)
                data = raw if dtype == "F32" else raw.view(np.uint16)
                found[name] = Tensor(name, dtype, array.shape, data=data, path=path)
    except (
        zipfile.BadZipFile,
        ValueError,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as e:
        raise Refused(
            path, f"is not an .npz archive of plain arrays: {printable(str(e), 160)}"
        ) from None
    return found
