"""Fast models against the plain ones: every task, precision, batch and size; reports; bad input; threads."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vpd_fast
from vpd_fast import VPD, VPDConfig
from vpd_fast.engine import Policy
from vpd_fast.engine.model import FastVPD
from vpd_fast.errors import InputError
from vpd_fast.models.random_weights import randomize

from ..helpers.backbones import TINY
from .golden_cases import assert_agrees_with_the_original

# Least cosine of every feature and of the result to the plain float32 model's.
GATES = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.995}
CASES = ["seg_small", "seg_small_a64", "refer_small", "depth_small"]
FULL_SIZE = ["seg_sd15", "refer_sd15", "depth_sd15"]
TINY_16 = dataclasses.replace(TINY, context_dim=16)


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def conditioned(model: VPD, images: Tensor) -> tuple[Tensor, ...]:
    """Arguments of a call: the images and what the task is conditioned on."""
    generator, config = torch.Generator().manual_seed(3), model.config
    if config.task == "referring":
        return images, torch.randn(len(images), config.tokens, config.backbone.context_dim, generator=generator)
    if config.task == "depth":
        return images, torch.randint(config.num_scenes, (len(images),), generator=generator)
    return (images,)


def result(model: VPD, inputs: tuple[Tensor, ...]) -> Tensor:
    out = model(*inputs)
    return out["pred_d"] if isinstance(out, dict) else out


def small_model(task: str = "segmentation", **settings: object) -> VPD:
    values = {"num_classes": 7, "tokens": 5, "num_scenes": 3, "base_size": 128, "channels": 32, "max_attn_size": 8}
    return randomize(VPD(VPDConfig(task=task, backbone=TINY_16, **(values | settings))), seed=1).eval()


@functools.cache
def shared_model(task: str = "segmentation") -> VPD:
    """The small model, for tests that only read it."""
    return small_model(task)


@functools.cache
def shared_fast_model(task: str = "segmentation", precision: str = "fp32") -> FastVPD:
    return vpd_fast.optimize(shared_model(task), precision)


def some_images(batch: int = 1, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *itertools.product(CASES[:3], GATES),
        ("depth_small", "int8"),
        *(pytest.param("depth_small", precision, marks=pytest.mark.slow) for precision in ("fp32", "bf16")),
        *(pytest.param(name, precision, marks=pytest.mark.slow) for name in FULL_SIZE for precision in GATES),
    ],
)
def test_features_and_results_agree_with_the_original(golden: Callable, name: str, precision: str) -> None:
    """The stored tensors are the original code's; the number is printed even when it passes (pytest -rP)."""
    case = golden(name)
    model, inputs, expected = case.model(), case.inputs(), case.tensors
    fast = vpd_fast.optimize(model, precision)
    del model
    assert_agrees_with_the_original(case, inputs, expected, fast, GATES[precision])


@pytest.mark.parametrize(
    ("task", "precision", "size"),
    [  # every pair of values in a third of the cases
        pytest.param(task, precision, size, marks=() if (i + j + k) % 3 == 0 else pytest.mark.slow)
        for i, task in enumerate(["segmentation", "referring", "depth"])
        for j, precision in enumerate(GATES)
        for k, size in enumerate([(1, 128, 64), (2, 64, 192), (3, 64, 64)])
    ],
)
def test_batches_and_sizes(task: str, precision: str, size: tuple[int, int, int]) -> None:
    """size: images, height, width."""
    model, batch = shared_model(task), size[0]
    inputs = conditioned(model, some_images(*size))
    with torch.no_grad():
        expected = result(model, inputs)
    fast = shared_fast_model(task, precision)
    together = result(fast, inputs)
    assert together.shape == expected.shape
    assert together.dtype == torch.float32
    assert cosine(together, expected) >= GATES[precision]
    for i in range(batch):  # an image's result does not depend on its neighbours
        alone = result(fast, tuple(x[i : i + 1] for x in inputs))
        # PyTorch's sigmoid rounds the tail of a tensor, which its size decides, by another formula than the rest.
        rtol = 1e-6 if task == "depth" else 0
        torch.testing.assert_close(alone, together[i : i + 1], rtol=rtol, atol=0)


