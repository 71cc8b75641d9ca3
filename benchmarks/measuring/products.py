"""Products alone, on rows that are prepared: by variant and shape, what a tile costs, and what libraries take."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch

from measuring.plan import Row, Step
from measuring.setting import STAND_IN, Setting
from measuring.shapes import Product, products, tiny
from vpd_fast.bench import libraries as of_pytorch
from vpd_fast.ops import PackedWeight
from vpd_fast.ops.statistics import run_length, statistics_shape

COUNT = 12  # shapes with the most work of a pass
PRECISIONS = {"int8": torch.int8, "bf16": torch.bfloat16}
STEPS_OF_K = (2, 5, 9, 18, 36, 72)  # of 128 bytes, by which the cost of a tile and of a step are told apart
STEP_BYTES, TILE, PROCESSORS = 128, 128, 132
LOOPS = ("wgmma", "wgmma_wide", "wgmma_persistent")  # whose tiles and steps are compared


@dataclass(frozen=True)
class Variant:
    """How a product is launched; nothing is compiled anew for it.

    backend: "cuda", "triton" or "library", which is cuBLAS and cuDNN. instructions: see csrc/cuda/gemm.h. residual:
    None as the product has it. out_dtype: of the result. statistics: found with it, by whatever finds them.
    """

    backend: str = "cuda"
    instructions: str = "auto"
    residual: bool | None = None
    out_dtype: torch.dtype = torch.bfloat16
    statistics: bool = False


VARIANTS = {
    "cuda": Variant(),
    "cuda, no residual": Variant(residual=False),
    "cuda, residual": Variant(residual=True),
    "cuda, float32 result": Variant(out_dtype=torch.float32),
    "cuda, wide": Variant(instructions="wgmma_wide"),
    "cuda, wide, no residual": Variant(instructions="wgmma_wide", residual=False),
    "cuda, wide, residual": Variant(instructions="wgmma_wide", residual=True),
    "cuda, statistics": Variant(statistics=True),
    "cuda, wide, statistics": Variant(instructions="wgmma_wide", statistics=True),
    "cuda, persistent": Variant(instructions="wgmma_persistent"),
    "cuda, persistent, no residual": Variant(instructions="wgmma_persistent", residual=False),
    "cuda, persistent, residual": Variant(instructions="wgmma_persistent", residual=True),
    "cuda, persistent, statistics": Variant(instructions="wgmma_persistent", statistics=True),
    "cuda, cluster": Variant(instructions="wgmma_cluster"),
    "cuda, mma": Variant(instructions="mma"),
    "triton": Variant("triton"),
    "library": Variant("library"),
}


class Problem:
    """Tensors of a product, and its launches."""

    def __init__(self, setting: Setting, product: Product, dtype: torch.dtype) -> None:
        from vpd_fast.kernels._prologue import Geometry, prepare

        self.product, self._setting = product, setting
        p, bfloat16 = product, torch.bfloat16
        sources = [setting.random(p.batch, p.height, p.width, c, dtype=bfloat16) for c in p.channels]
        x, x2 = (*sources, None)[:2]
        options = {"silu": p.prologue, "per_image": p.convolves}
        self._rows = prepare(x, x2, dtype, padding=p.padding if p.convolves else (0, 0, 0, 0), **options)
        top, left = (p.padding[i] - self._rows.padding[i] for i in range(2))
        self._geometry = Geometry(*p.sides, p.kernel, p.stride, top, left)
        matrix = setting.random(p.n, p.k) / p.k**0.5
        weight = PackedWeight.pack(matrix[None].cpu(), dtype).for_device(setting.device)
        self._weight = weight.numbers()[0].contiguous()
        self._scales, self._sums = (None if t is None else t[0] for t in (weight.scales, weight.weight_sums))
        self._bias = setting.random(p.n)
        width = p.n // 2 if p.activation == "geglu" else p.n
        self._residual = setting.random(p.batch, *p.sides, width, dtype=bfloat16)

    def launch(self, variant: Variant) -> Callable[[], torch.Tensor]:
        """What computes it in that way. The result is the same tensor in all calls."""
        from vpd_fast.kernels import _gemm_cuda
        from vpd_fast.kernels._gemm import Epilogue, gemm

        wanted = self.product.residual if variant.residual is None else variant.residual
        residual = self._residual if wanted else None
        positions, width = math.prod(self.product.sides), self._residual.shape[3]
        statistics = None
        if variant.statistics:
            data = self._setting.random(*statistics_shape(self.product.batch, positions, width))
            statistics = data, run_length(positions)
        epilogue = Epilogue(self._scales, self._sums, self._bias, self.product.activation, residual, statistics)
        out = torch.full_like(self._residual, float("nan"), dtype=variant.out_dtype)
        backend = "triton" if self._setting.dry and variant.backend == "cuda" else variant.backend

        def call() -> torch.Tensor:
            chosen = mock.patch.object(_gemm_cuda, "INSTRUCTIONS", variant.instructions)
            with chosen if backend == "cuda" else nullcontext():
                gemm(self._rows, self._geometry, self._weight, epilogue, out, backend)
            return out

        return call


def variants(setting: Setting) -> Iterator[Step]:
    """First what a tile costs, then a step for each shape and precision."""
    for name in setting.only(list(PRECISIONS)):
        yield Step(f"cost of a tile, {name}", functools.partial(_cost_of_a_tile, setting, name), 40)
    for name in setting.only(list(PRECISIONS)):
        for product, count in setting.only(products(setting, 1 if setting.dry else 8)[:COUNT]):
            shape = tiny(product) if setting.dry else product
            yield Step(f"{name} {product}", functools.partial(_by_variant, setting, name, shape, count), 40)


def _by_variant(setting: Setting, name: str, product: Product, count: int) -> list[Row]:
    """One row per variant that runs and agrees with the first."""
    problem = Problem(setting, product, PRECISIONS[name])
    launches = {variant: problem.launch(how) for variant, how in VARIANTS.items() if _differs(how, product)}
    usable, reasons = setting.possible(launches)
    expected = next(iter(usable.values()))().double()
    rows: list[Row] = []
    for variant, call in list(usable.items()):
        how = VARIANTS[variant]
        error = ((call().double() - expected).norm() / expected.norm()).item()
        if how.residual is None and not error <= 1e-2:  # nor NaN, of what was not written
            reasons[variant] = f"result differs from the first variant's by {error:.1e}"
            del usable[variant]
    for variant, ms in setting.milliseconds(usable, rounds=20).items():
        rate = {"tflop_per_s": product.gflop / ms}
        rows.append({"precision": name, "product": str(product), "calls": count, "variant": variant, "ms": ms, **rate})
        if setting.dry and VARIANTS[variant].backend == "cuda":
            rows[-1][STAND_IN] = "Triton's interpreter"
    return rows + [{"product": str(product), "not run": f"{v}: {reason}"} for v, reason in reasons.items()]


def _differs(how: Variant, product: Product) -> bool:
    """Whether a variant is another launch than the product's own, and one that the engine has."""
    if how.statistics and product.activation == "geglu":
        return False
    return how.residual is None or how.residual != product.residual


