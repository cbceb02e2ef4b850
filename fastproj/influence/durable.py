"""Files that are whole after a power cut, and a lock that dies with its process."""

from __future__ import annotations

import fcntl
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".part"


@contextmanager
def durable_file(path: Path, *, folder: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to that becomes ``path`` at the end of the block, whole and on the disk, or never.

    It lies in ``folder``, of the same file system, by default that of ``path``, which is made. Where anything
    in the block raises, what was written is removed and ``path`` stays what it was. Raises OSError where that
    or the writing fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder or path.parent, prefix=".", suffix=TEMPORARY_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # a temporary file is its owner's alone
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durably(path: Path, payload: bytes) -> None:
    """Write ``payload`` so that ``path`` holds all of it, also after a power cut, or is untouched.

    Raises OSError where the writing fails.
    """
    with durable_file(path) as file:
        file.write(payload)


def sync_folder(folder: Path) -> None:
    """Bring renames and removals in ``folder`` to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Lock:
    """The right to write, held by one process: an exclusive ``flock`` on a file, gone when the process is.

    Raises BlockingIOError where another holds it. Processes forked while it is held give their copy of it
    up, so that a worker outliving its parent keeps nobody out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        while self._file is None:
            self._file = _try_lock(path)
        _HELD.add(self)

    def release(self) -> None:
        """Give the lock back; the file stays."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        """Close this process's copy; the lock stays with the process that it was forked from."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _HELD.discard(self)

    def remove(self) -> None:
        """Give the lock back and remove its file."""
        self.path.unlink(missing_ok=True)
        self.release()


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _try_lock(path: Path) -> BinaryIO | None:
    """The file at ``path``, open and locked; None where another process has just removed it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        try:
            file = undo.enter_context(path.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return None
        except FileNotFoundError:
            return None
        except BlockingIOError as error:
            message = "another process is writing here; wait for it or end it"
            raise BlockingIOError(error.errno, message, str(path.parent)) from None
        undo.pop_all()
    return file


def _give_up_in_child() -> None:
    for lock in list(_HELD):
        lock.forget()


os.register_at_fork(after_in_child=_give_up_in_child)
