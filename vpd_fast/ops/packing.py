"""Weights in the layouts and number formats that matrix kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.errors import InputError, brief
from vpd_fast.ops._checks import check, check_choice, check_tensor, check_value, is_dense, is_int, kind_of

PANEL = 32  # rows of the weight that a kernel handles side by side
WIDTHS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # numbers along k that share 32 bits, on CPUs
FLOAT8 = torch.float8_e4m3fn
ROWS_ONLY = (torch.float16, FLOAT8)  # that CPUs have no kernels for
MAX_8_BITS = {torch.int8: 127, FLOAT8: 448}  # of the symmetric 8-bit weights


def geglu_rows(n: int) -> Tensor:
    """Order of the rows of a weight (2n, k), n values and their n gates, that activation="geglu" expects.

    Values and gates alternate in runs of 16 (the last run may be shorter), so that both are in one panel of the packed
    weight: `PackedWeight.pack(weight[geglu_rows(n)][None], dtype)`, and likewise the bias.
    """
    check_value(is_int(n) and n > 0, "n must be a positive integer", n)
    runs = torch.arange(n).split(PANEL // 2)
    return torch.cat([part for run in runs for part in (run, run + n)])


@dataclass(frozen=True)
class PackedWeight:
    """The right factor of C[t] = A[t] @ B[t].T, with B (matrices,n,k).

    data: in panels, for CPUs: (matrices, ceil(n/32), ceil(k/w), 32*w), w = 1 for float32, 2 for bfloat16, 4 for int8;
        number (i, j) of B[t] is data[t, i // 32, j // w, i % 32 * w + j % w], and padding is zero. Or in rows, for
        GPUs: (matrices, n, k), which float16 and float8_e4m3fn always are. The numbers are the same.
    scales: (matrices,n) float32 for int8 and float8_e4m3fn, else None: B = data * scales.
    weight_sums: (matrices,n) float32 for int8, else None: sums of data over k, by which a zero point is subtracted.

    Raises InputError unless the tensors have the shapes and dtypes that n and k say, and are on one device.
    """

    data: Tensor
    scales: Tensor | None
    weight_sums: Tensor | None
    n: int
    k: int

    def __post_init__(self) -> None:
        for name, size in (("n", self.n), ("k", self.k)):
            check_value(is_int(size) and size > 0, f"weight: {name} must be a positive integer", size)
        check(is_dense(self.data), f"weight: data must be a dense tensor, got {kind_of(self.data)}")
        shape, dtype, what = tuple(self.data.shape), self.data.dtype, f"weight {self.n}x{self.k}"
        width = WIDTHS.get(dtype, 1)
        expected: list[tuple[int, ...]] = [(self.n, self.k)]  # in rows, or in panels
        if dtype in WIDTHS:
            expected.append((-(-self.n // PANEL), -(-self.k // width), PANEL * width))
        if dtype not in (*WIDTHS, *ROWS_ONLY) or shape[1:] not in expected or not shape[0]:
            raise InputError(f"{what} is stored as {dtype} {shape}")
        for name, vector, kinds in (
            ("scales", self.scales, MAX_8_BITS),
            ("weight_sums", self.weight_sums, (torch.int8,)),
        ):
            if (vector is not None) != (dtype in kinds):
                expected_kinds = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
                raise InputError(f"{what} of {dtype}: only {expected_kinds} must have {name}")
            if vector is None:
                continue
            check_tensor(f"{name} of {what}", vector, "matrices n", (torch.float32,), matrices=shape[0], n=self.n)
            if vector.device != self.data.device:
                raise InputError(f"{name} of {what} must be on {self.data.device} as data is, got {vector.device}")

    @property
    def matrices(self) -> int:
        """Number of matrices: 1, 4 phases of an enlarging convolution, or the taps of a Winograd transform."""
        return self.data.shape[0]

    def matrix(self, i: int) -> PackedWeight:
        """Returns matrix i alone, in the same memory."""
        scales, sums = (None if t is None else t[i : i + 1] for t in (self.scales, self.weight_sums))
        return PackedWeight(self.data[i : i + 1], scales, sums, self.n, self.k)

    @property
    def dtype(self) -> torch.dtype:
        """float32, bfloat16, float16, int8 or float8_e4m3fn."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Memory of all its tensors."""
        return sum(x.nbytes for x in (self.data, self.scales, self.weight_sums) if x is not None)

    @classmethod
    def pack(cls, weight: Tensor, dtype: torch.dtype) -> PackedWeight:
        """Round a floating-point weight (matrices,n,k) to `dtype`; 8 bits symmetrically, with a scale per row.

        Raises InputError for other shapes and dtypes, and for 8 bits if the weight is not finite.
        """
        check(is_dense(weight), f"weight must be a dense tensor (matrices, n, k), got {kind_of(weight)}")
        if weight.dim() != 3 or not weight.is_floating_point() or 0 in weight.shape:
            raise InputError(f"weight must be a floating-point tensor (matrices, n, k), got {tuple(weight.shape)}")
        check_choice("dtype", dtype, (*WIDTHS, *ROWS_ONLY))
        scales = sums = None
        if dtype in MAX_8_BITS:
            weight, scales = _scaled(weight, MAX_8_BITS[dtype])
            weight = weight.round_() if dtype == torch.int8 else weight
        numbers = weight.to(dtype)
        if dtype == torch.int8:
            sums = numbers.sum(2, dtype=torch.int32).float()
        data = numbers.contiguous() if dtype in ROWS_ONLY else _panels(numbers)
        return cls(data, scales, sums, *weight.shape[1:])

    def for_device(self, device: torch.device | str) -> PackedWeight:
        """The same numbers on that device, in the layout that its kernels read. Raises InputError for no device."""
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"device must be the name of a device, got {brief(device)}") from error
        data = self.data if device.type == "cpu" else self.numbers().contiguous()
        if device.type == "cpu" and self.data.dim() == 3 and self.dtype not in ROWS_ONLY:
            data = _panels(self.data)
        scales, sums = (None if t is None else t.to(device) for t in (self.scales, self.weight_sums))
        return PackedWeight(data.to(device), scales, sums, self.n, self.k)

    def numbers(self) -> Tensor:
        """The stored numbers in order: (matrices,n,k) of `dtype`."""
        if self.data.dim() == 3:
            return self.data
        elements = self.data.unflatten(3, (PANEL, -1)).transpose(2, 3).flatten(3).flatten(1, 2)
        return elements[:, : self.n, : self.k]

    def unpack(self) -> Tensor:
        """The weight (matrices,n,k) in float32, as rounded."""
        numbers = self.numbers().float()
        return numbers if self.scales is None else numbers * self.scales[:, :, None]


def _panels(numbers: Tensor) -> Tensor:
    """Returns numbers (matrices,n,k) in panels, the layout for CPUs."""
    _, n, k = numbers.shape
    width = WIDTHS[numbers.dtype]
    padded = F.pad(numbers, (0, -k % width, 0, -n % PANEL))
    data = padded.unflatten(1, (-1, PANEL)).unflatten(3, (-1, width))  # matrices, panel, row, element, number
    return data.transpose(2, 3).flatten(3).contiguous()


def _scaled(weight: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Returns rows divided by their scales, so that they are at most `limit`, and the scales (matrices,n)."""
    largest = weight.abs().amax(2)
    try:
        finite = bool(torch.isfinite(largest).all())
    except RuntimeError as error:  # a tensor without memory
        raise InputError(f"weight has no values: it is on the {weight.device} device") from error
    if not finite:
        raise InputError("weight has values that are not finite, which 8 bits with a scale cannot hold")
    scales = torch.where(largest > 0, largest / limit, 1.0).float()
    return (weight / scales[:, :, None]).clamp_(-limit, limit), scales
