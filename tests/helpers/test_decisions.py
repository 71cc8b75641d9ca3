"""What runs on a GPU is what the operators take there: collected as on such a machine, asked without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="without it every implementation for a GPU refuses")
ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/ops", "tests/kernels", "tests/native", "tests/engine")

# What an implementation takes no case of. Two multiply 8 and 16 bits, and these functions need float32.
BY_OTHERS = {
    f"{function} by {impl}"
    for impl in ("cuda", "cuda_rows")
    for function in (
        "tests/ops/test_conv2d.py::test_is_the_convolution_of_pytorch",
        "tests/ops/test_linear.py::test_eps",
        "tests/ops/test_linear.py::test_geglu_is_that_of_the_plain_model",
    )
}
BY_OTHERS |= {  # windows that overlap, of which a pixel reads more than two logits along an axis
    f"tests/ops/test_upsample_argmax_windows.py::{name} by cuda_strips"
    for name in ("test_padding_is_cut_off", "test_size_defaults_to_the_image", "test_strides_do_not_matter")
}

WRONG = """
import pytest, torch
from tests.ops.gemm_cases import make_weight, randn
from vpd_fast import ops
from tests.ops import on_device

@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("k", [48, 40])
def test_second_call(impl, k):
    weight = make_weight(8, 48, torch.int8)
    on_device.ops.linear(randn(1, 5, 48), weight, impl=impl)
    on_device.ops.linear(randn(1, 5, k), make_weight(8, k, torch.int8), impl=impl)

@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton"])
def test_left_on_the_cpu(impl):
    ops.upsample_argmax(randn(1, 2, 4, 4), (8, 8), impl=impl)
"""


def decisions(*places: str) -> dict:
    """What the plugin says about the cases at these places."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    plugins = ("-p", "tests.helpers.with_fake_gpu", "-p", "no:cacheprovider", "-p", "no:xdist")
    options = ("-c", "pyproject.toml", "--rootdir", str(ROOT), "--collect-only", "-qq", "-m", "gpu")
    command = [sys.executable, "-m", "pytest", *plugins, *options, *places]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("DECISIONS")]
    assert len(lines) == 1, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(lines[0].removeprefix("DECISIONS"))


@pytest.mark.slow  # it asks some thousand cases
def test_no_case_for_a_gpu_is_refused_there() -> None:
    found = decisions(*FOLDERS)
    assert not found["refused"]
    assert found["taken"] > 1000
    assert not found["unasked"]
    assert set(found["without"]) == BY_OTHERS


def test_wrong_cases_are_found(tmp_path: Path) -> None:
    """A call after the first, and a tensor that is not on the GPU."""
    path = tmp_path / "test_wrong.py"
    path.write_text(WRONG)
    found = decisions(str(path))
    assert [name.partition("::")[2] for name in found["refused"]] == ["test_second_call[40-cuda]"]
    assert "40 channels of torch.int8 are no multiple of 16 bytes" in next(iter(found["refused"].values()))
    assert [name.partition("::")[2] for name in found["without"]] == ["test_left_on_the_cpu by triton"]
