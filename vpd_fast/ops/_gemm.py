"""What `linear` and `conv2d` share: checks of arguments, the arithmetic of the reference, arguments of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.ops._checks import check, check_tensor
from vpd_fast.ops._dispatch import WRITTEN, SymInt
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.packing import FLOAT8, PANEL, WIDTHS, PackedWeight, geglu_rows
from vpd_fast.ops.rounding import range_of_rows, rounded_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_DTYPES = (*WIDTHS,)  # of activations and weights in native kernels
ACTIVATIONS = (None, "relu", "silu", "geglu")
MOST_COLUMNS_8_BITS = 1 << 16  # 255 * 127 * this is below 2^31: no sum of products leaves int32


@dataclass(frozen=True)
class GemmArguments:
    """What operators that multiply by a packed weight have in common; see their public functions."""

    x: Tensor
    x2: Tensor | None
    data: Tensor
    scales: Tensor | None
    sums: Tensor | None
    n: SymInt
    bias: Tensor | None
    affine: Tensor | None
    scale: Tensor | None
    activation: str
    residual: Tensor | None
    out: Annotated[Tensor, WRITTEN]

    @property
    def channels(self) -> int:
        """Number of channels of both sources together."""
        return self.x.shape[-1] + (0 if self.x2 is None else self.x2.shape[-1])

    @property
    def columns(self) -> int:
        """Number of columns of the weight."""
        return self.channels

    @property
    def weight(self) -> PackedWeight:
        """The weight that `data`, `scales`, `sums` and `n` are parts of."""
        return PackedWeight(self.data, self.scales, self.sums, self.n, self.columns)


def check_weight(weight: Any, k: int, activation: str | None, taps: int = 1) -> int:
    """The number of output columns. Raises InputError unless `weight` has k columns and so many taps."""
    kind = type(weight).__name__
    check(isinstance(weight, PackedWeight), f"weight must be a PackedWeight, got {kind}")
    check(weight.taps == taps, f"weight must have {'one tap' if taps == 1 else f'{taps} taps'}, got {weight.taps}")
    if weight.k != k:  # torch.compile can not trace a message of sizes that it does not know
        raise InputError(f"weight must have {k} columns as the input says, got {weight.k}")
    if weight.dtype == torch.int8 and weight.k > MOST_COLUMNS_8_BITS:
        raise InputError(f"weight of 8 bits must have at most {MOST_COLUMNS_8_BITS} columns, got {weight.k}")
    check(activation in ACTIVATIONS, f"activation must be None, 'relu', 'silu' or 'geglu', got {activation!r}")
    if activation != "geglu":
        return weight.n
    if weight.n % 2:
        raise InputError(f"weight must have an even number of rows for geglu, got {weight.n}")
    return weight.n // 2


def check_vectors(bias: Any, affine: Any, scale: Any, *, n: int, batch: int, channels: int) -> None:
    """Raises InputError unless each is None or a float32 tensor: (n), (batch, 2, channels) and (channels)."""
    if bias is not None:
        check_tensor("bias", bias, "N", DTYPES[:1], N=n)
    if affine is not None:
        check_tensor("affine", affine, "B 2 C", DTYPES[:1], "B", **{"B": batch, "2": 2, "C": channels})
    if scale is not None:
        check_tensor("scale", scale, "C", DTYPES[:1], C=channels)


def check_out(out: Any, out_dtype: torch.dtype | None, x: Tensor, shape: dict[str, int]) -> Tensor:
    """`out`, or a new tensor. Raises InputError unless it has that dtype and shape (sizes by their names)."""
    check(out_dtype in (None, *DTYPES), f"out_dtype must be None, float32, bfloat16 or float16, got {out_dtype!r}")
    if out is None:
        return x.new_empty(tuple(shape.values()), dtype=out_dtype or x.dtype)
    check_tensor("out", out, " ".join(shape), DTYPES, "B", **shape)
    check(out_dtype in (None, out.dtype), f"out must be of out_dtype={out_dtype}, got {out.dtype}")
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise InputError(f"out must not be expanded: its elements share memory (strides {out.stride()})")
    return out


def check_places(op: str, device: torch.device, tensors: dict[str, Tensor | None]) -> None:
    """Raises InputError for a tensor on another device, and for one that requires gradients while they are recorded."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check(tensor.device == device, f"{name} must be on {device} as x is, got {tensor.device}")
        check(
            not (torch.is_grad_enabled() and tensor.requires_grad),
            f"{name} requires gradients, which {op} does not compute: call it under torch.no_grad()",
        )


# --- the reference ----------------------------------------------------------------------------------------------------


def joined(x: Tensor, x2: Tensor | None) -> Tensor:
    """cat([x, x2], -1) as float32, contiguous: in which order PyTorch sums would otherwise depend on the strides."""
    return (x if x2 is None else torch.cat([x.float(), x2.float()], dim=-1)).float().contiguous()


