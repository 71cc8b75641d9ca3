"""Interpreted kernels that leave their arguments are found."""

from __future__ import annotations

import pytest
import torch

from vpd_fast.ops.availability import triton_missing

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(triton_missing(torch.empty(0)) is not None, reason="nothing is interpreted with a GPU")


@triton.jit
def _copy(x, y, N, last):
    columns = tl.arange(0, 16)
    tl.store(y + columns, tl.load(x + columns, mask=columns < N, other=0.0), mask=columns < last)


@pytest.mark.parametrize(("read", "written"), [(10, 10), (11, 10), (10, 11)])
def test_addresses_beyond_a_part_of_a_tensor(read: int, written: int) -> None:
    """Memory that exists, but is no argument's: what is beside x and y in theirs."""
    x, y = torch.arange(16.0)[:10], torch.zeros(16)[:10]
    if read == written:
        _copy[(1,)](x, y, read, written)
        assert torch.equal(x, y)
        return
    with pytest.raises(Exception, match="are not within one argument"):
        _copy[(1,)](x, y, read, written)
