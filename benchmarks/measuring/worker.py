"""The process that measures, as seen from both sides: `Worker` is the handle, `_serve` what runs in it.

A kernel can hang, and an error of the GPU makes its whole process useless. So measurements run in a process of their
own, which sends what it has at once; it is ended when it takes too long, and another one goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Collection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measuring.plan import Item, Plan, resolve

_SPAWN = multiprocessing.get_context("spawn")  # a forked copy would share memory, threads and their locks
PREPARATION = "preparation"  # name of what happens between the steps of an item
PATIENCE = 2.0  # seconds for a process to end by itself
FATAL = ("AcceleratorError", "CUDA error", "CUDA driver error", "device-side assert", "illegal memory access")

Message = tuple[str, dict[str, Any]]  # kind and content


class Lost(Exception):
    """The process is gone or was ended. The message says why."""


class Worker:
    """A process that makes the plan's setting, then runs steps of items that it is sent.

    log: file to which everything is appended that it prints.
    """

    def __init__(self, plan: Plan, options: dict[str, Any], log: Path) -> None:
        self._log = log
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, plan, options, log), name="measuring")
        self._process.start()
        theirs.close()

    def begin(self, item: Item, done: Collection[str], seconds: float) -> None:
        """Let it run the steps of an item that are not `done`, beginning none after so many seconds."""
        try:
            self._connection.send((item, list(done), seconds))
        except OSError as error:
            raise Lost(self._why_gone()) from error

    def receive(self, until: float) -> Message | None:
        """Its next message, or None if there is none until that time of `time.monotonic`. Raises Lost if it is gone."""
        try:
            while not self._connection.poll(min(PATIENCE, max(0.0, until - time.monotonic()))):
                if not self._process.is_alive() and not self._connection.poll():
                    raise Lost(self._why_gone())
                if time.monotonic() >= until:
                    return None
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise Lost(self._why_gone()) from error

    def end(self) -> None:
        """End the process: at once if it is waiting, by force if it computes."""
        self._connection.close()
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()
        self._process.close()

    def kill(self) -> None:
        """End the process by force."""
        self._process.kill()
        self.end()

    def _why_gone(self) -> str:
        self._process.join(PATIENCE)
        code = self._process.exitcode
        name = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        printed = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        last = next((line.strip() for line in reversed(printed) if line.strip()), "it printed nothing")
        return f"the process ended with {name}: {last}"


def _serve(connection: Connection, plan: Plan, options: dict[str, Any], log: Path) -> None:
    """What the process does; every message is (kind, content)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it ends it
    file = log.open("a")
    os.dup2(file.fileno(), sys.stdout.fileno())
    os.dup2(file.fileno(), sys.stderr.fileno())
    faulthandler.enable(file)
    try:
        setting = plan.make_setting(options)
    except Exception as error:
        traceback.print_exc()
        connection.send(("unusable", {"error": _line(error)}))
        return
    connection.send(("ready", {"facts": setting.facts()}))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the one who started it is done
        while True:
            item, done, seconds = connection.recv()
            if not _run_item(connection, setting, item, set(done), time.monotonic() + seconds):
                return


def _run_item(connection: Connection, setting: Any, item: Item, done: set[str], end: float) -> bool:
    """Run an item's steps. Returns whether the process is still of use."""
    name = PREPARATION
    try:
        for step in resolve(item.steps)(setting):
            name = step.name
            if name in done:
                continue
            if time.monotonic() >= end:
                connection.send(("end", {"reached": False}))
                return True
            connection.send(("begin", {"step": name, "seconds": step.seconds}))
            usable = _run_step(connection, setting, step.run, name)
            if not usable:
                return False
            name = f"{PREPARATION} after {name}"
    except Exception as error:  # of what makes the steps
        traceback.print_exc()
        fatal = is_fatal(error)
        connection.send(("failed", {"step": name, "error": _line(error), "fatal": fatal}))
        if fatal:
            return False
    connection.send(("end", {"reached": True}))
    return True


def _run_step(connection: Connection, setting: Any, run: Any, name: str) -> bool:
    start = time.monotonic()
    try:
        rows = run()
        content = {"rows": rows if isinstance(rows, list) else [rows]}
        content |= {"seconds": round(time.monotonic() - start, 2), "gpu": setting.conditions(start)}
        connection.send(("done", {"step": name, **content}))
    except Exception as error:
        traceback.print_exc()
        fatal = is_fatal(error)
        connection.send(("failed", {"step": name, "error": _line(error), "fatal": fatal}))
        return not fatal
    finally:
        setting.tidy()
    return True


def is_fatal(error: Exception) -> bool:
    """Return whether the error leaves the process without a usable GPU."""
    text = f"{type(error).__name__}: {error}"
    return "out of memory" not in text and any(sign in text for sign in FATAL)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
