"""A process that holds one variant and computes when it is asked to, and the handle that others hold of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vpd_fast.bench.variants import Case, Source, Variant

PATIENCE = 2  # seconds for a process to end by itself
_SPAWN = multiprocessing.get_context("spawn")  # a forked copy would share memory, threads and their locks


class WorkerError(Exception):
    """A variant cannot be made or run, or its process is gone. The message says why."""


class Worker:
    """The process of one variant; it starts making it at once, and `wait` says when that is done.

    make: takes the source; returns a variant, or another object whose methods are called. A call that fails raises
    WorkerError, and the worker is of no use any more.
    """

    def __init__(self, make: Callable[[Source], Any], source: Source, name: str) -> None:
        self._log = source.scratch / f"{name.replace(' ', '-')}-{os.urandom(4).hex()}.log"
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, make, source, self._log), name=name)
        self._process.start()
        theirs.close()

    def wait(self) -> dict[str, int]:
        """{"resident", "peak"}: bytes of the process when the variant is made, and the most it had meanwhile."""
        return self._receive()

    def prepare(self, case: Case, outputs: Path) -> dict[str, int]:
        """One pass for the case, whose results are saved as `outputs`; {"resident", "peak"} of it."""
        return self.call("prepare", case, outputs)

    def run(self) -> dict[str, float]:
        """One pass of the case that was prepared last: seconds of each stage."""
        return self.call("run")

    def save(self, folder: Path) -> None:
        """Save a fast model."""
        self.call("save", folder)

    def close(self) -> None:
        """End the process: at once if it is waiting, by force if it computes."""
        self._connection.close()
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()
        self._process.close()

    def call(self, action: str, *arguments: Any) -> Any:
        """Run one of `_ACTIONS`, or a method of what `make` returned, there; its result."""
        try:
            self._connection.send((action, *arguments))
        except OSError as error:
            raise WorkerError(self._why_gone()) from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            # The pipe alone does not tell of the end: processes that a library started may hold its other side.
            while not self._connection.poll(PATIENCE):
                if not self._process.is_alive() and not self._connection.poll():
                    raise WorkerError(self._why_gone())
            succeeded, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerError(self._why_gone()) from error
        if not succeeded:
            raise WorkerError(value)
        return value

    def _why_gone(self) -> str:
        self._process.join()
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return "the process was killed, most likely because there was not enough memory"
        printed = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        last = next((line for line in reversed(printed) if line.strip()), "it printed nothing")
        return f"the process ended with exit code {code}: {last.strip()}"


def _serve(connection: Connection, make: Callable[[Source], Any], source: Source, log: Path) -> None:
    """What the process does: answers every message with (succeeded, value)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it ends it
    with log.open("w") as file:  # libraries print; the terminal belongs to the one who started it
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        variant = _make(make, source)
        connection.send((True, _memory()))
        while True:
            try:
                action, *arguments = connection.recv()
            except EOFError:
                return
            run = _ACTIONS.get(action) or getattr(type(variant), action)
            connection.send((True, run(variant, *arguments)))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().split("\n")
        connection.send((False, f"{type(error).__name__}: {lines[0]}"))


def _make(make: Callable[[Source], Any], source: Source) -> Any:
    import torch

    with contextlib.suppress(ImportError):  # transformers and diffusers bring it
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is for several processes, and left behind when one is killed
    torch.set_num_threads(source.threads)
    return make(source)


def _memory() -> dict[str, int]:
    from vpd_fast.bench.environment import peak_bytes, reset_peak, resident_bytes

    peak = peak_bytes()
    reset_peak()
    return {"resident": resident_bytes(), "peak": peak}


def _prepare(variant: Variant, case: Case, path: Path) -> dict[str, int]:
    variant.prepare(case)
    _memory()  # tensors of the case before this one are gone
    _, outputs = variant.run()
    memory = _memory()
    outputs.save(path)
    return memory


_ACTIONS: dict[str, Callable[..., Any]] = {
    "prepare": _prepare,
    "run": lambda variant: variant.run()[0],
    "save": lambda variant, folder: variant.model.save(folder),
}
