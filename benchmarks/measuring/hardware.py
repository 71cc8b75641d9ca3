"""What the hardware does, asked by small CUDA kernels (`csrc/cuda/probes`), each of whose waits is bounded.

They are module `_C_probes`, which no wheel for users has.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from itertools import product
from types import ModuleType

import torch

from measuring.plan import Row, Step
from measuring.setting import STAND_IN, Setting
from vpd_fast import _native

LINE_BYTES = 128
REGION = 1 << 17  # lines of 128 bytes, 16 MB, which fit into the L2 cache
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
WIDTHS = (128, 160, 256)  # columns of a matrix instruction
LEFT_LINES, ROWS_OF_A_BLOCK = 128, 128
LAUNCHES = 200
TILE_LINES, TILE_COLUMNS = 512, 64
NO_GPU = {STAND_IN: "nothing: only a GPU can run it"}


class Probes:
    """The module, and what all its kernels need."""

    def __init__(self, setting: Setting) -> None:
        self.module: ModuleType = _native.load("_C_probes")
        self.setting, self.processors = setting, torch.cuda.get_device_properties(0).multi_processor_count
        self.failed = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.region = setting.random(REGION, LINE_BYTES // 2, dtype=torch.bfloat16)

    @staticmethod
    def stream() -> int:
        """The current stream."""
        return torch.cuda.current_stream().cuda_stream

    def check(self) -> None:
        """Raises RuntimeError if a kernel has given up a wait."""
        if self.failed.item():
            self.failed.zero_()
            raise RuntimeError("a kernel waited in vain")


def _in_dry_run(row: Row) -> Callable[[], Row]:
    return lambda: {**row, **NO_GPU}


def _ghz(setting: Setting, start: float) -> float:
    return setting.conditions(start).get("sm_mhz", 0.0) / 1e3


# --- copies from L2 to shared memory ----------------------------------------------------------------------------------


def copies(setting: Setting) -> Iterator[Step]:
    """By blocks on a multiprocessor, lines of a box, and blocks of a cluster that share what each loads."""
    probes = None if setting.dry else Probes(setting)
    for lines, (blocks, cluster) in product((128, 256), ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2))):
        row = {"blocks_per_sm": blocks, "cluster": cluster, "box_bytes": lines * LINE_BYTES}
        stages = min(4, 200 * 1024 // blocks // (lines * LINE_BYTES))
        run = _in_dry_run(row) if probes is None else functools.partial(_copies, probes, row, stages)
        if stages >= 1:
            yield Step(", ".join(f"{value} {key}" for key, value in row.items()), run, 10)


def _copies(probes: Probes, row: Row, stages: int) -> Row:
    lines, cluster = row["box_bytes"] // LINE_BYTES, row["cluster"]
    blocks, boxes = probes.processors * row["blocks_per_sm"] // cluster * cluster, 2000
    clocks = torch.zeros(blocks, dtype=torch.int64, device="cuda")
    probes.region.add_(0)  # into the cache
    for _ in range(3):
        probes.module.copy_boxes(
            probes.region.data_ptr(), REGION, blocks, cluster, boxes, lines, stages, clocks.data_ptr(),
            probes.failed.data_ptr(), probes.stream(),
        )  # fmt: skip
    torch.cuda.synchronize()
    probes.check()
    received = boxes * lines * LINE_BYTES / clocks.double().mean().item() * row["blocks_per_sm"]
    return {**row, "stages": stages, "received_b_per_clk_sm": received, "loaded_b_per_clk_sm": received / cluster}


# --- matrix instructions ----------------------------------------------------------------------------------------------


def rates(setting: Setting) -> Iterator[Step]:
    """By dtype, columns, and numbers: zeros draw less power than what a network multiplies."""
    yield from _products(setting, product(WIDTHS[::-1], DTYPES, ("real", "zero"), (0,)), 0.5)


def contention(setting: Setting) -> Iterator[Step]:
    """The same while another warp has boxes copied into shared memory."""
    yield from _products(setting, product((256, 128), ("bf16", "int8"), ("real",), (64, 128)), 0.3)


def _products(setting: Setting, cases: Iterator[tuple[int, str, str, int]], seconds: float) -> Iterator[Step]:
    probes = None if setting.dry else Probes(setting)
    for columns, dtype, numbers, lines in cases:
        row = {"dtype": dtype, "columns": columns, "numbers": numbers, "copied_box_bytes": lines * LINE_BYTES}
        run = _in_dry_run(row) if probes is None else functools.partial(_multiply, probes, row, seconds)
        yield Step(", ".join(map(str, row.values())), run, 10)


def _multiply(probes: Probes, row: Row, seconds: float) -> Row:
    setting, dtype, columns = probes.setting, DTYPES[row["dtype"]], row["columns"]
    lines, blocks, steps = LEFT_LINES + columns, probes.processors, 20_000
    operands = setting.random(lines, LINE_BYTES // dtype.itemsize, dtype=dtype).contiguous()
    if row["numbers"] == "zero":
        operands.view(torch.int8).zero_()
    sums = torch.zeros(blocks, 256, device="cuda")
    clocks = torch.zeros(blocks, dtype=torch.int64, device="cuda")
    boxes = torch.zeros(blocks, dtype=torch.int32, device="cuda")
    name = str(dtype).removeprefix("torch.")
    copy_lines = row["copied_box_bytes"] // LINE_BYTES

    def launch() -> None:
        probes.module.multiply(
            name, operands.data_ptr(), probes.region.data_ptr(), REGION, blocks, columns, steps, copy_lines,
            sums.data_ptr(), clocks.data_ptr(), boxes.data_ptr(), probes.failed.data_ptr(), probes.stream(),
        )  # fmt: skip

    launch()
    torch.cuda.synchronize()
    probes.check()
    begin, count = time.monotonic(), 0
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    while time.monotonic() - begin < seconds or not count:  # long enough for the power limit to show
        launch()
        count += 1
        torch.cuda.current_stream().synchronize()
    events[1].record()
    torch.cuda.synchronize()
    probes.check()
    clk = clocks.double().mean().item()
    k = LINE_BYTES // dtype.itemsize
    flop = 2.0 * ROWS_OF_A_BLOCK * columns * k * steps * blocks * count
    tflop_per_s = flop / (events[0].elapsed_time(events[1]) * 1e-3) / 1e12
    found = {"clk_per_step": clk / steps, "tflop_per_s": tflop_per_s}
    if copy_lines:
        found["copied_b_per_clk_sm"] = boxes.double().mean().item() * row["copied_box_bytes"] / clk
    ghz = _ghz(setting, begin)
    return {**row, **found, **({"sm_ghz": ghz} if ghz else {})}


# --- tiles that begin at any line -------------------------------------------------------------------------------------


def halo(setting: Setting) -> Iterator[Step]:
    """Whether all taps of a convolution may read one tile: any first line, groups of 8 lines any distance apart."""
    row = {"starts": "0 to 19", "aparts": "8, 9, 10, 16, 18"}
    yield Step("first lines", _in_dry_run(row) if setting.dry else functools.partial(_tiles, Probes(setting)), 10)


def tile_cases() -> list[tuple[int, int, int]]:
    """(first line, lines between groups of 8, base offset) of what is tried."""
    return list(product(range(20), (8, 9, 10, 16, 18), range(8)))


def expected_tiles(left: torch.Tensor, right: torch.Tensor, starts: torch.Tensor, aparts: torch.Tensor) -> torch.Tensor:
    """(cases, 64, 64) exact sums."""
    lines = torch.arange(64, device=left.device)
    rows = starts[:, None] + lines // 8 * aparts[:, None] + lines % 8
    return (left.double()[rows.long()] @ right.double().T).to(torch.int32)


def _tiles(probes: Probes) -> list[Row]:
    """A row for each distance: which base offset gives the exact result, by the first line modulo 8."""
    setting, cases = probes.setting, tile_cases()
    left = setting.random(TILE_LINES, LINE_BYTES, dtype=torch.int8)
    right = setting.random(TILE_COLUMNS, LINE_BYTES, dtype=torch.int8)
    starts, aparts, offsets = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in zip(*cases, strict=True))
    sums = torch.full((len(cases), 64, TILE_COLUMNS), -1, dtype=torch.int32, device="cuda")
    probes.module.multiply_tiles(
        left.data_ptr(), right.data_ptr(), len(cases), TILE_LINES, starts.data_ptr(), aparts.data_ptr(),
        offsets.data_ptr(), sums.data_ptr(), probes.stream(),
    )  # fmt: skip
    right_ones = (sums == expected_tiles(left, right, starts, aparts)).flatten(1).all(1).tolist()
    rows = []
    for apart in (8, 9, 10, 16, 18):
        good = [case for case, exact in zip(cases, right_ones, strict=True) if exact and case[1] == apart]
        by_start = {start % 8: sorted({o for s, _, o in good if s % 8 == start % 8}) for start in range(8)}
        exact = {(s, o) for s, _, o in good}
        row = {"apart": apart, "exact_offsets_by_first_line": str(by_start)}
        row |= {"offset_0": all((s, 0) in exact for s in range(20))}
        rows.append(row | {"offset_of_first_line": all((s, s % 8) in exact for s in range(20))})
    return rows


# --- launches ---------------------------------------------------------------------------------------------------------


def launches(setting: Setting) -> Iterator[Step]:
    """Kernels one after the other in a graph: empty ones, small ones, and such as read weights before they wait."""
    for what, (blocks, nbytes, adds) in {
        "empty": (1, 0, False), "small": (132, 0, True), "reading 32 KB a block": (132, 32 << 10, True),
    }.items():  # fmt: skip
        row = {"kernels": what, "blocks": blocks, "bytes": nbytes}
        run = _in_dry_run(row) if setting.dry else functools.partial(_launches, Probes(setting), row, adds)
        yield Step(what, run, 10)


def _launches(probes: Probes, row: Row, adds: bool) -> list[Row]:
    numbers = torch.zeros(row["blocks"], dtype=torch.int32, device="cuda")
    calls = {}
    for name, dependent in {"one after the other": False, "programmatic dependent launch": True}.items():
        calls[name] = functools.partial(_launch_many, probes, row, adds, dependent, numbers)
    rows = []
    for launched, call in calls.items():
        numbers.zero_()
        call()
        if adds and not numbers.eq(LAUNCHES).all():  # a kernel did not wait for the one before it
            rows.append({**row, "launched": launched, "wrong": numbers.tolist()[:4]})
    for launched, ms in probes.setting.milliseconds(calls, cold=False).items():
        rows.append({**row, "launched": launched, "us_per_launch": 1e3 * ms / LAUNCHES})
    return rows


def _launch_many(probes: Probes, row: Row, adds: bool, dependent: bool, numbers: torch.Tensor) -> None:
    probes.module.launch_many(
        probes.region.data_ptr(), row["bytes"], LAUNCHES, row["blocks"], adds, dependent, numbers.data_ptr(),
        probes.stream(),
    )  # fmt: skip