def prologue(a: Tensor, affine: Tensor | None, silu: bool, scale: Tensor | None) -> Tensor:
    """silu(a * affine[:, 0] + affine[:, 1]) * scale of a (B, ..., C), of which any part may be missing."""
    if affine is not None:
        by_channel = affine.unflatten(1, (2, *[1] * (a.dim() - 2)))
        a = a * by_channel[:, 0] + by_channel[:, 1]
    a = F.silu(a) if silu else a
    return a if scale is None else a * scale


def product(a: Tensor, weight: PackedWeight, ranges: Tensor | None = None) -> Tensor:
    """Rows (B, ..., k) float32 times the weight, in its precision: (B, ..., n) float32.

    ranges: (B, 2, parts), of whole images, from which 8-bit rows then have their scale.
    """
    if weight.scales is None:
        return a.to(weight.dtype).float() @ weight.unpack()[0].T
    whole, scale = rounded_rows(a, weight.dtype, range_of_rows(a, ranges))
    if weight.dtype == FLOAT8:
        return (whole @ weight.numbers()[0].float().T) * (scale * weight.scales[0])
    exact = whole.double() @ weight.numbers()[0].double().T
    return exact.float() * (scale * weight.scales[0])


def finish(result: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, out: Tensor) -> None:
    """Stores activation(result + bias) + residual."""
    result = result if bias is None else result + bias
    if activation == "geglu":
        order = geglu_rows(result.shape[-1] // 2).to(result.device)
        values, gates = result[..., torch.argsort(order)].chunk(2, -1)
        result = values * F.gelu(gates)
    elif activation:
        result = F.relu(result) if activation == "relu" else F.silu(result)
    out.copy_(result if residual is None else result + residual)


# --- the kernels ------------------------------------------------------------------------------------------------------


def cpu_refuses(call: GemmArguments) -> str | None:
    """Why the native kernel cannot run on these arguments, or None."""
    if call.x.device.type != "cpu":
        return f"x is on {call.x.device}, not on the CPU"
    for tensor in (call.x, call.x2, call.data, call.residual, call.out):
        if tensor is not None and tensor.dtype not in CPU_DTYPES:
            return f"no native kernel computes in {_name(tensor.dtype)}"
    if call.data.dim() == 3:
        return 'weight is laid out for a GPU; PackedWeight.for_device("cpu") changes that'
    if any(getattr(call, name, None) is not None for name in ("ranges", "statistics")):
        return "statistics and ranges are for kernels that round whole images"
    return _native.why_missing("_C")


def triton_refuses(call: GemmArguments, padding: Sequence[int] = (0, 0, 0, 0)) -> str | None:
    """Why the Triton kernels of a product cannot run on an operator's arguments, or None."""
    x, data = call.x, call.data
    reason = triton_missing(x)
    if reason is not None:
        return reason
    if data.dtype == FLOAT8 and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return f"{torch.cuda.get_device_name(x.device)} has no 8-bit floating point (compute capability 8.9 has)"
    if call.activation == "geglu" and call.n % PANEL:
        return f"geglu of {call.n // 2} values, which are no runs of {PANEL // 2}"
    from vpd_fast.kernels import _limits, _rows

    return _rows.refuse(x, call.x2) or _limits.product_refuses(x, call.x2, data, call.residual, call.out, padding)


def triton_weight(weight: PackedWeight) -> Tensor:
    """(taps, n, k) contiguous; unpacked at every call if it is laid out for a CPU."""
    return weight.numbers().contiguous()


def contiguous_or_none(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each tensor, copied if need be."""
    return [None if t is None else t.contiguous() for t in tensors]


def last_contiguous(x: Tensor | None) -> Tensor | None:
    """x, copied if its channels are not next to each other."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def evenly_spaced(x: Tensor | None) -> Tensor | None:
    """(B, rows, C) with channels next to each other: x itself, or a copy where its strides do not allow that."""
    return last_contiguous(x if x is None or x.dim() == 3 else x.flatten(1, 2))


def strided(x: Tensor | None) -> tuple | None:
    """Address, dtype, channels and the three strides that the kernel reads; (B, rows, C) has two."""
    if x is None:
        return None
    return x.data_ptr(), _name(x.dtype), x.shape[-1], (*x.stride()[:-1], 0)[:3]


def vectors_and_weight(weight: PackedWeight, *vectors: Tensor | None) -> tuple[list[Tensor | None], tuple, tuple]:
    """The tensors, which must live while the kernel runs; the weight and the vectors as the kernel takes them."""
    kept = [None if x is None else x.contiguous() for x in (weight.data, weight.scales, weight.sums, *vectors)]
    addresses = tuple(0 if x is None else x.data_ptr() for x in kept)
    return kept, (addresses[:3], _name(weight.dtype), weight.n, weight.k), addresses[3:]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
