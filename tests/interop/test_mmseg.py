"""VPD in mmsegmentation: the Runner trains and tests it, MMSegInferencer predicts what our own predictor does."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import multiprocessing
import re
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.helpers import miniature, processes
from tests.helpers.backbones import TINY
from tests.helpers.released import released
from vpd_fast import VPD, VPDConfig
from vpd_fast.errors import CheckpointError, ImageError, InputError, MissingDependencyError
from vpd_fast.inference.batching import stacked
from vpd_fast.inference.segmentation import SegmentationPredictor
from vpd_fast.interop._mmcv_lite import fill_in_for_operators
from vpd_fast.models.random_weights import randomize
from vpd_fast.pictures.reading import read_image
from vpd_fast.training.groups import parameter_groups
from vpd_fast.training.schedules import poly_warmup

if importlib.util.find_spec("mmseg") is None or importlib.util.find_spec("mmcv") is None:
    pytest.skip("needs mmsegmentation and mmcv-lite (.ci/mmseg installs them)", allow_module_level=True)


class Ours:
    """vpd_fast.interop.mmseg, imported when it is first used: collecting tests shall not take the seconds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("vpd_fast.interop.mmseg"), name)


ours = Ours()
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "mmseg" / "vpd_ade20k.py"
SIDE, STRIDE = 64, 42  # the stride is that of our predictor, two thirds
SETTINGS = {"base_size": SIDE, "channels": 16, "backbone": vars(TINY)}
FIVE = {"num_classes": 5, "settings": SETTINGS}
MMSEG = re.compile("mmengine|mmseg|VPDSegmentor")
WINDOWS = {"mode": "slide", "crop_size": (SIDE, SIDE), "stride": (STRIDE, STRIDE)}


