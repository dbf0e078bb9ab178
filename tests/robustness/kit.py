"""What the robustness tests are made of: small adapters built by hand, and a watched run of the CLI.

The adapters are plain bytes (struct, json, numpy), so that a broken file is broken on purpose and
never by a library; the CLI is a black box whose every outcome must satisfy the same few rules.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

Entry = tuple[str, tuple[int, ...], bytes]

RANK, WIDTH, HEIGHTS = 4, 12, {"q_proj": 20, "v_proj": 8}
WEIGHTS = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
TIME_LIMIT = 5.0
LONGEST_LINE = 2000
# C0 (but the newline), DEL, C1, line separators and the marks that turn text around
RAW_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class Hang(BaseException):
    """Raised inside a run that takes too long; no handler of `Exception` swallows it."""


def encode(array: np.ndarray, dtype: str = "F32") -> Entry:
    """An array as the safetensors entry it would be in that dtype (BF16 by truncation)."""
    array = np.asarray(array, dtype=np.float32)
    if dtype == "BF16":
        raw = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        raw = array.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()
    return dtype, array.shape, raw


def pack(tensors: dict[str, Entry], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file with these tensors in this order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, raw) in tensors.items():
        end = position + len(raw)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(raw for _, _, raw in tensors.values())


@dataclass
class Folder:
    """An adapter folder under construction: change `tensors` and `config`, then `save()`."""

    kind: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Entry] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """The weights file of this kind of folder."""
        return self.path / WEIGHTS[self.kind]

    @property
    def config_path(self) -> Path:
        """The config file, which has the same name in both kinds."""
        return self.path / "adapter_config.json"

    @property
    def target(self) -> str:
        """The other format."""
        return "mlx" if self.kind == "peft" else "peft"

    def name(self, part: str = "A", layer: int = 0, proj: str = "q_proj") -> str:
        """The name of one tensor; `part` is A, B or m (the DoRA magnitude)."""
        module = f"model.layers.{layer}.self_attn.{proj}"
        if self.kind == "mlx":
            return f"{module}.m" if part == "m" else f"{module}.lora_{part.lower()}"
        if part == "m":
            return f"base_model.model.{module}.lora_magnitude_vector"
        return f"base_model.model.{module}.lora_{part}.weight"

    def set(self, name: str, array: np.ndarray, dtype: str = "F32") -> None:
        """Add or replace a tensor."""
        self.tensors[name] = encode(array, dtype)

    def factor(self, part: str, rank: int, size: int) -> np.ndarray:
        """Values for an A or B of this rank in the orientation of this kind."""
        shape = (rank, size) if part == "A" else (size, rank)
        values = np.linspace(-0.5, 0.5, rank * size, dtype=np.float32).reshape(shape)
        return values.T.copy() if self.kind == "mlx" else values

    def save(self) -> Folder:
        """Write both files."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.weights.write_bytes(pack(self.tensors, {"format": self.kind.replace("peft", "pt")}))
        self.config_path.write_text(json.dumps(self.config, indent=2))
        return self


def peft_config(dora: bool) -> dict[str, Any]:
    """The fields PEFT writes that matter here."""
    return {
        "base_model_name_or_path": "example/tiny", "bias": "none", "exclude_modules": None,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "lora_alpha": 8, "lora_dropout": 0.0,
        "modules_to_save": None, "peft_type": "LORA", "r": RANK, "rank_pattern": {},
        "alpha_pattern": {}, "target_modules": sorted(HEIGHTS), "task_type": "CAUSAL_LM",
        "use_dora": dora, "use_rslora": False,
    }  # fmt: skip


