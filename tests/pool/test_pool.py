"""The pool itself: budget, order of eviction, reading ahead, threads, and what people get wrong."""

from __future__ import annotations

import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch

import loraduct
from loraduct import AdapterPool
from loraduct.errors import LoraductError, Refused


def stored(folder, fusing):
    """Bytes of all tensors as float32."""
    return sum(4 * t.numel() for t in fusing.tensors(folder).values())


def test_least_recently_used_goes_first(fusing, bases, equal, model):
    one = stored(equal["a"], fusing)
    with AdapterPool(model, bases("llama"), budget=3 * one) as pool:
        for n in "abc":
            pool.load(n, equal[n])
        assert pool.resident_bytes == 3 * one
        pool.activate("a")
        pool.activate("b")  # now c is the least recently used, then a
        pool.load("d", equal["d"])
        assert set(pool.held) == {"a", "b", "d"}
        pool.load("e", equal["e"])
        assert set(pool.held) == {"b", "d", "e"}
        assert pool.evictions == 2
        pool.activate("c")  # is read again, and b, active till now, is not what goes first
        assert "c" in pool.held
        assert pool.resident_bytes <= 3 * one
        assert pool.loads == 6
        wanted = fusing.unfused(bases("llama"), (equal["c"], 1.0))
        assert np.abs(fusing.logits(model) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_budget_of_one(fusing, bases, equal, model):
    """A swap gives up what it replaces first; a stack of two doesn't fit; nor does a byte less."""
    one = stored(equal["a"], fusing)
    with AdapterPool(model, bases("llama"), budget=one) as pool:
        pool.load("a", equal["a"])
        pool.activate("a")
        with pytest.raises(LoraductError, match=r"of the budget of .* is in use"):
            pool.load("b", equal["b"])
        assert pool.active == (("a", 1.0),)
        pool.deactivate()
        pool.load("b", equal["b"])
        for n in "abab":
            pool.activate(n)
            assert pool.held == (n,)
        with pytest.raises(LoraductError) as caught:
            pool.activate("a", "b")
        assert "\n" not in str(caught.value)
        assert pool.resident_bytes <= one
    with (
        AdapterPool(model, bases("llama"), budget=one - 1) as pool,
        pytest.raises(LoraductError, match="more than the pool's budget"),
    ):
        pool.load("a", equal["a"])


def test_reading_ahead_does_not_wait_for_a_turn(bases, equal, model):
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("a", equal["a"])
        with pool.using("a"):
            future = pool.prefetch("b", equal["b"])
            future.result(timeout=60)  # while this thread holds the model
            assert pool.held == ("a", "b")
        pool.activate("b")
        assert pool.loads == 2
        pool.evict("a")
        pool.prefetch("a").result(timeout=60)
        assert set(pool.held) == {"a", "b"}


def test_error_of_reading_ahead_reaches_who_wants_it(bases, tmp_path, model):
    with AdapterPool(model, bases("llama")) as pool:
        pool.prefetch("a", tmp_path / "none")
        with pytest.raises(LoraductError, match="does not exist"):
            pool.activate("a")
        with pytest.raises(LoraductError, match="there is no adapter 'a'"):
            pool.activate("a")


def test_threads_never_see_a_mixed_state(fusing, bases, equal, model):
    """Four threads with adapters of their own, one switching without a turn: each call of the model
    gives what one of the states gives, and within `using` what its own gives."""
    with AdapterPool(model, bases("llama"), budget=3 * stored(equal["a"], fusing)) as pool:
        states = dict.fromkeys("abc")
        for n in states:
            pool.load(n, equal[n])
            with pool.using(n):
                states[n] = fusing.logits(model)
        plain = fusing.logits(model)
        wrong = []

        def own(name):
            for _ in range(15):
                with pool.using(name):
                    for _ in range(2):
                        if not np.array_equal(fusing.logits(model), states[name]):
                            wrong.append(name)

        def any_of_them():
            for _ in range(40):
                found = fusing.logits(model)
                if not any(np.array_equal(found, s) for s in (*states.values(), plain)):
                    wrong.append("mixed")

        def switching():
            for i in range(60):
                pool.activate("abc"[i % 3])

        threads = [threading.Thread(target=own, args=n) for n in states]
        threads += [threading.Thread(target=t) for t in (any_of_them, switching)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(timeout=120)
        assert not any(t.is_alive() for t in threads)
        assert not wrong
        pool.deactivate()
        assert np.array_equal(fusing.logits(model), plain)


def test_a_call_that_fails_gives_its_turn_back(fusing, bases, equal, model):
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("a", equal["a"])
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))
        done = threading.Thread(target=pool.activate, args=("a",))
        done.start()
        done.join(timeout=30)
        assert not done.is_alive()
        with pytest.raises(RuntimeError, match="mine"), pool.using():
            raise RuntimeError("mine")
        assert pool.active == (("a", 1.0),)


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda p, _: p.activate("z"), r"there is no adapter 'z' in the pool \(it has: a\)"),
        (lambda p, _: p.evict("z"), "there is no adapter 'z'"),
        (lambda p, _: p.prefetch("z"), "there is no adapter 'z'"),
        (lambda p, _: p.activate("a", ("a", 0.5)), "is asked for twice"),
        (lambda p, _: p.activate(("a", float("nan"))), "not a number to multiply by"),
        (lambda p, _: (p.activate("a"), p.evict("a")), "is active: deactivate it"),
        (lambda p, e: (p.activate("a"), p.load("a", e["b"])), "is active: deactivate it"),
        (lambda p, _: (p.close(), p.activate("a")), "the pool is closed"),
        (lambda p, _: (p.close(), p.evict("a")), "the pool is closed"),
        (lambda p, _: AdapterPool(p._runtime.model, budget=0), "a budget of 0 bytes"),
        (
            lambda p, _: AdapterPool(p._runtime.model, budget="1GB"),
            "'1GB' bytes: expected a number",
        ),
        (lambda p, _: AdapterPool(p._runtime.model, budget=float("nan")), "of nan bytes: expected"),
        (lambda p, _: p.activate(5), r"5 is no adapter .* expected a name, or \(name, weight\)"),
        (lambda p, _: p.activate(("a",)), r"\('a',\) is no adapter .* expected a name"),
        (lambda p, _: p.activate(("a", "b")), r"\('a', 'b'\) is no adapter .* expected a name"),
        (lambda p, _: p.activate((5, 1.0)), "expected a name"),
        (lambda p, e: p.load(3, e["a"]), "3 is no name of an adapter: expected a string"),
        (lambda p, e: p.prefetch(["a"], e["a"]), r"\['a'\] is no name of an adapter"),
        (lambda p, _: p.evict({}), "is no name of an adapter"),
        (lambda p, _: AdapterPool(object(), p.base), "neither a torch nor an mlx model"),
        (lambda p, _: AdapterPool(torch.nn.Linear(2, 2)), "give base=FOLDER"),
    ],
)
def test_mistakes_get_one_line(bases, equal, model, act, what):
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("a", equal["a"])
        with pytest.raises(LoraductError, match=what) as caught:
            act(pool, equal)
        assert "\n" not in str(caught.value)