@pytest.fixture(autouse=True)
def _as_it_was():
    """A Runner settles things for its whole process."""
    threads, start = cv2.getNumThreads(), multiprocessing.get_start_method(allow_none=True)
    yield
    cv2.setNumThreads(threads)
    multiprocessing.set_start_method(start, force=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return miniature.ade20k(tmp_path_factory.mktemp("ade"), count=2)


@pytest.fixture(scope="module")
def segmentor():
    """To be read only."""
    return ours.VPDSegmentor(**FIVE, test_cfg=WINDOWS)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    return miniature.write_image(tmp_path_factory.mktemp("photo") / "photo.jpg", miniature.picture(7, (70, 110))[0])


def tiny_config(data: Path, folder: Path, **changes):
    """The example, with a smaller network and fewer steps."""
    config = importlib.import_module("mmengine.config").Config.fromfile(EXAMPLE)
    pipeline = config.train_dataloader.dataset.pipeline
    pipeline[2].scale, pipeline[3].crop_size = (4 * SIDE, SIDE), (SIDE, SIDE)
    for split in ("train", "val", "test"):
        loader = config[f"{split}_dataloader"]
        loader.num_workers, loader.persistent_workers, loader.dataset.data_root = 0, False, str(data)
    for split in ("val", "test"):
        config[f"{split}_dataloader"].dataset.pipeline[1].scale = (4 * SIDE, SIDE)
    config.model.stable_diffusion = None
    config.model.settings = SETTINGS
    config.model.data_preprocessor.size = (SIDE, SIDE)
    config.model.test_cfg = WINDOWS
    config.train_cfg.max_iters = config.train_cfg.val_interval = config.default_hooks.checkpoint.interval = 2
    config.default_hooks.logger.interval = 1
    config.work_dir, config.experiment_name = str(folder), folder.name
    config.visualizer.name = f"{folder.name}-{len(changes)}"
    config.log_level = "WARNING"
    config.merge_from_dict(changes)
    return config


def run(config):
    return importlib.import_module("mmengine.runner").Runner.from_cfg(config)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A Runner after two steps and an evaluation, weights before, losses, and the checkpoint."""
    runner = run(tiny_config(data, tmp_path_factory.mktemp("trained")))
    before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    runner.train()
    losses = runner.message_hub.get_scalar("train/decode.loss_ce")._log_history
    return runner, before, losses, Path(runner.work_dir) / "iter_2.pth"


# Training and testing by the Runner


def test_the_runner_trains_and_tests(trained) -> None:
    runner, before, losses, _ = trained
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    after = runner.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"gamma", "neck.lateral_convs.0.conv.weight", "unet.unet.diffusion_model.time_embed.0.weight"} <= changed
    assert not any(name.startswith(("encoder_vq.", "class_embeddings")) for name in changed)
    metrics = runner.test()
    assert set(metrics) == {"aAcc", "mIoU", "mAcc"}
    assert 0 <= metrics["aAcc"] <= 100


def test_the_loss_is_that_of_our_training(segmentor) -> None:
    images, target = torch.rand(2, 3, SIDE, SIDE) * 2 - 1, torch.randint(0, 5, (2, SIDE, SIDE))
    target[:, :8] = 255
    with torch.no_grad():
        losses = segmentor(images, [labelled(t) for t in target], mode="loss")
        logits = segmentor(images, mode="tensor")
        assert logits.shape == (2, 5, SIDE // 8, SIDE // 8)
        full = segmentor.encode_decode(images)
    expected = torch.nn.functional.cross_entropy(full, target, ignore_index=255, reduction="sum") / target.numel()
    # Both add up 7,168 float32 terms, each in its own order.
    torch.testing.assert_close(losses["decode.loss_ce"], expected, rtol=1e-5, atol=1e-6)
    valid = target != 255
    accuracy = 100 * (full.argmax(1) == target)[valid].float().mean()
    # One pixel: where two classes agree to rounding, upsampling in another order may prefer the other one.
    torch.testing.assert_close(losses["decode.acc_seg"], accuracy, rtol=0, atol=100 / valid.sum().item())


def test_mixed_precision(segmentor) -> None:
    images, samples = torch.rand(2, 3, SIDE, SIDE) * 2 - 1, [labelled(torch.zeros(SIDE, SIDE))] * 2
    with torch.no_grad():
        exact = segmentor.loss(images, samples)["decode.loss_ce"]
        with torch.autocast("cpu", torch.bfloat16):  # as mmengine's AmpOptimWrapper does
            found = segmentor.loss(images, samples)["decode.loss_ce"]
    assert found.dtype == torch.float32
    assert torch.isfinite(found)
    assert float(found) != float(exact)  # it is another arithmetic


def test_learning_rates_are_those_of_our_training(trained) -> None:
    runner, *_ = trained
    network = runner.model.network
    ids = {id(parameter): name for name, parameter in network.named_parameters()}
    expected = {
        ids[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(network, lr=8e-5, weight_decay=1e-3, preset="segmentation")
        for parameter in group["params"]
    }
    found = {
        ids[id(parameter)]: (group["initial_lr"], group["weight_decay"])
        for group in runner.optim_wrapper.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name


def test_the_schedule_is_that_of_our_training() -> None:
    scheduler = importlib.import_module("mmengine.optim.scheduler")
    config = importlib.import_module("mmengine.config").Config.fromfile(EXAMPLE)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    schedules = [getattr(scheduler, s.pop("type"))(optimizer, **s) for s in map(dict, config.param_scheduler)]
    factor, checked = poly_warmup(80000), 0
    optimizer.step()
    for step in range(3000):
        if step in (0, 1, 700, 1499, 1500, 1501, 2999):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(factor(step), rel=1e-6)
            checked += 1
        for schedule in schedules:
            schedule.step()
    assert checked == 7


def test_checkpoints_are_resumed_and_loaded(trained, data, tmp_path) -> None:
    runner, _, _, path = trained
    weights = runner.model.state_dict()
    resumed = run(tiny_config(data, tmp_path, resume=True, load_from=str(path)))
    resumed.load_or_resume()
    assert resumed.iter == 2
    assert all(torch.equal(weights[name], tensor) for name, tensor in resumed.model.state_dict().items())
    loaded = VPD.from_checkpoint(path, base_size=SIDE, num_heads=TINY.num_heads)
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items())


def test_a_hostile_checkpoint_gets_no_getattr(tmp_path) -> None:
    class Reach:
        def __reduce__(self):
            return getattr, (np.ndarray, "tofile")

    torch.save({"state_dict": {}, "meta": Reach()}, tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match="may be hostile"):
        torch.load(tmp_path / "hostile.pth")


def test_auxiliary_heads() -> None:
    head = {
        "type": "mmseg.FCNHead", "in_channels": 16, "in_index": 2, "channels": 8, "num_convs": 1, "num_classes": 5,
        "loss_decode": {"type": "mmseg.CrossEntropyLoss", "loss_weight": 0.4},
    }  # fmt: skip
    one = ours.VPDSegmentor(**FIVE, auxiliary_head=head)
    images, sample = torch.zeros(1, 3, SIDE, SIDE), labelled(torch.zeros(SIDE, SIDE))
    with torch.no_grad():
        assert {"decode.loss_ce", "aux.loss_ce"} <= set(one.loss(images, [sample]))
        two = ours.VPDSegmentor(**FIVE, auxiliary_head=[head, head])
        assert {"aux_0.loss_ce", "aux_1.loss_ce"} <= set(two.loss(images, [sample]))
    weights = one.state_dict()
    assert "auxiliary_head.conv_seg.weight" in weights
    again = ours.VPDSegmentor(**FIVE, auxiliary_head=head)
    again.load_state_dict(weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.state_dict().items())


def train_in_a_group(folder: str) -> None:
    """A process of a distributed run, each with pixels of its own; its weights go into a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    model = ours.VPDSegmentor(**FIVE, train_cfg={"checkpointing": True}).train()
    wrapped = importlib.import_module("mmengine.model").MMDistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapper = importlib.import_module("mmengine.optim").OptimWrapper(torch.optim.SGD(trained, lr=1e-3))
    for _ in range(2):  # the second step fails if a parameter had no gradient in the first
        image = torch.randint(0, 256, (3, SIDE, 2 * SIDE), dtype=torch.uint8)
        losses = wrapped.train_step(
            {"inputs": [image], "data_samples": [labelled(torch.zeros(SIDE, 2 * SIDE))]}, wrapper
        )
        assert losses["loss"].isfinite()
    np.savez(Path(folder) / f"{rank}.npz", *(parameter.detach().numpy() for parameter in trained))


def labelled(target: torch.Tensor):
    """A sample of training."""
    sample = importlib.import_module("mmseg.structures").SegDataSample()
    sample.gt_sem_seg = importlib.import_module("mmengine.structures").PixelData(data=target[None].long())
    return sample


@pytest.mark.slow
def test_processes_train_together(tmp_path) -> None:
    processes.run_together(train_in_a_group, [(str(tmp_path),)] * 2, tmp_path / "log", 300)
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    start = [p.detach().numpy() for p in ours.VPDSegmentor(**FIVE).parameters() if p.requires_grad]
    assert len(first.files) == len(start)
    assert all(np.array_equal(first[name], second[name]) for name in first.files)
    kept = sum(np.array_equal(first[name], before) for name, before in zip(first.files, start, strict=True))
    assert kept < len(start) / 10  # keys' biases and the like have gradients of 0 in exact arithmetic


# Predictions


def as_the_predictor(segmentor, image: np.ndarray, resize_to: int = SIDE, **options):
    """What our predictor finds, the tensor that its network sees, and what a segmentor needs to know of the image."""
    predictor = SegmentationPredictor(model=segmentor._predictor(), resize_to=resize_to, **options)
    view = predictor.prepare(image).views[0]
    inputs = stacked([view], torch.device("cpu")) * 2 - 1
    sample = importlib.import_module("mmseg.structures").SegDataSample(metainfo={"ori_shape": image.shape[:2]})
    return predictor(image), inputs, sample


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_labels_are_those_of_our_predictor(segmentor, mode, monkeypatch) -> None:
    monkeypatch.setattr(segmentor, "test_cfg", {**WINDOWS, "mode": mode})
    image = miniature.picture(3, (70, 110))[0]
    expected, inputs, sample = as_the_predictor(segmentor, image, mode=mode, probabilities=True)
    (found,) = segmentor(inputs, [sample], mode="predict")
    assert found is sample
    assert found.pred_sem_seg.data.dtype == torch.int64
    np.testing.assert_array_equal(found.pred_sem_seg.data[0].numpy(), expected.labels)
    np.testing.assert_array_equal(found.seg_logits.data.softmax(0).numpy(), expected.probabilities)
    assert len(np.unique(expected.labels)) > 1


def test_labels_of_a_fast_model(segmentor) -> None:
    fast = ours.VPDSegmentor(**FIVE, test_cfg=WINDOWS, precision="bf16")
    image = miniature.picture(3)[0]
    expected, inputs, sample = as_the_predictor(fast, image)
    assert fast._predictor().precision == "bf16"
    (found,) = fast.predict(inputs, [sample])
    np.testing.assert_array_equal(found.pred_sem_seg.data[0].numpy(), expected.labels)
    predictor = fast._predictor()
    assert fast._predictor() is predictor
    fast.eval()
    assert fast._fast is None  # weights may have changed
    with pytest.raises(InputError, match="call model.eval"):
        fast.train().predict(inputs)


def test_flips_padding_and_batches(segmentor) -> None:
    images = torch.rand(3, 3, SIDE, 80) * 2 - 1
    padded = torch.nn.functional.pad(images, (0, 16, 0, 10), value=3.0)
    structures = importlib.import_module("mmseg.structures")

    def predict(inputs, **metainfo):
        samples = [structures.SegDataSample(metainfo={"ori_shape": (50, 60), **metainfo}) for _ in inputs]
        return segmentor.predict(inputs, samples)

    alone = [predict(images[i : i + 1])[0] for i in range(3)]
    # PyTorch multiplies one image and three by other kernels, so float32 rounds otherwise in every layer.
    for i, sample in enumerate(predict(padded, img_padding_size=(0, 16, 0, 10))):
        torch.testing.assert_close(sample.seg_logits.data, alone[i].seg_logits.data, rtol=1e-4, atol=1e-5)
        assert sample.pred_sem_seg.shape == (50, 60)
    for direction, axis in (("horizontal", 3), ("vertical", 2)):
        (flipped,) = predict(images[:1], flip=True, flip_direction=direction)
        for key in ("pred_sem_seg", "seg_logits"):
            assert torch.equal(getattr(flipped, key).data, getattr(alone[0], key).data.flip(axis - 1))
    with pytest.raises(InputError, match="change the test pipeline's flips"):
        predict(images[:1], flip=True, flip_direction="diagonal")
    without = segmentor.predict(images)
    assert [sample.pred_sem_seg.shape for sample in without] == [(SIDE, 80)] * 3
    with torch.no_grad():
        without[0].seg_logits.data += 1  # they are ordinary tensors


def test_averages_over_flips_are_those_of_our_predictor(segmentor) -> None:
    image = miniature.picture(3, (70, 110))[0]
    expected, inputs, sample = as_the_predictor(segmentor, image, flip=True)
    sample.set_metainfo({"img_path": "photo.jpg"})
    mirrored = sample.new()
    mirrored.set_metainfo({"flip": True, "flip_direction": "horizontal"})
    augmented = importlib.import_module("mmseg.models").SegTTAModel(module=segmentor)
    predictions = [segmentor.predict(inputs, [sample])[0], segmentor.predict(inputs.flip(3), [mirrored])[0]]
    (found,) = augmented.merge_preds([predictions])
    np.testing.assert_array_equal(found.pred_sem_seg.data[0].numpy(), expected.labels)


def test_only_labels(segmentor, monkeypatch) -> None:
    monkeypatch.setattr(segmentor, "test_cfg", {**WINDOWS, "seg_logits": False})
    (sample,) = segmentor.predict(torch.zeros(1, 3, SIDE, SIDE))
    assert "seg_logits" not in sample


def test_what_is_not_finite(segmentor, monkeypatch) -> None:
    monkeypatch.setattr(segmentor.network.gamma, "data", torch.full_like(segmentor.network.gamma, torch.nan))
    with pytest.raises(ImageError, match="not finite"):
        segmentor.predict(torch.zeros(1, 3, SIDE, SIDE))


def test_the_inferencer(data, photo, tmp_path) -> None:
    config = tiny_config(data, tmp_path)
    config.model = {"type": "VPDSegmentor", "checkpoint": "shapes-segmentation"}
    config.test_dataloader.dataset.pipeline[1].scale = (512, 128)
    inferencer = importlib.import_module("mmseg.apis").MMSegInferencer(config)
    names = VPD.from_checkpoint("shapes-segmentation").config.class_names
    assert inferencer.model.dataset_meta["classes"] == names  # not those of Cityscapes
    result = inferencer(str(photo), return_vis=True)
    sample = inferencer(str(photo), return_datasamples=True)
    image = read_image(photo)
    assert result["visualization"].shape == image.shape
    expected, inputs, exact = as_the_predictor(inferencer.model, image, resize_to=128)
    (exact,) = inferencer.model.predict(inputs, [exact])
    # mmseg's (x - 127.5) / 127.5 and our x / 255 * 2 - 1 round differently. Where no logit moves by more than d, the
    # largest is another one only if the next was within 2 d.
    logits = exact.seg_logits.data
    moved = (sample.seg_logits.data - logits).abs().max()
    assert moved <= 1e-4 * logits.abs().max()
    first, second = logits.topk(2, dim=0).values
    certain = (first - second > 2 * moved).numpy()
    assert certain.mean() > 0.99
    np.testing.assert_array_equal(result["predictions"][certain], expected.labels[certain])
    assert len(np.unique(expected.labels)) > 1


# Weights


def test_weights_of_every_origin(golden, tmp_path, trained) -> None:
    load = importlib.import_module("mmengine.runner").load_checkpoint
    case = golden("seg_small")
    torch.save(released(case), tmp_path / "released.pth")
    options = {"settings": {"base_size": case.config.base_size, "backbone": {"num_heads": 4}}}
    model = ours.VPDSegmentor(str(tmp_path / "released.pth"), **options)
    expected = VPD.from_checkpoint(tmp_path / "released.pth", base_size=case.config.base_size, num_heads=4)
    require_same(model, expected)
    model.network.save_pretrained(tmp_path / "own")
    require_same(ours.VPDSegmentor(str(tmp_path / "own")), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load(model, str(tmp_path / "released.pth"), strict=True)  # as the Runner's load_from
    require_same(model, expected)


def require_same(model, expected: VPD) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert model.network.config == expected.config


def test_a_copy_inside_another_module(segmentor) -> None:
    """As in mmengine's averages over a run (EMA)."""
    outer = torch.nn.ModuleDict({"module": copy.deepcopy(segmentor)})
    weights = {name: tensor + 1 for name, tensor in outer.state_dict().items()}
    assert weights.keys() == {f"module.{name}" for name in segmentor.state_dict()}
    outer.load_state_dict(weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in outer.state_dict().items())
    assert not torch.equal(segmentor.network.gamma, outer["module"].network.gamma)


def test_bundled_weights() -> None:
    model = ours.VPDSegmentor("shapes-segmentation")
    assert model.num_classes == len(model.dataset_meta["classes"]) == len(model.dataset_meta["palette"])
    require_same(model, VPD.from_checkpoint("shapes-segmentation"))


def test_other_classes(segmentor, tmp_path) -> None:
    segmentor.network.save_pretrained(tmp_path / "model")
    embeddings = torch.randn(3, TINY.context_dim)
    torch.save(embeddings, tmp_path / "embeddings.pth")
    state = torch.get_rng_state()
    model = ours.VPDSegmentor(
        str(tmp_path / "model"), class_embeddings=str(tmp_path / "embeddings.pth"), class_names=["a", "b", "c"]
    )
    assert torch.equal(torch.get_rng_state(), state)  # the Runner's seed
    assert model.num_classes == 3
    assert torch.equal(model.network.class_embeddings, embeddings)
    assert model.dataset_meta["classes"] == ("a", "b", "c")
    kept = "unet.unet.diffusion_model.time_embed.0.weight"
    assert torch.equal(model.state_dict()[kept], segmentor.state_dict()[kept])


ORIGINAL = {
    "type": "VPDSeg", "backbone": {"type": "ResNetV1c"},
    "unet_config": {"base_size": SIDE, "attn_selector": "up_cross"},
    "neck": {"type": "FPN", "in_channels": [320, 790, 1430, 1280], "out_channels": 16, "num_outs": 4},
    "decode_head": {
        "type": "FPNHead", "in_channels": [16] * 4, "in_index": (0, 1, 2, 3), "feature_strides": [4, 8, 16, 32],
        "channels": 16, "dropout_ratio": 0.1, "num_classes": 5, "norm_cfg": {"type": "SyncBN"}, "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0, "avg_non_ignore": True},
    },
    "train_cfg": {}, "test_cfg": WINDOWS, "settings": {"backbone": vars(TINY)},
}  # fmt: skip


def test_the_model_of_the_original_config(tmp_path) -> None:
    models = importlib.import_module("mmseg.registry").MODELS
    model = models.build(ORIGINAL)
    expected = VPDConfig(num_classes=5, channels=16, base_size=SIDE, attn_selector="up_cross", backbone=TINY)
    assert model.network.config == expected
    assert not model._train_settings.ignored_in_mean
    model.network.save_pretrained(tmp_path / "model")
    again = models.build({**ORIGINAL, "sd_path": "not-read.ckpt", "checkpoint": str(tmp_path / "model")})
    require_same(again, model.network)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("neck", {"num_outs": 5}, "neck.num_outs=5: VPD's has 4"),
        ("neck", {"out_channels": 8}, "give both the same, VPD has one width"),
        ("decode_head", {"norm_cfg": {"type": "GN"}}, "decode_head.norm_cfg.type='GN': VPD's has batch norm"),
        ("decode_head", {"type": "UPerHead"}, "decode_head.type='UPerHead': VPD's has 'FPNHead'"),
        ("decode_head", {"sampler": {}}, "decode_head.sampler={}: VPD's has type, in_index"),
        ("decode_head", {"loss_decode": {"type": "DiceLoss"}}, "loss_decode.type='DiceLoss': VPD's has 'CrossEnt"),
        ("decode_head", {"loss_decode": [{}]}, "decode_head.loss_decode must be a dict"),
        ("unet_config", {"use_att": False}, "unet_config.use_att is not a setting"),
    ],
)
def test_what_the_original_could_not_mean(section, changes, message) -> None:
    config = {**ORIGINAL, section: {**ORIGINAL[section], **changes}}
    with pytest.raises(InputError, match=re.escape(message)):
        ours.VPDSeg(**{key: value for key, value in config.items() if key != "type"})


