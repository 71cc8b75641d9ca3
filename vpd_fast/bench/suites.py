"""What the suites of benchmarks/ share: the implementations of an operator, their devices, and how rows are made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from vpd_fast import _native
from vpd_fast.bench.libraries import emulates_bfloat16
from vpd_fast.bench.peaks import rate
from vpd_fast.bench.statistics import rows_of
from vpd_fast.bench.timing import copy_gb_per_s, extra_memory, measure
from vpd_fast.ops import registry

Variants = dict[str, Callable[[], Any]]
EXHAUSTIVE = pytest.mark.exhaustive  # what a plain `pytest benchmarks/` leaves out
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_DTYPES = ("float32", "bfloat16")
BFLOAT16 = ("bf16", "bfloat16")
NOT_FOR_GPUS = ("cpu", "reference")


def some_of(cases: Iterable[str], typical: Iterable[str]) -> list:
    """All cases for `parametrize`, those that are not typical marked as exhaustive."""
    chosen = set(typical)
    return [case if case in chosen else pytest.param(case, marks=EXHAUSTIVE) for case in cases]


def on_devices(name: str, cpu: Iterable[str], cuda: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise `device` and `name`, which is "precision" or "dtype", with what each kind of device measures.

    bfloat16 is exhaustive on CPUs without instructions for it, where PyTorch needs up to 80 times as long.
    """
    emulated = BFLOAT16 if emulates_bfloat16("cpu") else ()
    pairs = [("cpu", value, [EXHAUSTIVE] if value in emulated else []) for value in cpu]
    pairs += [("cuda", value, [pytest.mark.gpu]) for value in cuda]
    values = [pytest.param(device, value, id=f"{device}-{value}", marks=marks) for device, value, marks in pairs]
    return pytest.mark.parametrize(("device", name), values, indirect=["device"])


def random_tensors(device: str) -> Callable[..., torch.Tensor]:
    """What makes normal random numbers of a shape on the device, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def variants_of(name: str, device: str, call: Callable[[str], Any], all_levels: bool = False) -> Variants:
    """call(impl) of operator `name` for every implementation that is for the device.

    On a CPU: the best instruction set, or all of them; on a GPU: what does not refuse these arguments, with a line for
    what does. Raises AssertionError if nothing is left.
    """
    if device == "cpu":
        levels = _native.load("_C").usable_isas()
        return {f"cpu {isa}": functools.partial(_at, isa, call) for isa in (levels if all_levels else levels[-1:])}
    found: Variants = {}
    for implementation in registry()[name].implementations:
        if implementation.name in NOT_FOR_GPUS:
            continue
        try:
            call(implementation.name)
        except ValueError as error:  # InputError: it refuses
            print(f"{name}: not run: {implementation.name}: {error}")
            continue
        found[implementation.name] = functools.partial(call, implementation.name)
    assert found, f"no implementation of {name} runs on this GPU"
    return found


def _at(isa: str, call: Callable[[str], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPD_FAST_ISA", isa)
        return call("cpu")


def library_variant(name: str, make: Callable[[], Callable[[], Any]]) -> Variants:
    """{name: call} of a library's function, or nothing if it does not take these sizes, with a line that says so."""
    try:
        call = make()
        call()
    except (RuntimeError, NotImplementedError) as error:
        print(f"not run: {name}: {str(error).strip().splitlines()[0]}")
        return {}
    return {name: call}


@functools.cache
def peak_rates(device: str, dtype: str) -> tuple[float, float]:
    """(GB/s, GFLOP/s) that this machine reaches with a copy and a matrix product."""
    return copy_gb_per_s(device), rate(device, dtype)


def side_by_side(
    variants: Variants,
    device: str,
    baseline: str | None = None,
    *,
    rounds: int = 30,
    seconds: float = 20.0,
    graphs: bool = True,
    gigabytes: float | None = None,
    gflop: float | None = None,
    peak_of: str | None = None,
    **facts: Any,
) -> list[dict[str, Any]]:
    """The rows of all variants, which take turns (`measure`), over the baseline, which is the first if none is named.

    peak_of: also the share of what this machine can do at most in that dtype, and the memory that each call needs.
    """
    memory = {name: extra_memory(device, call) for name, call in variants.items()} if peak_of else {}
    times = measure(variants, device, rounds, seconds, graphs)
    facts |= {"threads": torch.get_num_threads()}
    rows = rows_of(times, baseline or next(iter(variants)), gigabytes, gflop, **facts)
    for row in rows if peak_of else []:
        floors = zip((gigabytes, gflop), peak_rates(device, peak_of), strict=True)
        row["of_peak"] = round(1e3 * max((amount or 0) / rate for amount, rate in floors) / row["p50_ms"], 3)
        row["extra_mib"] = round(memory[row["variant"]] / 2**20, 2)
    return rows
