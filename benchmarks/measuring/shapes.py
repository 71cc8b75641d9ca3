"""The products, prologues and attention layers of a pass, found while the engine's own code runs without memory."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from measuring.setting import Setting
from vpd_fast.bench.choices import OperatorCalls
from vpd_fast.bench.engine_pass import MODELS, LabelledPass
from vpd_fast.bench.operations import ValuesAreFine, empty_engine


@dataclass(frozen=True)
class Product:
    """A product of an image, or of rows as an image of width 1, with a weight.

    channels: of each source. padding: top, left, bottom, right. prologue: whether something is done to the sources
    before they are multiplied.
    """

    batch: int
    height: int
    width: int
    channels: tuple[int, ...]
    n: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    activation: str = ""
    residual: bool = False
    prologue: bool = False

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution."""
        return self.width > 1

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of the result."""
        top, left, bottom, right = self.padding
        height, width = self.height + top + bottom, self.width + left + right
        return (height - self.kernel[0]) // self.stride + 1, (width - self.kernel[1]) // self.stride + 1

    @property
    def k(self) -> int:
        """Columns of the weight."""
        return math.prod(self.kernel) * sum(self.channels)

    @property
    def gflop(self) -> float:
        """10^9 multiplications and additions."""
        return 2e-9 * self.batch * math.prod(self.sides) * self.n * self.k

    def __str__(self) -> str:
        kernel = f" {self.kernel[0]}x{self.kernel[1]}" + (f"/{self.stride}" if self.stride > 1 else "")
        sources = "+".join(map(str, self.channels))
        size = f"{self.height}x{self.width}{kernel}" if self.convolves else f"{self.height}"
        ends = (self.activation, "residual" if self.residual else "")
        return " ".join(filter(None, (f"{self.batch}x{size} {sources}->{self.n}", *ends)))


@functools.cache
def calls_of_pass(setting: Setting, batch: int) -> list[tuple[str, Any]]:
    """Operators and their arguments, tensors without memory, of one pass of the engine for GPUs in bfloat16."""
    run = LabelledPass(empty_engine(MODELS[setting.model_name], "bf16", "cuda"))
    images = torch.empty(batch, 3, setting.size, setting.size, device="meta")
    calls: list[tuple[str, Any]] = []

    def note(op: Any, arguments: Any) -> Any:
        calls.append((op.name, arguments))
        return op.fake(arguments)

    with torch.no_grad(), ValuesAreFine():
        run(images)  # computes keys and values of the text, which later passes do not
        with OperatorCalls(note):
            run(images)
    return calls


def products(setting: Setting, batch: int) -> list[tuple[Product, int]]:
    """The products of a pass and how often each is made, those with the most work first."""
    found: Counter[Product] = Counter()
    for name, call in calls_of_pass(setting, batch):
        if name in ("linear", "conv2d"):
            found.update(_products_of(name, call))
    return sorted(found.items(), key=lambda pair: -pair[0].gflop * pair[1])


def _products_of(name: str, call: Any) -> Iterator[Product]:
    channels = tuple(int(t.shape[-1]) for t in (call.x, call.x2) if t is not None)
    ends = {"activation": call.activation, "residual": call.residual is not None, "prologue": call.has_prologue}
    if name == "linear":
        batch, rows = call.x.shape[:2]
        yield Product(int(batch), int(rows), 1, channels, int(call.n), **ends)
        return
    batch, height, width = map(int, call.x.shape[:3])
    for phase in call.phases() if not call.upsample else _phases(call):
        yield Product(
            *(batch, height, width, channels, int(call.n), tuple(map(int, call.kernel)), int(call.stride)),
            *(tuple(map(int, phase.padding)),),
            **ends,
        )


def _phases(call: Any) -> Iterator[Any]:
    """The four convolutions of an enlarging one, of which only the padding matters here."""
    for i in range(4):
        y, x = divmod(i, 2)
        yield replace(call, upsample=False, padding=(1 - y, 1 - x, y, x))


def tiny(product: Product) -> Product:
    """The same kind of product, small enough for an interpreter."""
    sources = (16,) * len(product.channels)
    side = {"height": 4, "width": 4} if product.convolves else {"height": 8, "width": 1}
    return replace(product, batch=1, channels=sources, n=32, **side)
