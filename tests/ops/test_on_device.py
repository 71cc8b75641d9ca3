"""That moving arguments to another device and back changes nothing: the CPU stands in for the GPU."""

from __future__ import annotations

import torch

from vpd_fast import ops
from vpd_fast.ops.packing import PackedWeight

from .on_device import moved
from .statistics_cases import empty_statistics


def test_results_and_what_is_written_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(3, 70, 40, generator=generator)
    x, residual = memory[:, :64, 3:19], memory[:1, 1:65, 21:27].expand(3, -1, -1)
    weight = PackedWeight.pack(torch.randn(1, 6, 16, generator=generator), torch.float32)
    buffer, before = torch.full((3, 64, 10), -7.0), memory.clone()
    out, statistics, known = buffer[..., 2:8], empty_statistics(3, 64, 6), empty_statistics(3, 64, 6)
    result = moved(ops.linear, "cpu")(x, weight, residual=residual, out=out, statistics=statistics, impl="reference")
    assert result is out
    assert torch.equal(out, ops.linear(x, weight, residual=residual, statistics=known, impl="reference"))
    assert torch.equal(statistics.data, known.data)
    assert (buffer[..., :2] == -7).all()
    assert (buffer[..., 8:] == -7).all()
    assert torch.equal(memory, before)


def test_a_residual_that_is_the_result_is_one_tensor_there() -> None:
    x, weight = torch.randn(1, 4, 8), PackedWeight.pack(torch.randn(1, 8, 8), torch.float32)
    out = x.clone()
    assert moved(ops.linear, "cpu")(x, weight, residual=out, out=out) is out
    assert torch.equal(out, ops.linear(x, weight, residual=x))
