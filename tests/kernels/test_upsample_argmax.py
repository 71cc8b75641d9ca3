"""The Triton kernel of upsample_argmax on tables whose sums are exact: on a GPU, or in Triton's interpreter on the CPU.

Logits are small integers and weights eighths, so float32 and float64 agree to the last bit, and labels must be equal.
Labels start as -7, so what is not written shows.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are interpreted or compiled as decided when defined
pytest.importorskip("triton")

from vpd_fast.kernels import upsample_argmax as kernels  # noqa: E402
from vpd_fast.kernels._common import INTERPRETED  # noqa: E402

from ..helpers.sparse import untouched  # noqa: E402

GPU_TILE = (8, 32)
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not INTERPRETED.value, reason="interpreted only without a GPU; with one, 'cuda' checks the same"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]

Table = tuple[torch.Tensor, torch.Tensor]  # sources (n, taps), weights (n, taps)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def make_table(n: int, taps: int, length: int) -> Table:
    generator = torch.Generator().manual_seed(n + taps)
    sources = torch.randint(length, (n, taps), generator=generator)
    return sources, torch.randint(1, 8, (n, taps), generator=generator) / 8


def make_logits(*shape: int) -> torch.Tensor:
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0)).float()


def exact_labels(logits: torch.Tensor, rows: Table, columns: Table) -> torch.Tensor:
    """Argmax of the sums in float64, which here are exact."""
    joined = logits.double().permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # images, channels, rows, columns
    tall = (joined[:, :, rows[0]] * rows[1].double()[:, :, None]).sum(3)
    return (tall[:, :, :, columns[0]] * columns[1].double()).sum(4).argmax(1)


def run(logits: torch.Tensor, rows: Table, columns: Table, tile: tuple[int, int] | None, device: str) -> torch.Tensor:
    labels = torch.full((logits.shape[0], len(rows[0]), len(columns[0])), -7, device=device)
    _, _, _, _, h, w = logits.shape
    _, grid_y, grid_x, _, row, column = logits.stride()
    tables = []
    for (sources, weights), length, grid, step in ((rows, h, grid_y, row), (columns, w, grid_x, column)):
        offsets = sources // length * grid + sources % length * step
        tables.append((offsets.to(device), weights.to(device)))
    kernels.forward(logits, *tables, labels, tile=tile)
    return labels.cpu()


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 8, 9])
def test_number_of_taps(taps: int, device: str) -> None:
    """Each way of the kernel to loop over taps, over windows and with tails on both sides."""
    logits = make_logits(2, 2, 3, 5, 4, 3)
    rows, columns = make_table(10, taps, 8), make_table(37, taps, 9)
    count = kernels.taps_for(taps)
    assert count >= taps
    rows, columns = (
        # More taps than there are: the first again, at zero. (A weight of zero is exact here; logits are finite.)
        (torch.cat([s, s[:, :1].expand(-1, count - taps)], 1), torch.cat([w, w.new_zeros(len(w), count - taps)], 1))
        for s, w in (rows, columns)
    )
    labels = run(logits.to(device), rows, columns, GPU_TILE, device)
    assert torch.equal(labels, exact_labels(logits, rows, columns))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8])
def test_channels_side_by_side(channels: int, device: str) -> None:
    """Beyond the last channel nothing is read, and no label is."""
    logits = torch.full((1, 1, 1, channels + 4, 4, 5), float("inf"))
    logits[:, :, :, :channels] = make_logits(1, 1, 1, channels, 4, 5) - 20
    logits = logits[:, :, :, :channels].to(device)
    rows, columns = make_table(9, 2, 4), make_table(33, 2, 5)
    labels = run(logits, rows, columns, GPU_TILE, device)
    assert torch.equal(labels, exact_labels(logits.cpu(), rows, columns))


def test_tiles_do_not_matter(device: str) -> None:
    logits = make_logits(3, 1, 1, 6, 7, 8).to(device)
    rows, columns = make_table(21, 2, 7), make_table(70, 2, 8)
    labels = [run(logits, rows, columns, tile, device) for tile in (GPU_TILE, GPU_TILE, (4, 64), None)]
    assert torch.equal(labels[0], exact_labels(logits.cpu(), rows, columns))
    assert all(torch.equal(labels[0], other) for other in labels[1:])


@pytest.mark.parametrize("dimension", range(6))
def test_offsets_of_64_bits(dimension: int, device: str) -> None:
    """Two elements of each dimension in turn lie more than 2**31 elements apart; only they are in memory."""
    shape = [1, 1, 1, 3, 2, 2]
    shape[dimension] = max(2, shape[dimension])
    strides = [1, 1, 1, 16, 4, 1]
    strides[dimension] = (1 << 31) + 8
    if dimension == 3:
        shape[3] = 2
    storage = untouched((1 << 31) + 1000, torch.bfloat16, device)
    logits = storage.as_strided(shape, strides)
    logits.copy_(make_logits(*shape))
    rows, columns = make_table(3, 2, shape[1] * 2), make_table(5, 2, shape[2] * 2)
    labels = run(logits, rows, columns, GPU_TILE, device)
    assert torch.equal(labels, exact_labels(logits.float().cpu(), rows, columns))
