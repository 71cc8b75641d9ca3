"""`linear` on a GPU: a kernel that prepares and rounds the rows, where they need it, and one that multiplies them."""

from typing import TYPE_CHECKING

from vpd_fast.kernels._gemm import Epilogue, gemm
from vpd_fast.kernels._prologue import Geometry, prepare

if TYPE_CHECKING:
    from vpd_fast.ops.linear import LinearArguments


def forward(call: "LinearArguments", backend: str = "triton", preparation: str = "triton") -> None:
    """Fills call.out. Last strides are 1 and vectors contiguous.

    backend: of the product, as in `_gemm.gemm`. preparation: what prepares the rows, as in `_prologue.prepare`.
    """
    x, x2, residual, out = (None if t is None else t.unsqueeze(2) for t in (call.x, call.x2, call.residual, call.out))
    weight = call.weight.numbers()[0].contiguous()
    copy = None if call.x_out is None else (call.x_rounding, call.x_out.unsqueeze(2))
    rows = prepare(
        x,
        x2,
        weight.dtype,
        norm=call.norm,
        eps=call.eps,
        scale_shift=call.scale_shift,
        input_scale=call.input_scale,
        copy=copy,
        backend=preparation,
    )
    statistics = None if call.statistics is None else (call.statistics, call.run)
    ends = call.bias, call.activation, residual, statistics, call.rounding
    epilogue = Epilogue(call.scales, call.weight_sums, *ends)
    gemm(rows, Geometry(out.shape[1], 1), weight, epilogue, out, backend)
