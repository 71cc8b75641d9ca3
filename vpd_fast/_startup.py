"""What the command line does before anything large is imported; the package itself imports it first, and it imports
nothing. In other programs it does nothing: their environment and signals are theirs.

Threads: PyTorch reads the environment when it is loaded. The number of OpenMP's threads is bounded by the share of
processors that a container has; PyTorch itself only sees which processors a process may use. How they wait stays
OpenMP's choice: threads that sleep are faster beside other work, but took up to 2.6 times as long on an idle machine.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130  # exit code
_CGROUPS = "/sys/fs/cgroup"


def is_command_line() -> bool:
    """Return whether this process was started as `vpd-fast` or `python -m vpd_fast`."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    if program in ("vpd-fast", "vpd-fast.exe"):
        return True
    arguments = sys.orig_argv  # while `python -m` looks for the module, sys.argv[0] is "-m"
    module = arguments[arguments.index("-m") + 1 :][:1] if "-m" in arguments else []
    return program in ("-m", "__main__.py", "main.py") and module in (["vpd_fast"], ["vpd_fast.cli.main"])


def prepare() -> None:
    """Settle threads and signals, if this is the command line."""
    if not is_command_line():
        return
    os.environ.update(thread_settings(os.environ))
    # Nothing is lost yet, and an exception in the middle of an import can be swallowed or break what is imported.
    set_handlers(_leave)


def set_handlers(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Let a function handle SIGINT and SIGTERM, but for one that is ignored, as in background jobs of a shell.

    Returns the handlers until now.
    """
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def interrupt(number: int, frame: FrameType | None) -> Any:
    """Handle SIGINT and SIGTERM while a command runs: the first is a KeyboardInterrupt, a second ends at once."""
    set_handlers(_leave)
    raise KeyboardInterrupt


def leave(code: int) -> NoReturn:
    """End the program.

    A thread of gloo may still be waiting for Python, to free a tensor of the last exchange with other processes; it
    aborts the process when Python ends before it. So Python's own end is left out while there is a process group.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def thread_settings(environment: Any) -> dict[str, str]:
    """Return what to add to the environment, without what the user has set."""
    share = cpu_share()
    if "OMP_NUM_THREADS" not in environment and share is not None and share < usable_cpus():
        return {"OMP_NUM_THREADS": str(max(1, math.ceil(share)))}
    return {}


def usable_cpus() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_share(root: str = _CGROUPS, own: str = "/proc/self/cgroup") -> float | None:
    """Return how many processors' time the control groups of this process allow it, None without a limit."""
    shares = []
    for line in _read(own).splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if not controllers:  # version 2
            folder, read = root, _share_of_version_2
        elif "cpu" in controllers.split(","):
            folder, read = (
                f"{root}/{controllers}" if os.path.isdir(f"{root}/{controllers}") else f"{root}/cpu",
                _share_of_version_1,
            )
        else:
            continue
        parts = [part for part in group.split("/") if part]
        # A limit of a group above is one, too. In a container the mounted root may be the process's own group.
        for depth in range(len(parts) + 1):
            share = read("/".join([folder, *parts[:depth]]))
            if share is not None:
                shares.append(share)
    return min(shares, default=None)


def _share_of_version_2(folder: str) -> float | None:
    quota, period = [*_read(f"{folder}/cpu.max").split(), "", ""][:2]
    return _share(quota, period)


def _share_of_version_1(folder: str) -> float | None:
    return _share(_read(f"{folder}/cpu.cfs_quota_us").strip(), _read(f"{folder}/cpu.cfs_period_us").strip())


def _share(quota: str, period: str) -> float | None:
    if not quota.isdigit() or not period.isdigit() or not int(period) or not int(quota):  # "max", -1, or no such file
        return None
    return int(quota) / int(period)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
