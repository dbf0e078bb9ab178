"""The table of devices: complete, with a source for every figure; a user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraduct.errors import Refused
from loraduct.validation import devices


def test_every_figure_has_a_source() -> None:
    table = json.loads((Path(devices._FILE)).read_text())
    for name, chip in table["chips"].items():
        assert {"bandwidth_gb_s", "gpu_tflops", "ane_tops"} <= chip.keys(), name
        for field, (value, source) in chip.items():
            assert value > 0, (name, field)
            assert source.startswith("assumed: ") or source in table["sources"], (name, field)
    used = {s for chip in table["chips"].values() for _, s in chip.values()}
    assert set(table["sources"]) <= used, "a source that nothing refers to"
    assert all("https://" in s["where"] for s in table["sources"].values())


def test_the_families_are_there() -> None:
    known = devices.built_in()
    chips = {d.chip for d in known.values()}
    assert {
        "A14 Bionic",
        "A15 Bionic",
        "A16 Bionic",
        "A17 Pro",
        "A18",
        "A18 Pro",
        "A19",
        "A19 Pro",
    } <= chips
    for n in range(1, 6):
        assert {f"M{n}", f"M{n} Pro", f"M{n} Max"} <= chips
    ids = [i for d in known.values() for i in d.identifiers]
    assert len(ids) == len(set(ids))


def test_names_that_are_found() -> None:
    known = devices.built_in()
    for name in ("iPhone 15 Pro", "iphone 15 pro", "iPhone16,1", "A17 Pro", "a17 pro"):
        assert [d.chip for d in devices.find(name, known)] == ["A17 Pro"], name
    assert devices.find("Apple M4 Max", known)[0].bandwidth == 546e9
    assert len(devices.find("all", known)) == len(known)


def test_own_names_are_found_as_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    names = ("Apple board", " X ", "iPhone16,1", "y", "Y", "")
    row = "bandwidth_gb_s = 10\ngpu_tflops = 1\nane_tops = 2\n"
    file.write_text("".join(f"[device.{json.dumps(n)}]\n{row}" for n in names))
    known = devices.built_in() | devices.own(file)
    for name in names:
        assert [d.name for d in devices.find(name, known)] == [name]
    assert [d.name for d in devices.find("apple Board", known)] == ["Apple board"]
    assert [d.chip for d in devices.find("Apple M4", known)] == ["M4"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("iPhone 15 Prp", "'iPhone 15 Pro'"), ("a17", "'A17 Pro'"), ("M4 Mx", "'M4 Max'")],
)
def test_unknown_devices_name_what_is_near(name: str, near: str) -> None:
    with pytest.raises(Refused, match="unknown device") as e:
        devices.find(name, devices.built_in())
    assert f"did you mean {near}" in str(e.value)


def test_own_devices(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[device."My board"]\nbandwidth_gb_s = 10\ngpu_tflops = 1\nane_tops = 2\n')
    (one,) = devices.own(file).values()
    assert (one.name, one.bandwidth, one.flops, one.ane_ops) == ("My board", 1e10, 1e12, 2e12)
    assert one.assumed == ["bandwidth_gb_s", "gpu_tflops", "ane_tops"]
    file.write_text(file.read_text() + 'source = "data sheet"\nmemory_gb = 4\n')
    (one,) = devices.own(file).values()
    assert (one.memory, one.assumed) == (4e9, [])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("x = [", "is not TOML"),
        ("", "holds no devices"),
        ("device = 3", "holds no devices"),
        ("[device]\nx = 3", "is not a table"),
        ("[device.all]\nx = 3", "'all': this means every device"),
        ("[device.x]\nbandwidth_gb_s = 1\ngpu_tflops = 1", "has no ane_tops"),
        ("[device.x]\nbandwidth_gb_s = 0\ngpu_tflops = 1\nane_tops = 1", "bandwidth_gb_s is 0"),
        ("[device.x]\nbandwidth_gb_s = nan\ngpu_tflops = 1\nane_tops = 1", "expected a number"),
        ("[device.x]\nbandwidth_gb_s = true\ngpu_tflops = 1\nane_tops = 1", "expected a number"),
        (
            f"[device.x]\nbandwidth_gb_s = {10**400}\ngpu_tflops = 1\nane_tops = 1",
            "expected a number",
        ),
        ("[device.x]\nbandwidth = 1", "is not known"),
        ("x = " + "[" * 100_000, "is not TOML"),
        (f"x = {'9' * 5000}", "is not TOML"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(Refused, match=r"mine\.toml") as e:
        devices.own(file)
    assert what in str(e.value)
    assert "\n" not in str(e.value)
