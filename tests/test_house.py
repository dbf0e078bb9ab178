"""The rules of the house: which way imports point, what is packaged, what importing costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDERS = {
    "loraduct": "core",
    "loraduct.formats": "formats",
    "loraduct.converters": "converters",
    "loraduct.validation": "validation",
}
# who may import whom; core's own modules are everybody's, its cli is nobody's
ALLOWED = {
    "core": {"core"},
    "formats": {"core", "formats"},
    "converters": {"core", "formats", "converters"},
    "validation": {"core", "formats", "validation"},
    "cli": {"core", "formats", "converters", "validation", "cli"},
}
HEAVY = ("torch", "mlx", "coremltools", "onnx", "transformers", "rich", "safetensors", "peft")


def layer_of(module: str) -> str | None:
    """core, cli, formats, ... for a dotted module name of ours."""
    parts = module.split(".")
    if parts[0] != "loraduct":
        return None
    if len(parts) > 1 and parts[1] in ("formats", "converters", "validation", "cli"):
        return parts[1]
    return "core"


def imports_of(file: Path) -> set[str]:
    """Every module of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return {m for m in found if m.startswith("loraduct")}


def test_arrows_point_one_way(repo: Path) -> None:
    seen = 0
    for folder in FOLDERS.values():
        for file in (repo / folder).rglob("*.py"):
            inner = file.relative_to(repo).parts
            if inner[:2] == ("core", "__main__.py"):
                continue
            layer = "cli" if inner[:2] == ("core", "cli") else folder
            targets = {t for m in imports_of(file) if (t := layer_of(m))}
            assert targets <= ALLOWED[layer], f"{file} imports from {targets - ALLOWED[layer]}"
            seen += 1
    assert seen > 30


def test_every_folder_with_code_is_packaged(repo: Path) -> None:
    listed = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for package, folder in FOLDERS.items():
        for file in (repo / folder).rglob("*.py"):
            inner = file.parent.relative_to(repo / folder).parts
            found.add(".".join((package, *inner)))
    assert found == set(listed)


def test_no_stray_packages_at_the_root(repo: Path) -> None:
    assert not (repo / "__init__.py").exists()
    assert not (repo / "conftest.py").exists()


def loaded_by(code: str) -> set[str]:
    """Top-level modules loaded by a snippet in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {m.split(".")[0] for m in json.loads(done.stdout.rsplit("\n", 2)[-2])}


def test_importing_loads_nothing_heavy() -> None:
    assert not loaded_by("import loraduct") & {*HEAVY, "numpy", "click"}


@pytest.mark.parametrize(
    ("flags", "numpy"), [([], False), (["--json"], False), (["--stats"], True)]
)
def test_inspect_loads_nothing_heavy(
    peft_folder: Callable[..., Path], flags: list[str], numpy: bool
) -> None:
    args = ["inspect", str(peft_folder()), *flags]
    code = f"from loraduct.cli import main\nmain({args!r}, standalone_mode=False)"
    loaded = loaded_by(code)
    assert not loaded & set(HEAVY)
    assert ("numpy" in loaded) == numpy


@pytest.mark.heavy
def test_wheel_works_in_an_empty_environment(
    repo: Path, tmp_path: Path, peft_folder: Callable[..., Path]
) -> None:
    """Build the wheel, install it where nothing else is, and run the verbs that need no extra."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", tmp_path, repo],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"loraduct"}
    for data in ("loraduct/architectures.json", "loraduct/py.typed"):
        assert data in names
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", repo / "constraints.txt", wheel], check=True
    )
    source, target = peft_folder(), tmp_path / "out"
    for args in (
        ["inspect", source],
        ["convert", source, "--to", "mlx", "-o", target],
        ["inspect", target, "--stats", "--json"],
        ["formats"],
    ):
        done = subprocess.run(
            [python.with_name("loraduct"), *args], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr


def test_repo_speaks_of_the_product_alone(repo: Path) -> None:
    """No absolute path of a build machine slips into what is shipped."""
    for file in [*repo.glob("*.md"), *repo.glob("docs/*.md"), *(repo / "core").rglob("*.py")]:
        text = file.read_text()
        assert "/work/" not in text, file
        assert "/root/" not in text, file
