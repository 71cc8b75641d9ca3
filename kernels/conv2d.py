"""`conv2d` on a GPU: a kernel that prepares, rounds and pads the image, where it needs it, and one that multiplies.

Images of 8 bits have one scale and one zero each, which the padding has, too, so that every position counts alike.
"""

from typing import TYPE_CHECKING

from vpd_fast.kernels import _narrow_cuda
from vpd_fast.kernels._gemm import Epilogue, gemm
from vpd_fast.kernels._prologue import Geometry, prepare

if TYPE_CHECKING:
    from vpd_fast.ops.conv2d import Conv2dArguments


def forward(call: "Conv2dArguments", backend: str = "triton", preparation: str = "triton") -> None:
    """Fills call.out. Last strides are 1 and vectors contiguous.

    backend: of the product, as in `_gemm.gemm`. preparation: what prepares the image, as in `_prologue.prepare`.
    Images of few channels need no preparation in CUDA C++. The four phases of `upsample` read the same prepared image.
    """
    if (backend, preparation) == ("cuda", "cuda") and _narrow_cuda.fits(call):
        _narrow_cuda.forward(call)
        return
    prologue = {
        "scale_shift": call.scale_shift,
        "silu": call.silu,
        "input_scale": call.input_scale,
        "ranges": call.ranges,
        "backend": preparation,
    }
    rows = prepare(call.x, call.x2, call.data.dtype, **prologue, padding=call.margins, per_image=True)
    for phase in call.phases():
        # Zeros above and to the left that are still missing, or, if negative, what the phase does not read.
        top, left = (wanted - present for wanted, present in zip(phase.padding, rows.padding, strict=False))
        kernel, (_, height, width, _) = (phase.kernel[0], phase.kernel[1]), phase.out.shape
        geometry = Geometry(height, width, kernel, phase.stride, max(0, top), max(0, left))
        statistics = None if phase.statistics is None else (phase.statistics, phase.run)
        epilogue = Epilogue(phase.scales, phase.weight_sums, phase.bias, phase.activation, phase.residual, statistics)
        weight = phase.weight.numbers()[0].contiguous()
        gemm(rows.without(max(0, -top), max(0, -left)), geometry, weight, epilogue, phase.out, backend)
