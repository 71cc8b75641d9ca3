"""Whether a model's output is finite, and how results get from a GPU into the computer's memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NOT_FINITE = (
    "the model's output has values that are not finite (NaN or infinity); its weights are damaged, or too large for "
    "its precision"
)


class FiniteCheck:
    """Collects outputs of a model for some images, and tells of each image whether all of its values are finite.

    argmax and thresholds would make an answer of NaN. Nothing here waits for a GPU.
    """

    def __init__(self) -> None:
        self._verdicts: list[Tensor] = []

    def see(self, values: Tensor) -> None:
        """Take in values (images, ...): two reductions on their device."""
        flat = values.flatten(1)
        self._verdicts += ((extreme * 0).float() for extreme in (flat.amin(1), flat.amax(1)))

    def verdict(self) -> Tensor:
        """Return 0 for each image, or NaN: (images,) float32, on the device."""
        return torch.stack(self._verdicts).sum(0)


class Transfer:
    """Tensors on their way from a GPU into the computer's memory; those of the CPU are there already."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            # Page-locked memory is filled while the program goes on.
            self._tensors = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
            )
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> tuple[np.ndarray, ...]:
        """Return them as arrays."""
        if self._event is not None:
            self._event.synchronize()
        return tuple(tensor.numpy() for tensor in self._tensors)
