"""What the operators that multiply by a packed weight share: their arguments, checks, and calls of kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from vpd_fast import _native
from vpd_fast.errors import InputError
from vpd_fast.ops._checks import check, check_choice, check_not_expanded, check_places, check_tensor
from vpd_fast.ops._choices import WORDS, Shape
from vpd_fast.ops._dispatch import WRITTEN, Implementation, Op, SymInt, register
from vpd_fast.ops._layout import contiguous, dtype_name, last_contiguous, leading_strides
from vpd_fast.ops.availability import triton_missing
from vpd_fast.ops.packing import FLOAT8, PANEL, WIDTHS, PackedWeight

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMAGES = ("x", "x2", "residual", "out", "rounding", "x_rounding")
ROUNDED = torch.int8  # of activations whose columns were rounded by what made them (`rounding.py`)
VECTORS = ("data", "scales", "weight_sums", "bias", "scale_shift", "input_scale", "ranges")
CPU_DTYPES = (*WIDTHS,)  # of activations and weights in native kernels
ACTIVATIONS = (None, "relu", "silu", "geglu")
MAX_COLUMNS_8_BITS = 1 << 16  # 255 * 127 * this is below 2^31: no sum of products leaves int32


@dataclass(frozen=True)
class GemmArguments:
    """What operators that multiply by a packed weight have in common; see their public functions."""

    x: Tensor
    x2: Tensor | None
    data: Tensor
    scales: Tensor | None
    weight_sums: Tensor | None
    n: SymInt
    bias: Tensor | None
    scale_shift: Tensor | None
    input_scale: Tensor | None
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
        """The weight that `data`, `scales`, `weight_sums` and `n` are parts of."""
        return PackedWeight(self.data, self.scales, self.weight_sums, self.n, self.columns)

    def public(self) -> dict[str, Any]:
        """Return the arguments of the public function that makes these."""
        names = ("x", "x2", "weight", "bias", "residual", "out")
        given = {name: getattr(self, name) for name in names}
        return given | {
            "affine": self.scale_shift,
            "scale": self.input_scale,
            "activation": self.activation or None,
        }

    @property
    def is_rounded(self) -> bool:
        """Whether the sources are numbers of 8 bits, which are multiplied as they are."""
        return self.x.dtype == ROUNDED

    @property
    def margins(self) -> Sequence[int]:
        """Zeros around the image that kernels for GPUs prepare: top, left, bottom, right."""
        return (0, 0, 0, 0)

    @property
    def has_prologue(self) -> bool:
        """Whether anything is done to the sources but rounding."""
        parts = (getattr(self, name, None) for name in ("norm", "silu", "scale_shift", "input_scale"))
        return any(part is not None and part is not False for part in parts)

    def dense(self) -> Self:
        """These arguments with channels next to each other and contiguous vectors, copied where need be."""
        images = {name: last_contiguous(getattr(self, name, None)) for name in IMAGES}
        vectors = {name: contiguous(getattr(self, name, None)) for name in VECTORS}
        changed = {name: t for name, t in (images | vectors).items() if t is not getattr(self, name, None)}
        return replace(self, **changed) if changed else self

    def keep(self, out: Tensor) -> None:
        """Copies the result of dense arguments to where it belongs, if it is not there."""
        if out is not self.out and out.data_ptr() != self.out.data_ptr():
            self.out.copy_(out.view(self.out.shape))


Run = Callable[[Any], None]
# The fields of `GemmArguments` in their order.
Checked = tuple[
    Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, int,
    Tensor | None, Tensor | None, Tensor | None, str, Tensor | None, Tensor,
]  # fmt: skip


def check_sources(x: Any, x2: Any, words: str, dtypes: Sequence[torch.dtype] = DTYPES) -> int:
    """The channels of both sources. Raises InputError unless they have dimensions of those words, the last channels."""
    check_tensor("x", x, f"{words}1", dtypes, "B")
    if x2 is None:
        return x.shape[-1]
    check_tensor("x2", x2, f"{words}2", dtypes, "B", **dict(zip(words.split(), x.shape, strict=False)))
    return x.shape[-1] + x2.shape[-1]


def check_weight(weight: Any, k: int, activation: str | None, matrices: int | None = 1) -> int:
    """The number of output columns. Raises InputError unless `weight` has k columns and so many matrices, None: as many
    as `winograd_weight` makes."""
    if not isinstance(weight, PackedWeight):
        expected = "PackedWeight" if matrices else "PackedWeight of winograd_weight(...)"
        raise InputError(f"weight must be a {expected}, got {type(weight).__name__}")
    check(
        matrices in (None, weight.matrices),
        f"weight must have {'one matrix' if matrices == 1 else f'{matrices} matrices'}, got {weight.matrices}",
    )
    if weight.k != k:  # torch.compile can not trace a message of sizes that it does not know
        raise InputError(f"weight must have {k} columns as the input says, got {weight.k}")
    if weight.dtype == torch.int8 and weight.k > MAX_COLUMNS_8_BITS:
        raise InputError(f"weight of 8 bits must have at most {MAX_COLUMNS_8_BITS} columns, got {weight.k}")
    check_choice("activation", activation, ACTIVATIONS)
    if activation != "geglu":
        return weight.n
    if weight.n % 2:
        raise InputError(f"weight must have an even number of rows for geglu, got {weight.n}")
    return weight.n // 2


def check_gemm(
    op: str,
    shape: dict[str, int],
    x: Tensor,
    x2: Tensor | None,
    weight: PackedWeight,
    bias: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
    out_dtypes: Sequence[torch.dtype] = DTYPES,
) -> Checked:
    """The arguments that all share, with memory for the result. Raises InputError unless they fit each other.

    shape: of the result, by names of its dimensions. out_dtypes: it may have. Sources and weight have been checked.
    """
    channels = x.shape[-1] + (0 if x2 is None else x2.shape[-1])
    if bias is not None:
        check_tensor("bias", bias, "N", DTYPES[:1], N=weight.n)
    if affine is not None:
        check_tensor("affine", affine, "B 2 C", DTYPES[:1], "B", **{"B": x.shape[0], "2": 2, "C": channels})
    if scale is not None:
        check_tensor("scale", scale, "C", DTYPES[:1], C=channels)
    if residual is not None:
        check_tensor("residual", residual, " ".join(shape), DTYPES, "B", **shape)
    check_choice("out_dtype", out_dtype, (None, *out_dtypes))
    if out is None:
        out = x.new_empty(tuple(shape.values()), dtype=out_dtype or x.dtype)
    else:
        check_tensor("out", out, " ".join(shape), out_dtypes, "B", **shape)
        check(out_dtype in (None, out.dtype), f"out must be of out_dtype={out_dtype}, got {out.dtype}")
        check_not_expanded("out", out)
    tensors = {"x": x, "x2": x2, "weight": weight.data, "bias": bias, "affine": affine, "scale": scale}
    check_places(op, x.device, tensors | {"residual": residual, "out": out})
    packed = weight.data, weight.scales, weight.weight_sums, weight.n
    return x, x2, *packed, bias, affine, scale, activation or "", residual, out


def cpu_refuses(call: GemmArguments) -> str | None:
    """Why the native kernel cannot run on these arguments, or None."""
    if call.x.device.type != "cpu":
        return f"x is on {call.x.device}, not on the CPU"
    for tensor in (call.x, call.x2, call.data, call.residual, call.out):
        if tensor is not None and tensor.dtype not in CPU_DTYPES:
            return f"no native kernel computes in {dtype_name(tensor)}"
    if call.is_rounded or call.out.dtype == ROUNDED or getattr(call, "x_out", None) is not None:
        return "rows that were rounded before, and such that are to be, are for GPUs"
    if call.data.dim() == 3:
        return 'weight is laid out for a GPU; PackedWeight.for_device("cpu") changes that'
    if any(getattr(call, name, None) is not None for name in ("ranges", "statistics")):
        return "statistics and ranges are for kernels that round whole images"
    return _native.why_missing("_C")


def triton_refuses(call: GemmArguments) -> str | None:
    """Why the Triton kernels of a product cannot run on these arguments, or None."""
    x, data = call.x, call.data
    reason = triton_missing(x)
    if reason is not None:
        return reason
    if data.dtype == FLOAT8 and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return f"{torch.cuda.get_device_name(x.device)} has no 8-bit floating point (compute capability 8.9 has)"
    if call.activation == "geglu" and call.n % PANEL:
        return f"geglu of {call.n // 2} values, which are no runs of {PANEL // 2}"
    from vpd_fast.kernels._limits import product_refuses

    return product_refuses(x, call.x2, data, call.residual, call.out, call.margins)


def cuda_refuses(call: GemmArguments) -> str | None:
    """Why the CUDA C++ kernels of a product cannot run on these arguments, or None."""
    if call.x.device.type != "cuda":
        return f"x is on {call.x.device}, not on a GPU"
    reason = triton_refuses(call)  # whose kernels prepare the rows
    if reason is not None:
        return reason
    from vpd_fast.kernels import _gemm_cuda

    return _gemm_cuda.refuse(call.x, call.x2, call.data.dtype, call.has_prologue)


def cuda_rows_refuses(call: GemmArguments) -> str | None:
    """Why CUDA C++ kernels cannot both prepare the rows of a product and compute it, or None."""
    if call.x.device.type == "cuda" and triton_refuses(call) is None:  # without which kernels cannot be imported
        from vpd_fast.kernels import _narrow_cuda

        if _narrow_cuda.fits(call):
            return _native.why_missing("_C_cuda")
    reason = cuda_refuses(call)
    if reason is not None:
        return reason
    if getattr(call, "x_out", None) is not None:
        return "x itself is to be rounded, too"
    from vpd_fast.kernels import _prologue_cuda

    return _prologue_cuda.refuse(call.x, call.x2, call.data.dtype)


def library_refuses(call: Any) -> str | None:
    """Why cuBLAS or cuDNN, between two Triton kernels, cannot compute a product, or None."""
    reason = triton_refuses(call)  # whose kernels prepare the rows, and finish the sums
    if reason is not None:
        return reason
    from vpd_fast.kernels import _library

    return _library.refuse(call)


def shape_of(call: GemmArguments) -> Shape:
    """Returns what decides which implementation of a product is fastest; sizes: rows, columns of the result, of A."""
    (height, width), stride = getattr(call, "kernel", (1, 1)), getattr(call, "stride", 1)
    key = f"{WORDS[call.data.dtype]} {height}x{width}/{stride}"
    if getattr(call, "upsample", False):
        key += " enlarging"
    if call.x2 is not None:
        key += " sources2"
    if call.activation:
        key += f" {call.activation}"
    if call.residual is not None:
        key += " residual"
    if getattr(call, "statistics", None) is not None:
        key += " statistics"
    out = call.out
    return Shape(key, (out.numel() // out.shape[-1], call.n, call.columns))


def operator(name: str, arguments: type, public: Callable[..., Any], cpu: Run, reference: Run, gpu: bool = True) -> Op:
    """Registers an operator that multiplies by a packed weight. gpu: `kernels/<name>.py` computes it on GPUs."""

    def run_cpu(call: Any) -> None:
        if call.out.numel():
            cpu(call)

    def run_gpu(call: Any, backend: str, preparation: str) -> None:
        if call.out.numel():
            dense = call.dense()
            importlib.import_module(f"vpd_fast.kernels.{name}").forward(dense, backend, preparation)
            call.keep(dense.out)

    on_gpu = (  # by what multiplies, and by what prepares its rows
        ("triton", triton_refuses, "triton", "triton"),
        ("cuda", cuda_refuses, "cuda", "triton"),
        ("library", library_refuses, "library", "triton"),
        ("cuda_rows", cuda_rows_refuses, "cuda", "cuda"),
    )
    implementations = (
        Implementation("cpu", run_cpu, cpu_refuses),
        *(
            Implementation(impl, partial(run_gpu, backend=backend, preparation=preparation), refuse)
            for impl, refuse, backend, preparation in on_gpu
            if gpu
        ),
        Implementation("reference", reference),
    )
    return register(Op(name, arguments, implementations, public, shape=shape_of if gpu else None))


def native_arguments(call: GemmArguments) -> dict[str, Any]:
    """What all native kernels of a product take, from dense arguments, which must live while the kernel runs."""
    vectors = (call.data, call.scales, call.weight_sums, call.bias, call.scale_shift, call.input_scale)
    addresses = tuple(0 if x is None else x.data_ptr() for x in vectors)
    weight, silu = (addresses[:3], dtype_name(call.data), call.n, call.columns), getattr(call, "silu", False)
    ends = call.activation, _image(call.residual), _image(call.out)
    gemm = (_image(call.x), _image(call.x2), weight, addresses[3:], silu, *ends)
    return {"gemm": gemm, "threads": torch.get_num_threads(), "isa": _native.isa()}


def _image(x: Tensor | None) -> tuple[int, str, int, tuple[int, ...]] | None:
    """Address, dtype, channels and the three strides that the kernel reads; (B, rows, C) has two."""
    return None if x is None else (x.data_ptr(), dtype_name(x), x.shape[-1], (*leading_strides(x), 0)[:3])
