"""How much memory a process has, and has had."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> None:
    """Let the most memory that the process has had be what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    """Return bytes of this process: "VmRSS" now, "VmHWM" the most since the last `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
