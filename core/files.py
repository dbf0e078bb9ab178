"""The one place that touches the disk: bounded reads, and writes that are all or nothing.

A folder is written beside its target, synced, then swapped in with one system call; a killed
process leaves the old folder or the new one. Every mutating call of the package is made here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loraduct.errors import Refused

CONFIG_LIMIT = 8 << 20  # bytes of a JSON file we are willing to parse
_MOST_BUFFERS = 1024  # of one preadv call (IOV_MAX)
_WRITEBACK = 32 << 20  # bytes after which the disk is asked to start
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Source:
    """An open regular file, read by offset; a short read names the file and the tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        info = os.fstat(self.fd)
        if not stat.S_ISREG(info.st_mode):  # swapped between the check and the open
            os.close(self.fd)
            raise Refused(path, "is not a regular file")
        self.size = info.st_size

    def read(self, offset: int, count: int, what: str) -> bytearray:
        """``count`` bytes at ``offset``."""
        buffer = bytearray(count)
        self.read_into(offset, buffer, what)
        return buffer

    def read_into(self, offset: int, buffer: Any, what: str) -> None:
        """Fill ``buffer`` from ``offset``."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            got = os.preadv(self.fd, [view[done:]], offset + done)
            if got == 0:
                raise Refused(self.path, "the file ended while it was read", tensor=what)
            done += got

    def read_rows(self, offset: int, rows: Any, what: str) -> None:
        """Fill the rows of a matrix of bytes, which may lie apart in memory, from ``offset`` on."""
        width = rows.shape[1]
        for first in range(0, rows.shape[0], _MOST_BUFFERS):
            views = [memoryview(r) for r in rows[first : first + _MOST_BUFFERS]]
            begin = offset + first * width
            if os.preadv(self.fd, views, begin) != len(views) * width:
                for i, view in enumerate(views):  # a short read: row by row
                    self.read_into(begin + i * width, view, what)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.fd)


def check_regular(path: Path) -> None:
    """Refuse what is absent or not a regular file (opening a pipe would wait forever)."""
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        if path.is_symlink():
            raise Refused(
                path, f"is a symbolic link that leads nowhere ({os.strerror(e.errno or 0)})"
            ) from None
        raise Refused(path, f"can't be read: {os.strerror(e.errno or 0)}") from None
    if not stat.S_ISREG(mode):
        raise Refused(path, f"is {_kind(mode)}, expected a regular file")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a small file."""
    source = Source(path)
    if source.size > limit:
        raise Refused(path, f"has {source.size:,} bytes, expected at most {limit:,}")
    return bytes(source.read(0, source.size, "contents"))


def is_file(path: Path) -> bool:
    """Whether something other than a folder is there (a pipe counts: opening it will refuse)."""
    return (path.exists() and not path.is_dir()) or (path.is_symlink() and not path.is_dir())


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into one clear line."""
    try:
        yield
    except OSError as e:
        where = Path(os.fsdecode(e.filename)) if isinstance(e.filename, str | bytes) else path
        reason = os.strerror(e.errno) if e.errno else str(e)
        raise Refused(where, f"can't be written: {reason}; nothing was changed") from e


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """One writer of ``target`` at a time, in this and other processes."""
    import fcntl

    lock = target.with_name(f".{target.name}.lock")
    while True:
        fd = os.open(lock, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Refused(target, "is being written by another process; try again later") from None
        # the former holder may have removed the file between our open and our lock
        try:
            if os.stat(lock).st_ino == os.fstat(fd).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(fd)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)
        os.close(fd)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when the block ends without error.

    Whether an existing ``target`` may be replaced is the caller's decision, made before.
    """
    # resolved, so that a link given as the target stays a link and its folder is replaced
    target = resolved(target)
    with os_errors(target), locked(target):
        _remove_left(target, "tmp")  # of a writer that was killed: we hold the lock
        stage = _beside(target, "tmp")
        os.mkdir(stage)
        try:
            yield stage
            sync(stage)
            if target.exists():
                exchange(stage, target)
            else:
                os.rename(stage, target)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_tree(stage)
            raise
        # From here on the new folder is in place: what fails now must not look like a failure.
        with contextlib.suppress(OSError):
            sync(target.parent)
        with contextlib.suppress(OSError):
            remove_tree(stage)
            _remove_left(target, "old")


def resolved(path: Path) -> Path:
    """``path`` without links; links that lead in a circle are refused."""
    try:
        return path.resolve()
    except (RuntimeError, OSError):  # Python before 3.13 raises RuntimeError
        raise Refused(path, "is a symbolic link that leads nowhere (links in a circle)") from None


