"""How fast devices are at most: as published, as measured by `layers.py`, and measured now."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vpd_fast.bench import libraries
from vpd_fast.bench.statistics import percentile
from vpd_fast.bench.timing import measure

SIDE = {"cpu": 1536, "cuda": 8192}  # of the large product
EXPONENTIALS = 16  # per multiprocessor and clock, of all architectures from sm_80 to sm_90


@dataclass(frozen=True)
class Device:
    """Rates of a device. gflop_per_s: of products by precision, without sparsity. gb_per_s: of its memory.

    gexp_per_s: 10^9 exponentials a second, of which attention needs one for each probability; None: not known.
    kind: which engine runs on it, "cpu" or "cuda".
    """

    name: str
    kind: str
    source: str
    gflop_per_s: dict[str, float]
    gb_per_s: float
    gexp_per_s: float | None = None

    def seconds(self, precision: str, flop: float, nbytes: float, exponentials: float = 0.0) -> tuple[float, str]:
        """The least time of an operation and what limits it: "products", "bytes" or "exponentials".

        Each of them is assumed to overlap completely with the others. Raises SystemExit for a precision it has not.
        """
        times = {"bytes": nbytes / self.gb_per_s / 1e9}
        if flop:
            times["products"] = flop / self.peak(precision) / 1e9
        if exponentials and self.gexp_per_s:
            times["exponentials"] = exponentials / self.gexp_per_s / 1e9
        bound = max(times, key=times.__getitem__)
        return times[bound], bound

    def peak(self, precision: str) -> float:
        """GFLOP/s in that precision. Raises SystemExit if there are none."""
        if precision not in self.gflop_per_s:
            known = ", ".join(self.gflop_per_s)
            sys.exit(f"{self.name} has no rate for {precision} products; it has those of {known}")
        return self.gflop_per_s[precision]


def _gpu(name: str, source: str, tflop: dict[str, float], gb_per_s: float, multiprocessors: int, ghz: float) -> Device:
    rates = {precision: 1e3 * rate for precision, rate in tflop.items()}
    return Device(name, "cuda", source, rates, gb_per_s, multiprocessors * EXPONENTIALS * ghz)


_PUBLISHED = "published: dense products with float32 or int32 sums, at boost clock; float32 itself without TF32"
_SUSTAINED = "assumed: what large products keep up under the power limit, at 1.755 GHz; measured rates replace it"
_AMPERE = {"fp32": 19.5, "bf16": 312.0, "fp16": 312.0, "int8": 624.0}
_ADA = {"fp32": 82.6, "bf16": 165.2, "fp16": 165.2, "int8": 660.6, "fp8": 330.3}
_HOPPER = {"fp32": 66.9, "bf16": 989.4, "fp16": 989.4, "int8": 1978.9, "fp8": 1978.9}
_HOPPER_SUSTAINED = {"fp32": 59.3, "bf16": 790.0, "fp16": 790.0, "int8": 1380.0, "fp8": 1380.0}
DEVICES = {
    "h200": _gpu("H200 SXM", _PUBLISHED, _HOPPER, 4800, 132, 1.98),
    "h100": _gpu("H100 SXM", _PUBLISHED, _HOPPER, 3350, 132, 1.98),
    "a100": _gpu("A100 SXM 80 GB", _PUBLISHED, _AMPERE, 2039, 108, 1.41),
    "rtx4090": _gpu("RTX 4090", _PUBLISHED, _ADA, 1008, 128, 2.52),
    "h200-sustained": _gpu("H200 SXM, sustained", _SUSTAINED, _HOPPER_SUSTAINED, 4300, 132, 1.755),
}


def find(name: str) -> Device:
    """A device of the table, or one measured: a JSON file of `layers.py`. Raises SystemExit."""
    if name in DEVICES:
        return DEVICES[name]
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        environment = content["environment"]
        return Device(
            name=environment["device"],
            kind=content.get("kind", "cpu"),
            source=f"measured with torch {environment['torch']} ({name})",
            gflop_per_s={precision: float(rate) for precision, rate in content["peak_gflop_per_s"].items()},
            gb_per_s=float(content["copy_gb_per_s"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        known = ", ".join(DEVICES)
        sys.exit(f"{name} is neither a known device ({known}) nor a file of layers.py: {type(error).__name__}: {error}")


def measured(device: str, precisions: Iterable[str]) -> dict[str, float]:
    """GFLOP/s of a large product of PyTorch's libraries, by precision; without those that they refuse here."""
    found = {}
    for precision in precisions:
        try:
            found[precision] = rate(device, precision)
        except (RuntimeError, NotImplementedError) as error:  # of the library that would compute them
            print(f"no rate of {precision} products: {type(error).__name__}: {str(error).strip().split(chr(10))[0]}")
    return found


def rate(device: str, precision: str) -> float:
    """GFLOP/s of a large product of PyTorch's libraries. Raises what they raise for a precision that they refuse."""
    side = SIDE[device]
    matrix, bias = torch.randn(side, side, device=device), torch.zeros(side, device=device)
    product = libraries.linear(side, matrix, bias, precision)
    return 2 * side**3 / percentile(measure({"": product}, device, rounds=10)[""], 20) / 1e9
