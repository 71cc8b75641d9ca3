"""Scenes as folders in the formats of real data sets, for readers of those."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpd_fast.data.refer import PlainUnpickler
from vpd_fast.data.sample import MILLIMETRES
from vpd_fast.data.shapes.world import CLASSES, SPLITS, Scene, make_scene
from vpd_fast.errors import DatasetError, InputError
from vpd_fast.files import write_files

SCENE = "living_room_0001"  # NYUv2 has no scene of this kind; readers need the name of one of theirs
_ORIGIN = "vpd_fast shapes world"
_ADE20K_SPLITS = {"train": "training", "validation": "validation", "test": "validation", "unseen": "validation"}
_REFER_SPLITS = {"train": "train", "validation": "val", "test": "testA", "unseen": "testB"}


def export(kind: str, root: str | Path, split: str, scenes: Iterable[int], *, size: int = 128) -> None:
    """Write scenes of a split into `root` as a data set of `kind`, as `vpd_fast.data.open_dataset` reads it.

    ade20k: images/ and annotations/, label n stored as n + 1; open it with classes=CLASSES. nyu: depths as 16-bit
    millimetres, in sync/ for "train", else in official_splits/test/. refcoco: refs(unc).p, instances.json with masks
    as uncompressed RLE, which pycocotools reads (a ring's hole is no polygon), and the images; splits train, val, testA
    ("test") and testB ("unseen"), of which others that an export left stay. Images are JPEG of quality 95.

    ade20k and nyu have one folder for all that is not "train": give "validation", "test" and "unseen" a root each.

    Raises InputError for an unknown kind or split, DatasetError where the folder cannot be written or has another data
    set's or split's files.
    """
    if kind not in _WRITERS:
        raise InputError(f"kind must be one of {', '.join(_WRITERS)}, got {kind!r}")
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    try:
        _WRITERS[kind](Path(root), split, ((i, make_scene(i, split, size=size)) for i in scenes))
    except OSError as error:
        raise DatasetError(f"{root}: cannot be written ({error.strerror or error})") from error


def _check_split(folder: Path, prefix: str) -> None:
    """Raise DatasetError where a folder has images of another split, which readers would take for this one's."""
    other = next((path for path in sorted(folder.glob("*.jpg")) if not path.name.startswith(prefix)), None)
    if other is not None:
        raise DatasetError(f"{folder}: has {other.name}, of another split; give each split a folder of its own")


Numbered = Iterable[tuple[int, Scene]]


def _ade20k(root: Path, split: str, scenes: Numbered) -> None:
    place = _ADE20K_SPLITS[split]
    _check_split(root / "images" / place, f"{split}_")
    for i, scene in scenes:
        name = f"{split}_{i:07d}"
        write_files(
            {
                root / "images" / place / f"{name}.jpg": _jpeg(scene.image),
                root / "annotations" / place / f"{name}.png": _png(scene.labels + 1),
            }
        )


def _nyu(root: Path, split: str, scenes: Numbered) -> None:
    folder = root / ("sync" if split == "train" else "official_splits/test") / SCENE
    _check_split(folder, f"rgb_{SPLITS[split]}")
    for i, scene in scenes:
        number = f"{SPLITS[split]}{i:07d}"
        millimetres = np.rint(scene.depth * MILLIMETRES).astype(np.uint16)
        write_files(
            {folder / f"rgb_{number}.jpg": _jpeg(scene.image), folder / f"sync_depth_{number}.png": _png(millimetres)}
        )


def _refcoco(root: Path, split: str, scenes: Numbered) -> None:
    folder = root / "refcoco"
    refs_path, instances_path = folder / "refs(unc).p", folder / "instances.json"
    place = _REFER_SPLITS[split]
    refs, instances = _exported_before(refs_path, instances_path, place)
    for i, scene in scenes:
        image_id = SPLITS[split] * 10**8 + i
        name = f"COCO_train2014_{image_id:012d}.jpg"
        write_files({root / "images/mscoco/images/train2014" / name: _jpeg(scene.image)})
        height, width = scene.labels.shape
        instances["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for number in sorted({number for _, number in scene.sentences}):
            ann_id = image_id * 10 + number
            about = {"image_id": image_id, "category_id": CLASSES.index(scene.objects[number].shape)}
            annotation = _annotation(scene.instances == number + 1)
            instances["annotations"].append({"id": ann_id, **about, **annotation})
            texts = [text for text, of in scene.sentences if of == number]
            sentences = [
                {"sent_id": ann_id * 10 + k, "sent": text, "raw": text, "tokens": text.split()}
                for k, text in enumerate(texts)
            ]
            refs.append(
                {
                    "ref_id": ann_id, "ann_id": ann_id, "file_name": name, "split": place, **about,
                    "sentences": sentences, "sent_ids": [sentence["sent_id"] for sentence in sentences],
                }
            )  # fmt: skip
    write_files(
        {
            refs_path: lambda path: path.write_bytes(pickle.dumps(refs, protocol=2)),
            instances_path: lambda path: path.write_text(json.dumps(instances), encoding="utf-8"),
        }
    )


def _exported_before(refs_path: Path, instances_path: Path, place: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what an earlier export of other splits left. Raises DatasetError for files that are of another origin."""
    empty = {
        "info": {"description": _ORIGIN}, "images": [], "annotations": [],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)],
    }  # fmt: skip
    if not refs_path.exists() and not instances_path.exists():
        return [], empty
    try:
        found = json.loads(instances_path.read_text(encoding="utf-8"))
        if found["info"]["description"] != _ORIGIN:
            raise ValueError("it is another data set")
        with refs_path.open("rb") as file:
            refs = [ref for ref in PlainUnpickler(file).load() if ref["split"] != place]
        kept = {ref["image_id"] for ref in refs}
        empty["images"] = [image for image in found["images"] if image["id"] in kept]
        empty["annotations"] = [shape for shape in found["annotations"] if shape["image_id"] in kept]
    except (OSError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        folder = refs_path.parent
        raise DatasetError(f"{folder}: has files that no export wrote ({error}); give another folder") from error
    return refs, empty


def _annotation(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's fields of one object; bbox is x, y, width, height in pixels."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    segmentation = {"size": list(mask.shape), "counts": _run_lengths(mask)}
    return {"segmentation": segmentation, "area": int(mask.sum()), "bbox": [int(v) for v in box], "iscrowd": 0}


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Encode as COCO's uncompressed RLE: lengths of runs column by column, the first of zeros."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths


def _jpeg(image: np.ndarray) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(image).save(path, format="JPEG", quality=95, subsampling=0)


def _png(values: np.ndarray) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(values).save(path, format="PNG")


_WRITERS = {"ade20k": _ade20k, "nyu": _nyu, "refcoco": _refcoco}
