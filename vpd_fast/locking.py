"""One run at a time in a folder: a lock file that says which process has it, and that a killed process leaves free."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from vpd_fast.errors import InputError
from vpd_fast.files import process_exists
from vpd_fast.forks import Lock

try:
    import fcntl
except ImportError:  # Windows, where the exclusive creation of the file and its process number must do
    fcntl = None

_held: set[str] = set()  # the system's locks are those of processes: they do not keep two runs of one process apart
_held_lock = Lock()


class RunLock:
    """The lock of a run, held from its making to `release`, or to the end of a `with` block, or of the process.

    path: the lock file, which has the process number and the host.
    Raises InputError, which names the process, if another run holds it or the file cannot be written. The system frees
    the lock of a process that is killed, whatever its file still says; on file systems without locks the process number
    decides, and the lock of another host stays until someone removes the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.abspath(path))
        with _held_lock:
            if str(self.path) in _held:
                raise InputError(f"{self.path.parent}: another run of this process writes there")
            try:
                self._file = self._take()
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from error
            _held.add(str(self.path))

    def _take(self) -> int:
        """Return the open, locked file."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                free = _lock(file)
                holder = _read_holder(file)
                if free is False or (free is None and _is_running(holder)):
                    raise InputError(self._message(holder))
                if not same_file(file, self.path):  # its holder ended and removed it in the meantime
                    os.close(file)
                    continue
                os.ftruncate(file, 0)
                os.lseek(file, 0, os.SEEK_SET)
                os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n")
            except BaseException:
                os.close(file)
                raise
            return file

    def _message(self, holder: dict[str, Any] | None) -> str:
        who = "" if holder is None else f" (process {holder['pid']} on {holder['host']})"
        text = f"{self.path.parent}: another run{who} writes there; wait for its end, or choose another folder"
        if holder is not None and holder["host"] != socket.gethostname():
            text += f"; if it has ended, remove {self.path}"
        return text

    def release(self) -> None:
        """Let others have the lock."""
        with _held_lock:
            if str(self.path) not in _held:
                return
            if same_file(self._file, self.path):
                with contextlib.suppress(OSError):
                    self.path.unlink()
            os.close(self._file)
            _held.discard(str(self.path))

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _lock(file: int) -> bool | None:
    """Lock an open file: True if done, False if another process has it, None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by processes that are forked
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _read_holder(file: int) -> dict[str, Any] | None:
    """Return what a lock file says of the run that wrote it, None if it is empty or unreadable."""
    try:
        holder = json.loads(os.read(file, 4096))
        return {"pid": int(holder["pid"]), "host": str(holder["host"])}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_running(holder: dict[str, Any] | None) -> bool:
    """Return whether the process that a lock file names may still run: one of another host may."""
    if holder is None or holder["host"] != socket.gethostname():
        return holder is not None
    return holder["pid"] != os.getpid() and process_exists(holder["pid"])


def same_file(file: int, path: Path) -> bool:
    """Return whether an open file, by its descriptor, is what has that path."""
    try:
        there, here = os.stat(path), os.fstat(file)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
