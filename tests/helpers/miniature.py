"""Miniature data sets in the real folder formats: coloured rectangles on a grey ground, the same for the same seed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import cv2
import numpy as np

SIZE = (64, 96)  # height, width
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230), (230, 210, 50))
NAMES = ("red", "green", "blue", "yellow")


def picture(seed: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int, int]]]:
    """RGB image, labels (0 ground, i + 1 has COLOURS[i]), boxes (top, left, bottom, right) of two rectangles."""
    rng = np.random.default_rng(seed)
    image = np.full((*size, 3), 128, np.uint8) + rng.integers(0, 12, (*size, 3), np.uint8)
    labels, boxes = np.zeros(size, np.uint8), []
    for half in range(2):  # one on the left, one on the right: they never overlap
        colour = int(rng.integers(0, 2)) + 2 * half
        top, left = int(rng.integers(4, size[0] // 3)), int(rng.integers(4, size[1] // 6)) + half * size[1] // 2
        bottom, right = top + size[0] // 2, left + size[1] // 4
        image[top:bottom, left:right], labels[top:bottom, left:right] = COLOURS[colour], colour + 1
        boxes.append((top, left, bottom, right))
    return image, labels, boxes


def write_image(path: Path, image: np.ndarray) -> Path:
    """RGB, or one channel, as JPEG or PNG by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = image[..., ::-1] if image.ndim == 3 else image
    assert cv2.imwrite(str(path), values)
    return path


def ade20k(root: Path, count: int = 4, splits: tuple[str, ...] = ("training", "validation")) -> Path:
    """Five classes: stored 0 is ignored (a border of 2 pixels), 1 the ground, 2.. the rectangles."""
    for number, split in enumerate(splits):
        for i in range(count):
            image, labels, _ = picture(100 * number + i)
            stored = labels + 1
            stored[:2] = 0
            name = f"ADE_{split[:5]}_{i:08d}"
            write_image(root / "images" / split / f"{name}.jpg", image)
            write_image(root / "annotations" / split / f"{name}.png", stored)
    return root


def refer(root: Path, kind: str = "refcoco", count: int = 4, by: str = "unc") -> Path:
    """An object per image and split: polygons in even images, uncompressed RLE in odd ones; two sentences each."""
    refs, images, annotations = [], [], []
    for i, split in enumerate(["train"] * count + ["val"] * 2 + ["testA", "testB"]):
        image, labels, boxes = picture(i)
        file_name = f"COCO_train2014_{i:012d}.jpg"
        write_image(root / "images/mscoco/images/train2014" / file_name, image)
        top, left, bottom, right = boxes[0]
        if i % 2 == 0:
            segmentation = [[left, top, right, top, right, bottom, left, bottom]]
        else:
            mask = np.zeros(SIZE, np.uint8)
            mask[top:bottom, left:right] = 1
            flat = mask.ravel(order="F")
            edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
            segmentation = {"size": list(SIZE), "counts": np.diff(np.concatenate([[0], edges])).tolist()}
        colour = NAMES[int(labels[top, left]) - 1]
        sentences = [{"sent": f"the {colour} box", "tokens": ["the", colour, "box"]}, {"sent": f"{colour} on the left"}]
        refs.append({"ref_id": 10 + i, "ann_id": 20 + i, "image_id": 30 + i, "split": split, "sentences": sentences})
        images.append({"id": 30 + i, "file_name": file_name, "height": SIZE[0], "width": SIZE[1]})
        annotations.append({"id": 20 + i, "image_id": 30 + i, "segmentation": segmentation, "category_id": 1})
    folder = root / kind
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    values = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    (folder / "instances.json").write_text(json.dumps(values))
    return root


def depths(labels: np.ndarray) -> np.ndarray:
    """uint16 millimetres: the ground at 4 m, rectangles nearer; the first two rows unknown."""
    millimetres = (4000 - 600 * labels.astype(np.int32)).astype(np.uint16)
    millimetres[:2] = 0
    return millimetres


def nyu(root: Path, count: int = 4, size: tuple[int, int] = SIZE) -> Path:
    """Scenes kitchen_0028b and study_room_0004 (train), bathroom (test)."""
    scenes = {"sync/kitchen_0028b": count // 2, "sync/study_room_0004": count - count // 2}
    for number, (scene, images) in enumerate([*scenes.items(), ("official_splits/test/bathroom", count)]):
        for i in range(images):
            image, labels, _ = picture(100 * number + i, size)
            write_image(root / scene / f"rgb_{i:05d}.jpg", image)
            write_image(root / scene / f"sync_depth_{i:05d}.png", depths(labels))
    return root


def folder(root: Path, task: str, count: int = 4) -> Path:
    """`Folder` of a task with the splits train and val."""
    entries = []
    for number, split in enumerate(("train", "val")):
        place = "" if task == "referring" else split
        for i in range(count):
            image, labels, boxes = picture(100 * number + i)
            name = f"{split}_{i}"
            write_image(root / "images" / place / f"{name}.png", image)
            top, left, bottom, right = boxes[0]
            if task == "referring":
                mask = np.zeros(SIZE, np.uint8)
                mask[top:bottom, left:right] = 255
                write_image(root / "masks" / f"{name}.png", mask)
                row = {"image": f"{name}.png", "mask": f"{name}.png", "split": split}
                entries.append({**row, "sentences": [f"the {NAMES[labels[top, left] - 1]} box"]})
            elif task == "depth":
                write_image(root / "depths" / split / f"{name}.png", depths(labels))
            else:
                write_image(root / "masks" / split / f"{name}.png", labels)
    if task == "referring":
        (root / "sentences.json").write_text(json.dumps(entries))
    elif task == "segmentation":
        (root / "classes.txt").write_text("\n".join(("ground", *NAMES)))
    return root