def _cost_of_a_tile(setting: Setting, name: str) -> list[Row]:
    """Clocks of a tile on a multiprocessor = a + b x steps of 128 bytes, by least squares over lengths of the sum."""
    dtype, rows = PRECISIONS[name], []
    tiles = 2 if setting.dry else 8 * PROCESSORS
    for instructions, residual in itertools.product(LOOPS, (False, True)):
        points = []
        start = time.monotonic()
        for steps in setting.only(list(STEPS_OF_K), 2):
            k = steps * (16 if setting.dry else STEP_BYTES // dtype.itemsize)
            product = Product(1, tiles * (16 if setting.dry else TILE), 1, (k,), 16 if setting.dry else TILE)
            call = Problem(setting, product, dtype).launch(Variant(instructions=instructions, residual=residual))
            ms = setting.milliseconds({"": call}, rounds=9, cold=False)[""]
            points.append((steps, 1e6 * ms / (tiles / PROCESSORS)))
        slope, constant = numpy.polyfit(*zip(*points, strict=True), 1)
        ghz = setting.conditions(start).get("sm_mhz", 0.0) / 1e3
        row: Row = {"precision": name, "instructions": instructions, "residual": residual}
        row |= {"tile_ns": float(constant), "step_ns": float(slope)}
        row |= {"tile_clk": float(constant) * ghz, "step_clk": float(slope) * ghz} if ghz else {}
        rows.append({**row, **({STAND_IN: "Triton's interpreter"} if setting.dry else {})})
    return rows


def libraries(setting: Setting) -> Iterator[Step]:
    """cuBLAS and cuDNN on all products of a pass, with a search for the fastest algorithm."""
    for batch in (1,) if setting.dry else (8, 1):
        shapes = setting.only(products(setting, batch), 3)
        for i in range(0, len(shapes), 10):  # a few at a time, so that a hang does not cost all
            part = shapes[i : i + 10]
            yield Step(
                f"batch {batch}, products {i + 1} to {i + len(part)}", functools.partial(_library, setting, part)
            )


def _library(setting: Setting, shapes: list[tuple[Product, int]]) -> list[Row]:
    rows = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for product, count in shapes:
            shape = tiny(product) if setting.dry else product
            makers = {"bf16": lambda s=shape: _library_call(setting, s, "bf16")}
            if not shape.convolves:
                makers["int8"] = lambda s=shape: _library_call(setting, s, "int8")
            for precision, make in makers.items():
                usable, reasons = setting.possible({precision: make()})
                facts = {"product": str(product), "calls": count, "precision": precision}
                for ms in setting.milliseconds(usable, rounds=9, seconds=0.5).values():
                    rows.append({**facts, "ms": ms, "tflop_per_s": shape.gflop / ms})
                rows += [{**facts, "not run": reason} for reason in reasons.values()]
    return rows


def _library_call(setting: Setting, product: Product, precision: str) -> Callable[[], Any]:
    """The product alone, of one source."""
    p, channels = product, sum(product.channels)
    bias, matrix = setting.random(p.n), setting.random(p.n, p.k)
    if not p.convolves:
        return of_pytorch.linear(p.batch * p.height, matrix, bias, precision)
    images = setting.random(p.batch, channels, p.height, p.width)
    if p.kernel == (3, 3) and p.padding == (1, 1, 1, 1):
        return of_pytorch.conv2d(images, matrix.view(p.n, channels, 3, 3), bias, p.stride, precision)
    dtype, layout = of_pytorch.activations(precision), torch.channels_last
    x = torch.nn.functional.pad(images, (p.padding[1], p.padding[3], p.padding[0], p.padding[2]))
    x, kernel = (t.to(dtype, memory_format=layout) for t in (x, matrix.view(p.n, channels, *p.kernel)))
    bias = bias.to(dtype)
    return lambda: torch.nn.functional.conv2d(x, kernel, bias, stride=p.stride)
