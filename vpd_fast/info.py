"""What is installed here and what is not, and why: the report of `vpd-fast info` and `python -m vpd_fast`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from vpd_fast import __version__, _native
from vpd_fast.errors import InputError

REQUIRED = (
    "torch",
    "numpy",
    "safetensors",
    "pillow",
    "opencv-python-headless",
    "transformers",
    "rich",
    "typer",
)
OPTIONAL = {
    "triton": "Triton kernels on GPUs (comes with PyTorch's GPU builds)",
    "xformers": 'self-attention on GPUs with attention_backend="xformers"',
    "flash-attn": 'self-attention on GPUs in 16 bits with attention_backend="flash-attn"',
    "accelerate": "training",
    "tensorboard": "curves and sample pictures of training",
    "pycocotools": "RefCOCO's masks",
    "ray": "prediction on a cluster",
    "openvino": "a peer of `vpd-fast bench`",
    "nncf": "OpenVINO's INT8",
    "diffusers": "comparison in the tests; its folders load without it",
    "pytest": "the tests",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The name of the processor, as its maker writes it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _isa() -> dict[str, Any]:
    native = _native.load("_C")
    usable, override = native.usable_isas(), os.environ.get(_native.ISA_VARIABLE)
    try:
        chosen = _native.isa()
    except InputError as error:
        chosen = f"none: {error}"
    return {"chosen": chosen, "usable": usable, "override": override}


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(
            f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} SMs"
        )
    return found


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable GPU or driver"


def collect() -> dict[str, Any]:
    """Everything the report says, as plain values that can be written as JSON.

    Keys: vpd_fast, python, platform (versions); required, optional (package -> version or None); cpu (name, threads,
    isa or None); native (module -> build metadata, or {"missing": reason}); compiled_kernels (a line about those of
    Triton); gpus (one line each); no_gpu (why there is none, or None).
    Loads PyTorch and the native modules, and asks the driver for GPUs; imports no other package.
    """
    import torch

    from vpd_fast.kernels.cubins import summary

    native = {}
    for name in _native.MODULES:
        reason = _native.why_missing(name)
        module = None if reason else _native.load(name)
        # A module that an earlier version left in the folder may say nothing.
        native[name] = dict(getattr(module, "build_info", {"of": "another version"})) if module else {"missing": reason}
    gpus = _gpus()
    return {
        "vpd_fast": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "required": {name: _version(name) for name in REQUIRED},
        "optional": {name: _version(name) for name in OPTIONAL},
        "cpu": {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "isa": None if "missing" in native["_C"] else _isa(),
        },
        "native": native,
        "compiled_kernels": summary(),
        "gpus": gpus,
        "no_gpu": None if gpus else _why_no_gpu(),
    }


def render(report: dict[str, Any]) -> str:
    """The report of `collect` as text, one fact a line."""
    rows = [("vpd_fast", report["vpd_fast"]), ("python", report["python"]), ("platform", report["platform"])]
    rows += [(name, version or "MISSING: required") for name, version in report["required"].items()]
    cpu = report["cpu"]
    rows.append(("CPU", f"{cpu['name']}, {cpu['threads']} threads"))
    if cpu["isa"]:
        override = cpu["isa"]["override"]
        source = f"{_native.ISA_VARIABLE}={override}" if override else f"{_native.ISA_VARIABLE} is not set"
        rows.append(
            ("instruction set", f"{cpu['isa']['chosen']} (usable: {', '.join(cpu['isa']['usable'])}; {source})")
        )
    for name, build in report["native"].items():
        text = build.get("missing") or ", ".join(f"{key} {value}" for key, value in build.items())
        rows.append((f"native {name}", f"missing: {text}" if "missing" in build else text))
    rows.append(("Triton kernels", f"compiled ahead of time: {report['compiled_kernels']}"))
    rows += [(f"GPU {index}", gpu) for index, gpu in enumerate(report["gpus"])]
    if report["no_gpu"]:
        rows.append(("GPU", f"none: {report['no_gpu']}"))
    for name, version in report["optional"].items():
        rows.append((name, f"{version or 'not installed'} (optional, for {OPTIONAL[name]})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
