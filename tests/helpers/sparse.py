"""Memory of which only what a test touches is there."""

from __future__ import annotations

import pytest
import torch


def untouched(elements: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """A tensor (elements,) of address space; skips the test where there is not as much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it would touch all of it
        try:
            return torch.empty(elements, dtype=dtype, device=device)
        except RuntimeError:
            pytest.skip(f"no {elements * dtype.itemsize >> 30} GiB of address space")
