"""What `inspect`, `list` and `validate` say of a package and of the adapters in it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraduct.converters import coreml, package
from loraduct.formats import base as base_folder

pytest.importorskip("peft")

import adapters
import families

KINDS = {
    "plain": ("all-linear", {}),
    "patterns": ("all-linear", {"rank_pattern": {"q_proj": 2}}),
    "dora": (["q_proj", "down_proj"], {"use_dora": True}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, its package, and adapters in FLOAT16, all made once."""
    room = tmp_path_factory.mktemp("world")
    model, folder = families.saved("llama", room / "base")
    coreml.build(base_folder.read(folder), room / "x.mlpackage", coreml.Options(context=48))
    for i, (kind, (targets, options)) in enumerate(KINDS.items()):
        adapters.save(adapters.trained(model, adapters.config(targets, **options), i), room / kind)
    return room


@pytest.fixture
def x(world, tmp_path):
    """A package of the base alone, to be edited."""
    return Path(shutil.copytree(world / "x.mlpackage", tmp_path / "x.mlpackage"))


def members(*sources):
    return [package.Member(str(s)) for s in sources]


def test_list_and_inspect(world, x, cli):
    package.add(x, {"one": members(world / "plain"), "two": [package.Member("one", 0.25)]})
    package.add(x, {"three": members("one", world / "dora")})
    document = json.loads(cli("inspect", x, "--json").stdout)
    functions = {f["name"]: f for f in document["functions"]}
    assert list(functions) == ["base", "one", "two", "three"]
    assert functions["two"]["adapters"] == [{"name": "one", "weight": 0.25}]
    assert document["minimum"].startswith("iOS 18")
    assert functions["one"]["inputs"][0] == {
        "name": "inputIds",
        "dtype": "INT32",
        "shape": [1, [1, 48]],
    }
    assert {a["name"]: a["modules"] for a in document["adapters"]} == {"one": 21, "three_2": 6}
    stored = sum(len(d) for _, d in adapters.tensors(world / "plain").values())
    assert document["adapters"][0]["bytes"] == stored
    assert document["bytes"]["unused"] == 0
    package.remove(x, ["three"])
    assert json.loads(cli("inspect", x, "--json").stdout)["bytes"]["unused"] > 0
    listed = json.loads(cli("package", "list", x, "--json").stdout)
    assert [a["name"] for a in listed["adapters"]] == ["one"]
    text = cli("inspect", x).output
    assert "0.25 one" in text
    assert "iOS 18" in text
    one = json.loads(cli("inspect", f"{x}:one", "--json").stdout)
    assert (one["format"], one["modules"], one["ranks"]) == ("coreml", 21, {"4": 21})
    named = json.loads(cli("inspect", x, "--adapter", "one", "--json").stdout)
    assert named == one
    assert one["path"] == f"{x}:one"
    nobody = cli("inspect", f"{x}:nobody")
    assert nobody.exit_code == 1
    assert "one" in nobody.output


def test_validate_compares_module_by_module(world, x, cli):
    package.add(x, {"one": members(world / "plain"), "two": members(world / "patterns")})
    base = ["--base", world / "base"]
    done = cli("validate", world / "plain", f"{x}:one", *base)
    assert done.exit_code == 0, done.output
    assert "21 modules" in done.output
    assert cli("validate", world / "plain", f"{x}:two", *base).exit_code == 3
    before = adapters.snapshot(x)
    assert cli("annotate", f"{x}:one", "--name", "bot").exit_code == 1
    assert adapters.snapshot(x) == before


def test_inspect_loads_no_numpy(world):
    code = (
        "from loraduct.cli import main\n"
        f"main(['inspect', {str(world / 'x.mlpackage')!r}], standalone_mode=False)\n"
        "import sys; assert not {'numpy', 'torch', 'coremltools'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
