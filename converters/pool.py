"""Adapters on the fly: many adapters in memory beside one live model, any of them active at once.

``loraduct.AdapterPool`` holds adapters of every format that loraduct reads within a byte budget,
drops the least recently used, and switches a transformers or mlx-lm model between them. Two locks:
one is held while the model computes or is switched (`using`, and on torch every call of the model),
the other for the moments in which the pool's own state changes, so that reading ahead never waits
for a generation. docs/pool.md says what is guaranteed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraduct import formats
from loraduct.converters import pool_given
from loraduct.converters.neutral import neutral
from loraduct.converters.pool_given import PoolError, Stamps, Wanted
from loraduct.converters.pool_parts import Held, Plan, check_stack
from loraduct.errors import LoraductError
from loraduct.formats.base import Base
from loraduct.formats.options import ReadOptions
from loraduct.text import printable, several, size

__all__ = ["AdapterPool", "PoolError"]


class _NoRoom(PoolError):
    """The budget has no room for it, at least not now."""


@dataclass(eq=False)
class _Entry:
    path: Path
    options: ReadOptions
    held: Held | None = None
    stamps: Stamps | None = None  # of its files, when they were read first
    known: bool = False  # by its name: one that no longer has its place was replaced


class AdapterPool:
    """Adapters beside one live model.

    ``model``: transformers' on torch or mlx-lm's, as it was loaded, without adapters in it; it must
    not be moved, cast or wrapped while the pool is open. ``base``: its folder (default: where
    transformers loaded it from), by which adapters are checked. ``budget``: bytes of adapters in
    memory (None: no limit). ``fused``: put adapters into the weights instead of beside them.
    Raises Refused for a folder that is no base, PoolError for a model of another kind, or one that
    is in a pool already.
    """

    def __init__(
        self,
        model: Any,
        base: str | Path | Base | None = None,
        *,
        budget: int | None = None,
        fused: bool = False,
    ) -> None:
        pool_given.check_budget(budget)
        self.base = pool_given.base_of(model, base)
        self.budget, self.fused = budget, fused
        self.loads = self.evictions = 0
        self._runtime = pool_given.runtime(model, fused)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._active: tuple[tuple[str, float], ...] = ()
        self._wanted: frozenset[str] = frozenset()  # of a switch under way: not to be evicted
        self._turn, self._state = threading.RLock(), threading.RLock()
        self._ahead = ThreadPoolExecutor(1, "loraduct-prefetch")
        self._coming: dict[str, tuple[_Entry, Future[None]]] = {}
        self._closed = False
        self._release = pool_given.claim(model, self._turn)

    # --- what is in memory ------------------------------------------------------------------

    @property
    def active(self) -> tuple[tuple[str, float], ...]:
        """(name, weight) of what the model computes with, in order."""
        return self._active

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter the pool knows, least recently used first; see `held`."""
        with self._state:
            return tuple(self._entries)

    @property
    def held(self) -> tuple[str, ...]:
        """Those in memory, least recently used first."""
        with self._state:
            return tuple(n for n, e in self._entries.items() if e.held)

    @property
    def resident_bytes(self) -> int:
        """Of all adapters in memory: what the budget limits."""
        with self._state:
            return sum(e.held.nbytes for e in self._entries.values() if e.held)

    @property
    def exchanged_bytes(self) -> int:
        """Of weights that stand in the place of the base's now (fused, or replaced whole)."""
        with self._state:
            return self._runtime.exchanged_bytes

    def load(self, name: str, path: str | Path, options: ReadOptions | None = None) -> None:
        """Read an adapter into memory under ``name``, in place of one of that name.

        The model is not touched. Raises Refused naming what can't be carried, PoolError where it is
        active now, or larger than the budget.
        """
        pool_given.check_name(name)
        with contextlib.suppress(Exception):  # of what is replaced now
            self._settle(name)
        with self._turn:
            self._open()
            self._fetch(name, _Entry(Path(path), options or ReadOptions()))

    def prefetch(self, name: str, path: str | Path | None = None) -> Future[None]:
        """The same in the background; one that was evicted needs no path.

        One that the pool has from this very path is not read twice; another path replaces it. It
        doesn't wait for generations under way. What goes wrong is raised by the result, and by the
        `activate` that wants it, unless that can read it itself.
        """
        pool_given.check_name(name)
        with self._state:
            self._open()
            last, future = self._coming.get(name, (None, None))
            if future is None or future.done():
                last, future = self._entries.get(name), None
            if last is None or (path is not None and last.path != Path(path)):
                if path is None:
                    raise self._unknown(name)
                last, future = _Entry(Path(path), ReadOptions()), None
                self._may_mean(name, last)
            if future is None:
                future = self._ahead.submit(self._read_ahead, name, last)
                self._coming[name] = last, future
            return future

    def evict(self, name: str) -> None:
        """Drop its bytes; its path is kept, and activating it reads it again."""
        pool_given.check_name(name)
        with self._state:
            self._open()
            entry = self._entries.get(name)
            if entry is None:
                raise self._unknown(name)
            if name in self._pinned():
                raise PoolError(f"{printable(name)} is active: deactivate it before it is evicted")
            self._drop(entry)

    # --- what the model computes with ----------------------------------------------------------

    def activate(self, *wanted: Wanted) -> None:
        """Make the model compute with these adapters, in this order, and with no others.

        Each a name, or (name, weight). What was evicted is read again. Raises PoolError for an
        unknown name, and a budget that can't hold them; Refused for what has no meaning together.
        The model is then as it was, except where the message says that nothing is active.
        """
        stack = pool_given.stack_of(wanted)
        with self._turn:
            self._open()
            for name, _ in stack:
                self._settle(name)
                if name not in self._entries:
                    raise self._unknown(name)
            if tuple(stack) == self._active:
                self._touch(stack)
                return
            self._switch(stack)

    def deactivate(self) -> None:
        """Back to the base: the very weights that it had."""
        self.activate()

    @contextlib.contextmanager
    def using(self, *wanted: Wanted) -> Iterator[Any]:
        """With these adapters, and then with what was active before; other threads' turns wait.

        ``with pool.using("a") as model: model.generate(...)``; without names, the base alone.
        """
        with self._turn:
            before = self._active
            self.activate(*wanted)
            try:
                yield self._runtime.model  # type: ignore[attr-defined]
            finally:
                if not self._closed:
                    self.activate(*before)

    def close(self) -> None:
        """Back to the base, and nothing of the pool stays in the model or in memory."""
        with self._turn:
            if self._closed:
                return
            with self._state:
                self._runtime.show(())
                self._active = ()
                self._entries.clear()
                self._coming.clear()
                self._closed = True
            self._release()
            self._ahead.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- within -------------------------------------------------------------------------------

    def _switch(self, stack: Sequence[tuple[str, float]]) -> None:
        names = frozenset(n for n, _ in stack)
        with self._state:
            self._wanted = names
        left = False
        try:
            for name in dict.fromkeys(n for n, _ in stack):
                entry = self._entries[name]
                if entry.held is None:
                    plan = self._planned(entry)
                    left = self._leave(names, plan.nbytes) or left
                    self._fetch(name, entry, plan)
            with self._state:
                self._touch(stack)
                found = [(self._entries[n].held, w) for n, w in stack]
                both = [(h, w) for h, w in found if h is not None]
                check_stack(both)
                self._runtime.show(both)
                self._active = tuple(stack)
        except LoraductError as e:
            if left:  # its room was needed for what then failed
                raise PoolError(f"{e}; nothing is active now") from e
            raise
        finally:
            with self._state:
                self._wanted = frozenset()

    def _leave(self, wanted: frozenset[str], nbytes: int) -> bool:
        """Whether what is active had to leave first, because a swap needs the room it holds."""
        if self.budget is None or not self._active:
            return False
        with self._state:
            stay = self._bytes(wanted) + nbytes
            if stay > self.budget or self._bytes(wanted | self._pinned()) + nbytes <= self.budget:
                return False  # it doesn't help, or isn't needed
            self._runtime.show(())
            self._active = ()
            return True

    def _bytes(self, names: frozenset[str]) -> int:
        return sum(e.held.nbytes for n, e in self._entries.items() if e.held and n in names)

    def _pinned(self) -> frozenset[str]:
        return self._wanted | {n for n, _ in self._active}

    def _planned(self, entry: _Entry) -> Plan:
        options = replace(entry.options, base=entry.options.base or self.base)
        found = formats.read(entry.path, options)
        entry.stamps = pool_given.stamps(found, entry.stamps)
        adapter = neutral(found, self.base, naming=self._runtime.naming)
        with self._state:
            return self._runtime.plan(adapter)

    def _read_ahead(self, name: str, entry: _Entry) -> None:
        try:
            self._fetch(name, entry)
        except _NoRoom:  # a switch may have it: the name is known, and who wants it reads it
            with self._state:
                if self._may_mean(name, entry):
                    self._place(name, entry)
            raise

    def _fetch(self, name: str, entry: _Entry, plan: Plan | None = None) -> None:
        """Read and keep. Room is made before a value is read."""
        held = None
        with self._state:
            self._open()
            wanted = entry.held is None and self._may_mean(name, entry)
        if wanted:
            plan = plan or self._planned(entry)
            with self._state:
                self._make_room(name, plan.nbytes)
                weights = self._runtime.weights(plan)
            held = self._runtime.read(plan, weights)
        with self._state:  # as one: what is held counts from the moment at which it is
            self._open()
            if not self._may_mean(name, entry):
                return
            if held is not None and entry.held is None:  # else another thread was faster
                self._make_room(name, held.nbytes)
                entry.held = held
                self.loads += 1
            self._place(name, entry)

    def _may_mean(self, name: str, entry: _Entry) -> bool:
        """False where the name was given to another adapter since. Raises PoolError where one that
        it would replace is active."""
        if self._entries.get(name) is entry:
            return True
        if not entry.known and name in self._pinned():
            raise PoolError(f"{printable(name)} is active: deactivate it before it is replaced")
        return not entry.known

    def _place(self, name: str, entry: _Entry) -> None:
        entry.known = True
        self._entries[name] = entry
        self._entries.move_to_end(name)

    def _make_room(self, name: str, nbytes: int) -> None:
        """Evict the least recently used until ``nbytes`` more fit. Raises PoolError when they can't."""
        if self.budget is None:
            return
        if nbytes > self.budget:
            what = f"needs {size(nbytes)}, more than the pool's budget of {size(self.budget)}"
            raise _NoRoom(f"{printable(name)} {what}")
        others = frozenset(self._entries) - {name}
        used, fixed = self._bytes(others), self._bytes(others & self._pinned())
        if fixed + nbytes > self.budget:
            what = f"needs {size(nbytes)}, and {size(fixed)} of the budget of {size(self.budget)} is in use"
            raise _NoRoom(f"{printable(name)} {what}")
        for other, entry in self._entries.items():
            if used + nbytes <= self.budget:
                break
            if other in others - self._pinned() and entry.held:
                used -= entry.held.nbytes
                self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        self.evictions += entry.held is not None
        entry.held = None

    def _touch(self, stack: Sequence[tuple[str, float]]) -> None:
        with self._state:
            for name, _ in stack:
                self._entries.move_to_end(name)

    def _settle(self, name: str) -> None:
        """Wait for what is being read ahead; its error is ours, unless it can be read again."""
        with self._state:
            coming = self._coming.get(name)
        if coming is None:
            return
        entry, future = coming
        try:
            future.result()
        except CancelledError:  # by who asked for it, or by `close`
            pass
        except Exception:
            if not entry.known:
                raise
        finally:
            with self._state:
                if future.done() and self._coming.get(name) is coming:
                    del self._coming[name]

    def _unknown(self, name: str) -> PoolError:
        there = several(list(self._entries)) or "none"
        return PoolError(
            f"there is no adapter {printable(repr(name))} in the pool (it has: {there})"
        )

    def _open(self) -> None:
        if self._closed:
            raise PoolError("the pool is closed")
