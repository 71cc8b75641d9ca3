"""The shapes world: geometry by hand, sentences by another checker, splits, what is kept."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vpd_fast.data import open_dataset
from vpd_fast.data.shapes import CLASSES, SPLITS, VOCABULARY, Scene, export, make_scene, stream
from vpd_fast.data.shapes.dataset import OBJECTS
from vpd_fast.data.shapes.language import CLEAR, CLEAR_METRES, KINDS, PER_OBJECT, kind_of
from vpd_fast.data.shapes.render import SHAPES, Camera, Room, Solid, shade, trace
from vpd_fast.data.shapes.world import held_out
from vpd_fast.errors import DatasetError, InputError

GREY = (0.5, 0.5, 0.5)
ROOM = Room(8.0, GREY, GREY, "plain", "plain", (0.0, 1.0, 0.0))


@functools.cache
def scenes(split: str = "train", count: int = 40) -> list[Scene]:
    return [make_scene(i, split) for i in range(count)]


def straight(height: float, x: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """One ray along z."""
    return np.array([x, height, 0], np.float32), np.array([[0, 0, 1]], np.float32)


@pytest.mark.parametrize(
    ("shape", "depth"),
    [("sphere", 4.0), ("cube", 4.2), ("cylinder", 4.2), ("cone", 4.5), ("pyramid", 4.5)],
)
def test_depth_of_solids_by_hand(shape: str, depth: float) -> None:
    """Solids of radius 1 at 5 metres, seen at half their height, where a cone is half as wide as its base."""
    hits = trace(ROOM, [Solid(shape, 0, 5, 1, 0, GREY)], *straight(1.0))
    assert hits["depth"][0] == pytest.approx(depth, abs=1e-5)
    assert hits["seen"][0] == 0


def test_a_ring_has_a_hole() -> None:
    solid = Solid("ring", 0, 5, 1, 0, GREY)
    middle, side = trace(ROOM, [solid], *straight(1.0)), trace(ROOM, [solid], *straight(1.0, 0.67))
    assert middle["seen"][0] == -2
    assert middle["depth"][0] == 8
    assert side["depth"][0] == pytest.approx(5 - 0.33, abs=0.02)


def test_turning_a_cube_brings_its_edge_forward() -> None:
    hits = trace(ROOM, [Solid("cube", 0, 5, 1, math.pi / 4, GREY)], *straight(1.0))
    assert hits["depth"][0] == pytest.approx(5 - 0.8 * math.sqrt(2), abs=1e-3)


def test_camera() -> None:
    origin, rays = Camera(height=2, pitch=30, view=60).rays(64)
    hits = trace(ROOM, [], origin, rays)
    middle = hits["depth"].reshape(64, 64)[31:33, 31:33].mean()
    assert middle == pytest.approx(2 / math.sin(math.radians(30)), rel=1e-2)  # where the axis meets the floor
    assert (np.abs(rays @ np.array([0, -0.5, math.sqrt(0.75)], np.float32) - 1) < 1e-5).all()  # so t is depth


def test_what_is_nearer_hides() -> None:
    near, far = Solid("sphere", 0, 4, 0.5, 0, GREY), Solid("cube", 0, 6, 1, 0, GREY)
    for solids in ([near, far], [far, near]):
        hits = trace(ROOM, solids, *straight(0.5))
        assert solids[hits["seen"][0]] is near
        assert hits["each"].all()


def test_shadows_under_the_light() -> None:
    """Light from above: the floor is dark under a sphere and only there."""
    origin, rays = np.array([0, 2, 0], np.float32), np.array([[0, -2, 5], [0, -2, 3]], np.float32)
    sphere = Solid("sphere", 0, 5, 0.3, 0, GREY)
    assert shade(ROOM, [], origin, rays) == pytest.approx(0.5)
    aside = shade(ROOM, [dataclasses.replace(sphere, x=1)], origin, rays)
    assert aside == pytest.approx(0.5)
    below = np.array([0.1, 0.02, 5], np.float32)  # under the sphere, looking down
    down = np.array([[0, -1, 0]], np.float32)
    assert shade(ROOM, [sphere], below, down) == pytest.approx(0.5 * 0.38)
    assert shade(ROOM, [], below, down) == pytest.approx(0.5)


def test_scenes_are_what_they_say() -> None:
    for scene in scenes():
        assert (scene.image.shape, scene.image.dtype) == ((128, 128, 3), np.uint8)
        assert (scene.depth.dtype, scene.labels.dtype) == (np.float32, np.uint8)
        assert 1.5 < scene.depth.min() < scene.depth.max() < 10
        assert 1 <= len(scene.objects) <= 5
        for i, thing in enumerate(scene.objects):
            mask = scene.instances == i + 1
            assert (scene.labels[mask] == CLASSES.index(thing.shape)).all()
            if mask.any():
                assert thing.column == pytest.approx(np.nonzero(mask)[1].mean())
        assert set(scene.labels[scene.instances == 0].tolist()) <= {0, 1}
    assert {thing.shape for scene in scenes() for thing in scene.objects} == set(SHAPES)


def test_same_seed_same_scene() -> None:
    again = make_scene(3)
    for field in dataclasses.fields(Scene):
        first, second = getattr(scenes()[3], field.name), getattr(again, field.name)
        np.testing.assert_array_equal(first, second) if isinstance(first, np.ndarray) else None
        assert isinstance(first, np.ndarray) or first == second
    assert not np.array_equal(again.image, make_scene(3, "test").image)


def test_held_out_pairs() -> None:
    for split in SPLITS:
        for scene in scenes(split, 20 if split == "train" else 6):
            pairs = [held_out(thing.shape, thing.color) for thing in scene.objects]
            assert sum(pairs) == (split == "unseen")


def fits(sentence: str, scene: Scene) -> list[int]:
    """Objects a sentence may mean, found by words alone."""
    match = re.fullmatch(
        r"the (?:(leftmost|rightmost|nearest|farthest) )?(.+?)(?: (left of|right of|in front of|behind) the (.+))?",
        sentence,
    )
    extreme, phrase, relation, anchor = match.groups()

    def named(text: str) -> set[int]:
        words = set(text.split()) - {"thing"}
        things = enumerate(scene.objects)
        return {i for i, t in things if t.visible >= 0.3 and words <= {t.shape, t.color, t.size, t.texture}}

    def place(i: int, word: str) -> float:
        thing = scene.objects[i]
        across = {"left of": 1, "leftmost": 1, "right of": -1, "rightmost": -1}.get(word)
        if across:
            return across * thing.column / 128 / CLEAR
        return {"in front of": 1, "nearest": 1, "behind": -1, "farthest": -1}[word] * thing.z / CLEAR_METRES

    found = named(phrase)
    if extreme:
        best = min(place(i, extreme) for i in found)
        return [i for i in found if place(i, extreme) < best + 1]
    if relation:
        (other,) = named(anchor)
        return [i for i in found - {other} if place(i, relation) < place(other, relation) + 1]
    return list(found)


def test_sentences_fit_one_object() -> None:
    count = 0
    for split in SPLITS:
        for scene in scenes(split, 40 if split == "train" else 12):
            for sentence, number in scene.sentences:
                assert fits(sentence, scene) == [number], (sentence, scene.objects)
                count += 1
    assert count > 500


def test_kinds_of_sentences_take_turns() -> None:
    """No kind has more than its share where the others have sentences as well."""
    counts = dict.fromkeys(KINDS, 0)
    for scene in scenes():
        for sentence, _ in scene.sentences:
            counts[kind_of(sentence)] += 1
    assert PER_OBJECT == 4
    assert all(count > 0.15 * sum(counts.values()) for count in counts.values()), counts


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("the large red cube", "attributes"),
        ("the leftmost thing", "extremes"),
        ("the cube left of the red ring", "relations"),
        ("the large thing behind the cone", "relations"),
        ("the ring in front of the cone", "relations"),
    ],
)
def test_kind_of(sentence: str, kind: str) -> None:
    assert kind_of(sentence) == kind


def test_vocabulary_and_lengths() -> None:
    for scene in scenes():
        for text in (scene.caption, *(sentence for sentence, _ in scene.sentences)):
            assert set(text.split()) <= set(VOCABULARY)
            assert len(text.split()) <= 20
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_boundaries_matter_little() -> None:
    """Labels as coarse as latents still tell the classes apart."""
    both, either = torch.zeros(len(CLASSES)), torch.zeros(len(CLASSES))
    for scene in scenes():
        shares = F.one_hot(torch.from_numpy(scene.labels).long(), len(CLASSES)).permute(2, 0, 1)[None].float()
        coarse = F.interpolate(F.avg_pool2d(shares, 8), size=(128, 128), mode="bilinear").argmax(1)
        found, true = F.one_hot(coarse[0], len(CLASSES)) > 0, shares[0].permute(1, 2, 0) > 0
        both += (found & true).sum((0, 1))
        either += (found | true).sum((0, 1))
    assert (both / either).mean() >= 0.92


@pytest.mark.parametrize("task", ["segmentation", "referring", "depth"])
def test_data_set_keeps_what_it_rendered(task: str, tmp_path, monkeypatch) -> None:
    count = 3 * OBJECTS if task == "referring" else 3
    data = open_dataset("shapes", tmp_path, "validation", task=task, length=count)
    first = [data.load(i) for i in range(count)]
    stored = sorted(tmp_path.rglob("*.npz"))
    assert len(stored) >= 3
    monkeypatch.setattr("vpd_fast.data.shapes.dataset.make_scene", None)  # nothing is rendered again
    for a, b in zip(first, (data.load(i) for i in range(count)), strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.target, b.target)
        assert (a.name, a.sentences, a.scene) == (b.name, b.sentences, b.scene)
    monkeypatch.undo()
    stored[0].write_bytes(stored[0].read_bytes()[:100])
    np.testing.assert_array_equal(data.load(0).image, first[0].image)  # made again
    if task == "referring":
        scene = make_scene(0, "validation")
        (number,) = {n for text, n in scene.sentences if text in first[0].sentences}
        np.testing.assert_array_equal(first[0].target, scene.instances == number + 1)
        spoken_of = {number for _, number in scene.sentences}
        assert len({sample.target.tobytes() for sample in first[:OBJECTS]}) == min(OBJECTS, len(spoken_of))
    if task == "segmentation":
        assert data.class_names == CLASSES


def test_stream() -> None:
    scenes_from_two = list(itertools.islice(stream("validation", first=2, size=32), 2))
    for scene, index in zip(scenes_from_two, (2, 3), strict=True):
        np.testing.assert_array_equal(scene.image, make_scene(index, "validation", size=32).image)


def alike(image: np.ndarray, stored: np.ndarray) -> bool:
    return image.shape == stored.shape and np.abs(image.astype(int) - stored).mean() < 4  # JPEG


@pytest.mark.parametrize("split", ["train", "test"])
def test_export_as_ade20k(split: str, tmp_path) -> None:
    export("ade20k", tmp_path, split, range(3))
    data = open_dataset("ade20k", tmp_path, "training" if split == "train" else "validation", classes=CLASSES)
    assert len(data) == 3
    for i in range(3):
        sample, scene = data.load(i), make_scene(i, split)
        assert alike(sample.image, scene.image)
        np.testing.assert_array_equal(sample.target, scene.labels)


@pytest.mark.parametrize("split", ["train", "test"])
def test_export_as_nyu(split: str, tmp_path) -> None:
    export("nyu", tmp_path, split, range(3))
    data = open_dataset("nyu", tmp_path, split)
    assert len(data) == 3
    for i in range(3):
        sample, scene = data.load(i), make_scene(i, split)
        assert alike(sample.image, scene.image)
        np.testing.assert_allclose(sample.target, scene.depth, atol=5.01e-4, rtol=0)  # half a millimetre, float32


def test_export_as_refcoco(tmp_path) -> None:
    pytest.importorskip("pycocotools")
    for split in ("train", "test", "test"):  # one after the other into one folder; again replaces
        export("refcoco", tmp_path, split, range(3))
    for split, stored in (("train", "train"), ("test", "testA")):
        data = open_dataset("refcoco", tmp_path, stored)
        samples = [data.load(i) for i in range(len(data))]
        wanted = [
            (scene, number)
            for scene in (make_scene(i, split) for i in range(3))
            for number in sorted({number for _, number in scene.sentences})
        ]
        assert len(samples) == len(wanted) > 3
        for sample, (scene, number) in zip(samples, wanted, strict=True):
            assert alike(sample.image, scene.image)
            np.testing.assert_array_equal(sample.target, scene.instances == number + 1)
            assert set(sample.sentences) == {text for text, of in scene.sentences if of == number}


def test_export_as_refcoco_is_what_coco_reads(tmp_path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    export("refcoco", tmp_path, "train", range(3))
    data = coco.COCO(tmp_path / "refcoco" / "instances.json")
    for annotation in data.loadAnns(data.getAnnIds()):
        mask = data.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width - 1, y + height - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
        assert data.loadCats(annotation["category_id"])[0]["name"] in CLASSES[2:]


def test_export_leaves_other_data_sets_alone(tmp_path) -> None:
    folder = tmp_path / "refcoco"
    folder.mkdir()
    (folder / "instances.json").write_text('{"info": {"description": "COCO 2014"}, "images": [], "annotations": []}')
    (folder / "refs(unc).p").write_bytes(b"precious")
    with pytest.raises(DatasetError, match="files that no export wrote"):
        export("refcoco", tmp_path, "train", range(1))
    assert (folder / "refs(unc).p").read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["ade20k", "nyu"])
def test_export_does_not_mix_held_out_splits(kind: str, tmp_path) -> None:
    for split in ("train", "test", "test"):
        export(kind, tmp_path, split, range(1))
    with pytest.raises(DatasetError, match="of another split"):
        export(kind, tmp_path, "unseen", range(1))


def test_export_refuses(tmp_path) -> None:
    with pytest.raises(InputError, match="kind must be one of ade20k, nyu, refcoco, got 'coco'"):
        export("coco", tmp_path, "train", range(1))
    with pytest.raises(InputError, match="split must be one of"):
        export("nyu", tmp_path, "val", range(1))
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="cannot be written"):
        export("nyu", tmp_path / "file", "train", range(1))


def test_bad_input(tmp_path) -> None:
    for arguments in ((-1,), (0, "nowhere"), (0, "train")):
        with pytest.raises(InputError):
            make_scene(*arguments, size=127 if arguments == (0, "train") else 128)
    for options in ({"task": "sound"}, {"task": "depth", "length": 0}, {}):
        with pytest.raises(InputError):
            open_dataset("shapes", tmp_path, "train", **options)
    with pytest.raises(InputError, match="the split must be one of train, validation, test, unseen, got 'val'"):
        open_dataset("shapes", tmp_path, "val", task="depth")
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="the scene cannot be written"):
        open_dataset("shapes", tmp_path / "file", "train", task="depth").load(0)
