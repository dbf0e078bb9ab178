"""Things that are not regular files, links, pickles and hostile companions.

A pipe in place of a file makes most readers wait for ever, a link out of the folder can smuggle a
private file into the output, and unpickling runs whatever the pickle says.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kit import Folder, Kit

Place = Callable[[Path], Any]


def make_socket(path: Path) -> None:
    """A socket; bound by a relative name because socket paths are short."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link_to_fifo(path: Path) -> None:
    """A link to a pipe beside the folder."""
    os.mkfifo(path.parent.parent / "pipe")
    path.symlink_to(path.parent.parent / "pipe")


def link_loop(path: Path) -> None:
    """Two links that point to each other."""
    path.symlink_to(path.with_name("loop"))
    path.with_name("loop").symlink_to(path)


def unreadable(path: Path) -> None:
    """A file that this user may not read."""
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path.write_bytes(b"{}")
    path.chmod(0)


def full_folder(path: Path) -> None:
    """A folder with something in it."""
    path.mkdir()
    (path / "a").write_text("a")


ODD: dict[str, Place] = {
    "absent": lambda path: None,
    "fifo": os.mkfifo,
    "socket": make_socket,
    "folder": full_folder,
    "dev_zero": lambda path: path.symlink_to("/dev/zero"),
    "dev_null": lambda path: path.symlink_to("/dev/null"),
    "dev_full": lambda path: path.symlink_to("/dev/full"),
    "dev_tty": lambda path: path.symlink_to("/dev/tty"),
    "proc_mem": lambda path: path.symlink_to("/proc/self/mem"),
    "proc_empty_size": lambda path: path.symlink_to("/proc/self/status"),
    "link_to_fifo": link_to_fifo,
    "link_to_folder": lambda path: path.symlink_to(path.parent),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "dangling_hub": lambda path: path.symlink_to("../../blobs/" + "ab" * 32),
    "loop": link_loop,
    "unreadable": unreadable,
}


@pytest.mark.parametrize("which", ["weights", "config_path"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_file(odd: str, which: str, adapter: Folder, kit: Kit) -> None:
    """Anything but a readable regular file is refused by name, without waiting on it."""
    path: Path = getattr(adapter, which)
    path.unlink()
    ODD[odd](path)
    names = (path.name,)
    if odd == "absent" and which == "weights":
        names = (r"\.safetensors",)
    kit.refuse_everywhere(adapter, *names)


@pytest.mark.parametrize("odd", ODD)
def test_odd_source(odd: str, kit: Kit, tmp_path: Path) -> None:
    """The same as the adapter's own path: exit 1, or 2 where the path is not there at all."""
    (tmp_path / "room").mkdir()
    source = tmp_path / "room" / "thing"
    ODD[odd](source)
    for args in (("inspect", source), ("convert", source, "--to", "mlx", "-o", tmp_path / "out")):
        outcome = kit.run(*args).tidy()
        assert outcome.code in (1, 2)
        assert "thing" in outcome.stderr
        assert not (tmp_path / "out").exists()


def test_empty_folder(kit: Kit, tmp_path: Path) -> None:
    """A folder with nothing in it is named, and the message says what was looked for."""
    (tmp_path / "nothing").mkdir()
    kit.run("inspect", tmp_path / "nothing").refused("nothing", "PEFT", "MLX")


def test_both_formats_in_one_folder(peft: Folder, kit: Kit) -> None:
    """Weights of both formats beside one config: which one is meant is not guessed in silence."""
    (peft.path / "adapters.safetensors").write_bytes(peft.weights.read_bytes())
    outcome = kit.run("inspect", peft.path).tidy()
    if outcome.code == 0:
        assert "adapters.safetensors" in outcome.stdout + outcome.stderr
    else:
        outcome.refused("peft", "mlx")


def test_linked_files_are_read(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """A model cache's snapshot is nothing but links into `blobs`; it is read and converted."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "f00d"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (adapter.path / "README.md").write_text("# Model card\n")
    for item in adapter.path.iterdir():
        item.rename(blobs / item.name)
        (snapshot / item.name).symlink_to(Path("../../blobs") / item.name)
    assert kit.run("inspect", snapshot).tidy().code == 0
    out = tmp_path / "out"
    outcome = kit.run("convert", snapshot, "--to", adapter.target, "-o", out).tidy()
    assert outcome.code == 0, outcome.stderr
    assert not [item.name for item in out.iterdir() if item.is_symlink()]


def convert_fine(folder: Folder, kit: Kit, *options: str) -> Path:
    """Convert a folder that must be accepted; the output's path."""
    out = folder.path.parent / "out"
    outcome = kit.run("convert", folder.path, "--to", folder.target, "-o", out, *options).tidy()
    assert outcome.code == 0, outcome.stderr
    assert outcome.seconds < 5
    return out


SECRET = "-----BEGIN PRIVATE KEY-----"
COMPANIONS = ["README.md", "tokenizer.json", "chat_template.jinja", "LICENSE"]


@pytest.mark.parametrize("name", COMPANIONS)
@pytest.mark.parametrize("how", ["absolute", "relative", "through_folder", "hub_lookalike"])
def test_companion_link_to_secret(
    how: str, name: str, adapter: Folder, kit: Kit, tmp_path: Path
) -> None:
    """A companion that links out of the folder is left behind: its target may be private."""
    secret = tmp_path / "private" / "blobs" / "id_rsa"
    secret.parent.mkdir(parents=True)
    secret.write_text(SECRET)
    if how == "relative":
        (adapter.path / name).symlink_to("../private/blobs/id_rsa")
    elif how == "through_folder":
        (adapter.path / "inner").symlink_to(secret.parent)
        (adapter.path / name).symlink_to("inner/id_rsa")
    else:
        (adapter.path / name).symlink_to(secret)
    out = convert_fine(adapter, kit)
    for path in (out, *out.rglob("*")):
        assert not path.is_symlink()
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd != "absent"])
def test_odd_companion(odd: str, adapter: Folder, kit: Kit) -> None:
    """A companion that is no regular file is left behind, and nobody waits on it."""
    ODD[odd](adapter.path / "tokenizer.json")
    out = convert_fine(adapter, kit)
    assert not (out / "tokenizer.json").exists()


def test_huge_companion(adapter: Folder, kit: Kit) -> None:
    """A sparse 8 GB "tokenizer" doesn't fill the disk: left behind or refused."""
    with (adapter.path / "tokenizer.json").open("wb") as file:
        file.truncate(8 << 30)
    out = adapter.path.parent / "out"
    outcome = kit.run("convert", adapter.path, "--to", adapter.target, "-o", out).tidy()
    assert outcome.code in (0, 1)
    assert not (out / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "notes.pkl"])
