"""What a GPU did while it was measured: clocks, power, temperature, as NVML or nvidia-smi tells, if one is there."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import statistics
import subprocess
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

# What rows call it -> what nvidia-smi calls it.
FIELDS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}
Sample = dict[str, float]


def facts() -> dict[str, Any]:
    """What stays the same: CUDA's version, the driver's, compute capability, whether float32 products are TF32."""
    reply = _nvidia_smi("driver_version")
    return {
        "cuda": torch.version.cuda,
        "driver": reply[0] if reply else None,
        "capability": list(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


class Telemetry:
    """Samples by name, taken by calling it: `measure(..., after=telemetry)`."""

    def __init__(self, device: str) -> None:
        self._read = _reader() if device == "cuda" else None
        self._samples: dict[str, list[Sample]] = defaultdict(list)

    def __call__(self, name: str) -> None:
        """Take a sample right after a call of the variant `name`."""
        sample = self._read() if self._read else None
        if sample:
            self._samples[name].append(sample)

    def medians(self, name: str) -> dict[str, float | None]:
        """The median of each quantity over the samples of `name`; None where there are none."""
        return dict.fromkeys(FIELDS) | _medians(self._samples[name])


class Sampler:
    """Samples that a thread takes all the time, every `interval` seconds at most, as long as this process lives.

    MAX_SAMPLES are kept. On a CPU, or where nothing tells, there are none.
    """

    MAX_SAMPLES = 100_000

    def __init__(self, device: str, interval: float = 0.05) -> None:
        self._read = _reader() if device == "cuda" else None
        self._interval = interval
        self._samples: deque[tuple[float, Sample]] = deque(maxlen=self.MAX_SAMPLES)
        if self._read is not None:
            threading.Thread(target=self._run, daemon=True, name="telemetry").start()

    def medians(self, start: float) -> dict[str, float]:
        """The median of each quantity over the samples since that time of `time.monotonic`, where there are some."""
        return _medians([sample for at, sample in list(self._samples) if at >= start])

    def _run(self) -> None:
        while self._read is not None:
            with contextlib.suppress(Exception):  # as in `_reader`: one that fails now and then is no reason to stop
                self._samples.append((time.monotonic(), self._read()))
            time.sleep(self._interval)


def _medians(samples: Sequence[Sample]) -> dict[str, float]:
    values = {field: [sample[field] for sample in samples if field in sample] for field in FIELDS}
    return {field: round(statistics.median(found), 1) for field, found in values.items() if found}


def _uuid() -> str | None:
    """Return the UUID of the GPU that PyTorch uses, whose number may be another one than the driver's."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    uuid = getattr(properties, "uuid", None)
    return f"GPU-{uuid}" if uuid else None


def _reader() -> Callable[[], Sample] | None:
    # Not installed, no driver, a part of a GPU, a quantity that it does not tell: every NVML has errors of its own.
    with contextlib.suppress(Exception):
        read = _sample_of_nvml(importlib.import_module("pynvml"))
        read()
        return read
    return _sample_of_nvidia_smi if _sample_of_nvidia_smi() else None


def _sample_of_nvml(nvml: Any) -> Callable[[], Sample]:
    nvml.nvmlInit()
    uuid = _uuid()
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(0)
    return lambda: {
        "sm_mhz": float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "memory_mhz": float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "celsius": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
    }


def _sample_of_nvidia_smi() -> Sample:
    """What it tells, without what it does not ("[N/A]")."""
    sample: Sample = {}
    for field, text in zip(FIELDS, _nvidia_smi(*FIELDS.values()), strict=False):
        with contextlib.suppress(ValueError):
            sample[field] = float(text)
    return sample


def _nvidia_smi(*fields: str) -> list[str]:
    """Its answers about the GPU that PyTorch uses, or an empty list."""
    program, uuid = shutil.which("nvidia-smi"), _uuid()
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([*command, *(["-i", uuid] if uuid else [])], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.strip().splitlines()
    return [text.strip() for text in lines[0].split(",")] if done.returncode == 0 and lines else []