def mlx_config(dora: bool) -> dict[str, Any]:
    """The fields mlx-lm reads on loading, and the name of the base."""
    keys = [f"self_attn.{proj}" for proj in sorted(HEIGHTS)]
    return {
        "fine_tune_type": "dora" if dora else "lora", "model": "example/tiny", "num_layers": 2,
        "lora_parameters": {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": keys},
    }  # fmt: skip


def build(kind: str, path: Path, dora: bool = False, dtype: str = "F32") -> Folder:
    """A valid two-layer adapter with non-square factors, not yet saved."""
    folder = Folder(kind, path, (peft_config if kind == "peft" else mlx_config)(dora))
    for layer in range(2):
        for proj, height in HEIGHTS.items():
            folder.set(folder.name("A", layer, proj), folder.factor("A", RANK, WIDTH), dtype)
            folder.set(folder.name("B", layer, proj), folder.factor("B", RANK, height), dtype)
            if dora:
                folder.set(folder.name("m", layer, proj), np.linspace(1, 2, height), dtype)
    return folder


@dataclass(frozen=True)
class Outcome:
    """What one run of the CLI did, whether in this process or in another."""

    code: int
    stdout: str
    stderr: str
    seconds: float = 0.0
    crash: str = ""

    def tidy(self) -> Outcome:
        """The rules every run obeys: known exit code, no traceback, nothing raw to the terminal."""
        assert not self.crash, f"crashed: {self.crash}"
        assert "Traceback" not in self.stderr + self.stdout, self.stderr[-3000:]
        assert self.code in (0, 1, 2, 3), (self.code, self.stderr[-500:])
        assert self.seconds < TIME_LIMIT, f"took {self.seconds:.1f} s"
        found = RAW_CONTROL.search(self.stdout + self.stderr)
        assert not found, f"raw control character {found!r}"
        return self

    def error_line(self) -> str:
        """The one `error: ` line, which is the last thing on stderr."""
        lines = self.stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, f"stderr: {self.stderr[:2000]!r}"
        assert lines[-1] == errors[0], f"stderr: {self.stderr[:2000]!r}"
        strays = [line for line in lines[:-1] if not line.startswith(("note: ", "warning: "))]
        assert not strays, f"stray lines on stderr: {strays[:3]}"
        assert len(errors[0]) <= LONGEST_LINE, f"an error line of {len(errors[0])} characters"
        return errors[0]

    def refused(self, *names: str) -> None:
        """Exit 1 and one line in which each pattern (a regex, any case) is found."""
        self.tidy()
        assert self.code == 1, f"exit {self.code}: {self.stdout[:300]!r} {self.stderr[:500]!r}"
        line = self.error_line()
        missing = [name for name in names if not re.search(name, line, re.IGNORECASE)]
        assert not missing, f"not named: {missing} in {line!r}"

    def one_document(self) -> Any:
        """With --json: stdout is empty or one strict JSON document."""
        if not self.stdout.strip():
            return None
        return json.loads(self.stdout, parse_constant=lambda text: pytest.fail(f"{text} in JSON"))


def watched(action: Callable[[], Any], limit: float) -> Any:
    """Run the action and raise Hang in it after `limit` seconds.

    A timer thread sends SIGUSR1: it reaches a blocked open() and a running regex, and leaves
    SIGALRM to the program under test.
    """

    def stop(signum: int, frame: object) -> None:
        raise Hang

    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Timer(limit, signal.pthread_kill, (main, signal.SIGUSR1))
    timer.start()
    try:
        return action()
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def run_here(*args: str | Path) -> Outcome:
    """Run the CLI in this process."""
    from loraduct.cli import main

    words = [str(arg) for arg in args]
    started = time.monotonic()
    try:
        result = watched(lambda: CliRunner().invoke(main, words), 2 * TIME_LIMIT)
    except Hang:
        return Outcome(-1, "", "", 0.0, f"still running after {2 * TIME_LIMIT:.0f} s")
    seconds = time.monotonic() - started
    exception = result.exception
    crash = "" if exception is None or isinstance(exception, SystemExit) else repr(exception)[:500]
    return Outcome(result.exit_code, result.stdout, result.stderr, seconds, crash)


def run_there(*args: str | Path, env: dict[str, str] | None = None, limit: float = 60) -> Outcome:
    """Run the CLI as a process of its own."""
    words = [sys.executable, "-m", "loraduct", *map(str, args)]
    started = time.monotonic()
    done = subprocess.run(
        words, capture_output=True, env={**os.environ, **(env or {})}, timeout=limit, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = time.monotonic() - started
    text = [part.decode("utf-8", "backslashreplace") for part in (done.stdout, done.stderr)]
    return Outcome(done.returncode, text[0], text[1], seconds)


def snapshot(path: Path) -> dict[str, bytes] | None:
    """The bytes of every file in a folder by relative name, or None where there is no folder."""
    if not path.is_dir():
        return None
    files = (item for item in sorted(path.rglob("*")) if item.is_file())
    return {str(item.relative_to(path)): item.read_bytes() for item in files}


def convert_refused(folder: Folder, *names: str, options: tuple[str, ...] = ()) -> None:
    """Convert to the other format: refused by name, and nothing is left where OUT was to be."""
    room = folder.path.parent / "room"
    room.mkdir(exist_ok=True)
    beside = {item.name for item in folder.path.parent.iterdir()}
    run_here(
        "convert", folder.path, "--to", folder.target, "-o", room / "out", *options
    ).refused(*names)  # fmt: skip
    left = [item.name for item in room.iterdir()]
    assert not left, f"left beside OUT: {left}"
    assert {item.name for item in folder.path.parent.iterdir()} == beside


def refuse_everywhere(folder: Folder, *names: str, inspect: str = "refuse") -> None:
    """Both verbs refuse the folder; with inspect="any", inspect may also describe it."""
    for options in ((), ("--json",)):
        outcome = run_here("inspect", folder.path, *options).tidy()
        if inspect == "refuse" or outcome.code != 0:
            outcome.refused(*names)
        if options:
            outcome.one_document()
    convert_refused(folder, *names)


@dataclass(frozen=True)
class Kit:
    """The helpers above, handed to the test files, which cannot import from each other."""

    build: Callable[..., Folder] = build
    pack: Callable[..., bytes] = pack
    encode: Callable[..., Entry] = encode
    run: Callable[..., Outcome] = run_here
    run_process: Callable[..., Outcome] = run_there
    snapshot: Callable[[Path], dict[str, bytes] | None] = snapshot
    convert_refused: Callable[..., None] = convert_refused
    refuse_everywhere: Callable[..., None] = refuse_everywhere
