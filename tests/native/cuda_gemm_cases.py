"""Problems for the GEMM kernels, emulated or on a GPU, their float64 oracle and error budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpd_fast.ops import geglu_rows

from .devices import H200, Device

FLOAT8 = torch.float8_e4m3fn
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@dataclass(frozen=True)
class Case:
    """Sizes and options of a product."""

    batch: int = 1
    height: int = 5
    width: int = 7
    channels: tuple[int, ...] = (48,)
    n: int = 40
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dtype: torch.dtype = torch.int8
    per_image: bool = False
    bias: bool = True
    activation: str = ""
    residual: torch.dtype | None = None
    out_dtype: torch.dtype = torch.float32
    pitch: int = 0  # elements between the channels of out and residual, and between those of sources, in 16 bytes
    seed: int = 0
    run: int = 0  # positions of a run of statistics; 0: none are asked for
    rounded_rows: bool = False  # of int8, that are multiplied as they are
    rounded_result: bool = False  # to int8, whatever out_dtype is

    @property
    def sides(self) -> tuple[int, int]:
        top, left, bottom, right = self.padding
        sizes = (self.height + top + bottom, self.kernel[0]), (self.width + left + right, self.kernel[1])
        return tuple((size - kernel) // self.stride + 1 for size, kernel in sizes)

    @property
    def out_columns(self) -> int:
        return self.n // 2 if self.activation == "geglu" else self.n


@dataclass
class Problem:
    """Tensors of a case; addresses outside of these are errors."""

    case: Case
    sources: list[Tensor]
    weight: Tensor
    row_scales: Tensor | None = None
    row_zeros: Tensor | None = None
    column_scales: Tensor | None = None
    sums: Tensor | None = None
    bias: Tensor | None = None
    rounding: Tensor | None = None
    residual: Tensor | None = None
    out: Tensor = field(default_factory=lambda: torch.empty(0))
    statistics: Tensor = field(default_factory=lambda: torch.empty(0))

    def tensors(self) -> list[tuple[Tensor, bool]]:
        """All of them, and whether they may be written."""
        scales = self.row_scales, self.row_zeros, self.column_scales, self.sums
        vectors = *scales, self.bias, self.rounding, self.residual
        read = [*self.sources, self.weight, *vectors]
        return [(t, False) for t in read if t is not None] + [(self.out, True), (self.statistics, True)]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, pitch: int) -> Tensor:
    """Memory full of NaN, or of -7, with `pitch` elements behind the last dimension."""
    wide = torch.full((*shape[:-1], shape[-1] + pitch), -7.0 if dtype == torch.int8 else float("nan"))
    return wide.to(dtype)[..., : shape[-1]]


def stored(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers that the format holds; of float8 such that 14 bits hold the sum of 128 products exactly."""
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator).to(dtype)
    if dtype == FLOAT8:
        return (torch.randint(-8, 9, shape, generator=generator) / 4).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def make(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.seed + case.n + sum(case.channels))
    places, eight = (case.batch, *case.sides), case.dtype.itemsize == 1
    k = case.kernel[0] * case.kernel[1] * sum(case.channels)
    images = [(case.batch, case.height, case.width, channels) for channels in case.channels]
    sources = [poisoned(shape, case.dtype, case.pitch * 16 // case.dtype.itemsize) for shape in images]
    for source in sources:
        source.copy_(stored(source.shape, case.dtype, generator))
    problem = Problem(case, sources, stored((case.n, k), case.dtype, generator))
    if eight:
        rows = case.batch if case.per_image else case.batch * case.sides[0] * case.sides[1]
        if not case.rounded_rows:
            problem.row_scales = torch.rand(rows, generator=generator) * 0.01 + 1e-3
        problem.column_scales = torch.rand(case.n, generator=generator) * 0.01 + 1e-3
    if case.dtype == torch.int8:
        if not case.rounded_rows:
            problem.row_zeros = torch.randint(-128, 128, (rows,), generator=generator).float()
        problem.sums = problem.weight.sum(1, dtype=torch.int32).float()
    if case.bias:
        problem.bias = torch.randn(case.n, generator=generator)
    if case.residual is not None:
        problem.residual = poisoned((*places, case.out_columns), case.residual, case.pitch)
        problem.residual.copy_(torch.randn(problem.residual.shape, generator=generator))
    out_dtype = torch.int8 if case.rounded_result else case.out_dtype
    problem.out = poisoned((*places, case.out_columns), out_dtype, case.pitch)
    if case.rounded_result:  # what is stored then fills the range and goes beyond it
        factors = torch.rand(case.out_columns, generator=generator) * 40 + 10
        shifts = torch.randint(-40, 40, (case.out_columns,), generator=generator).float()
        problem.rounding = torch.stack([factors, shifts])
    if case.run:
        runs = -(-case.sides[0] * case.sides[1] // case.run)
        problem.statistics = torch.full((case.batch, runs, 5, case.out_columns), float("nan"))
    return problem


def memory_of(x: Tensor) -> tuple[int, int]:
    """Address and bytes from the first to the last element of x."""
    return x.data_ptr(), (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on_gpu(x: Tensor | None) -> Tensor | None:
    """The same in a GPU's memory, with what is around it."""
    return None if x is None else whole(x).cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def whole(x: Tensor) -> Tensor:
    """The tensor that x is a part of."""
    return x if x._base is None else x._base


def image_of(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.data_ptr(), name_of(x.dtype), x.stride()[:3])


def run(cuda: ModuleType, p: Problem, instructions: str, device: Device = H200) -> Tensor:
    """out, as the emulated device computes it, or the GPU if `cuda` is the real module."""
    if hasattr(cuda, "configure"):
        cuda.configure(*device)
        call, scratch = prepare(cuda, p, instructions)
        memory = [*p.tensors(), (scratch, True)]
        cuda.announce([(*memory_of(x), writable) for x, writable in memory if x.numel()])
        call.run(scratch.data_ptr() if scratch.numel() else 0, 0, 0)
    else:
        if instructions.startswith("wgmma") and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("only compute capability 9.0 has wgmma")
        names = [f.name for f in fields(Problem) if f.name not in ("case", "sources")]
        moved = replace(p, sources=[on_gpu(x) for x in p.sources], **{name: on_gpu(getattr(p, name)) for name in names})
        call, scratch = prepare(cuda, moved, instructions)
        call.run(scratch.data_ptr() if scratch.numel() else 0, 0, torch.cuda.current_stream().cuda_stream)
        whole(p.out).copy_(whole(moved.out))
        p.statistics.copy_(moved.statistics)
    if p.out.dtype == torch.int8:
        between = whole(p.out).clone()
        between.as_strided(p.out.shape, p.out.stride(), p.out.storage_offset()).fill_(-7)
        assert (between == -7).all()
    elif p.out._base is not None and p.out.numel():  # what lies between the rows stays as it was
        assert p.out._base.isnan().sum() == p.out._base.numel() - p.out.numel() + p.out.isnan().sum()
    return p.out


def prepare(cuda: ModuleType, p: Problem, instructions: str) -> tuple[Any, Tensor]:
    """The call and the scratch memory that it needs."""
    case, scales = p.case, (p.row_scales, p.row_zeros, p.column_scales, p.sums)
    call = cuda.Gemm(
        [(x.data_ptr(), x.stride()[:3], x.shape[3]) for x in p.sources],
        name_of(case.dtype),
        (case.batch, case.height, case.width, *case.sides),
        (*case.kernel, case.stride, *case.padding[:2]),
        p.weight.data_ptr(),
        case.n,
        tuple(0 if x is None else x.data_ptr() for x in scales),
        case.per_image,
        0 if p.bias is None else p.bias.data_ptr(),
        case.activation,
        image_of(p.residual),
        image_of(p.out),
        instructions,
        (p.statistics.data_ptr(), p.statistics.stride(0), case.run) if case.run else None,
        None if p.rounding is None else [vector.data_ptr() for vector in p.rounding],
    )
    return call, torch.full((call.scratch(0) // 4,), float("nan"), device=p.weight.device)


def rows_of(p: Problem) -> Tensor:
    """What each position reads, (B, OH, OW, K) float64: for each tap one source after the other."""
    case = p.case
    top, left, bottom, right = case.padding
    padded = [F.pad(x.double(), (0, 0, left, right, top, bottom)) for x in p.sources]
    taps = []
    for dy in range(case.kernel[0]):
        for dx in range(case.kernel[1]):
            ends = dy + (case.sides[0] - 1) * case.stride + 1, dx + (case.sides[1] - 1) * case.stride + 1
            taps += [x[:, dy : ends[0] : case.stride, dx : ends[1] : case.stride] for x in padded]
    return torch.cat(taps, -1)


def activated(x: Tensor, activation: str) -> Tensor:
    if activation == "geglu":
        values, gates = x[..., torch.argsort(geglu_rows(x.shape[-1] // 2))].chunk(2, -1)
        return values * F.gelu(gates)
    return {"": lambda x: x, "relu": F.relu, "silu": F.silu}[activation](x)


def by_row(p: Problem, vector: Tensor) -> Tensor:
    """Of rows or of images, in a shape that fits the result."""
    return vector.view(-1, 1, 1, 1) if p.case.per_image else vector.view(*p.out.shape[:3], 1)


def before_activation(p: Problem) -> Tensor:
    """What 8 bits must give bit by bit: exact sums, then the operations of the kernel in float32."""
    sums = rows_of(p) @ p.weight.double().T
    if p.row_zeros is not None:
        sums = sums - by_row(p, p.row_zeros).double() * p.sums.double()
    assert sums.abs().max() < (2**31 if p.case.dtype == torch.int8 else 2**20)  # in steps of 2^-4
    scales = p.column_scales if p.row_scales is None else by_row(p, p.row_scales) * p.column_scales
    values = sums.float() * scales
    return values if p.bias is None else values + p.bias


def exact_and_budget(p: Problem) -> tuple[Tensor, Tensor]:
    """16 bits: the sums with their bias in float64; each product, and the bias, may cost 2^-23 of the sum of all sizes.

    That is one bit of float32, because tensor cores cut off instead of rounding.
    """
    rows, weight = rows_of(p), p.weight.double()
    bias = (torch.zeros(p.case.n) if p.bias is None else p.bias).double()
    size = rows.abs() @ weight.abs().T + bias.abs()
    return rows @ weight.T + bias, size * (rows.shape[-1] + 1) * 2 * UNIT[torch.float32]


def finish(p: Problem, x: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Activation, residual and rounding. The slopes of silu and gelu are at most 1.13."""
    out, unit = activated(x, p.case.activation), UNIT[torch.float32]
    if p.case.activation == "geglu":
        order = torch.argsort(geglu_rows(x.shape[-1] // 2))
        (values, gates), (of_values, of_gates) = x[..., order].chunk(2, -1), budget[..., order].chunk(2, -1)
        budget = of_values * (F.gelu(gates).abs() + 1.13 * of_gates) + 1.13 * of_gates * values.abs()
        budget = budget + 16 * unit * (1 + gates.abs()) * values.abs()
    elif p.case.activation:
        budget = 1.13 * budget + 16 * unit * x.abs()
    if p.residual is not None:
        out = out + p.residual.double()
        budget = budget + unit * (out.abs() + p.residual.double().abs())
    return out, budget + out.abs() * UNIT[p.out.dtype] * 1.01 + SMALLEST[p.out.dtype]


def check(cuda: ModuleType, case: Case, instructions: str, device: Device = H200) -> None:
    """Runs a case and compares it: 8 bits bit by bit unless an activation follows, others within their roundings."""
    p = make(case)
    actual, eight = run(cuda, p, instructions, device), case.dtype.itemsize == 1
    if eight and case.activation in ("", "relu"):
        expected = activated(before_activation(p), case.activation)
        expected = expected if p.residual is None else expected + p.residual.float()
        assert torch.equal(actual, expected.to(case.out_dtype))
        return
    if eight:
        exact = before_activation(p).double()
        budget = torch.zeros_like(exact)
    else:
        exact, budget = exact_and_budget(p)
    expected, budget = finish(p, exact, budget)
    distance = (actual.double() - expected).abs()
    assert (distance <= budget).all(), (distance / budget).max()
