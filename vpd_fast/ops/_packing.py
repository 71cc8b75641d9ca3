"""Weights in the layouts that matrix kernels read, in float32, bfloat16 or 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.errors import InputError

PANEL = 32  # rows of the weight that a kernel handles side by side
WIDTHS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # numbers along k that share 32 bits
LARGEST = 127  # of the symmetric 8-bit weights


@dataclass(frozen=True)
class PackedWeight:
    """The right factor of C[t] = A[t] @ B[t].T, with B (taps,n,k).

    data: in panels, for CPUs: (taps, ceil(n/32), ceil(k/w), 32*w), w = 1 for float32, 2 for bfloat16, 4 for int8;
        number (i, j) of B[t] is data[t, i // 32, j // w, i % 32 * w + j % w], and padding is zero. Or in rows, for
        GPUs: (taps, n, k). The numbers are the same.
    scales, sums: (taps,n) float32 for int8, else None: B = data * scales, and the sums of data over k.
    """

    data: Tensor
    scales: Tensor | None
    sums: Tensor | None
    n: int
    k: int

    @property
    def taps(self) -> int:
        """Matrices in it: 1, or the taps of a Winograd transform."""
        return self.data.shape[0]

    def tap(self, i: int) -> PackedWeight:
        """Its matrix i alone, in the same memory."""
        parts = (None if t is None else t[i : i + 1] for t in (self.data, self.scales, self.sums))
        return PackedWeight(*parts, self.n, self.k)

    @property
    def dtype(self) -> torch.dtype:
        """float32, bfloat16 or int8."""
        return self.data.dtype

    def require_consistent(self) -> None:
        """Raises ValueError unless the tensors have the shapes and dtypes that n and k say."""
        expected = (self.taps, -(-self.n // PANEL), -(-self.k // WIDTHS.get(self.dtype, 1)))
        if self.dtype not in WIDTHS or self.data.shape != (*expected, PANEL * WIDTHS[self.dtype]):
            raise ValueError(f"weight {self.n}x{self.k} is stored as {self.dtype} {tuple(self.data.shape)}")
        for name, vector in (("scales", self.scales), ("sums", self.sums)):
            if (vector is not None) != (self.dtype == torch.int8):
                raise ValueError(f"weight {self.n}x{self.k} of {self.dtype} must have {name} if it is int8, else none")
            if vector is not None and (vector.shape != (self.taps, self.n) or vector.dtype != torch.float32):
                raise ValueError(f"{name} of weight {self.n}x{self.k} are {vector.dtype} {tuple(vector.shape)}")

    @property
    def nbytes(self) -> int:
        """Memory of all its tensors."""
        return sum(x.nbytes for x in (self.data, self.scales, self.sums) if x is not None)

    @classmethod
    def pack(cls, weight: Tensor, dtype: torch.dtype) -> PackedWeight:
        """Round a floating-point weight (taps,n,k) to `dtype`; int8 symmetrically, with a scale per row.

        Raises InputError for other shapes and dtypes, and for int8 if the weight is not finite.
        """
        if weight.dim() != 3 or not weight.is_floating_point() or 0 in weight.shape:
            raise InputError(f"weight must be a floating-point tensor (taps, n, k), got {tuple(weight.shape)}")
        if dtype not in WIDTHS:
            raise InputError(f"dtype must be one of {', '.join(map(str, WIDTHS))}, got {dtype}")
        scales = sums = None
        if dtype == torch.int8:
            weight, scales = _round_to_int8(weight)
            sums = weight.sum(2, dtype=torch.int32).float()
        return cls(_panels(weight.to(dtype)), scales, sums, *weight.shape[1:])

    def for_device(self, device: torch.device | str) -> PackedWeight:
        """The same numbers on that device, in the layout that its kernels read."""
        device = torch.device(device)
        data = self.data if device.type == "cpu" else self.numbers().contiguous()
        if device.type == "cpu" and self.data.dim() == 3:
            data = _panels(self.data)
        moved = (None if t is None else t.to(device) for t in (data, self.scales, self.sums))
        return PackedWeight(*moved, self.n, self.k)

    def numbers(self) -> Tensor:
        """The stored numbers in order: (taps,n,k) of `dtype`."""
        if self.data.dim() == 3:
            return self.data
        elements = self.data.unflatten(3, (PANEL, -1)).transpose(2, 3).flatten(3).flatten(1, 2)
        return elements[:, : self.n, : self.k]

    def unpack(self) -> Tensor:
        """The weight (taps,n,k) in float32, as rounded."""
        numbers = self.numbers().float()
        return numbers if self.scales is None else numbers * self.scales[:, :, None]


def _panels(numbers: Tensor) -> Tensor:
    """(taps,n,k) -> the layout for CPUs."""
    _, n, k = numbers.shape
    width = WIDTHS[numbers.dtype]
    padded = F.pad(numbers, (0, -k % width, 0, -n % PANEL))
    data = padded.unflatten(1, (-1, PANEL)).unflatten(3, (-1, width))  # taps, panel, row, element, number
    return data.transpose(2, 3).flatten(3).contiguous()


def _round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.abs().amax(2)
    if not torch.isfinite(largest).all():
        raise InputError("weight has values that are not finite, which 8-bit integers cannot hold")
    scales = torch.where(largest > 0, largest / LARGEST, 1.0).float()
    return (weight / scales[:, :, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales
