"""Options of packages that meet: each is heeded or refused, none is dropped in silence."""

from pathlib import Path

import numpy as np
import pytest

from loraduct.converters import coreml
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats import read as read_adapter
from loraduct.formats.coreml.package import read
from loraduct.validation import coreml as run

pytest.importorskip("peft")

import adapters
import families


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, its folder, an adapter, and one whose names are of two adapters."""
    room = tmp_path_factory.mktemp("world")
    model, folder = families.saved("llama", room / "base")
    adapters.save(adapters.trained(model, adapters.config(["q_proj"]), 1), room / "one")
    return model, folder, room


def test_stateless_functions_of_fixed_shapes(world, tmp_path):
    model, folder, _ = world
    path = tmp_path / "x.mlpackage"
    options = coreml.Options(stateless=True, shapes=(4, 8), context=48)
    coreml.build(base_folder.read(folder), path, options)
    made = run.session(read(path))
    assert made.stateless
    for count in (1, 3, 4, 6, 8):
        ids = families.tokens(count)
        expected = families.reference(model, ids)
        got = made.feed(ids[0].tolist())
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()
    with pytest.raises(Refused, match="takes 8 tokens at most"):
        made.feed(families.tokens(9)[0].tolist())


def test_a_name_that_is_also_a_path_is_asked_about(world, tmp_path, cli, monkeypatch):
    model, folder, room = world
    path = tmp_path / "x.mlpackage"
    spec = f"one={room / 'one'}"
    assert cli("package", "--base", folder, "-a", spec, "-o", path).exit_code == 0
    other = adapters.trained(model, adapters.config(["v_proj"]), 2)
    adapters.save(other, tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    before = adapters.snapshot(path)
    found = cli("package", "replace", path, "one=one")
    assert found.exit_code == 1
    assert "both an adapter of the package and a path: write ./one" in found.stderr
    assert adapters.snapshot(path) == before
    assert cli("package", "replace", path, "one=./one").exit_code == 0
    assert all(n.endswith("v_proj") for n in read_adapter(Path(f"{path}:one")).low_rank)


CHANGES = [["--rank", "2"], ["--energy", "0.9"], ["--allow-approximate"], ["--uniform"],
           ["--dtype", "f16"], ["--include", "q_proj"], ["--dry-run"]]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c[0])
def test_what_converting_to_a_package_does_not_do(world, tmp_path, cli, change):
    _, folder, room = world
    path = tmp_path / "x.mlpackage"
    args = ["convert", room / "one", "--to", "coreml", "-o", path, "--base", folder]
    found = cli(*args, *change)
    assert found.exit_code == 2
    assert "convert to peft first" in found.stderr
    assert not path.exists()


@pytest.mark.parametrize("way", ["build", "convert"])
def test_which_adapter_of_a_folder(world, tmp_path, cli, way):
    _, folder, room = world
    both = tmp_path / "both"
    for name in ("first", "second"):
        (both / name).parent.mkdir(exist_ok=True)
        (both / name).symlink_to(room / "one", target_is_directory=True)
    path = tmp_path / "x.mlpackage"
    args = {
        "build": ["package", "--base", folder, "-a", f"a={both}", "-o", path],
        "convert": ["convert", both, "--to", "coreml", "--base", folder, "-o", path],
    }[way]
    found = cli(*args)
    assert found.exit_code == 1
    assert not path.exists()
    found = cli(*args, "--adapter", "second")
    assert found.exit_code == 0, found.stderr
    assert len(run.functions(read(path))) == 2  # the base's and the adapter's


def test_options_before_a_command(world, cli):
    found = cli("package", "--context", "64", "list", "x.mlpackage")
    assert found.exit_code == 2
    assert "give options behind list" in found.stderr
