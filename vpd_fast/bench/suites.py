"""The implementations of an operator that a benchmark measures, and the pairs of device and precision it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from vpd_fast import _native
from vpd_fast.bench.onednn import emulates_bfloat16
from vpd_fast.ops import registry

EXHAUSTIVE = pytest.mark.exhaustive  # what a plain `pytest benchmarks/` leaves out
BFLOAT16 = ("bf16", "bfloat16")
NOT_FOR_GPUS = ("cpu", "reference")


def some_of(cases: Iterable[str], typical: Iterable[str]) -> list:
    """All cases for `parametrize`, those that are not typical marked as exhaustive."""
    chosen = set(typical)
    return [case if case in chosen else pytest.param(case, marks=EXHAUSTIVE) for case in cases]


def on_devices(cpu: Iterable[str], cuda: Iterable[str]) -> list:
    """Pairs (device, precision or dtype) for `parametrize(("device", ...), ..., indirect=["device"])`.

    bfloat16 is exhaustive on CPUs without instructions for it, where PyTorch needs up to 80 times as long.
    """
    emulated = BFLOAT16 if emulates_bfloat16("cpu") else ()
    on_cpu = [
        pytest.param("cpu", name, id=f"cpu-{name}", marks=[EXHAUSTIVE] if name in emulated else []) for name in cpu
    ]
    return on_cpu + [pytest.param("cuda", name, id=f"cuda-{name}", marks=pytest.mark.gpu) for name in cuda]


def variants_of(name: str, device: str, call: Callable[[str], Any], all_levels: bool = False) -> dict[str, Callable]:
    """call(impl) of operator `name` for every implementation that is for the device.

    On a CPU: the best instruction set, or all of them; on a GPU: what does not refuse these arguments, with a line for
    what does. Raises AssertionError if nothing is left.
    """
    if device == "cpu":
        levels = _native.load("_C").usable_isas()
        return {f"cpu {isa}": _with_level(isa, call) for isa in (levels if all_levels else levels[-1:])}
    found: dict[str, Callable] = {}
    for implementation in registry()[name].implementations:
        if implementation.name in NOT_FOR_GPUS:
            continue
        try:
            call(implementation.name)
        except ValueError as error:  # InputError: it refuses
            print(f"{name}: not run: {implementation.name}: {error}")
            continue
        found[implementation.name] = lambda impl=implementation.name: call(impl)
    assert found, f"no implementation of {name} runs on this GPU"
    return found


def _with_level(isa: str, call: Callable[[str], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VPD_FAST_ISA", isa)
            return call("cpu")

    return run


def library_variant(name: str, make: Callable[[], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """{name: call} of a library's function, or nothing if it does not take these sizes, with a line that says so."""
    try:
        call = make()
        call()
    except (RuntimeError, NotImplementedError) as error:
        print(f"not run: {name}: {str(error).strip().splitlines()[0]}")
        return {}
    return {name: call}