# Errors


def test_what_a_config_must_not_have(segmentor, tmp_path) -> None:
    segmentor.network.save_pretrained(tmp_path / "five")
    five = str(tmp_path / "five")
    config = VPDConfig(task="depth", num_scenes=2, backbone=TINY)
    depth = randomize(VPD.empty(config), 1)
    depth.save_pretrained(tmp_path / "depth")
    for options, message in (
        ({}, "number of classes is not known: give num_classes"),
        ({"checkpoint": five, "class_embeddings": "x.pth"}, "number of classes is not known"),
        ({"checkpoint": five, "num_classes": 7}, "has 5 classes and num_classes is 7: leave num_classes out"),
        ({"num_classes": 2, "class_names": ["a"]}, "class_names has 1 names and num_classes is 2"),
        ({"class_names": "wall"}, "must be a list of names"),
        ({"checkpoint": five, "stable_diffusion": "sd.ckpt"}, "leave the other out"),
        ({"stable_diffusion": "sd.ckpt", "num_classes": 3}, "give class_names"),
        ({"num_classes": 5, "settings": {"task": "depth"}}, "settings.task is not a setting"),
        ({"num_classes": 5, "settings": [1]}, "settings must be a dict"),
        ({**FIVE, "test_cfg": {"mode": "slices"}}, 'mode must be "slide" or "whole"'),
        ({**FIVE, "test_cfg": {"crop": 3}}, "test_cfg.crop is not a setting, did you mean crop_size"),
        ({**FIVE, "test_cfg": {"crop_size": 64, "stride": 65}}, "must not exceed crop_size"),
        ({**FIVE, "train_cfg": {"checkpoint": True}}, "train_cfg.checkpoint is not a setting"),
        ({**FIVE, "attention_backend": "best"}, "attention_backend"),
        ({**FIVE, "pretrained": "resnet"}, "checkpoint= takes weights"),
        ({**FIVE, "precision": "int9"}, "precision must be None or one of fp32"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            ours.VPDSegmentor(**options)
    with pytest.raises(CheckpointError, match="holds a depth model; expected segmentation"):
        ours.VPDSegmentor(str(tmp_path / "depth"))
    torch.save({"state_dict": depth.state_dict()}, tmp_path / "depth.pth")
    with pytest.raises(CheckpointError, match="checkpoint of another task or model"):
        importlib.import_module("mmengine.runner").load_checkpoint(segmentor, str(tmp_path / "depth.pth"))


def import_anew() -> None:
    spec = importlib.util.find_spec("vpd_fast.interop.mmseg")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("missing", ["mmcv", "mmengine", "mmseg.models"])
def test_a_missing_package(monkeypatch, missing) -> None:
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    for name in list(sys.modules):
        if name.startswith(f"{missing}."):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "vpd_fast\[mmseg\]"'):
        import_anew()


def test_an_operator_that_mmcv_lite_does_not_have() -> None:
    loader = importlib.import_module("mmcv.utils.ext_loader")
    operators = importlib.import_module("mmcv.ops")
    with pytest.raises(MissingDependencyError, match="compile mmcv"):
        operators.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    assert importlib.util.find_spec("mmcv._ext").loader is None  # what check_ops_exist of mmcv asks
    with pytest.raises(AssertionError):
        loader.load_ext("_ext", ["__missing__"])


def test_full_mmcv_is_left_alone(monkeypatch) -> None:
    ours.register()  # mmcv is imported
    extension = types.ModuleType("mmcv._ext")
    extension.__spec__ = ModuleSpec("mmcv._ext", None)
    monkeypatch.setitem(sys.modules, "mmcv._ext", extension)
    assert not fill_in_for_operators()
    assert sys.modules["mmcv._ext"] is extension
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    assert fill_in_for_operators()
    assert sys.modules["mmcv._ext"] is not extension


def test_a_name_that_is_taken(monkeypatch) -> None:
    registry = importlib.import_module("mmseg.registry").MODELS
    import_anew()  # the same module once more is no error
    assert registry.get("VPDSegmentor").__module__ == ours.__name__

    class VPDSegmentor(torch.nn.Module):
        """Somebody else's."""

    with monkeypatch.context() as patch:
        patch.setitem(registry.module_dict, "VPDSegmentor", VPDSegmentor)
        with pytest.raises(InputError, match=r"test_mmseg\.VPDSegmentor has this name in mmseg's registry"):
            ours.register()
    ours.register()
    assert registry.get("VPDSegmentor") is ours.VPDSegmentor


# The page


def test_the_examples_of_the_page(trained, data, photo, tmp_path, monkeypatch) -> None:
    page = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    train, model, predict = (e for e in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if MMSEG.search(e))
    tiny_config(data, tmp_path / "work").dump(tmp_path / "tiny.py")
    monkeypatch.chdir(tmp_path)
    run_example(train, {"examples/mmseg/vpd_ade20k.py": "tiny.py"})
    assert (tmp_path / "work" / "iter_2.pth").is_file()
    *_, weights = trained
    replaced = {
        "examples/mmseg/vpd_ade20k.py": "tiny.py", "photo.jpg": str(photo),
        "work_dirs/vpd_ade20k/iter_80000.pth": str(weights),
    }  # fmt: skip
    found = run_example(predict, replaced)
    assert found["labels"].shape == read_image(photo).shape[:2]
    built = importlib.import_module("mmseg.registry").MODELS.build(run_example(model, {})["model"])
    (sample,) = built.predict(torch.zeros(1, 3, 128, 130))
    assert sample.pred_sem_seg.shape == (128, 130)
    assert built._predictor().precision == "int8"


def run_example(example: str, replaced: dict[str, str]) -> dict:
    """The names that an example leaves, with other paths in it."""
    for name, path in replaced.items():
        example = example.replace(name, path)
    found: dict = {}
    exec(example, found)  # noqa: S102
    return found
