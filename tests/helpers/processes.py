"""Processes that begin with PyTorch and the package imported: copies of one that did nothing but that.

Starting one takes a tenth of a second instead of three. What a program settles when it starts (signals, threads) they
do not settle, so one test of each kind starts the program as users do.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable
from multiprocessing import context, forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]


@functools.cache
def preloaded() -> context.BaseContext:
    """Of multiprocessing, for such processes."""
    found = get_context("forkserver")
    found.set_forkserver_preload(["tests.helpers.preloaded"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])):
        forkserver.ensure_running()
    return found


def start(function: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> BaseProcess:
    """Calls a function in a process of its own, whose output goes to `log`; it ends with what the function returns.

    The function is found by its module and name. environment: for the process only.
    """
    process = preloaded().Process(target=_call, args=(function, arguments, str(log), environment))
    process.start()
    return process


def run(function: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> str:
    """Calls a function as `start` does and waits. Returns what it printed; fails unless it ends with 0 or None."""
    process = start(function, *arguments, log=log, **environment)
    process.join()
    printed = log.read_text(errors="replace")
    assert process.exitcode == 0, f"ended with {process.exitcode}: {printed[-3000:]}"
    return printed


def run_together(function: Callable[..., Any], calls: list[tuple], log: Path, seconds: float) -> None:
    """Calls a function as the processes of one group, with these arguments; fails unless all end with 0 in time."""
    group = {"WORLD_SIZE": str(len(calls)), "LOCAL_WORLD_SIZE": str(len(calls)), "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group["MASTER_PORT"] = str(free.getsockname()[1])
    started = [
        start(function, *arguments, log=log.with_name(f"{log.name}{i}"), RANK=str(i), LOCAL_RANK=str(i), **group)
        for i, arguments in enumerate(calls)
    ]
    end = time.monotonic() + seconds
    try:
        while any(process.exitcode is None for process in started) and time.monotonic() < end:
            started[0].join(0.05)
            if any(process.exitcode for process in started):  # the others would wait for it
                break
    finally:
        for process in started:
            process.kill()
            process.join()
    codes = [process.exitcode for process in started]
    printed = [log.with_name(f"{log.name}{i}").read_text(errors="replace")[-4000:] for i in range(len(calls))]
    assert codes == [0] * len(calls), f"ended with {codes}:\n" + "\n\n".join(printed)


def _call(function: Callable[..., Any], arguments: tuple, log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    raise SystemExit(function(*arguments))
