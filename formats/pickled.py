"""torch's pickled ``.bin``: read in a child process with limits, never in ours."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from loraduct.errors import MissingExtra, Refused
from loraduct.files import check_regular
from loraduct.formats.safetensors_file import read_header
from loraduct.tensor import Tensor
from loraduct.text import printable

SECONDS = 300
MEMORY = 12 << 30  # bytes of data the child may allocate
_CHILD = """
import resource, sys
try:
    resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[3]),) * 2)
except (ValueError, OSError):
    pass
try:
    import torch
    from safetensors.torch import save_file
except ImportError:
    sys.exit(9)
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
if not isinstance(state, dict) or not all(
    isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
):
    sys.exit("does not hold named tensors")
save_file({k: v.clone().contiguous() for k, v in state.items()}, sys.argv[2])
"""


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickle by name, by way of a temporary safetensors file."""
    check_regular(path)
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(i.file_size for i in archive.infolist())
        if unpacked > 2 * size + (1 << 20):  # torch stores without compression
            raise Refused(path, f"unpacks to {unpacked:,} bytes from {size:,}: refused unread")
    with tempfile.TemporaryDirectory(prefix="loraduct-") as folder:
        copy = Path(folder) / "adapter_model.safetensors"
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CHILD, str(path), str(copy), str(MEMORY)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Refused(path, f"took over {SECONDS} s to open") from None
        if done.returncode == 9:
            raise MissingExtra("torch", "reading a pickle")
        if done.returncode:
            last = done.stderr.strip().rsplit("\n", 1)[-1]
            raise Refused(path, f"can't be opened as tensors: {printable(last, 300)}")
        # the open file outlives the folder it was written in
        return read_header(copy)[0]