@pytest.mark.parametrize("settings", [{"attn_selector": "up_cross+down_cross+mid_cross"}, {"use_attn": False}])
def test_other_selections_of_maps(settings: dict) -> None:
    model = small_model(**settings)
    images = some_images(2, 128, 128)
    with torch.no_grad():
        expected = model.extract_feat(images)
    for actual, wanted in zip(vpd_fast.optimize(model, "fp32").extract_feat(images), expected, strict=True):
        assert cosine(actual, wanted) > 0.999999
        assert actual.shape == wanted.shape


def test_self_attention_maps() -> None:
    model = small_model(attn_selector="up_self+down_cross", max_attn_size=8)
    images = some_images(1, 128, 128)
    with torch.no_grad():
        expected = model.extract_feat(images)
    for actual, wanted in zip(vpd_fast.optimize(model, "fp32").extract_feat(images), expected, strict=True):
        assert cosine(actual, wanted) > 0.999999


def test_other_texts_are_not_mistaken_for_the_last_one() -> None:
    model, fast = shared_model("referring"), shared_fast_model("referring")
    images = some_images()
    for seed in (0, 1, 0):
        tokens = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            torch.testing.assert_close(fast(images, tokens), model(images, tokens), rtol=1e-3, atol=1e-4)


def test_depth_of_several_scenes_in_one_batch() -> None:
    model, fast, images = shared_model("depth"), shared_fast_model("depth"), some_images(3)
    with torch.no_grad():
        for scenes in (torch.tensor([0, 2, 1]), torch.tensor([1, 1, 1]), None):
            expected = model(images, scenes)["pred_d"]
            torch.testing.assert_close(fast(images, scenes)["pred_d"], expected, rtol=1e-3, atol=1e-4)


