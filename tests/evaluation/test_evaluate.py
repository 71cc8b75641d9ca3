"""Evaluation against the predictors and the metrics called one by one, in one process and in two."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from vpd_fast import VPD, VPDConfig, optimize
from vpd_fast.cli.options import random_tokens
from vpd_fast.errors import DatasetError, ImageError, InputError
from vpd_fast.evaluation import DepthMetrics, ReferringMetrics, SegmentationMetrics, evaluate
from vpd_fast.inference import make_predictor
from vpd_fast.models.random_weights import randomize

from .sets import BROKEN, MemoryDataset, MemorySample, make_dataset


def embed(sentences):
    return random_tokens(list(sentences), 8, 64)


@pytest.fixture
def make_model(tiny_backbone):
    def make(task: str) -> VPD:
        config = VPDConfig(
            task=task, num_classes=5, num_scenes=3, tokens=8, channels=32, base_size=64, backbone=tiny_backbone
        )
        return randomize(VPD.empty(config), 1)

    return make


def test_segmentation_is_the_predictor_and_the_metrics(make_model):
    model, dataset = make_model("segmentation").train(), make_dataset("segmentation", 3)
    found = evaluate(model, dataset, scales=[0.75, 1.0], flip=True)
    assert model.training
    assert model.encoder_vq.training == make_model("segmentation").train().encoder_vq.training
    metrics, predictor = SegmentationMetrics(5), make_predictor(model, scales=[0.75, 1.0], flip=True)
    rows = [metrics.update(predictor(sample.image).labels, sample.target) for sample in dataset.samples]
    assert found.metrics == metrics.compute()
    assert found.per_image == [{"index": i, "name": f"image {i}", **row} for i, row in enumerate(rows)]
    assert found.per_class == metrics.per_class(dataset.class_names)
    assert found.primary == ("mIoU", found.metrics["mIoU"])
    assert (found.count, found.failed, found.left_out) == (3, [], [])
    assert found.settings == {"mode": "slide", "resize_to": 64, "scales": [0.75, 1.0], "flip": True, "batch_size": 1}
    assert [case.name for case in found.worst] == [
        row["name"] for row in sorted(found.per_image, key=lambda row: row["mIoU"])
    ]


def test_referring_at_the_models_size_and_at_the_images(make_model):
    model, dataset = make_model("referring").eval(), make_dataset("referring", 3)
    encoded = []
    encode = model.encode
    model.encode = lambda images: encoded.append(len(images)) or encode(images)
    found = evaluate(model, dataset, text_encoder=embed, batch_size=2)
    assert sum(encoded) == 3  # once per image, however many sentences
    original = evaluate(model, dataset, text_encoder=embed, resolution="original")
    del model.encode

    # Written out as the reference does it: one forward per sentence, argmax, labels resized by Pillow.
    metrics, sentences = ReferringMetrics(), []
    for sample in dataset.samples:
        photo = Image.fromarray(sample.image).resize((64, 64), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
        target = np.asarray(Image.fromarray(sample.target).resize((64, 64), Image.Resampling.NEAREST))
        for sentence in sample.sentences:
            with torch.no_grad():
                mask = model(image, embed([sentence])).argmax(1)[0].numpy()
            metrics.update(mask, target)
            sentences.append(sentence)
    assert [row["sentence"] for row in found.per_image] == sentences
    assert [row["index"] for row in found.per_image] == [0, 1, 1, 2, 2, 2]
    assert found.metrics == pytest.approx(metrics.compute(), abs=2e-3)  # a few pixels of 4096 are undecided
    assert found.count == 3

    metrics = ReferringMetrics()
    for sample in dataset.samples:
        masks = make_predictor(model, text=list(sample.sentences), tokens=embed(sample.sentences))(sample.image).masks
        for mask in masks:
            metrics.update(mask, sample.target)
    assert original.metrics == metrics.compute()
    assert original.metrics != found.metrics


def test_depth_takes_each_samples_scene(make_model):
    model, dataset = make_model("depth"), make_dataset("depth", 3, (50, 60))
    found = evaluate(model, dataset, crop="none", max_depth=8)
    metrics = DepthMetrics(max_depth=8, crop="none")
    for sample in dataset.samples:
        metrics.update(make_predictor(model, scene=sample.scene)(sample.image).depth, sample.target)
    assert found.metrics == metrics.compute()
    assert found.metrics != evaluate(model, dataset, crop="none", max_depth=8, scene=None).metrics
    assert found.metrics != evaluate(model, dataset, crop="none", max_depth=8, flip=False).metrics
    assert found.notes == []
    assert evaluate(model, make_dataset("depth", 2, (50, 60))).notes == [
        "the Eigen crop is for images of 480x640 pixels; 2 of 2 were measured whole"
    ]


def test_fast_models_work_too(make_model):
    model, dataset = make_model("segmentation").eval(), make_dataset("segmentation", 2)
    fast = evaluate(optimize(model, "int8"), dataset)
    assert fast.metrics["aAcc"] == pytest.approx(evaluate(model, dataset).metrics["aAcc"], abs=0.1)


def test_broken_samples_are_left_out_or_raised(make_model):
    model, dataset = make_model("depth"), make_dataset("depth", 4, (50, 60))
    good = dataset.samples[2:]
    small = MemorySample(good[0].image, good[0].target[:10], "image 1")
    dataset.samples[:2] = [BROKEN, small]
    found = evaluate(model, dataset)
    assert [(row["index"], row["name"]) for row in found.failed] == [(0, "image 0"), (1, "image 1")]
    assert found.failed[0]["error"] == str(BROKEN)
    assert "expected the same size" in found.failed[1]["error"]
    assert found.metrics == evaluate(model, MemoryDataset("depth", good)).metrics
    assert found.count == 2
    assert "2 of 4 samples failed and are missing in the metrics" in found.notes
    with pytest.raises(ImageError, match="broken.jpg"):
        evaluate(model, dataset, strict=True)
    with pytest.raises(DatasetError, match=r"none of the 1 samples could be measured; the first: image 0: broken.jpg"):
        evaluate(model, dataset, limit=1)


def test_images_without_labels_count_nowhere(make_model):
    model, dataset = make_model("segmentation"), make_dataset("segmentation", 2)
    empty = MemorySample(dataset.samples[0].image, np.full_like(dataset.samples[0].target, 255), "empty")
    beyond = MemorySample(dataset.samples[0].image, np.full_like(dataset.samples[0].target, 9), "beyond")
    whole = evaluate(model, dataset)
    dataset.samples += [empty, beyond]
    found = evaluate(model, dataset)
    assert found.metrics == whole.metrics
    assert found.left_out == [{"index": 2, "name": "empty"}]
    assert [row["error"] for row in found.failed] == ["beyond: labels from 9 to 9; expected 0 to 4, or 255 for pixels "
                                                      "without a label"]  # fmt: skip
    assert all(math.isfinite(value) for value in found.metrics.values())


def test_whatever_reading_raises_is_a_failed_sample(make_model):
    model, dataset = make_model("segmentation"), make_dataset("segmentation", 1)
    errors = [KeyError("line 3"), OSError(36, "File name too long"), RecursionError(), MemoryError()]
    good = list(dataset.samples)
    dataset.samples += errors
    found = evaluate(model, dataset)
    assert [row["name"] for row in found.failed] == [f"image {i}" for i in (1, 2, 3, 4)]
    for i, row in enumerate(found.failed, 1):
        assert row["error"].startswith(f"image {i}: the sample cannot be read (")
    assert found.count == 1
    for error in errors:
        dataset.samples = [*good, error]
        with pytest.raises(DatasetError, match="image 1: the sample cannot be read"):
            evaluate(model, dataset, strict=True)


def test_classes_that_never_occur_and_what_a_data_set_left_out_are_told(make_model):
    model, dataset = make_model("segmentation"), make_dataset("segmentation", 2)
    dataset.notes = ["3 left out: files without a mask; the first: a.jpg"]
    for sample in dataset.samples:
        sample.target[sample.target == 2] = 255
    assert evaluate(model, dataset).notes == [
        "data set: 3 left out: files without a mask; the first: a.jpg",
        "1 of 5 classes have no pixel in the masks: tree",
    ]
    for sample in dataset.samples:
        sample.target[...] = 255
    with pytest.raises(
        DatasetError, match=r"none of the 2 samples could be measured.*100.0% of the pixels are ignored"
    ):
        evaluate(model, dataset)


def test_depths_in_another_unit_are_told(make_model):
    model, dataset = make_model("depth"), make_dataset("depth", 2)
    for sample in dataset.samples:
        sample.target[:-1] *= 1000
    notes = evaluate(model, dataset, crop="none").notes
    assert len(notes) == 1
    assert "of the known depths are between 0.001 and 10 metres: are the files in another unit?" in notes[0]
    for sample in dataset.samples:
        sample.target[-1] *= 1000
    with pytest.raises(DatasetError, match=r"none of the 2 samples.*; 0.0% of the known depths are between"):
        evaluate(model, dataset, crop="none")


def test_one_text_is_one_sentence(make_model):
    model, dataset = make_model("referring"), make_dataset("referring", 1)
    dataset.samples[0] = dataclasses.replace(dataset.samples[0], sentences="a thing")
    assert [row["sentence"] for row in evaluate(model, dataset, text_encoder=embed).per_image] == ["a thing"]


def test_limit_progress_and_reading_ahead(make_model):
    model, dataset = make_model("depth"), make_dataset("depth", 4, (50, 60))
    seen = []
    found = evaluate(model, dataset, limit=3, progress=lambda *state: seen.append(state), workers=2)
    assert sorted(dataset.loaded) == [0, 1, 2]
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] == found.metrics
    assert "only the first 3 of 4 samples were measured" in found.notes
    assert evaluate(model, dataset, limit=3, workers=0).metrics == found.metrics
    assert not [t for t in threading.enumerate() if t.name.startswith("vpd_fast-reading")]


@pytest.mark.parametrize(
    ("task", "data", "options", "message"),
    [
        ("segmentation", "depth", {}, "data set is for depth, the model for segmentation"),
        ("segmentation", "segmentation", {"names": ("a", "b")}, "the model has 5 classes, the data set 2"),
        ("depth", "depth", {"names": ("a", "b", "c", "d")}, "the model has 3 scenes, the data set 4"),
        ("referring", "referring", {}, "text_encoder="),
        ("referring", "referring", {"text_encoder": embed, "resolution": "big"}, "resized, original, got 'big'"),
        ("referring", "referring", {"text_encoder": embed, "flip": True}, "no option flip"),
        ("segmentation", "segmentation", {"crop": "eigen"}, "segmentation has no option crop"),
        ("depth", "depth", {"limit": 0}, "limit must be an int of at least 1, got 0"),
        ("depth", "depth", {"rank": 1, "world_size": 2}, "torch.distributed is not initialised"),
        ("depth", "depth", {"rank": 2, "world_size": 2}, "0 <= rank < world_size"),
    ],
)
def test_wrong_options(make_model, task, data, options, message):
    dataset = make_dataset(data, 1)
    dataset.class_names = options.pop("names", dataset.class_names)
    with pytest.raises(InputError, match=message):
        evaluate(make_model(task), dataset, **options)


@pytest.mark.parametrize("task", ["segmentation", "referring", "depth"])
def test_files(make_model, tmp_path, task):
    dataset = make_dataset(task, 4, (50, 60))
    dataset.samples[1] = BROKEN
    found = evaluate(make_model(task), dataset, text_encoder=embed, worst=2)
    folder = tmp_path / "out"
    written = found.save(folder, {"model": "tiny"})
    assert {path.name for path in folder.iterdir()} == {path.name for path in written}
    assert ("per_class.csv" in {path.name for path in written}) == (task == "segmentation")
    values = json.loads((folder / "metrics.json").read_text())
    assert values["model"] == "tiny"
    assert values["metrics"] == found.metrics
    assert [row["name"] for row in values["failed"]] == ["image 1"]
    rows = list(csv.DictReader((folder / "per_image.csv").open(newline="")))
    assert [int(row["index"]) for row in rows] == [row["index"] for row in found.per_image]
    assert len(found.worst) == 2
    html = (folder / "worst.html").read_text()
    assert html.count('<li class="case">') == 2
    assert html.count("data:image/jpeg;base64,") == 8
    assert "<road>" not in html  # names of classes are escaped
    assert "http" not in html
    Image.open(folder / "worst.png").verify()


def test_a_folder_that_cannot_be_written(make_model, tmp_path):
    found = evaluate(make_model("depth"), make_dataset("depth", 1, (50, 60)))
    (tmp_path / "file").write_text("here")
    with pytest.raises(InputError, match="cannot write the evaluation there"):
        found.save(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_the_worst_are_drawn_and_kept():
    from vpd_fast.evaluation import panels
    from vpd_fast.evaluation.gallery import Worst
    from vpd_fast.evaluation.tasks import Finding

    drawn = []

    def finding(i, badness):
        picture = panels.Drawing([("a", Image.new("RGB", (4, 4)))])
        return Finding({}, badness, lambda: drawn.append(i) or picture)

    worst = Worst(2)
    for i, badness in enumerate([0.5, 0.1, 0.1, 0.9, 0.5, 0.2]):
        worst.offer(i, 0, str(i), "", finding(i, badness))
    assert [case.name for case in worst.cases] == ["3", "0"]  # of equals the first
    assert drawn == [0, 1, 3]
    Worst(0).offer(0, 0, "x", "", finding(9, 1.0))
    assert 9 not in drawn
