"""What kernels are compiled to for an H200, without one: `python -m tests.kernels.compiled` prints it as JSON.

The interpreter rounds as Python is written; a compiler may join a product and a sum, or divide with two units of error.
"""

from __future__ import annotations

import json
import re
from collections import Counter

import torch
from torch import Tensor

from vpd_fast.bench.compilation import compile_key
from vpd_fast.kernels import cross_attention_maps, cross_attention_maps_backward, linear, upsample_argmax
from vpd_fast.kernels.recording import recording
from vpd_fast.kernels.specialization import specialize
from vpd_fast.ops import PackedWeight, registry

LEFT_OUT = ("_gemm_kernel", "_merge_kernel", "_reduce_kernel")  # sums in which the compiler may do as it likes
INSTRUCTION = re.compile(r"^\s+(?:@!?%p\d+ )?((?:fma|mul|add|sub|div)\.[a-z0-9.]*f32)", re.MULTILINE)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_everything() -> None:
    """Rows of 8 bits; attention of 16 bits with maps in one pass, in two, and backward; labels."""
    scales = empty(1, 64, dtype=torch.float32)
    for precision in (torch.int8, torch.float8_e4m3fn):
        sums = scales if precision == torch.int8 else None
        weight = PackedWeight(empty(1, 64, 320, dtype=precision), scales, sums, 64, 320)
        linear.forward(registry()["linear"].bind(empty(1, 64, 320), weight, out=empty(1, 64, 64)))
    q, k, maps = empty(2, 4096, 320), empty(1, 77, 320), empty(2, 4096, 77, dtype=torch.float32)
    options = {"heads": 8, "scale": 0.1, "weight": 0.2, "categories": None, "average_heads": True}
    for one_pass in (True, False):
        cross_attention_maps.forward(q, k, k, q, maps, maps, **options, one_pass=one_pass)
    cross_attention_maps_backward.backward(q, maps, q, k, k, q, k, k, **options)
    axis, logits = (empty(64, 2, dtype=torch.int64), empty(64, 2, dtype=torch.float32)), empty(1, 1, 1, 9, 8, 8)
    upsample_argmax.forward(logits, axis, axis, empty(1, 64, 64, dtype=torch.int64))


def main() -> None:
    """One line per kernel: its name, the dtype of its result, and how often each instruction of float32 is in it."""
    launches = []
    with recording(lambda kernel, _, arguments: launches.append((kernel, arguments))):
        launch_everything()
    for kernel, arguments in launches:
        if kernel.__name__ not in LEFT_OUT:
            code = compile_key(specialize(kernel, arguments)[0], "sm_90").asm["ptx"]
            dtype = str(arguments["out"].dtype).removeprefix("torch.") if "out" in arguments else ""
            print(json.dumps([kernel.__name__, dtype, Counter(INSTRUCTION.findall(code))]))


if __name__ == "__main__":
    main()
