"""What becomes of a process that is forked: locks that others hold, and computing threads that are not there.

A fork copies locks as they are, but only the thread that forked. A lock that another thread held stays closed for ever
in the child, and OpenMP waits there for threads that it believes to have. So locks of this package are renewed in the
child, and a child of a process that may compute with several threads computes with one.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable

import torch

_ONE_THREAD = (
    "this process was forked from one that had imported vpd_fast, so it computes with one thread: OpenMP hangs in "
    'children of processes that have computed. Start processes with multiprocessing\'s method "spawn", or call '
    "torch.set_num_threads where nothing was computed before the fork"
)
_limited = False  # whether this process was forked and the number of its threads lowered


def call_in_children(function: Callable[[], object]) -> None:
    """Let every forked child call a function, once, before anything else runs in it."""
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(after_in_child=function)


class Lock:
    """A lock that is free again in a forked child; used with `with`. reentrant: its holder may take it again."""

    def __init__(self, reentrant: bool = False) -> None:
        self._make = threading.RLock if reentrant else threading.Lock
        self._lock = self._make()
        _locks.add(self)

    def renew(self) -> None:
        """Forget who holds the lock."""
        self._lock = self._make()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_locks() -> None:
    for lock in list(_locks):
        lock.renew()


def _use_one_thread() -> None:
    global _limited
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        _limited = True
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)


def tell_of_one_thread() -> None:
    """Warn once, in a forked child whose number of threads was lowered and still is."""
    global _limited
    if _limited and torch.get_num_threads() == 1:
        warnings.warn(_ONE_THREAD, RuntimeWarning, stacklevel=3)
    _limited = False


call_in_children(_renew_locks)


def install() -> None:
    """Let forked children compute with one thread."""
    call_in_children(_use_one_thread)