def test_the_model_is_not_changed_and_may_be_deleted() -> None:
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = vpd_fast.optimize(model, "fp32")
    expected = fast(some_images())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    torch.testing.assert_close(fast(some_images()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("precision", GATES)
def test_results_do_not_share_memory_with_later_ones(precision: str) -> None:
    fast = shared_fast_model("segmentation", precision)
    features, logits = fast.extract_feat(some_images()), fast(some_images())
    copies = [x.clone() for x in (*features, logits)]
    fast(some_images(2, 128, 128))
    fast(-some_images())
    for kept, copy in zip((*features, logits), copies, strict=True):
        torch.testing.assert_close(kept, copy, rtol=0, atol=0)


def test_two_threads_may_call_one_model() -> None:
    model, fast = shared_model("referring"), shared_fast_model("referring", "int8")
    calls = [conditioned(model, some_images() * factor) for factor in (1.0, -0.5)]
    calls[1][1].neg_()
    expected = [fast(*call) for call in calls]
    failures = []

    def work(i: int) -> None:
        for _ in range(2):
            if not torch.equal(fast(*calls[i]), expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_predict_gives_the_same_kind_of_result() -> None:
    import numpy as np

    model, fast = shared_model(), shared_fast_model()
    photo = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    plain = model.predict(photo, with_maps=True)
    found = fast.predict(photo, with_maps=True)
    assert (plain.labels == found.labels).mean() > 0.999
    assert plain.maps.names == found.maps.names


def test_nothing_is_converted_between_layers() -> None:
    """A bfloat16 engine keeps activations in bfloat16 and channels-last: PyTorch only converts at its two ends."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            name = func.overloadpacket.__name__
            if name in ("_to_copy", "copy_", "clone", "contiguous", "cat"):
                self.calls.append(name)
            return func(*args, **kwargs or {})

    fast, images = shared_fast_model("segmentation", "bf16"), some_images()
    fast.encode(images)
    with Count() as count:
        latents = fast.encode(images)
    # Images to channels-last, latents to float32.
    assert sorted(count.calls) == ["_to_copy", "clone"]
    context = fast.context(1)
    fast.features(latents, context)
    with Count() as count:
        fast.features(latents, context)
    # Four features to float32, before their maps, which are computed there.
    assert count.calls == ["copy_"] * 4


def test_report_says_what_each_layer_became() -> None:
    fast = vpd_fast.optimize(small_model(), "int8", policy=Policy(precisions={"unet.input_blocks.1.*": "bf16"}))
    report = fast.report()
    rows = {row["name"]: row for row in report.rows()}
    assert set(rows) == set(fast.layers)
    assert rows["encoder.conv_in"]["precision"] == "bf16"
    assert rows["unet.input_blocks.1.0.conv1"]["precision"] == "bf16"
    assert rows["unet.input_blocks.3.0.conv1"]["precision"] == "int8"
    assert rows["unet.input_blocks.1.0.conv1"]["reason"].endswith("policy: unet.input_blocks.1.*")
    text = str(report)
    assert all(name in text for name in fast.layers)
    assert "time (14 layers)" in text
    with pytest.raises(InputError, match="calibration images"):
        fast.report(sensitivity=True)


def test_policy_without_winograd() -> None:
    model, with_it, images = shared_model(), shared_fast_model(), some_images()
    without = vpd_fast.optimize(model, "fp32", policy=Policy(winograd=False))
    assert "winograd_conv2d" not in {layer.kind for layer in without.layers.values()}
    assert "2x2 for each of 4 phases" in {info.algorithm for info in without.infos}
    assert "winograd_conv2d" in {layer.kind for layer in with_it.layers.values()}
    torch.testing.assert_close(without(images), with_it(images), rtol=1e-3, atol=1e-4)


def test_calibration_measures_and_does_not_harm() -> None:
    model, images = small_model(), some_images(2, 64, 64)
    with torch.no_grad():
        expected = model(images)
        # Channels of very different ranges, which is what smoothing is for.
        for block in model.unet.unet.diffusion_model.modules():
            if isinstance(block, torch.nn.GroupNorm):
                block.weight[::7] *= 30
        expected = model(images)
    plain = vpd_fast.optimize(model, "int8")
    fast = vpd_fast.optimize(model, "int8", calibration=[images])
    errors = [(m(images) - expected).norm().item() for m in (plain, fast)]
    assert errors[1] < errors[0]
    rows = fast.report(sensitivity=True).rows()
    assert rows == sorted(rows, key=lambda row: row["snr_db"])
    assert {row["precision"] for row in rows} == {"int8"}
    assert rows[0]["snr_db"] > 15
    assert len(rows) == sum(row["precision"] == "int8" for row in fast.report().rows() if ".kv" not in row["name"])
    assert "SNR dB" in str(fast.report(sensitivity=True))


def calibration_of(task: str) -> list:
    """Images at a size that each task takes, and sentences."""
    if task == "depth":
        return [torch.rand(1, 3, 96, 64), torch.rand(2, 3, 64, 64)]  # multiples of 32
    images = some_images(2)
    return [images, (images, torch.randn(2, 5, TINY_16.context_dim))] if task == "referring" else [images]


@pytest.mark.parametrize("task", ["segmentation", "referring", "depth"])
def test_calibration_reaches_every_8_bit_layer(task: str) -> None:
    fast = vpd_fast.optimize(shared_model(task), "int8", calibration=calibration_of(task))
    measured = {row["name"] for row in fast.report(sensitivity=True).rows()}
    assert measured == {row["name"] for row in fast.report().rows() if row["precision"] == "int8"}


def test_bad_input() -> None:
    model = small_model()
    known = "'fp32', 'bf16', 'fp16', 'int8', 'fp8'"
    for precision, message in (("int4", known), ("fp16", "does not run on cpu"), ("fp8", "does not run on cpu")):
        with pytest.raises(InputError, match=message):
            vpd_fast.optimize(model, precision)
    with pytest.raises(InputError, match=r"model\.eval"):
        vpd_fast.optimize(small_model().train(), "fp32")
    with pytest.raises(InputError, match=r"must be a vpd_fast\.VPD, got Linear"):
        vpd_fast.optimize(torch.nn.Linear(1, 1), "fp32")
    with pytest.raises(InputError, match="float32"):
        vpd_fast.optimize(small_model().bfloat16(), "bf16")
    with pytest.raises(InputError, match="fits no layer"):
        vpd_fast.optimize(model, "int8", policy=Policy(precisions={"unet.nothing": "bf16"}))
    with pytest.raises(InputError, match="fits no layer"):  # a statistic has no precision
        vpd_fast.optimize(model, "int8", policy=Policy(precisions={"*.norm1": "bf16"}))
    with pytest.raises(InputError, match="must be one of fp32, bf16, fp16, int8, fp8"):
        Policy(precisions={"*": "int4"})
    with pytest.raises(InputError, match="on the CPU"):
        vpd_fast.optimize(VPD.empty(model.config).eval(), "fp32")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        (torch.zeros(1, 3, 64, 64), "constant"),
        (torch.full((1, 3, 64, 64), float("nan")), "not finite"),
        (torch.rand(1, 3, 64, 64) * 255, "must be in"),
        (torch.rand(1, 3, 60, 64), "64"),
        (torch.rand(1, 4, 64, 64), "3"),
        (torch.empty(0, 3, 64, 64), "no images"),
        ((torch.rand(1, 3, 64, 64), torch.rand(1, 5, 16)), "calibration"),  # a sentence for a segmentation model
        ("photo.jpg", "calibration"),
    ],
)
def test_bad_calibration_images(images: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vpd_fast.optimize(shared_model(), "int8", calibration=images)


def test_calibration_of_another_precision() -> None:
    with pytest.raises(InputError, match="int8"):
        vpd_fast.optimize(shared_model(), "bf16", calibration=[some_images()])


def test_bad_calibration_sentences() -> None:
    images = some_images(2)
    for tokens in (torch.randn(1, 5, TINY_16.context_dim), torch.randn(2, 5, 3), "the cat"):
        with pytest.raises(InputError, match=r"calibration\[0\]"):
            vpd_fast.optimize(shared_model("referring"), "int8", calibration=[(images, tokens)])


def test_what_a_fast_model_cannot_do() -> None:
    model, fast = shared_model(), shared_fast_model()
    assert not fast.training
    assert fast.eval() is fast
    assert fast.to("cpu") is fast
    for call in (
        lambda: fast.train(),
        lambda: fast.load_state_dict(model.state_dict()),
        lambda: fast.save_pretrained("somewhere"),
        lambda: fast.gradient_checkpointing_enable(),
        lambda: fast.to("cuda"),
        lambda: fast.bfloat16(),
        lambda: fast.half(),
        lambda: vpd_fast.optimize(fast, "fp32"),
        lambda: setattr(fast, "attention_backend", "sdpa"),
    ):
        with pytest.raises(InputError):
            call()
    assert not fast(some_images().requires_grad_()).requires_grad
    with pytest.raises(InputError, match="multiples of 64"):
        fast(some_images(1, 60, 64))


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_needs_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    device = torch.device("cuda", 0)
    for policy, precision in ((Policy(), "fp8"), (Policy(precisions={"unet.*": "fp8"}), "int8")):
        if refused:
            with pytest.raises(InputError, match='precision "fp8" does not run on cuda:0: A GPU has no instructions'):
                policy.check_device(precision, device)
        else:
            policy.check_device(precision, device)
    Policy(emulate=True).check_device("fp8", device)
    Policy().check_device("fp16", device)


def test_devices() -> None:
    model = shared_model()
    fast = vpd_fast.optimize(model, "fp32", device="cpu", graphs=False)
    assert fast.device == torch.device("cpu")
    assert not fast.graphs
    assert vpd_fast.optimize(model, "fp32").graphs
    for device, message in (
        ("tpu", "device must be the name of a device, got 'tpu'"),
        ("meta", "the CPU or a GPU, got meta"),
    ):
        with pytest.raises(InputError, match=message):
            vpd_fast.optimize(model, "fp32", device=device)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device is cuda, but PyTorch finds no GPU"):
            vpd_fast.optimize(model, "fp32", device="cuda")
