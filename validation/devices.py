"""The table of devices that latency is forecast for: ``core/devices.json``, and a user's own TOML.

A figure is a value with its source: the key of a page in ``sources`` (``read`` says whether we
opened that page, or took the figure from what quotes it), or a text that begins with ``assumed``.
A user's file has a table a device::

    [device."My board"]
    bandwidth_gb_s = 51.2   # of memory
    gpu_tflops = 2.1        # half precision
    ane_tops = 35           # as its maker counts them
    memory_gb = 8           # optional, as is ane_gb_s: what its Neural Engine can read
    source = "the maker's data sheet"
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import loraduct
from loraduct.errors import Refused
from loraduct.files import read_bytes
from loraduct.text import printable, several

SCHEMA = 1
_FILE = Path(loraduct.__file__).with_name("devices.json")
_NEEDED = ("bandwidth_gb_s", "gpu_tflops", "ane_tops")
_KNOWN = (*_NEEDED, "ane_gb_s", "memory_gb")
_LIMIT = 1 << 20  # bytes of a user's file


@dataclass(frozen=True)
class Device:
    """What a forecast needs to know of a device.

    ``bandwidth``: bytes a second of memory; ``flops``: of the GPU, half precision, a second;
    ``ane_ops``: of the Neural Engine, as its maker counts them, a second; ``ane_bandwidth``: bytes
    a second that the Neural Engine reads (None: not known, a share of ``bandwidth``); ``memory``:
    bytes of RAM, None where it differs by model. ``sources``: field -> where its figure is from.
    """

    name: str
    chip: str
    bandwidth: float
    flops: float
    ane_ops: float
    ane_bandwidth: float | None = None
    memory: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    identifiers: tuple[str, ...] = ()

    @property
    def assumed(self) -> list[str]:
        """The fields whose figure has no source."""
        return [f for f, s in self.sources.items() if s.startswith("assumed")]


def is_positive(value: object) -> bool:
    """Whether it is a number above 0 that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18


def built_in() -> dict[str, Device]:
    """Name -> device, as shipped."""
    table = json.loads(_FILE.read_text(encoding="utf-8"))
    pages = {
        k: s["where"] + ("" if s["read"] else " (quoted)") for k, s in table["sources"].items()
    }
    found = {}
    for name, row in table["devices"].items():
        figures = dict(table["chips"][row["chip"]])
        if "memory_gb" in row:
            figures["memory_gb"] = row["memory_gb"]
        values = {k: float(v) for k, (v, _) in figures.items()}
        sources = {k: pages.get(s, s) for k, (_, s) in figures.items()}
        found[name] = _made(name, row["chip"], values, sources, tuple(row.get("identifiers", ())))
    return found


def own(file: Path) -> dict[str, Device]:
    """The devices of a user's TOML. Raises Refused naming the device and the field."""
    try:
        table = tomllib.loads(read_bytes(file, _LIMIT).decode())
    except (ValueError, RecursionError) as e:
        raise Refused(file, f"is not TOML: {printable(str(e), 200)}") from None
    rows = table.get("device")
    if not isinstance(rows, dict) or not rows:
        raise Refused(file, 'holds no devices; expected tables [device."NAME"]')
    if "all" in rows:
        raise Refused(file, "device 'all': this means every device; give it another name")
    found = {}
    for name, row in rows.items():
        where = f"device {printable(name, 80)!r}"
        if not isinstance(row, dict):
            raise Refused(file, f"{where} is not a table")
        if strange := sorted(row.keys() - {*_KNOWN, "source", "chip"}):
            raise Refused(
                file, f"{where}: {several(strange)} is not known; known: {several(_KNOWN, 9)}"
            )
        if missing := [k for k in _NEEDED if k not in row]:
            raise Refused(file, f"{where} has no {missing[0]}")
        values = {}
        for key in _KNOWN:
            if key not in row:
                continue
            value = row[key]
            if not is_positive(value):
                raise Refused(
                    file,
                    f"{where}: {key} is {printable(repr(value), 40)}, expected a number above 0",
                )
            values[key] = float(value)
        source = str(row.get("source", "assumed: no source given"))
        sources = dict.fromkeys(values, source)
        found[name] = _made(name, str(row.get("chip", name)), values, sources, ())
    return found


def _made(
    name: str,
    chip: str,
    values: Mapping[str, float],
    sources: Mapping[str, str],
    identifiers: tuple[str, ...],
) -> Device:
    ane, memory = values.get("ane_gb_s"), values.get("memory_gb")
    return Device(
        name,
        chip,
        values["bandwidth_gb_s"] * 1e9,
        values["gpu_tflops"] * 1e12,
        values["ane_tops"] * 1e12,
        None if ane is None else ane * 1e9,
        None if memory is None else memory * 1e9,
        sources,
        identifiers,
    )


def find(name: str, known: Mapping[str, Device]) -> list[Device]:
    """The devices meant by ``name``: a device, a phone's identifier, a chip, or ``all``.

    The name as it stands comes first: people name their own devices as they like. Raises Refused
    with near names for one that is not known.
    """
    if name == "all":
        return list(known.values())
    if name in known:
        return [known[name]]
    plain = {n.casefold(): d for n, d in known.items()}
    plain |= {i.casefold(): d for d in known.values() for i in d.identifiers}
    wanted = name.casefold().removeprefix("apple ").strip()
    for one in (name.casefold(), wanted):
        if one in plain:
            return [plain[one]]
        if chips := [d for d in known.values() if d.chip.casefold() == one]:
            return [chips[-1]]
    names = list(dict.fromkeys([*known, *(d.chip for d in known.values())]))
    begins = [n.casefold() for n in names if wanted and n.casefold().startswith(wanted)][:3]
    near = begins or difflib.get_close_matches(wanted, [n.casefold() for n in names], 3, 0.5)
    shown = [next(n for n in names if n.casefold() == w) for w in near]
    hint = f"did you mean {' or '.join(map(repr, shown))}?" if shown else "say all to see them;"
    raise Refused(
        None, f"unknown device {printable(name, 80)!r}: {hint} own devices go into --devices FILE"
    )