def test_a_file_that_changed_is_not_taken_for_the_old_one(fusing, bases, equal, model, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(equal["a"], folder)
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("a", folder)
        pool.evict("a")
        fusing.trained(bases("llama"), folder, 99, target_modules=["q_proj", "v_proj"])
        with pytest.raises(Refused, match="was changed since"):
            pool.activate("a")
        assert pool.active == ()
        pool.load("a", folder)
        pool.activate("a")


def alpha(folder):
    """Changes what the config says, and no byte of the weights."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 60}))


def touched(name):
    def change(folder):
        file = folder / name
        when = file.stat().st_mtime_ns + 10**9
        os.utime(file, ns=(when, when))

    return change


@pytest.mark.parametrize(
    ("form", "change", "what"),
    [
        ("folder", alpha, "adapter_config.json"),
        ("shards", touched("two.safetensors"), "two.safetensors"),
        ("shards", touched("adapter_model.safetensors.index.json"), "index.json"),
        ("shards", lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
        ("package", touched("Manifest.json"), "Manifest.json"),
        ("package", touched("Data/com.apple.CoreML/model.mlmodel"), "model.mlmodel"),
        ("package", touched("Data/com.apple.CoreML/weights/weight.bin"), "weight.bin"),
    ],
)
def test_every_file_that_says_what_it_is_counts(
    cli, fusing, bases, equal, model, tmp_path, form, change, what
):
    from safetensors.torch import save_file

    folder = path = tmp_path / "p.mlpackage"
    if form == "package":
        words = ["--base", bases("llama"), "-a", f"one={equal['a']}", "--context", "40", "-o"]
        done = cli("package", *words, folder)
        assert done.exit_code == 0, done.stderr
        path = f"{folder}:one"
    else:
        shutil.copytree(equal["a"], folder)
    if form == "shards":
        tensors = fusing.tensors(folder)
        (folder / "adapter_model.safetensors").unlink()
        files = {n: f"{('one', 'two')[i % 2]}.safetensors" for i, n in enumerate(tensors)}
        for file in set(files.values()):
            save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
        index = json.dumps({"metadata": {}, "weight_map": files})
        (folder / "adapter_model.safetensors.index.json").write_text(index)
    with AdapterPool(model, bases("llama")) as pool:
        pool.load("a", path)
        for _ in range(2):
            pool.evict("a")
            pool.activate("a")  # nothing changed
            pool.deactivate()
        pool.evict("a")
        change(folder)
        with pytest.raises(LoraductError, match=what) as caught:
            pool.activate("a")
        assert "\n" not in str(caught.value)
        assert pool.active == ()


def test_values_that_are_no_numbers_are_refused(fusing, bases, equal, model, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(equal["a"], tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    held = load_file(file)
    next(iter(held.values()))[0, 0] = float("nan")
    save_file(held, file, {"format": "pt"})
    with AdapterPool(model, bases("llama")) as pool:
        with pytest.raises(Refused, match="NaN"):
            pool.load("a", tmp_path / "a")
        assert pool.names == ()


def test_close_twice_and_threads_end(bases, equal, model):
    pool = AdapterPool(model, bases("llama"))
    pool.prefetch("a", equal["a"]).result()
    ours = [t for t in threading.enumerate() if t.name.startswith("loraduct-prefetch")]
    assert ours
    pool.close()
    pool.close()
    assert not any(t.is_alive() for t in ours)


def test_offered_by_the_package():
    assert loraduct.AdapterPool is AdapterPool
    with pytest.raises(AttributeError, match="no attribute 'Pool'"):
        loraduct.Pool  # noqa: B018
