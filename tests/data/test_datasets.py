"""Data sets read from miniature folders in the real formats, and what they say about wrong ones."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vpd_fast.data import open_dataset
from vpd_fast.errors import DatasetError, ImageError, InputError

from ..helpers import miniature


def test_ade20k(tmp_path):
    data = open_dataset("ade20k", miniature.ade20k(tmp_path), "training", classes=["ground", *miniature.NAMES])
    assert len(data) == 4
    assert data.task == "segmentation"
    assert data.name(1) == "training/ADE_train_00000001"
    sample, (_, labels, _) = data.load(1), miniature.picture(1)
    expected = labels.copy()
    expected[:2] = 255
    np.testing.assert_array_equal(sample.target, expected)
    assert sample.image.shape == (64, 96, 3)
    raw = open_dataset("ade20k", tmp_path, "training", reduce_zero_label=False).load(1).target
    np.testing.assert_array_equal(raw[2:], labels[2:] + 1)
    assert len(open_dataset("ade20k", tmp_path, "validation").class_names) == 150


def test_ade20k_errors(tmp_path):
    with pytest.raises(DatasetError, match="looked for the folder .*images/training"):
        open_dataset("ade20k", tmp_path, "training")
    miniature.ade20k(tmp_path)
    with pytest.raises(DatasetError, match="training, validation"):
        open_dataset("ade20k", tmp_path, "test")
    with pytest.raises(DatasetError, match=r"ADE_train_00000000.png.* class 3, but there are only 3"):
        open_dataset("ade20k", tmp_path, "training", classes=["a", "b", "c"]).load(0)
    miniature.write_image(tmp_path / "annotations/training/ADE_train_00000000.png", np.zeros((10, 10), np.uint8))
    with pytest.raises(DatasetError, match="64x96 and 10x10"):
        open_dataset("ade20k", tmp_path, "training").load(0)
    (tmp_path / "annotations/training/ADE_train_00000000.png").unlink()
    with pytest.raises(ImageError, match="ADE_train_00000000.png"):
        open_dataset("ade20k", tmp_path, "training").load(0)
    (tmp_path / "images/training/ADE_train_00000001.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(ImageError, match="ADE_train_00000001.jpg"):
        open_dataset("ade20k", tmp_path, "training").load(1)
    with pytest.raises(InputError, match="colour"):
        open_dataset("ade20k", tmp_path, "training", colour=1)
    with pytest.raises(InputError, match="must be one of ade20k"):
        open_dataset("coco", tmp_path, "training")


@pytest.mark.parametrize("kind", ["refcoco", "refcoco+"])
def test_refer(tmp_path, kind):
    data = open_dataset(kind, miniature.refer(tmp_path, kind), "train")
    assert (len(data), data.class_names) == (4, ())
    for i in range(4):  # polygons and RLE
        sample, (_, labels, boxes) = data.load(i), miniature.picture(i)
        top, left, bottom, right = boxes[0]
        expected = np.zeros_like(labels)
        expected[top:bottom, left:right] = 1
        np.testing.assert_array_equal(sample.target, expected)
        assert sample.name == f"train/{10 + i}"
        assert sample.sentences[0] == f"the {miniature.NAMES[labels[top, left] - 1]} box"
        assert len(sample.sentences) == 2
    assert [len(open_dataset(kind, tmp_path, split)) for split in ("val", "testA", "testB", "test")] == [2, 1, 1, 2]


def rewrite(root, change) -> None:
    path = root / "refcoco/refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    change(refs)
    path.write_bytes(pickle.dumps(refs, protocol=2))


def test_overlapping_polygons(tmp_path):
    miniature.refer(tmp_path)
    path = tmp_path / "refcoco/instances.json"
    values = json.loads(path.read_text())
    values["annotations"][0]["segmentation"] = [[0, 0, 20, 0, 20, 20, 0, 20], [10, 0, 30, 0, 30, 20, 10, 20]]
    path.write_text(json.dumps(values))
    assert open_dataset("refcoco", tmp_path, "train").load(0).target.sum() == 20 * 20  # 30 x 20 without the middle
    assert open_dataset("refcoco", tmp_path, "train", overlaps="union").load(0).target.sum() == 30 * 20


def test_refer_errors(tmp_path):
    with pytest.raises(DatasetError, match=r"looked for the folder .*refcocog"):
        open_dataset("refcocog", tmp_path, "val")
    miniature.refer(tmp_path)
    with pytest.raises(DatasetError, match=r"refs\(google\).p; the folder has instances.json, refs\(unc\).p"):
        open_dataset("refcoco", tmp_path, "val", split_by="google")
    with pytest.raises(InputError, match="testA"):
        open_dataset("refcoco", tmp_path, "validation")
    with pytest.raises(DatasetError, match="no object is in the split testC"):
        open_dataset("refcoco", tmp_path, "testC")
    everything = ["sentences", "ann_id", "image_id"]
    for key, value in zip(everything, ([{"sent": " "}], 99, 99), strict=True):
        miniature.refer(tmp_path)
        rewrite(tmp_path, lambda refs, key=key, value=value: [ref.update({key: value}) for ref in refs])
        with pytest.raises(DatasetError, match=r"object.* left out|no image of an object|can be used \(\d left out"):
            open_dataset("refcoco", tmp_path, "train")
    rewrite(tmp_path, lambda refs: [ref.pop("split") for ref in refs])
    with pytest.raises(DatasetError, match="list of objects; the first: number 0 .*split"):
        open_dataset("refcoco", tmp_path, "train")


def test_broken_objects_are_told_and_left_out(tmp_path):
    miniature.refer(tmp_path)
    rewrite(tmp_path, lambda refs: refs.extend(
        [
            {**refs[0], "ref_id": 90, "sentences": []},
            {**refs[0], "ref_id": 91, "sentences": [{"sent": ""}, {"sent": "red"}]},
            {**refs[0], "ref_id": 92, "sentences": "a red box"},
            {**refs[0], "ref_id": 93, "sentences": ["a red box"]},
            {**refs[0], "ref_id": 94, "ann_id": 99},
            {**refs[0], "ref_id": 95, "image_id": 99},
            {"ref_id": 96},
            None,
            {**refs[0], "ref_id": 97, "sentences": [{"sent": "\ud800"}]},
        ]
    ))  # fmt: skip
    data = open_dataset("refcoco", tmp_path, "train")
    samples = {data.name(i): data.load(i).sentences for i in range(len(data))}
    assert len(samples) == 4 + 3
    assert [samples[f"train/{i}"] for i in (91, 92, 93)] == [("red",), ("a red box",), ("a red box",)]
    assert [(note.split(":")[0], note.split("the first: ")[1][:10]) for note in data.notes] == [
        ("2 left out", "number 14 "), ("2 left out", "object 90"), ("2 left out", "object 94"),
        ("1 left out", "object 91"),
    ]  # fmt: skip


@pytest.mark.parametrize("orientation", [3, 6])
def test_refer_reads_images_as_they_are_stored(tmp_path, orientation):
    miniature.refer(tmp_path)
    path = tmp_path / "images/mscoco/images/train2014/COCO_train2014_000000000000.jpg"
    before = open_dataset("refcoco", tmp_path, "train").load(0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, block = path.read_bytes(), exif.tobytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:])
    np.testing.assert_array_equal(open_dataset("refcoco", tmp_path, "train").load(0).image, before.image)
    turned = open_dataset("refcoco", tmp_path, "train", exif=True)
    if orientation == 6:
        with pytest.raises(DatasetError, match="must have the same size"):
            turned.load(0)
    else:
        np.testing.assert_array_equal(turned.load(0).image, before.image[::-1, ::-1])


@pytest.mark.parametrize("segmentation", [[], [[1, 2]], ["abc"], None, {"size": [64, 96], "counts": "!!zz99"}])
def test_shapes_that_are_none(tmp_path, segmentation):
    miniature.refer(tmp_path)
    path = tmp_path / "refcoco/instances.json"
    values = json.loads(path.read_text())
    values["annotations"][0]["segmentation"] = segmentation
    path.write_text(json.dumps(values))
    with pytest.raises(DatasetError, match="train/10: no polygon and no RLE"):
        open_dataset("refcoco", tmp_path, "train").load(0)
    values["images"][0]["height"] = None
    path.write_text(json.dumps(values))
    data = open_dataset("refcoco", tmp_path, "train")
    assert (len(data), data.notes[0].rpartition(": ")[2]) == (3, "object 10")


def test_compressed_rle(tmp_path):
    from pycocotools import mask as masks

    miniature.refer(tmp_path)
    expected = np.zeros((64, 96), np.uint8, order="F")
    expected[3:9, 4:80] = 1
    code = masks.encode(expected)
    path = tmp_path / "refcoco/instances.json"
    values = json.loads(path.read_text())
    values["annotations"][0]["segmentation"] = {"size": [64, 96], "counts": code["counts"].decode()}
    path.write_text(json.dumps(values))
    np.testing.assert_array_equal(open_dataset("refcoco", tmp_path, "train").load(0).target, expected)


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_runs_no_code(tmp_path, capsys):
    path = miniature.refer(tmp_path) / "refcoco/refs(unc).p"
    path.write_bytes(pickle.dumps([Hostile()]))
    with pytest.raises(DatasetError, match="would load builtins.print"):
        open_dataset("refcoco", tmp_path, "train")
    assert capsys.readouterr().out == ""
    path.write_bytes(b"not a pickle")
    with pytest.raises(DatasetError, match="not a pickle"):
        open_dataset("refcoco", tmp_path, "train")


def test_nyu(tmp_path):
    data = open_dataset("nyu", miniature.nyu(tmp_path), "train")
    assert [data.name(i) for i in range(4)] == [
        "kitchen_0028b_rgb_00000", "kitchen_0028b_rgb_00001", "study_room_0004_rgb_00000", "study_room_0004_rgb_00001"
    ]  # fmt: skip
    sample = data.load(1)
    np.testing.assert_allclose(sample.target, miniature.depths(miniature.picture(1)[1]) / 1000, rtol=1e-6)
    assert sample.target.dtype == np.float32
    assert [data.class_names[data.load(i).scene] for i in range(4)] == ["kitchen", "kitchen", "study", "study"]
    fixed = open_dataset("nyu", tmp_path, "train", scene_rule="fixed")
    assert fixed.class_names[fixed.load(2).scene] == "study_room"
    assert len(open_dataset("nyu", tmp_path, "test")) == 4


def test_nyu_from_a_list(tmp_path):
    miniature.nyu(tmp_path)
    listing = tmp_path / "list.txt"
    listing.write_text("/study_room_0004/rgb_00001.jpg /study_room_0004/sync_depth_00001.png 518.8\n\n")
    data = open_dataset("nyu", tmp_path, "train", filenames=listing)
    assert [data.load(i).name for i in range(len(data))] == ["study_room_0004_rgb_00001"]
    listing.write_text("/study_room_0004/rgb_00001.jpg\n")
    with pytest.raises(DatasetError, match="an image and a depth file, got '/study_room_0004/rgb_00001.jpg'"):
        open_dataset("nyu", tmp_path, "train", filenames=listing)


def test_nyu_scenes_that_are_unknown(tmp_path):
    miniature.nyu(tmp_path)
    with pytest.raises(DatasetError, match="tells none of the 1 scenes"):
        open_dataset("nyu", tmp_path, "train", classes=["bathroom"]).load(0)
    assert open_dataset("nyu", tmp_path, "train", classes=["bathroom"], unknown_scene="mean").load(0).scene is None
    with pytest.raises(InputError, match="train, test"):
        open_dataset("nyu", tmp_path, "val")


@pytest.mark.parametrize("task", ["segmentation", "referring", "depth"])
def test_folder(tmp_path, task):
    data = open_dataset("folder", miniature.folder(tmp_path, task), "val", task=task)
    assert len(data) == 4
    assert data.name(2) == "val/val_2"
    sample, (image, labels, boxes) = data.load(2), miniature.picture(102)
    np.testing.assert_array_equal(sample.image, image)
    top, left, bottom, right = boxes[0]
    if task == "segmentation":
        assert data.class_names == ("ground", *miniature.NAMES)
        np.testing.assert_array_equal(sample.target, labels)
    elif task == "depth":
        assert (data.class_names, sample.scene) == ((), None)
        np.testing.assert_allclose(sample.target, miniature.depths(labels) / 1000, rtol=1e-6)
    else:
        assert sample.target.sum() == (bottom - top) * (right - left)
        assert len(sample.sentences) == 1


def test_folder_with_lists_and_errors(tmp_path):
    miniature.folder(tmp_path, "segmentation")
    (tmp_path / "splits").mkdir()
    for path in (tmp_path / "images/train").iterdir():
        path.rename(tmp_path / "images" / path.name)
    for path in (tmp_path / "masks/train").iterdir():
        path.rename(tmp_path / "masks" / path.name)
    (tmp_path / "splits/few.txt").write_text("train_3\ntrain_1\n")
    data = open_dataset("folder", tmp_path, "few", task="segmentation")
    assert [data.load(i).name for i in range(len(data))] == ["few/train_3", "few/train_1"]
    (tmp_path / "splits/few.txt").write_bytes("\ufefftrain_3\r\ntrain_1\r\n".encode())  # as Windows editors write
    assert len(open_dataset("folder", tmp_path, "few", task="segmentation")) == 2
    names = ("ground", *miniature.NAMES)
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "classes.txt").write_bytes("\r\n".join(names).encode(encoding))
        assert open_dataset("folder", tmp_path, "few", task="segmentation").class_names == names
    for folder in ("images", "masks"):
        path = next((tmp_path / folder).glob("train_3.*"))
        path.rename(path.with_name("caf\udce9" + path.suffix))  # the byte E9, which is no UTF-8
    (tmp_path / "splits/few.txt").write_bytes(b"caf\xe9\n")
    data = open_dataset("folder", tmp_path, "few", task="segmentation")
    assert [data.name(i) for i in range(len(data))] == ["few/caf\udce9"]
    (tmp_path / "splits/few.txt").write_text("train_9\n")
    with pytest.raises(DatasetError, match="'train_9' has no image"):
        open_dataset("folder", tmp_path, "few", task="segmentation")
    with pytest.raises(DatasetError, match="looked for the folder .*images/test"):
        open_dataset("folder", tmp_path, "test", task="segmentation")
    (tmp_path / "classes.txt").write_text("a\na\n")
    with pytest.raises(DatasetError, match="none twice"):
        open_dataset("folder", tmp_path, "val", task="segmentation")
    with pytest.raises(DatasetError, match="depths"):
        open_dataset("folder", tmp_path, "val", task="depth")
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DatasetError, match=r"classes.txt.*expected text in UTF-8"):
        open_dataset("folder", tmp_path, "val", task="segmentation")
    with pytest.raises(DatasetError, match="256 classes; expected at most 255"):
        open_dataset("folder", tmp_path, "val", task="segmentation", classes=[str(i) for i in range(256)])


def test_a_folder_of_black_and_white_masks(tmp_path):
    miniature.folder(tmp_path, "segmentation")
    (tmp_path / "classes.txt").write_text("ground\nbox\n")
    for i in range(4):
        labels = miniature.picture(100 + i)[1]
        miniature.write_image(tmp_path / f"masks/val/val_{i}.png", np.where(labels > 0, 255, 0).astype(np.uint8))
    target = open_dataset("folder", tmp_path, "val", task="segmentation", binary=True).load(1).target
    np.testing.assert_array_equal(target, miniature.picture(101)[1] > 0)
    assert target.dtype == np.uint8
    with pytest.raises(InputError, match="binary is for segmentation of two classes, got segmentation of 3"):
        open_dataset("folder", tmp_path, "val", task="segmentation", binary=True, classes=["a", "b", "c"])
    with pytest.raises(InputError, match="binary must be true or false, got 'yes'"):
        open_dataset("folder", tmp_path, "val", task="segmentation", binary="yes")


def test_labels_that_are_no_class(tmp_path):
    miniature.folder(tmp_path, "segmentation")
    for value in (-1, 256, 70_000):
        labels = np.full((64, 96), value, np.int32)
        (tmp_path / "masks/val/val_0.png").unlink(missing_ok=True)
        Image.fromarray(labels).save(tmp_path / "masks/val/val_0.tif")
        with pytest.raises(DatasetError, match=f"val_0.tif: the mask has class {value}, but there are only 5"):
            open_dataset("folder", tmp_path, "val", task="segmentation").load(0)


@pytest.mark.parametrize("kind", ["ade20k", "nyu", "folder"])
def test_one_text_is_no_list_of_classes(tmp_path, kind):
    root = {"ade20k": miniature.ade20k, "nyu": miniature.nyu}.get(kind, lambda r: miniature.folder(r, "segmentation"))
    split = {"ade20k": "training", "nyu": "train"}.get(kind, "train")
    options = {"task": "segmentation"} if kind == "folder" else {}
    with pytest.raises(InputError, match="classes must be a list of names, got the text 'abc'"):
        open_dataset(kind, root(tmp_path), split, classes="abc", **options)


@pytest.mark.parametrize("kind", ["nyu", "folder"])
def test_the_unit_of_depths(tmp_path, kind):
    root = miniature.nyu(tmp_path) if kind == "nyu" else miniature.folder(tmp_path, "depth")
    options = {"task": "depth"} if kind == "folder" else {}
    metres = open_dataset(kind, root, "train", **options).load(0).target
    scaled = open_dataset(kind, root, "train", depth_scale=256, **options).load(0).target
    # A quotient each, and a product: three roundings of 2^-24.
    np.testing.assert_allclose(scaled, metres * (1000 / 256), rtol=2**-22)
    for scale in (0, -1, float("nan"), "m", True):
        with pytest.raises(InputError, match="depth_scale must be units per metre"):
            open_dataset(kind, root, "train", depth_scale=scale, **options)
    path = root / ("sync/kitchen_0028b/sync_depth_00000.png" if kind == "nyu" else "depths/train/train_0.png")
    miniature.write_image(path, np.full((64, 96), 200, np.uint8))
    with pytest.raises(DatasetError, match=f"{path.name}: depths of 8 bits, which end at 255 millimetres"):
        open_dataset(kind, root, "train", **options).load(0)
    target = open_dataset(kind, root, "train", depth_scale=25.5, **options).load(0).target
    np.testing.assert_allclose(target, 200 / 25.5, rtol=2**-24)  # one rounding of a quotient


def test_nyu_tells_what_has_no_partner(tmp_path):
    scene = miniature.nyu(tmp_path) / "sync/kitchen_0028b"
    assert open_dataset("nyu", tmp_path, "train").notes == []
    (scene / "sync_depth_00001.png").unlink()
    (scene / "rgb_00000.jpg").unlink()
    data = open_dataset("nyu", tmp_path, "train")
    assert len(data) == 2
    assert [note.replace(str(tmp_path), "") for note in data.notes] == [
        "1 left out: images without a depth file in /sync; the first: kitchen_0028b/rgb_00001.jpg",
        "1 left out: depth files without an image in /sync; the first: kitchen_0028b/sync_depth_00000.png",
    ]


def test_folders_tell_what_they_leave_out(tmp_path):
    miniature.folder(tmp_path / "own", "segmentation")
    place = tmp_path / "own/images/val"
    for name in ("val_0.webp", "val_1.PNG", "notes.txt", ".hidden"):
        (place / name).write_bytes((place / "val_0.png").read_bytes())
    (tmp_path / "own/masks/val/val_9.png").write_bytes(b"")
    data = open_dataset("folder", tmp_path / "own", "val", task="segmentation")
    assert [data.entries[i]["image"].name for i in range(4)] == ["val_0.png", "val_1.PNG", "val_2.png", "val_3.png"]
    assert [(note[:10], note.rpartition("/")[2]) for note in data.notes] == [
        ("2 left out", "val_1.png"), ("1 left out", "notes.txt"), ("1 left out", "val_9.png")
    ]  # fmt: skip
    miniature.ade20k(tmp_path / "ade")
    place = tmp_path / "ade/images/training"
    (place / "ADE_train_00000000.jpg").rename(place / "ADE_train_00000000.JPG")
    data = open_dataset("ade20k", tmp_path / "ade", "training")
    assert len(data) == 3
    assert [note.split(" left out: files in ")[0] for note in data.notes] == ["1", "1"]


def test_entries_of_sentences_that_are_broken_are_told_and_left_out(tmp_path):
    miniature.folder(tmp_path, "referring")
    path = tmp_path / "sentences.json"
    rows = json.loads(path.read_text())
    row = next(row for row in rows if row["split"] == "val")
    good = len([row for row in rows if row["split"] == "val"])
    broken = [None, "x", 5, {}, {**row, "image": 5}, {**row, "sentences": None}, {**row, "sentences": [" "]}]
    more = [{**row, "sentences": "cube"}, {**row, "sentences": ["cube", ""]}]
    path.write_text(json.dumps([*rows, *broken, *more]))
    data = open_dataset("folder", tmp_path, "val", task="referring")
    assert [data.load(i).sentences for i in (good, good + 1)] == [("cube",), ("cube",)]
    assert [note.split(" left out")[0] for note in data.notes] == [str(len(broken)), "1"]
    for text in (json.dumps(broken), "{}", "[" * 100_000, '"abc"', "nonsense"):
        path.write_text(text)
        with pytest.raises(
            DatasetError, match="expected a list of entries with image, mask, sentences and split|no im"
        ):
            open_dataset("folder", tmp_path, "val", task="referring")


def test_orientation_in_a_folder(tmp_path):
    miniature.folder(tmp_path, "segmentation")
    path = tmp_path / "images/val/val_0.png"
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(path) as image:
        pixels = np.asarray(image)
        image.save(path, exif=exif)
    for value, expected in ((True, pixels[::-1, ::-1]), (False, pixels)):
        data = open_dataset("folder", tmp_path, "val", task="segmentation", exif=value)
        np.testing.assert_array_equal(data.load(0).image, expected)