def _remove_left(target: Path, what: str) -> None:
    for left in target.parent.glob(f".{_escape(target.name)}.{what}-*"):
        remove_tree(left)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}-{os.urandom(4).hex()}")


def _escape(name: str) -> str:
    import glob

    return glob.escape(name)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours (links in it are removed, never followed)."""
    if not folder.is_dir() or folder.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder)
        return
    for entry in sorted(folder.iterdir()):
        remove_tree(entry)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(folder)


def exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step where the system can, else with two renames.

    Linux: renameat2(RENAME_EXCHANGE); macOS: renamex_np(RENAME_SWAP = 2). The fallback keeps the
    old folder as ``.NAME.old-*`` until the new one is in place.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        code = libc.renamex_np(first, second, 2)
    elif hasattr(libc, "renameat2"):
        code = libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
    else:
        code, _ = -1, ctypes.set_errno(errno.ENOSYS)
    if code == 0:
        return
    reason = ctypes.get_errno()
    if reason not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(reason, os.strerror(reason), str(b))
    aside = _beside(b, "old")
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except OSError:
        os.rename(aside, b)
        raise
    with contextlib.suppress(OSError):  # the new folder is in place: only tidying is left
        os.rename(aside, a)


def sync(path: Path) -> None:
    """Make a folder's entries durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """A new folder within one that is being written."""
    os.mkdir(path)


def lift(folder: Path) -> None:
    """Put what a folder within one that is being written holds into that one, in its place."""
    for entry in folder.iterdir():
        os.rename(entry, folder.parent / entry.name)
    os.rmdir(folder)


def write_file(path: Path, chunks: Iterable[Any]) -> None:
    """A new file from pieces of bytes or contiguous arrays, synced."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        done = started = 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while len(view):
                written = os.write(fd, view)
                view, done = view[written:], done + written
            if done - started >= _WRITEBACK:
                _start_writeback(fd, started, done - started)
                started = done
        os.fsync(fd)
    finally:
        os.close(fd)


def _start_writeback(fd: int, offset: int, count: int) -> None:
    """Let the disk work while we compute, so that the final fsync has little left (Linux)."""
    if sys.platform == "linux":
        import ctypes

        call = getattr(ctypes.CDLL(None), "sync_file_range", None)
        if call is not None:  # 2 is SYNC_FILE_RANGE_WRITE; a refusal only costs speed
            call(fd, ctypes.c_int64(offset), ctypes.c_int64(count), 2)


def replace_file(target: Path, chunks: Iterable[Any]) -> None:
    """Put a new file in the place of ``target`` (or where none was), all or nothing.

    The lock is its folder's: whoever replaces the folder is a second writer too. Where the folder
    can't be replaced, because nothing may be written beside it, there is none.
    """
    if target.is_symlink():  # in a model cache, to a file that others share
        raise Refused(target, f"is a link to {os.readlink(target)}; copy the folder first")
    target = resolved(target)
    folder = target.parent
    lock = locked(folder) if os.access(folder.parent, os.W_OK) else contextlib.nullcontext()
    with os_errors(target), lock:
        swap_file(target, chunks)


def swap_file(target: Path, chunks: Iterable[Any]) -> None:
    """As `replace_file`, for who holds the lock already."""
    _remove_left(target, "tmp")
    stage = _beside(target, "tmp")
    try:
        write_file(stage, chunks)
        os.replace(stage, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(stage)
        raise
    with contextlib.suppress(OSError):
        sync(target.parent)


@contextlib.contextmanager
def editing(folder: Path) -> Iterator[Path]:
    """The only writer of what is in ``folder``, which is edited in place."""
    folder = resolved(folder)
    with os_errors(folder), locked(folder):
        yield folder


def append(path: Path, start: int, chunks: Iterable[Any], head: bytes) -> int:
    """Put pieces behind the first ``start`` bytes of a file, synced; then ``head`` at its beginning.

    What was behind ``start`` goes, and so do the pieces if one of them can't be had or written.
    Returns the bytes written. For who holds the lock.
    """
    fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    try:
        if os.fstat(fd).st_nlink > 1:
            raise Refused(path, "is a hard link that other folders share; copy the folder first")
        os.ftruncate(fd, start)
        done = start
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                while len(view):
                    written = os.pwrite(fd, view, done)
                    view, done = view[written:], done + written
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, start)
            raise
        os.fsync(fd)
        os.pwrite(fd, head, 0)
    finally:
        os.close(fd)
    return done - start


def file_chunks(path: Path) -> Iterator[bytearray]:
    """A file's bytes in pieces, to be copied."""
    source = Source(path)
    step = 4 << 20
    for offset in range(0, source.size, step):
        yield source.read(offset, min(step, source.size - offset), path.name)
