"""RefCOCO, RefCOCO+, G-Ref and RefClef in the folders of the REFER toolkit (Yu et al., ECCV 2016)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from vpd_fast.data.coco import object_layers, require_pycocotools
from vpd_fast.data.sample import Sample, check_flags, left_out, read_rgb, require_file, require_folder, usable_sentences
from vpd_fast.errors import DatasetError, InputError
from vpd_fast.files import read_text
from vpd_fast.pictures.decoding import printable, reason

SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "refclef": "unc"}
IMAGES = {"refclef": "images/saiapr_tc-12"}
COCO_IMAGES = "images/mscoco/images/train2014"
SPLITS = ("train", "val", "test", "testA", "testB", "testC", "testAB", "testBC", "testAC")
OVERLAPS = ("hole", "union")


class Refer:
    """Reads root/KIND/refs(BY).p, root/KIND/instances.json and the images; one sample per referred object.

    kind: refcoco, refcoco+, refcocog (G-Ref) or refclef. split: train, val, test, testA, testB and so on.
    split_by: whose split; "unc", for refcocog "umd" or "google".
    overlaps: what pixels are where polygons of one object overlap. "hole" is the original's: it adds the polygons up
        and takes what is exactly 1. "union" makes them part of the object.
    exif: whether images are turned by their EXIF orientation. False is the original's and REFER's: objects were drawn
        on the pixels as stored.

    notes: how many objects and sentences were left out, and why.
    Raises DatasetError, InputError, MissingDependencyError (pycocotools).
    """

    task = "referring"
    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        kind: str = "refcoco",
        split_by: str | None = None,
        overlaps: str = "hole",
        exif: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"{kind} has the splits {', '.join(SPLITS)}, got {split!r}")
        if overlaps not in OVERLAPS:
            raise InputError(f"overlaps must be one of {', '.join(OVERLAPS)}, got {overlaps!r}")
        check_flags(exif=exif)
        require_pycocotools()
        root, self.kind, self.split, self.overlaps, self.exif = Path(root), kind, split, overlaps, exif
        self.path = require_file(root / kind / f"refs({split_by or SPLIT_BY[kind]}).p", kind)
        self.images = require_folder(root / IMAGES.get(kind, COCO_IMAGES), kind)
        instances = require_file(root / kind / "instances.json", kind)
        all_refs, self.notes = _read_refs(self.path)
        refs = [ref for ref in all_refs if _is_in(ref["split"], split)]
        if not refs:
            raise DatasetError(f"{self.path}: no object is in the split {split}{_because(self.notes)}")
        self._annotations, self._images = _read_instances(instances, refs)
        self.refs = []
        mute, lost = [], []
        for ref in refs:
            if not ref["sentences"]:
                mute.append(f"object {ref['ref_id']}")
            elif ref["ann_id"] not in self._annotations or ref["image_id"] not in self._images:
                lost.append(f"object {ref['ref_id']}")
            else:
                self.refs.append(ref)
        empty = [f"object {ref['ref_id']}" for ref in self.refs if ref["empty"]]
        self.notes += left_out(mute, "objects without words in a sentence")
        self.notes += left_out(lost, f"objects of which {instances.name} has no annotation or no image")
        self.notes += left_out(empty, "empty sentences of objects that have others")
        if not self.refs:
            raise DatasetError(f"{self.path}: no object of the split {split} can be used{_because(self.notes)}")

    def __len__(self) -> int:
        return len(self.refs)

    def name(self, index: int) -> str:
        """Return SPLIT/REF_ID."""
        return f"{self.split}/{self.refs[index]['ref_id']}"

    def load(self, index: int) -> Sample:
        """Read image and mask. Raises ImageError, DatasetError."""
        ref = self.refs[index]
        about = self._images[ref["image_id"]]
        path = self.images / about["file_name"]
        image = read_rgb(path, self.exif)
        size = about["height"], about["width"]
        if image.shape[:2] != size:  # before a mask of a size that nobody checked is made
            raise DatasetError(
                f"{printable(path)}: image and target must have the same size, got {image.shape[0]}x{image.shape[1]} "
                f"and {size[0]}x{size[1]} pixels (height x width)"
            )
        layers = object_layers(self._annotations[ref["ann_id"]], *size, self.name(index))
        mask = layers == 1 if self.overlaps == "hole" else layers > 0
        return Sample(image, mask.astype(np.uint8), self.name(index), ref["sentences"])


def _because(notes: list[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def _is_in(of_ref: str, split: str) -> bool:
    """Apply REFER's rule: letters of test splits may be joined ("testAB" is in testA and testB)."""
    if split in ("testA", "testB", "testC"):
        return split[-1] in of_ref
    return split in of_ref if split == "test" else of_ref == split


class PlainUnpickler(pickle.Unpickler):
    """Unpickles without running code: containers, text and numbers need no class; nothing else is allowed."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would load {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of it")


def _read_refs(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read what is needed of each ref (ref_id, ann_id, image_id, split, sentences, how many were empty), and notes.

    Raises DatasetError where no ref is readable.
    """
    try:
        with path.open("rb") as file:
            values = PlainUnpickler(file, encoding="latin-1").load()  # written by Python 2
    except Exception as error:  # a damaged pickle raises anything
        raise DatasetError(f"{path}: not a pickle of plain values ({reason(error)})") from error
    refs, broken = [], []
    for number, value in enumerate(values if isinstance(values, list | tuple) else ()):
        try:
            refs.append(_ref(value))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            broken.append(f"number {number} ({type(error).__name__}: {error})")
    if not refs:
        first = f"; the first: {broken[0]}" if broken else f", got a {type(values).__name__}"
        raise DatasetError(f"{path}: not REFER's list of objects{first}")
    return refs, left_out(broken, f"entries of {path.name} without ref_id, ann_id, image_id, split or sentences")


def _ref(value: Any) -> dict[str, Any]:
    given = value["sentences"]
    if isinstance(given, list | tuple):
        given = [sentence["sent"] if isinstance(sentence, dict) else sentence for sentence in given]
    sentences, empty = usable_sentences(given)
    numbers = {key: int(value[key]) for key in ("ref_id", "ann_id", "image_id")}
    return {**numbers, "split": str(value["split"]), "sentences": sentences, "empty": empty}


def _read_instances(path: Path, refs: list[dict[str, Any]]) -> tuple[dict[int, Any], dict[int, dict[str, Any]]]:
    """Read the refs' segmentations by annotation and usable images by number. Raises DatasetError."""
    wanted, pictures = {ref["ann_id"] for ref in refs}, {ref["image_id"] for ref in refs}
    try:
        values = json.loads(read_text(path))
        shapes = {a["id"]: a.get("segmentation") for a in values["annotations"] if a["id"] in wanted}
        images = {i["id"]: i for i in values["images"] if i["id"] in pictures and _is_image(i)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{path}: not COCO's instances ({type(error).__name__}: {reason(error)})") from error
    if not images:
        raise DatasetError(f"{path}: no image of an object has a file_name, and height and width in pixels")
    return shapes, images


def _is_image(value: dict[str, Any]) -> bool:
    sizes = value.get("height"), value.get("width")
    return isinstance(value.get("file_name"), str) and all(type(size) is int and size > 0 for size in sizes)
