"""``--suite swap``: passes for the pool, and fails, by name, for pools that do each thing wrong."""

from __future__ import annotations

import pytest

from loraduct import AdapterPool, formats
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats.options import ReadOptions
from loraduct.validation import suites, swap


class Runs:
    """Tokens of one prompt."""

    ids = ([5, 17, 3, 44, 60, 9],)

    @staticmethod
    def progress(what):
        assert what


def context(base, *paths, pool=AdapterPool, **more):
    model = base_folder.read(base)
    first = formats.read(paths[0], ReadOptions(restore=False, base=model))
    return suites.Context(
        (first,), model, Runs(), beside=tuple(paths[1:]), options={"pool": pool} if pool else {}, **more
    )  # fmt: skip


class Leaves(AdapterPool):
    """Forgets to take the last adapter out."""

    def close(self):
        self._runtime.show = lambda stack: None
        super().close()


class Mixes(AdapterPool):
    """Applies every stack in full weight."""

    def activate(self, *wanted):
        super().activate(*wanted)
        found = [(self._entries[n].held, abs(w)) for n, w in self.active]
        self._runtime.show(found)


class Hoards(AdapterPool):
    """Takes a budget for a wish."""

    def _make_room(self, name, nbytes):
        pass


def failed(found):
    return {c.name for c in found.checks if c.status == "failed"}


@pytest.mark.parametrize("names", [("one",), ("one", "dora"), ("one", "two", "norms", "tokens")])
def test_passes(bases, adapters, names):
    found = swap.run(context(bases("llama"), *(adapters[n] for n in names)))
    assert found.status == "passed", found
    numbers = found.numbers
    assert numbers["errors"] == 0
    assert sum(numbers["done"].values()) == numbers["steps"] == 200
    assert numbers["resident_bytes"] <= numbers["budget_bytes"]
    assert numbers["evictions"] > 10
    assert numbers["stock_states"] >= 3
    assert numbers["largest_difference"] <= numbers["bound"]


def test_mlx(cli, bases, adapters, tmp_path):
    pytest.importorskip("mlx_lm")
    done = cli(
        "convert", adapters["one"], "--to", "mlx", "--base", bases("llama"), "-o", tmp_path / "m"
    )
    assert done.exit_code == 0, done.stderr
    found = swap.run(context(bases("llama"), tmp_path / "m", adapters["two"]))
    assert found.status == "passed", found
    assert found.numbers["backend"] == "mlx"


@pytest.mark.parametrize(
    ("pool", "what"), [(Leaves, "base"), (Mixes, "outputs"), (Hoards, "budget")]
)
def test_faults_are_named(bases, adapters, pool, what):
    found = swap.run(
        context(bases("llama"), adapters["one"], adapters["norms"], adapters["two"], pool=pool)
    )
    assert found.status == "failed"
    assert what in failed(found)


def test_without_a_pool(bases, adapters):
    with pytest.raises(suites.CannotRun, match="no pool"):
        swap.run(context(bases("llama"), adapters["one"], pool=None))


def test_every_step_is_compared(bases, adapters):
    """A pool that is wrong only after an eviction, in a state that did not change."""

    class Shakes(AdapterPool):
        def evict(self, name):
            super().evict(name)
            if self.active:
                found = [(self._entries[n].held, 1.01 * w) for n, w in self.active]
                self._runtime.show(found)

    found = swap.run(
        context(bases("llama"), adapters["one"], adapters["two"], adapters["norms"], pool=Shakes)
    )
    assert found.numbers["compared"] == 200
    (check,) = (c for c in found.checks if c.name == "outputs")
    assert check.status == "failed"
    assert "(evict): logits are off by" in check.detail


def test_what_no_pool_takes_is_skipped_and_named(bases, adapters):
    class Picky(AdapterPool):
        def load(self, name, path, options=None):
            raise Refused(path, "is not to my taste")

    with pytest.raises(suites.CannotRun, match="is not to my taste"):
        swap.run(context(bases("llama"), adapters["one"], pool=Picky))


def test_a_base_without_weights_is_skipped(bases, adapters, tmp_path):
    (tmp_path / "config.json").write_text((bases("llama") / "config.json").read_text())
    with pytest.raises(suites.CannotRun, match="no weights"):
        swap.run(context(tmp_path, adapters["one"]))


@pytest.mark.usefixtures("every_suite")
def test_all_suites_run_unless_some_are_asked_for(cli, bases, adapters):
    import json

    done = cli("validate", adapters["one"], "--base", bases("llama"), "--json")
    assert done.exit_code == 0, done.output
    found = {s["name"]: s for s in json.loads(done.stdout)["suites"]}
    skipped = {n: s["reason"] for n, s in found.items() if s["status"] != "passed"}
    assert skipped.keys() == {"parity", "quality"}
    assert "one adapter" in skipped["parity"]
    assert "--text FILE" in skipped["quality"]
    assert found["swap"]["numbers"]["compared"] == 200
    assert found["latency"]["numbers"]["tokens_per_second"] > 0


def test_command(cli, bases, adapters):
    import json

    done = cli(
        "validate", adapters["one"], "--base", bases("llama"), "--suite", "swap",
        "--beside", adapters["two"], "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["passed"]
