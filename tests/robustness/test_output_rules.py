"""What may be written where: an existing, foreign or unsuitable OUT is refused and untouched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kit import Folder, Kit, Outcome


def tree(path: Path) -> dict[str, Any]:
    """Everything below a path: kinds, link targets and bytes."""
    found: dict[str, Any] = {}
    for item in sorted(path.rglob("*")):
        name = str(item.relative_to(path))
        if item.is_symlink():
            found[name] = os.readlink(item)
        else:
            found[name] = item.read_bytes() if item.is_file() else None
    return found


def convert(kit: Kit, folder: Folder, out: Path | str, *options: str | Path) -> Outcome:
    """Convert to the other format."""
    outcome: Outcome = kit.run(
        "convert", folder.path, "--to", folder.target, "-o", out, *options
    ).tidy()  # fmt: skip
    return outcome


def untouched(kit: Kit, folder: Folder, out: Path | str, *options: str, name: str) -> None:
    """The conversion is refused naming `name`, and nothing below the room changes."""
    room = folder.path.parent
    before = tree(room)
    convert(kit, folder, out, *options).refused(name)
    assert tree(room) == before


def test_existing_out(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """Without --force an existing adapter stays; the message says how to replace it."""
    out = tmp_path / "out"
    assert convert(kit, adapter, out).code == 0
    before = tree(tmp_path)
    outcome = convert(kit, adapter, out)
    outcome.refused("out", "--force")
    assert tree(tmp_path) == before
    assert convert(kit, adapter, out, "--force").code == 0
    assert tree(tmp_path) == before


def one_file(out: Path) -> None:
    """Somebody's file."""
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def adapter_and_file(out: Path) -> None:
    """Somebody's file beside what may be an adapter."""
    one_file(out)
    (out / "adapter_config.json").write_text("{}")
    (out / "adapters.safetensors").write_bytes(b"old")
    (out / "adapter_model.safetensors").write_bytes(b"old")


def subfolder(out: Path) -> None:
    """Somebody's folder beside what may be an adapter."""
    adapter_and_file(out)
    (out / "thesis.txt").unlink()
    (out / "checkpoint-100").mkdir()
    (out / "checkpoint-100" / "a").write_text("a")


def repository(out: Path) -> None:
    """A git checkout of an adapter."""
    adapter_and_file(out)
    (out / "thesis.txt").unlink()
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")


def base_model(out: Path) -> None:
    """A whole model."""
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "model.safetensors").write_bytes(b"large")


def a_file(out: Path) -> None:
    """A regular file."""
    out.write_text("years of work")


def dangling(out: Path) -> None:
    """A link to nothing."""
    out.symlink_to("nowhere")


def loop(out: Path) -> None:
    """A link to itself."""
    out.symlink_to(out)


FOREIGN: list[Callable[[Path], Any]] = [
    one_file, adapter_and_file, subfolder, repository, base_model, a_file, os.mkfifo, loop,
]  # fmt: skip


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_foreign_out(
    make: Callable[[Path], Any], force: tuple[str, ...], adapter: Folder, kit: Kit
) -> None:
    """What is not an adapter alone is never replaced, not even with --force."""
    out = adapter.path.parent / "out"
    make(out)
    untouched(kit, adapter, out, *force, name="out")


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
def test_out_is_or_holds_source(force: tuple[str, ...], adapter: Folder, kit: Kit) -> None:
    """OUT equal to SRC under any of its names, inside it, or around it."""
    src, room = adapter.path, adapter.path.parent
    (room / "alias").symlink_to("src")
    (src / "README.md").write_text("# card")
    for out in (src, src / ".", room / "x" / ".." / "src", room / "alias", f"{src}/"):
        untouched(kit, adapter, out, *force, name="src|alias")
    for out in (src / "out", src / "a" / "b", room / "alias" / "out"):
        untouched(kit, adapter, out, *force, name="src|alias")
    untouched(kit, adapter, room, *force, name=room.name)


