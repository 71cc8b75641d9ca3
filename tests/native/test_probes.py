"""The probes of the hardware, as far as the emulation has what they ask for: what they compute, and that they end."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from .devices import H200

LINE = 128  # bytes
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def probes(cuda: ModuleType) -> ModuleType:
    cuda.configure(*H200._replace(processors=2))
    return cuda


def known(cuda: ModuleType, *tensors: torch.Tensor) -> list[int]:
    """Announces tensors to the emulation, and returns their addresses."""
    cuda.announce([(t.data_ptr(), t.nbytes, True) for t in tensors])
    return [t.data_ptr() for t in tensors]


def test_copies_come_and_are_counted(probes: ModuleType) -> None:
    source = torch.randn(64, LINE // 2).to(torch.bfloat16)
    clocks, failed = torch.full((3,), -1), torch.zeros(1, dtype=torch.int32)
    addresses = known(probes, source, clocks, failed)
    for stages in (1, 3):
        clocks.fill_(-1)
        probes.copy_boxes(addresses[0], 64, 3, 1, 7, 16, stages, *addresses[1:], 0)
        assert (clocks >= 0).all()
        assert not failed.any()
    for cluster in (2, 4):  # each block loads a part of every box and sends it to all
        clocks, failed = torch.full((4,), -1), torch.zeros(1, dtype=torch.int32)
        addresses = known(probes, source, clocks, failed)
        probes.copy_boxes(addresses[0], 64, 4, cluster, 7, 16, 2, *addresses[1:], 0)
        assert (clocks >= 0).all()
        assert not failed.any()
    with pytest.raises(RuntimeError):
        probes.copy_boxes(addresses[0], 64, 3, 1, 7, 24, 2, *addresses[1:], 0)  # boxes do not divide the region


@pytest.mark.parametrize("copy_lines", [0, 16])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_products_repeat_the_same_sums(probes: ModuleType, dtype: torch.dtype, copy_lines: int) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 9, (256, LINE // dtype.itemsize), generator=generator).to(dtype)
    # As it lies in shared memory: 16-byte pieces of a line change places by its number.
    pieces = numbers.view(torch.int8).view(256, 8, 16)
    order = torch.arange(8)[None] ^ (torch.arange(256) % 8)[:, None]
    operands = torch.empty_like(pieces)
    operands.scatter_(1, order[..., None].expand(-1, -1, 16), pieces)
    source = torch.zeros(64, LINE, dtype=torch.int8)
    sums, clocks = torch.full((1, 256), float("nan")), torch.full((1,), -1)
    boxes, failed = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    addresses = known(probes, operands, source, sums, clocks, boxes, failed)
    name, steps = str(dtype).removeprefix("torch."), 3
    probes.multiply(name, *addresses[:2], 64, 1, 128, steps, copy_lines, *addresses[2:], 0)
    exact = steps * (numbers[:128].double() @ numbers[128:].double().T).sum()
    assert sums.double().sum() == exact
    assert clocks[0] >= 0
    assert not failed.any()
    assert bool(copy_lines) == (boxes[0] > 0)


def test_tiles_are_read_where_the_descriptor_says(probes: ModuleType, monkeypatch) -> None:
    """First lines and distances that the emulation takes; it swizzles by address, as one expects of the hardware."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    hardware = importlib.import_module("measuring.hardware")
    cases = [(0, 8, 0), (8, 10, 0), (16, 18, 0), (0, 9, 0)]
    assert {(apart, offset) for _, apart, offset in cases} <= {case[1:] for case in hardware.tile_cases()}
    left, right = (torch.randint(-128, 128, (lines, LINE), dtype=torch.int8) for lines in (256, 64))
    starts, aparts, offsets = (torch.tensor(x, dtype=torch.int32) for x in zip(*cases, strict=True))
    sums = torch.full((len(cases), 64, 64), -1, dtype=torch.int32)
    a, b, *places = known(probes, left, right, starts, aparts, offsets, sums)
    probes.multiply_tiles(a, b, len(cases), 256, *places, 0)
    assert torch.equal(sums, hardware.expected_tiles(left, right, starts, aparts))


@pytest.mark.parametrize("dependent", [False, True])
def test_launches_follow_each_other(probes: ModuleType, dependent: bool) -> None:
    weights, numbers = torch.zeros(3, 64, dtype=torch.int8), torch.zeros(3, dtype=torch.int32)
    addresses = known(probes, weights, numbers)
    probes.launches()
    probes.launch_many(addresses[0], 64, 5, 3, True, dependent, addresses[1], 0)
    assert probes.launches() == 5
    assert numbers.tolist() == [5, 5, 5]
