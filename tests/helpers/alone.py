"""Tests in a process of their own: where it dies (by a signal, or by the driver's abort) it says so, and where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 60  # of what it printed last


def run_alone(*arguments: str, seconds: float = 300) -> None:
    """Runs `python arguments`. Raises AssertionError with the end of what it printed unless it ends with 0.

    A process that died is run again with CUDA_LAUNCH_BLOCKING=1, where the kernel that was launched last is to blame.
    """
    status, printed = _run(arguments, {}, seconds)
    if status == 0:
        return
    message = f"{_ended(status)}:\n{printed}"
    if status < 0:
        status, printed = _run(arguments, {"CUDA_LAUNCH_BLOCKING": "1"}, seconds)
        message += f"\nand again, kernel by kernel, {_ended(status)}:\n{printed}"
    raise AssertionError(message)


def _run(arguments: tuple[str, ...], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-u", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
    )
    return result.returncode, "\n".join(result.stdout.decode(errors="replace").splitlines()[-MAX_LINES:])


def _ended(status: int) -> str:
    return f"ended with {status}" if status >= 0 else f"died of {signal.Signals(-status).name}"
