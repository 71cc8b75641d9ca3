"""Fast models on a GPU, against the plain model there."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import vpd_fast
from vpd_fast import VPD
from vpd_fast.bench.parity import cosine
from vpd_fast.engine import Policy

from ..helpers.alone import run_alone
from .agreement import GATES, SMALL, compare, make_model
from .agreement import images as make_images


@pytest.fixture
def model() -> VPD:
    return make_model("cuda")


images = partial(make_images, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", GATES)
def test_agrees_with_the_plain_model(precision: str) -> None:
    """In a process of its own, because a worker once died here without a word."""
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    run_alone("-m", "tests.engine.agreement", precision)


def test_what_runs_in_a_process_of_its_own() -> None:
    backbone = replace(SMALL, model_channels=32, context_dim=16, vae_ch=32, vae_num_res_blocks=1, num_res_blocks=1)
    compare(make_model("cpu", backbone), "fp32", graphs=True, sizes=((1, 64), (1, 64)))


@pytest.mark.gpu
def test_results_are_not_overwritten(model: VPD) -> None:
    fast = vpd_fast.optimize(model, "bf16")
    first = fast(images(seed=1))
    kept = first.clone()
    fast(images(seed=2))
    assert torch.equal(first, kept)


@pytest.mark.gpu
def test_two_threads_on_streams_of_their_own(model: VPD) -> None:
    fast, results = vpd_fast.optimize(model, "bf16"), {}
    expected = {seed: fast(images(seed=seed)).clone() for seed in range(4)}

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = images(seed=seed)
            for _ in range(5):
                results[seed] = fast(x)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in results.items():
        assert torch.equal(result, expected[seed])


@pytest.mark.gpu
def test_an_engine_of_the_cpu_runs_on_the_gpu(model: VPD, tmp_path: Path) -> None:
    vpd_fast.optimize(model.cpu(), "int8", policy=Policy(winograd=False)).save(tmp_path)
    on_cpu, on_gpu = vpd_fast.load_engine(tmp_path), vpd_fast.load_engine(tmp_path, device="cuda")
    assert cosine(on_gpu(images()).cpu(), on_cpu(images().cpu())) >= GATES["int8"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_model_on_the_cpu_becomes_a_fast_one_on_the_gpu(model: VPD, precision: str) -> None:
    there = vpd_fast.optimize(model, precision)
    moved = vpd_fast.optimize(model.cpu(), precision, device="cuda")
    assert moved.device.type == "cuda"
    assert [info.algorithm for info in moved.infos] == [info.algorithm for info in there.infos]
    assert cosine(moved(images()), there(images())) >= 0.9999
