"""linear at the sizes of Stable Diffusion 1.5, against oneDNN's product through PyTorch, and cuBLASLt's on GPUs.

They get rows that are joined, normalised and, for 8 bits, rounded already, and applies no activation and no
residual: their time is that of the product alone. "eager" is the whole computation, step by step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import ops
from vpd_fast.bench import libraries
from vpd_fast.bench.suites import library_variant, on_devices, random_tensors, side_by_side, some_of, variants_of
from vpd_fast.ops.packing import PackedWeight

CASES = {  # rows, widths of the sources, columns of the weight, what is fused
    "qkv at 64": (4096, (320,), 960, "norm"),
    "to_out at 64": (4096, (320,), 320, "residual"),
    "geglu at 64": (4096, (320,), 2560, "geglu"),
    "ff and proj_out at 64": (4096, (1280, 320), 320, "residual"),
    "shortcut at 64": (4096, (640, 320), 320, "plain"),
    "qkv at 32": (1024, (640,), 1920, "norm"),
    "geglu at 32": (1024, (640,), 5120, "geglu"),
    "ff and proj_out at 32": (1024, (2560, 640), 640, "residual"),
    "qkv at 16": (256, (1280,), 3840, "norm"),
    "geglu at 16": (256, (1280,), 10240, "geglu"),
    "ff and proj_out at 16": (256, (5120, 1280), 1280, "residual"),
    "qkv at 8": (64, (1280,), 3840, "norm"),
    "geglu at 8": (64, (1280,), 10240, "geglu"),
    "ff and proj_out at 8": (64, (5120, 1280), 1280, "residual"),
    "attention of the encoder": (4096, (512,), 512, "affine"),
    "shortcut at 512": (262144, (128,), 256, "plain"),
    "shortcut at 256": (65536, (256,), 512, "plain"),
    "lateral at 32": (1024, (640, 150), 256, "plain"),
}
MAIN = "qkv at 64"
TYPICAL = (MAIN, "ff and proj_out at 16", "geglu at 8")


@on_devices("precision", libraries.PRECISIONS, libraries.GPU_PRECISIONS)
@pytest.mark.parametrize("case", some_of(CASES, TYPICAL))
def test_side_by_side(case: str, precision: str, device: str, keep: Callable) -> None:
    rows, widths, n, fused = CASES[case]
    k, dtype = sum(widths), libraries.activations(precision)
    random = random_tensors(device)
    sources = [random(1, rows, width).to(dtype) for width in widths]
    x, x2 = (*sources, None)[:2]
    matrix, bias, order = random(n, k) / k**0.5, random(n), torch.arange(n)
    options = {}
    if fused in ("norm", "geglu"):
        options["norm"] = "layer"
    if fused == "residual":
        options["residual"] = random(1, rows, n).to(dtype)
    if fused == "affine":
        options["affine"] = random(1, 2, k).abs()
    if fused == "geglu":
        options["activation"], order = "geglu", ops.geglu_rows(n // 2)
    weight = PackedWeight.pack(matrix[order][None], libraries.GPU_PRECISIONS[precision]).for_device(device)
    ordered = bias[order]

    def native(impl: str) -> Tensor:
        return ops.linear(x, weight, ordered, x2=x2, impl=impl, **options)

    def eager(dtype: torch.dtype = dtype, rows: slice = slice(None)) -> Tensor:
        a = torch.cat([t[:, rows].to(dtype) for t in sources], -1)
        a = F.layer_norm(a, (k,)) if "norm" in options else a
        if "affine" in options:
            a = a * options["affine"][:, :1].to(dtype) + options["affine"][:, 1:].to(dtype)
        result = F.linear(a, matrix.to(dtype), bias.to(dtype))
        if fused == "geglu":
            values, gates = result.chunk(2, -1)
            return values * F.gelu(gates)
        return result + options["residual"][:, rows].to(dtype) if "residual" in options else result

    ours = variants_of("linear", device, native, all_levels=case == MAIN)
    few = slice(0, 64)
    exact = eager(torch.float64, few)
    for variant in ours.values():
        libraries.require_parity(variant()[:, few], exact, precision)
    library, _ = libraries.NAMES[device]
    variants = library_variant(library, lambda: libraries.linear(rows, matrix, bias, precision))
    # Beside 8 bits it would take minutes where a CPU has no instructions for bfloat16.
    if precision != "int8" or not libraries.emulates_bfloat16(device):
        variants["eager"] = eager
    facts = {"case": case, "precision": precision, "gflop": 2 * rows * k * n / 1e9}
    keep(side_by_side(variants | ours, device, rounds=10, seconds=6, **facts))
