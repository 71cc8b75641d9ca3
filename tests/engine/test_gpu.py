"""Fast models on a GPU, against the plain model there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import vpd_fast
from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.bench.parity import cosine
from vpd_fast.engine import Policy
from vpd_fast.models.random_weights import randomize

pytestmark = pytest.mark.gpu
SMALL = BackboneConfig(model_channels=64, num_heads=4, context_dim=32, vae_ch=64)
GATES = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999, "int8": 0.99, "fp8": 0.95}


@pytest.fixture
def model() -> VPD:
    config = VPDConfig(num_classes=7, channels=64, base_size=256, backbone=SMALL)
    return randomize(VPD(config), seed=1).eval().cuda()


def images(batch: int = 1, seed: int = 0, size: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, size, size, generator=generator) * 2 - 1).cuda()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("precision", GATES)
def test_agrees_with_the_plain_model(model: VPD, precision: str, graphs: bool) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    fast = vpd_fast.optimize(model, precision, graphs=graphs)
    for batch, size in ((1, 256), (2, 128), (1, 256)):
        x = images(batch, size=size)
        with torch.no_grad():
            expected = [*model.extract_feat(x), model(x)]
        for actual, plain in zip([*fast.extract_feat(x), fast(x)], expected, strict=True):
            assert cosine(actual, plain) >= GATES[precision]


def test_results_are_not_overwritten(model: VPD) -> None:
    fast = vpd_fast.optimize(model, "bf16")
    first = fast(images(seed=1))
    kept = first.clone()
    fast(images(seed=2))
    assert torch.equal(first, kept)


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


def test_an_engine_of_the_cpu_runs_on_the_gpu(model: VPD, tmp_path: Path) -> None:
    vpd_fast.optimize(model.cpu(), "int8", policy=Policy(winograd=False)).save(tmp_path)
    on_cpu, on_gpu = vpd_fast.load_engine(tmp_path), vpd_fast.load_engine(tmp_path, device="cuda")
    assert cosine(on_gpu(images()).cpu(), on_cpu(images().cpu())) >= GATES["int8"]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_model_on_the_cpu_becomes_a_fast_one_on_the_gpu(model: VPD, precision: str) -> None:
    there = vpd_fast.optimize(model, precision)
    moved = vpd_fast.optimize(model.cpu(), precision, device="cuda")
    assert moved.device.type == "cuda"
    assert [info.algorithm for info in moved.infos] == [info.algorithm for info in there.infos]
    assert cosine(moved(images()), there(images())) >= 0.9999