def test_training_state_is_never_opened(name: str, adapter: Folder, kit: Kit) -> None:
    """Training state beside the adapter may be a pipe: nobody looks into it or carries it."""
    os.mkfifo(adapter.path / name)
    assert kit.run("inspect", adapter.path).tidy().code == 0
    assert not (convert_fine(adapter, kit) / name).exists()


class Payload:
    """What an attacker pickles: unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def torch_zip(path: Path, payload: bytes) -> None:
    """The zip layout torch saves, with any pickle inside."""
    with zipfile.ZipFile(path, "w") as writer:
        writer.writestr("archive/data.pkl", payload)
        writer.writestr("archive/version", "3\n")


@pytest.mark.parametrize("layout", ["plain", "zip"])
@pytest.mark.parametrize("allowed", [False, True])
def test_pickle(allowed: bool, layout: str, peft: Folder, kit: Kit, tmp_path: Path) -> None:
    """adapter_model.bin is refused naming the way out; even then its code never runs."""
    if allowed and find_spec("torch") is None:
        pytest.skip("needs torch")
    marker = tmp_path / "executed"
    payload = pickle.dumps({"a": Payload(marker)}, protocol=2)
    weights = peft.path / "adapter_model.bin"
    peft.weights.unlink()
    if layout == "zip":
        torch_zip(weights, payload)
    else:
        weights.write_bytes(payload)
    if allowed:
        out = tmp_path / "out"
        outcome = kit.run_process(
            "convert", peft.path, "--to", "mlx", "-o", out, "--allow-pickle", limit=60
        )
        assert outcome.code == 1, outcome.stdout
        assert "adapter_model.bin" in outcome.error_line()
        assert not out.exists()
    else:
        kit.refuse_everywhere(peft, r"adapter_model\.bin", "--allow-pickle")
    assert not marker.exists()


def test_safetensors_wins_over_pickle(peft: Folder, kit: Kit, tmp_path: Path) -> None:
    """With both weights files there, the pickle is neither opened nor carried."""
    os.mkfifo(peft.path / "adapter_model.bin")
    out = convert_fine(peft, kit)
    assert not list(out.glob("*.bin"))


NPY = b"\x93NUMPY\x01\x00"


def test_npz_with_objects(kit: Kit, tmp_path: Path) -> None:
    """An old MLX adapters.npz whose array is a pickle: refused, its code never runs."""
    marker = tmp_path / "executed"
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    array = NPY + struct.pack("<H", len(header)) + header
    source = tmp_path / "src"
    source.mkdir()
    with zipfile.ZipFile(source / "adapters.npz", "w") as writer:
        name = "model.layers.0.self_attn.q_proj.lora_a.npy"
        writer.writestr(name, array + pickle.dumps([Payload(marker)]))
    (source / "adapter_config.json").write_text(json.dumps(kit.build("mlx", source).config))
    outcome = kit.run("convert", source, "--to", "peft", "-o", tmp_path / "out", "--allow-pickle")
    outcome.tidy()
    assert outcome.code == 1
    outcome.error_line()
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
