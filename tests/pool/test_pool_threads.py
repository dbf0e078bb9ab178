"""Threads at awkward moments: each is held where the others meet it half-way."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
import threading
import time

import numpy as np
import pytest

from loraduct import AdapterPool
from loraduct.errors import LoraductError


class Gate:
    """Holds reading of what ``held`` names (by the adapter's folder) until it is opened."""

    def __init__(self, pool, *held):
        self.held, self.reached, self.open = held, threading.Semaphore(0), threading.Event()
        self.read, pool._runtime.read = pool._runtime.read, self

    def __call__(self, plan, weights):
        if plan.adapter.path.name in self.held:
            self.reached.release()
            assert self.open.wait(60)
        return self.read(plan, weights)

    def wait(self):
        assert self.reached.acquire(timeout=60)


def started(call, *words):
    thread = threading.Thread(target=call, args=words, daemon=True)
    thread.start()
    return thread


def ended(*threads):
    for t in threads:
        t.join(timeout=60)
    return not any(t.is_alive() for t in threads)


def close(fusing, base, model, adapter):
    wanted = fusing.unfused(base, (adapter, 1.0))
    return np.abs(fusing.logits(model) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_what_was_replaced_does_not_come_back(fusing, bases, equal, model):
    """Reading ahead of the old one, queued while the name is given to the new one."""
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("x", equal["a"])
        one = pool.resident_bytes
        pool.budget = 2 * one
        gate = Gate(pool, "d")
        pool.prefetch("z", equal["d"])
        gate.wait()  # the thread that reads ahead is busy
        second = Gate(pool, "b")
        loading = started(pool.load, "x", equal["b"])
        second.wait()
        late = pool.prefetch("x")  # still the old one
        second.open.set()
        assert ended(loading)
        pool.load("y", equal["c"])
        gate.open.set()
        late.result(timeout=60)
        assert pool.resident_bytes <= 2 * one
        pool.activate("x")
        assert close(fusing, bases("llama"), model, equal["b"])


def test_one_that_two_threads_read_is_held_once(fusing, bases, equal, model):
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("x", equal["a"])
        pool.evict("x")
        gate = Gate(pool, "a")
        switch = started(pool.activate, "x")
        gate.wait()
        ahead = pool.prefetch("x")
        gate.wait()  # both have begun
        gate.open.set()
        assert ended(switch)
        ahead.result(timeout=60)
        assert pool.loads == 2
        held = pool._entries["x"].held.updates
        (hook,) = model.model.layers[0].self_attn.q_proj._forward_hooks.values()
        assert hook.steps[0][0] is held["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_budget_holds_whatever_the_threads_do(fusing, bases, equal, model, fused):
    with AdapterPool(model, bases("llama"), fused=fused) as pool:
        pool.load("a", equal["a"])
        most = pool.budget = 2 * pool.resident_bytes
        over, odd, until = [], [], time.monotonic() + 3

        def work(seed):
            dice = random.Random(seed)
            while time.monotonic() < until:
                name = dice.choice("abcd")
                path = equal[name]
                try:
                    dice.choice([
                        lambda n=name, p=path: pool.prefetch(n, p),
                        lambda n=name: pool.evict(n),
                        lambda n=name, p=path: pool.load(n, p),
                        lambda n=name: pool.activate(n),
                    ])()  # fmt: skip
                except LoraductError as e:
                    if not any(w in str(e) for w in ("in use", "is active", "is no adapter")):
                        odd.append(e)
                if pool.resident_bytes > most:
                    over.append(pool.resident_bytes)

        usual = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            assert ended(*[started(work, i) for i in range(4)])
        finally:
            sys.setswitchinterval(usual)
        assert not over
        assert not odd


@pytest.mark.parametrize("way", ["call", "forward"])
def test_ctrl_c_gives_the_turn_back(fusing, bases, equal, model, way):
    def ctrl_c(*_):
        raise KeyboardInterrupt

    with AdapterPool(model, bases("llama")) as pool:
        pool.load("a", equal["a"])
        hook = model.model.layers[0].register_forward_hook(ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            (model if way == "call" else model.forward)(fusing.IDS)
        hook.remove()
        assert ended(started(pool.activate, "a"))


def test_the_model_is_as_it_was_and_a_copy_stands_alone(fusing, bases, equal, model):
    """What generate asks of `forward` is there; and a forward that another library put there stays."""
    before = inspect.signature(model.forward)
    with AdapterPool(model, bases("llama")) as pool:
        assert inspect.signature(model.forward) == before
        twin = copy.deepcopy(model)
        plain = fusing.logits(twin)
        pool.load("a", equal["a"])
        pool.activate("a")
        assert np.array_equal(fusing.logits(twin), plain)
        assert not np.array_equal(fusing.logits(model), plain)
        with pytest.raises(LoraductError, match="or a copy of one that is"):
            AdapterPool(twin, bases("llama"))
    assert not {"forward", "_loraduct_pool"} & vars(model).keys()
    calls = []
    model.forward = own = lambda *a, **k: (calls.append(1), type(model).forward(model, *a, **k))[1]
    with AdapterPool(model, bases("llama")):
        assert np.array_equal(fusing.logits(model), plain)
    assert model.forward is own
    assert calls == [1]


def test_a_second_pool_is_refused_while_the_first_is_open(bases, model):
    with AdapterPool(model, bases("llama"), fused=True):
        for fused in (False, True):
            with pytest.raises(LoraductError, match="is in a pool already") as caught:
                AdapterPool(model, bases("llama"), fused=fused)
            assert "\n" not in str(caught.value)
    AdapterPool(model, bases("llama")).close()


def test_streaming_takes_its_turn_in_its_own_thread(fusing, bases, equal, model):
    """As docs/pool.md says; tokens are those of PEFT's model."""
    from peft import PeftModel
    from transformers.generation.streamers import BaseStreamer

    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    stock = PeftModel.from_pretrained(fusing.loaded(bases("llama")), equal["a"])
    wanted = stock.generate(input_ids=fusing.IDS, **given)[0, -5:].tolist()

    class Streamer(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.reshape(-1).tolist()

        def end(self):
            pass

    with AdapterPool(model, bases("llama")) as pool:
        pool.load("a", equal["a"])
        streamer = Streamer()

        def run():
            with pool.using("a") as live:
                live.generate(fusing.IDS, streamer=streamer, **given)

        assert ended(started(run))
    assert streamer.tokens[-5:] == wanted


def test_waiting_for_a_pool_that_is_closed(bases, equal, model):
    pool = AdapterPool(model, bases("llama"))
    gate, said = Gate(pool, "a"), []
    first = pool.prefetch("x", equal["a"])
    gate.wait()
    pool.prefetch("y", equal["b"])

    def load():
        try:
            pool.load("y", equal["b"])
        except BaseException as e:
            said.append(e)

    waiting = started(load)
    closing = started(pool.close)
    deadline = time.monotonic() + 60
    while not pool._closed and time.monotonic() < deadline:
        time.sleep(0.01)
    gate.open.set()
    assert ended(waiting, closing)
    (error,) = said
    assert isinstance(error, LoraductError)
    assert "the pool is closed" in str(error)
    with pytest.raises(LoraductError, match="the pool is closed"):
        first.result()
    with pytest.raises(LoraductError, match="the pool is closed"):
        pool.prefetch("x", equal["a"])


def test_what_only_hinders_reading_ahead_does_not_hinder_a_switch(
    fusing, bases, equal, model, tmp_path
):
    """Budget of one: a swap has the room that reading ahead hasn't; for a new name as for an old."""
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("x", equal["a"])
        pool.budget = pool.resident_bytes
        pool.load("y", equal["b"])
        pool.activate("x")
        for name, path in (("y", None), ("z", equal["c"])):
            with pytest.raises(LoraductError, match="is in use"):
                pool.prefetch(name, path).result(timeout=60)
            assert pool.active == (("x", 1.0),)
            with pool.using(name):
                assert close(fusing, bases("llama"), model, equal["b" if path is None else "c"])
        # a name that is known and whose file is back
        pool.deactivate()
        equal["b"].rename(tmp_path / "away")
        try:
            with pytest.raises(LoraductError, match="does not exist"):
                pool.prefetch("y").result(timeout=60)
        finally:
            (tmp_path / "away").rename(equal["b"])
        pool.activate("y")


def test_a_load_is_not_told_what_went_wrong_ahead_of_it(bases, equal, model, tmp_path):
    with AdapterPool(model, bases("llama")) as pool:
        with contextlib.suppress(LoraductError):
            pool.prefetch("x", tmp_path / "none").result(timeout=60)
        pool.load("x", equal["a"])
        pool.activate("x")


def test_reading_ahead_from_another_path_replaces(fusing, bases, equal, model):
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("x", equal["a"])
        pool.prefetch("x", equal["a"]).result(timeout=60)
        assert pool.loads == 1  # the same: nothing to read
        pool.prefetch("x", equal["b"]).result(timeout=60)
        pool.activate("x")
        assert close(fusing, bases("llama"), model, equal["b"])
        with pytest.raises(LoraductError, match="is active: deactivate it before it is replaced"):
            pool.prefetch("x", equal["c"])
        pool.prefetch("x", equal["b"]).result(timeout=60)
        pool.deactivate()
        gate = Gate(pool, "c")
        first = pool.prefetch("x", equal["c"])
        gate.wait()
        assert pool.prefetch("x") is pool.prefetch("x", equal["c"]) is first
        pool.prefetch("x", equal["d"])  # the last one counts
        gate.open.set()
        pool.activate("x")
        assert close(fusing, bases("llama"), model, equal["d"])
