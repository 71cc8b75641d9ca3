"""Whether a model's output is finite: argmax and thresholds would make an answer of NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from vpd_fast.errors import ImageError

NOT_FINITE = (
    "the model's output has values that are not finite (NaN or infinity); its weights are damaged, or too large for "
    "its precision"
)


class FiniteCheck:
    """Collects outputs of a model for one image and raises ImageError unless all of their values are finite.

    Nothing waits for a GPU until `fetch` copies a result to the computer's memory, which waits anyway.
    """

    def __init__(self) -> None:
        self._extremes: list[Tensor] = []

    def see(self, values: Tensor) -> None:
        """Take in values of any shape: one reduction on their device."""
        self._extremes += (extreme.float() for extreme in torch.aminmax(values))

    def fetch(self, values: Tensor) -> Tensor:
        """Return `values` in the computer's memory. Raises ImageError unless what was seen so far is finite."""
        verdict = self._verdict()
        if verdict.is_cuda:
            # Page-locked memory is filled while the program goes on, and is there once `values` are.
            verdict = torch.empty((), pin_memory=True).copy_(verdict, non_blocking=True)
        fetched = values.cpu()
        if verdict.item() != 0:
            raise ImageError(NOT_FINITE)
        return fetched

    def require(self) -> None:
        """Raise ImageError unless what was seen so far is finite, for results that stay on their device."""
        if self._verdict().item() != 0:
            raise ImageError(NOT_FINITE)

    def _verdict(self) -> Tensor:
        return (torch.stack(self._extremes) * 0).sum()  # 0, or NaN
