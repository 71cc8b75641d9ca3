"""Runs commands in forked processes, so that the imports are paid once, and kills them at a chosen file operation.

An operation is what changes a file or folder in a run's folder: opening to write, renaming, removing, making; the
process is killed just before the N-th.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def watch(folder: str, kill_at: int | None, answer: int) -> None:
    """Count the operations of this process, tell each, and end it before number `kill_at`."""
    numbers = itertools.count(1)  # threads of the command take theirs from it one at a time

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(folder):
            return
        number = next(numbers)
        os.write(answer, b".")  # lets other threads run
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(arguments: list[str], folder: str, kill_at: int | None, log: str) -> tuple[int, int]:
    """Run a command in a process of its own. Return its exit code, negative for a signal, and how many operations it
    did."""
    told, answer = os.pipe()
    process = os.fork()
    if not process:
        os.close(told)
        code = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            watch(folder, kill_at, answer)
            from vpd_fast.cli.main import run as command

            code = command(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(answer)
    operations = 0
    while read := os.read(told, 65536):
        operations += len(read)
    os.close(told)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), operations


def serve(requests: Connection) -> None:
    """Answer requests, the arguments of `run`, until the other end is closed."""
    with contextlib.suppress(EOFError):
        while True:
            requests.send(run(*requests.recv()))
