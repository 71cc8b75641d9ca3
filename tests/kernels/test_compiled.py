"""Arithmetic whose every bit matters, in the instructions that kernels are compiled to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
Code = dict[tuple[str, str], dict[str, int]]


@pytest.fixture(scope="module")
def code() -> Code:
    """How often each instruction is in a kernel, by its name and the dtype of its result."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled"]
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    return {(name, dtype): counts for name, dtype, counts in map(json.loads, output.splitlines())}


@pytest.mark.parametrize("dtype", [pytest.param("int8", marks=pytest.mark.slow), "float8_e4m3fn"])
def test_rows_of_8_bits_are_divided_exactly_and_scaled_in_two_steps(code: Code, dtype: str) -> None:
    """As the operators define it: scale and inverse are rounded once each, and so are product and sum with the zero."""
    counts = code["_prologue_kernel", dtype]
    assert counts["div.rn.f32"] > 0
    assert not {name for name in counts if name.startswith("div.") and name != "div.rn.f32"}
    assert not {name for name in counts if name.startswith("fma.")}


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("_one_pass_kernel", "bfloat16"), ("_online_kernel", "bfloat16")]
    + [(kernel, "") for kernel in ("_map_kernel", "_query_kernel", "_token_kernel")],
)
def test_scores_are_rounded_before_the_highest_is_subtracted(code: Code, kernel: str, dtype: str) -> None:
    """In every kernel alike: joined with the subtraction, a score of 10^7 would be half a unit, 2^0.5, off."""
    counts = code[kernel, dtype]
    assert counts["mul.rn.f32"] > 0
    assert counts["sub.rn.f32"] > 0
    assert not {name for name in counts if name.startswith("fma.")}


def test_all_channels_of_labels_are_summed_alike(code: Code) -> None:
    """Each product is joined with its sum, six per pixel and channel, four channels at a time; else equals differ."""
    assert code["_upsample_argmax_kernel", ""] == {"fma.rn.f32": 4 * 6}