def test_linked_out_keeps_link(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """OUT as a link: replaced through the link or refused, but the link stays a link."""
    real = tmp_path / "real"
    assert convert(kit, adapter, real).code == 0
    (tmp_path / "link").symlink_to("real")
    before = tree(tmp_path)
    convert(kit, adapter, tmp_path / "link").refused("link|real")
    assert tree(tmp_path) == before
    outcome = convert(kit, adapter, tmp_path / "link", "--force")
    assert outcome.code in (0, 1)
    assert tree(tmp_path) == before


def test_dangling_out(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """OUT as a link to nothing: the link survives, whether the conversion is refused or not."""
    dangling(tmp_path / "out")
    outcome = convert(kit, adapter, tmp_path / "out")
    assert outcome.code in (0, 1)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").exists() == (outcome.code == 0)


def test_out_parent_missing(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """A missing parent is either made along with OUT or named; never half of both."""
    out = tmp_path / "no" / "such" / "out"
    outcome = convert(kit, adapter, out)
    if outcome.code:
        outcome.refused("no/such")
        assert ".lock" not in outcome.stderr
        assert not (tmp_path / "no").exists()
    else:
        assert (out / "adapter_config.json").exists()


def test_out_parent_is_a_file(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """A parent that is no folder."""
    (tmp_path / "file").write_text("x")
    untouched(kit, adapter, tmp_path / "file" / "out", name="file")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_out_parent_takes_nothing(adapter: Folder, kit: Kit) -> None:
    """A place where nobody, not even root, can create a folder."""
    untouched(kit, adapter, "/proc/loraduct-out", name="/proc")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_out_parent_read_only(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """A parent without write permission."""
    (tmp_path / "locked").mkdir(mode=0o555)
    untouched(kit, adapter, tmp_path / "locked" / "out", name="locked")


ODD_NAMES = ["a b", "-out", "o[u]t*", "%s", "x" * 230, "模型", "out.safetensors", ".hidden"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_out_names(name: str, adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """Names that a glob, an option parser or a format string could take for something else."""
    room = tmp_path / "room"
    room.mkdir()
    for options in ((), ("--force",)):
        assert convert(kit, adapter, room / name, *options).code == 0
        assert [item.name for item in room.iterdir()] == [name]


def test_out_name_too_long(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """A name the file system can't hold is one clear line."""
    untouched(kit, adapter, tmp_path / ("y" * 300), name="yyy")


def test_dry_run_writes_nothing(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """--dry-run reports and leaves no trace."""
    before = tree(tmp_path)
    outcome = convert(kit, adapter, tmp_path / "out", "--dry-run", "--json")
    assert outcome.code == 0
    assert outcome.one_document() is not None
    assert tree(tmp_path) == before


@pytest.mark.parametrize("options", [
    ("--to", "gguff"), ("--dtype", "f12"), ("--scale", "x"), ("--frob",), ("--to",), ("-i",),
], ids=" ".join)  # fmt: skip
def test_usage_errors(options: tuple[str, ...], peft: Folder, kit: Kit, tmp_path: Path) -> None:
    """Wrong options are usage errors: exit 2 and nothing written."""
    args = ("convert", peft.path, "--to", "mlx", "-o", tmp_path / "out", *options)
    assert kit.run(*args).tidy().code == 2
    assert not (tmp_path / "out").exists()


BAD_OPTIONS = [
    ("--scale", "nan"), ("--scale", "inf"), ("--scale", "1e999"), ("--scale", "1e308"),
    ("-i", "("), ("-e", "("), ("-i", "nothing matches this"), ("-e", ".*"),
    ("-i", "(" * 3000 + ")" * 3000), ("--base", "/no/such/base"), ("--name-map", "/no/such/map"),
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=lambda row: " ".join(row)[:40])
def test_bad_option_values(
    options: tuple[str, str], adapter: Folder, kit: Kit, tmp_path: Path
) -> None:
    """Option values that make no sense: exit 1 or 2, and no adapter full of NaN or of nothing."""
    outcome = convert(kit, adapter, tmp_path / "out", *options)
    assert outcome.code in (1, 2), outcome.stdout
    assert not (tmp_path / "out").exists()


NAME_MAPS: dict[str, bytes] = {
    "empty": b"", "list": b"[]", "text": b"frob", "numbers": b'{"model": 5}',
    "bom": b"\xef\xbb\xbf{}",
    "latin1": b'{"mod\xe9l": "x"}', "nested": b'{"a": {"b": "c"}}', "deep": b"[" * 100_000,
    "duplicate": b'{"model": "a", "model": "b"}', "brackets": b"{" * 9_000_000,
    "two_into_one": b'{"model.layers.{}.self_attn.q_proj": "x.{}.q", '
                    b'"model.layers.{}.self_attn.v_proj": "x.{}.q"}',
}  # fmt: skip


@pytest.mark.parametrize("case", NAME_MAPS)
def test_bad_name_map(case: str, adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """A name map that is no map, or that sends two modules to one name, is refused by name."""
    path = tmp_path / "map.json"
    path.write_bytes(NAME_MAPS[case])
    untouched(
        kit, adapter, tmp_path / "out", "--name-map", str(path), name=r"map\.json|x\.\{?0?\}?\.q"
    )


def test_annotate_refuses_what_inspect_refuses(adapter: Folder, kit: Kit, tmp_path: Path) -> None:
    """annotate touches nothing in a folder it can't read."""
    data = adapter.weights.read_bytes()
    adapter.weights.write_bytes(data[:-1])
    before = tree(tmp_path)
    kit.run("annotate", adapter.path, "--name", "x").refused(adapter.weights.name)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", ["\x1b[31mred", "a\nb: c", "---\n", "\ud800", "x" * 200_000, ""])
def test_annotate_hostile_values(value: str, adapter: Folder, kit: Kit) -> None:
    """Values are stored faithfully or refused; the adapter stays readable either way."""
    outcome = kit.run("annotate", adapter.path, "--name", value).tidy()
    assert outcome.code in (0, 1, 2)
    assert kit.run("inspect", adapter.path).tidy().code == 0
    json.loads(adapter.config_path.read_text())
