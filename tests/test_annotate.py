"""`annotate`: what it writes is found again, and it writes into nobody else's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

Folder = Callable[..., Path]
Cli = Callable[..., Any]


def base_of(cli: Cli, folder: Path) -> Any:
    return json.loads(cli("inspect", folder, "--json").stdout)["base"]


def test_trained_on_is_written_and_travels(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    source = peft_folder()
    before = load_file(source / "adapter_model.safetensors")
    result = cli("annotate", source, "--trained-on", "nf4", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["metadata"]["trained_on"] == "nf4"
    after = load_file(source / "adapter_model.safetensors")
    assert all(after[k].tobytes() == v.tobytes() for k, v in before.items())
    cli("convert", source, "--to", "mlx", "-o", tmp_path / "mlx")
    cli("convert", tmp_path / "mlx", "--to", "peft", "-o", tmp_path / "back")
    for folder in (source, tmp_path / "mlx", tmp_path / "back"):
        found = base_of(cli, folder)
        assert (found["quantization"], found["quantization_known"]) == ("nf4", True), folder


def test_trained_on_claims_no_conversion(peft_folder: Folder, cli: Cli) -> None:
    source = peft_folder()
    cli("annotate", source, "--trained-on", "none")
    document = json.loads(cli("inspect", source, "--json").stdout)
    assert document["origin"] is None
    assert document["traps"] == []
    assert "converted from" not in cli("inspect", source).stdout
    cli("annotate", source, "--trained-on", "")
    assert not base_of(cli, source)["quantization_known"]


def test_trained_on_keeps_the_way_back(peft_folder: Folder, cli: Cli, tmp_path: Path) -> None:
    """The record of a conversion is added to, not replaced: the way back stays exact."""
    ranks = {"self_attn.q_proj": 2}
    source = peft_folder(ranks=ranks, rank_pattern={"q_proj": 2})
    cli("convert", source, "--to", "mlx", "--trained-on", "none", "-o", tmp_path / "mlx")
    cli("annotate", tmp_path / "mlx", "--trained-on", "gptq")
    assert base_of(cli, tmp_path / "mlx")["quantization"] == "gptq"
    cli("convert", tmp_path / "mlx", "--to", "peft", "-o", tmp_path / "back")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    for key, value in load_file(source / "adapter_model.safetensors").items():
        assert back[key].tobytes() == value.tobytes(), key


def test_nothing_to_write_is_a_usage_error(peft_folder: Folder, cli: Cli) -> None:
    assert cli("annotate", peft_folder()).exit_code == 2


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_model_caches_blob_is_not_touched(
    given: str, peft_folder: Folder, cli: Cli, tmp_path: Path
) -> None:
    """A snapshot's weights are a link to a blob named by its hash, which others share."""
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "f00d", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for item in list(peft_folder().iterdir()):
        item.rename(blobs / item.name)
        (snapshot / item.name).symlink_to(Path("../../blobs") / item.name)
    before = (blobs / "adapter_model.safetensors").read_bytes()
    path = snapshot if given == "folder" else snapshot / "adapter_model.safetensors"
    result = cli("annotate", path, "--name", "x")
    assert result.exit_code == 1
    assert "copy the folder first" in result.stderr
    assert (blobs / "adapter_model.safetensors").read_bytes() == before
    assert (snapshot / "adapter_model.safetensors").is_symlink()
