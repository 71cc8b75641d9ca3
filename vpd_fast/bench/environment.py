"""What measured numbers depend on, and how much memory there is."""

from __future__ import annotations

import ctypes
import datetime
import gc
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vpd_fast import info

PACKAGES = ("torch", "numpy", "triton", "diffusers", "openvino", "nncf")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def device_name(device: str) -> str:
    """The name of the CPU or GPU."""
    return torch.cuda.get_device_name() if device == "cuda" else info.cpu_name()


def kind_of_machine(device: str) -> str:
    """What results are stored under: the device's name, and for a CPU the instruction set in use ("amd-epyc-avx2")."""
    parts = [device_name(device), *([_isa() or "portable"] if device == "cpu" else [])]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _isa() -> str | None:
    found = info.collect()["cpu"]["isa"]
    return found["chosen"] if found else None


def environment(device: str) -> dict[str, Any]:
    """Device, for a GPU its compute capability, threads, instruction set, versions, commit, time."""
    report = info.collect()
    versions = report["required"] | report["optional"]
    return {
        "device": device_name(device),
        **({"capability": list(torch.cuda.get_device_capability())} if device == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "vpd_fast": report["vpd_fast"],
        "commit": _commit(),
        "python": report["python"],
        **{name: versions[name] for name in PACKAGES if versions[name]},
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of a source checkout; an installed package has none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        return subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not under it
        return None


def resident_bytes() -> int:
    """Memory of this process now (Linux)."""
    return _kilobytes("VmRSS", _STATUS)


def peak_bytes() -> int:
    """Most memory this process had, since it started or since `reset_peak` (Linux)."""
    return _kilobytes("VmHWM", _STATUS)


def reset_peak() -> None:
    """Let `peak_bytes` start again from the memory that is really in use (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide the need
    _CLEAR.write_text("5")


def peak_memory(device: str, call: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result of a call, bytes in use before it, and the most in use during it: of the process, or of the GPU."""
    if device == "cpu":
        reset_peak()
        before = resident_bytes()
        return call(), before, peak_bytes()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, before, torch.cuda.max_memory_allocated()


def _kilobytes(name: str, path: Path) -> int:
    """Bytes of the line NAME: N kB in a file of /proc."""
    return 1024 * int(path.read_text().split(f"{name}:")[1].split()[0])


def total_memory(device: str = "cpu") -> int:
    """Bytes that all processes may use together: of the machine, or of the container's limit, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    machine = _kilobytes("MemTotal", Path("/proc/meminfo"))
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    texts = [path.read_text().strip() for path in limits if path.is_file()]
    return min([machine, *(int(text) for text in texts if text.isdigit())])
