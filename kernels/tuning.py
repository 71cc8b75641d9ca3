"""Which tile, pipeline and split of a product of Triton's is fastest: measured on a GPU and recorded, or by a rule.

The table of a GPU (`tables.py`) maps products, without their number of rows, to the configurations that were fastest
for some numbers of rows; what has no entry within a factor of 1.5 goes by the rule.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton

from vpd_fast.kernels import recording, tables
from vpd_fast.kernels._common import multiprocessors
from vpd_fast.kernels.tables import Config

NEAR = 1.5  # ratio of rows up to which a configuration is taken over
Measurer = Callable[["GemmShape", Callable[[Config], None]], Config]


@dataclass(frozen=True)
class GemmShape:
    """What decides which configuration is fastest. rows, n, k: of the matrix product."""

    dtype: str
    kernel: tuple[int, int]
    stride: int
    rows: int
    n: int
    k: int
    channels: int  # of the source with fewer of them
    sources: int
    activation: str
    run: int  # positions of whose runs statistics are found, or 1

    @property
    def key(self) -> str:
        """Everything but the rows, as it is written in tables."""
        shape = f"{self.dtype} {self.kernel[0]}x{self.kernel[1]}/{self.stride} n{self.n} k{self.k}"
        ends = (f"sources{self.sources}" if self.sources > 1 else "", self.activation, "runs" if self.run > 1 else "")
        return " ".join(filter(None, (shape, *ends)))


def by_rule(product: GemmShape, processors: int) -> Config:
    """Tile, pipeline and number of splits, for a GPU with that many multiprocessors."""
    if product.dtype == "float32":  # no tensor cores
        config = {"BM": 64, "BN": 64, "BK": 16, "num_warps": 4, "num_stages": 2}
    else:
        config = {"BM": 128, "BN": 128, "BK": _block_of_k(product), "num_warps": 8, "num_stages": 3}
        if triton.cdiv(product.rows, 128) * triton.cdiv(product.n, 128) < processors and product.run <= 64:
            config |= {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 4}
    return {**config, "GROUP": 8, "SPLITS": _splits(product, config, processors)}


def _block_of_k(product: GemmShape) -> int:
    """128 bytes of K, less if a source has fewer channels."""
    smallest, largest = (16, 64) if product.dtype in ("bfloat16", "float16") else (32, 128)
    if product.channels % 16:  # is loaded number by number, for which addresses take registers
        largest = 64
    return max(smallest, min(largest, triton.next_power_of_2(product.channels)))


def _splits(product: GemmShape, config: Config, processors: int) -> int:
    """Idle multiprocessors share the sums, as long as each part is worth a pipeline."""
    tiles = triton.cdiv(product.rows, config["BM"]) * triton.cdiv(product.n, config["BN"])
    return max(1, min(processors // tiles, product.k // (8 * config["BK"]), 16))


def candidates(product: GemmShape, processors: int) -> list[Config]:
    """What `tuning` measures: the rule's choice first."""
    configs = [by_rule(product, processors)]
    if product.dtype == "float32":
        tiles = [(64, 64, 4, 2), (128, 64, 8, 2), (32, 64, 4, 3), (128, 128, 8, 2)]
    else:
        tiles = [(128, 256, 8, 3), (128, 128, 8, 3), (128, 128, 4, 4), (128, 64, 4, 4), (64, 128, 4, 4), (64, 64, 4, 5)]
    block = 16 if product.dtype == "float32" else _block_of_k(product)
    for bm, bn, warps, stages in tiles:
        config = {"BM": bm, "BN": bn, "BK": block, "num_warps": warps, "num_stages": stages, "GROUP": 8}
        splits = _splits(product, config, processors)
        for number in sorted({1, splits, max(1, splits // 2)}):
            if bm % product.run == 0 and bn < 2 * triton.next_power_of_2(product.n):
                configs.append({**config, "SPLITS": number})
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def nearest(table: Mapping[str, Mapping[int, Config]], product: GemmShape) -> Config | None:
    """The configuration recorded for the nearest number of rows, if that is near enough."""
    recorded = table.get(product.key, {})
    ratio = {rows: max(rows, product.rows) / max(1, min(rows, product.rows)) for rows in recorded}
    best = min(ratio, key=lambda rows: ratio[rows], default=None)
    return recorded[best] if best is not None and ratio[best] <= NEAR else None


class _Tuning(threading.local):
    measurer: Measurer | None = None


_tuning = _Tuning()


@contextlib.contextmanager
def tuning(measurer: Measurer) -> Iterator[None]:
    """Every product of this thread has its configuration chosen by the measurer."""
    _tuning.measurer = measurer
    try:
        yield
    finally:
        _tuning.measurer = None


def choose(product: GemmShape, device: torch.device, run: Callable[[Config], None]) -> Config:
    """The configuration of a product. run: computes it with a given one, for measurements."""
    if _tuning.measurer is not None:
        return _tuning.measurer(product, run)
    table = tables.of_device(device).table if device.type == "cuda" else None
    recorded = nearest(recording.state.configs if table is None else table.configs, product)
    return recorded or by_rule(product, multiprocessors(device))


def to_rows(measured: dict[GemmShape, list[tuple[Config, float]]]) -> list[dict[str, Any]]:
    """The rows of a table's `configs`. measured: configurations and their milliseconds, fastest first."""
    rows = []
    for product, found in measured.items():
        config, milliseconds = found[0]
        others = [{"config": other, "ms": round(time, 5)} for other, time in found[1:4]]
        row = {"key": product.key, "rows": product.rows, "config": config, "ms": round(milliseconds, 5)}
        rows.append({**row, "product": asdict(product), "next": others})
    return rows
