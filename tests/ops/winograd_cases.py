"""What the tests of winograd_conv2d share: inputs, the float64 oracle, and budgets that follow from the transforms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast import ops
from vpd_fast.ops.packing import PackedWeight
from vpd_fast.ops.winograd_conv2d import _INPUT, _OUTPUT, _WEIGHT, STEPS

TAPS = tuple(STEPS)
PRECISIONS = (torch.float32, torch.bfloat16, torch.int8)
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}  # half the distance of neighbours, relative
ROUGH_SILU = 5e-5  # how far SiLU may be off in front of a rounding to 16 or 8 bits
PEAK = 3.5  # largest magnitude of a hundred normal numbers, in standard deviations


@dataclass
class Problem:
    """Arguments of winograd_conv2d, with the weight before it was transformed and packed."""

    x: Tensor
    kernel: Tensor  # (N, C, 3, 3)
    taps: int
    precision: torch.dtype
    options: dict[str, Any]

    def run(self, impl: str = "cpu", **more: Any) -> Tensor:
        weight = PackedWeight.pack(ops.winograd_weight(self.kernel, self.taps), self.precision)
        return ops.winograd_conv2d(self.x, weight, upsample=self.taps == 9, impl=impl, **(self.options | more))

    def using(self, **options: Any) -> Problem:
        return replace(self, options=self.options | options)

    def exact(self) -> Tensor:
        """In float64, from the definition of a convolution."""
        o = self.options
        a = self.x.double()
        if o.get("x2") is not None:
            a = torch.cat([a, o["x2"].double()], -1)
        if o.get("affine") is not None:
            a = a * o["affine"][:, 0, None, None].double() + o["affine"][:, 1, None, None].double()
        a = F.silu(a) if o.get("silu") else a
        a = a if o.get("scale") is None else a * o["scale"].double()
        a = a.permute(0, 3, 1, 2)
        if self.taps == 9:
            a = a.repeat_interleave(2, 2).repeat_interleave(2, 3)
        bias = None if o.get("bias") is None else o["bias"].double()
        result = F.conv2d(a, self.kernel.double(), bias, padding=1).permute(0, 2, 3, 1)
        result = {None: lambda y: y, "relu": F.relu, "silu": F.silu}[o.get("activation")](result)
        return result if o.get("residual") is None else result + o["residual"].double()


def make_problem(
    shape: tuple[int, int, int, int],
    n: int,
    taps: int,
    precision: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    c2: int = 0,
) -> Problem:
    """Normal numbers; with c2 channels of a second source in float32. The convolution's results are near 1."""
    generator = torch.Generator().manual_seed(sum(shape) + n + c2)
    channels = shape[3] + c2
    x = torch.randn(shape, generator=generator).to(dtype)
    kernel = torch.randn(n, channels, 3, 3, generator=generator) / math.sqrt(9 * channels)
    options = {"x2": torch.randn(*shape[:3], c2, generator=generator)} if c2 else {}
    return Problem(x, kernel, taps, precision, options)


def everything(problem: Problem) -> dict[str, Tensor | bool]:
    """One of each option around the convolution, but for the activation and x2."""
    generator = torch.Generator().manual_seed(7)
    batch, height, width, _ = problem.x.shape
    n, channels = problem.kernel.shape[:2]
    zoom = 2 if problem.taps == 9 else 1
    return {
        "bias": torch.randn(n, generator=generator),
        "affine": torch.randn(batch, 2, channels, generator=generator) * 0.5 + 1,
        "silu": True,
        "scale": torch.rand(channels, generator=generator) + 0.5,
        "residual": torch.randn(batch, height * zoom, width * zoom, n, generator=generator).to(problem.x.dtype),
    }


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; infinite if something is not finite."""
    assert actual.shape == expected.shape
    distance = (actual.double() - expected.double()).norm() / expected.double().norm()
    return distance.item() if actual.isfinite().all() else math.inf


def noise_gain(taps: int) -> float:
    """By how much the results' relative errors exceed those of transformed inputs or weights, if these are random.

    For white inputs and weights: with row norms u, v of the transforms in one dimension, products of tap t are of size
    v[t] * u[t], and output o has the error of sum_t out[o, t]^2 * v[t]^2 * u[t]^2. Two dimensions multiply. The results
    themselves have the variance 3 per dimension, three terms, also where two of them meet the same doubled pixel.
    """
    inward, weight, outward = (torch.tensor(table[taps], dtype=torch.float64) for table in (_INPUT, _WEIGHT, _OUTPUT))
    of_products = inward.square().sum(1) * weight.square().sum(1)
    return (outward.square() @ of_products).mean().item() / 3


def rounding_error(precision: torch.dtype) -> float:
    """Root mean square of what rounding to the precision changes, relative to the numbers' size.

    bfloat16: uniform within half a step; steps are 2^-7 to 2^-8 of a number: at most 2^-8 / sqrt(3). 8 bits: steps of
    largest / 127, so PEAK / 127 / sqrt(12). float32: up to six roundings on the way to a transformed number.
    """
    if precision == torch.float32:
        return math.sqrt(6) * UNITS[torch.float32]
    return PEAK / 127 / math.sqrt(12) if precision == torch.int8 else 2 * UNITS[torch.bfloat16] / math.sqrt(3)


def quantisation_budget(taps: int, precision: torch.dtype) -> float:
    """Both factors are rounded: sqrt(2). Twice that, because a few hundred results are a sample."""
    return 2 * math.sqrt(2) * noise_gain(taps) * rounding_error(precision)


def flip_budget(taps: int, precision: torch.dtype, silu: bool) -> float:
    """Between two kernels that round the same numbers up to a small difference.

    Numbers that differ by d, relative to their size, are rounded to different neighbours in d / step of all cases, and
    then differ by a step: sqrt(d * step), root mean square. Three times that, for a sample. d is a few roundings of
    float32 in the transform (16 of them for the larger tiles), or that of SiLU.
    """
    step = rounding_error(precision) * math.sqrt(12)
    difference = (ROUGH_SILU if silu else 0) + 16 * UNITS[torch.float32]
    return 3 * noise_gain(taps) * math.sqrt(difference * step)


def check(problem: Problem, impl: str = "cpu") -> Tensor:
    """Runs the problem and holds it to float64 and to the reference; both budgets allow one rounding of the store.

    float32: twice the reference's error. Rounded factors: the reference's error and what differs from it.
    """
    actual = problem.run(impl)
    assert actual.dtype == problem.options.get("out_dtype", problem.x.dtype)
    exact, reference = problem.exact(), problem.run("reference", out_dtype=torch.float32)
    store = UNITS[actual.dtype]
    found, of_reference = error(actual, exact), error(reference, exact)
    assert of_reference <= quantisation_budget(problem.taps, problem.precision)
    if problem.precision == torch.float32:
        limit = 2 * of_reference + store
    else:
        flips = flip_budget(problem.taps, problem.precision, problem.options.get("silu", False))
        limit = of_reference + flips + store
        distance = error(actual, reference)
        assert distance <= flips + store, f"{distance:.2e} from the reference, allowed are {flips + store:.2e}"
    assert found <= limit, f"{found:.2e} from float64, allowed are {limit:.2e}"
    return actual
