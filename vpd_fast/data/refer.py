"""RefCOCO, RefCOCO+, G-Ref and RefClef in the folders of the REFER toolkit (Yu et al., ECCV 2016)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from vpd_fast.data.sample import Sample, check_same_size, read_rgb, require_file, require_folder
from vpd_fast.errors import DatasetError, InputError, MissingDependencyError
from vpd_fast.files import read_text

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
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"{kind} has the splits {', '.join(SPLITS)}, got {split!r}")
        if overlaps not in OVERLAPS:
            raise InputError(f"overlaps must be one of {', '.join(OVERLAPS)}, got {overlaps!r}")
        _coco_masks()
        root, self.kind, self.split, self.overlaps = Path(root), kind, split, overlaps
        self.path = require_file(root / kind / f"refs({split_by or SPLIT_BY[kind]}).p", kind)
        self.images = require_folder(root / IMAGES.get(kind, COCO_IMAGES), kind)
        instances = require_file(root / kind / "instances.json", kind)
        refs = [ref for ref in _read_refs(self.path) if _is_in(ref["split"], split)]
        if not refs:
            raise DatasetError(f"{self.path}: no object is in the split {split}")
        self.refs = refs
        self._annotations, self._images = _read_instances(instances, refs)
        for ref in refs:
            if not ref["sentences"] or any(not sentence.strip() for sentence in ref["sentences"]):
                raise DatasetError(f"{self.path}: object {ref['ref_id']} has an empty sentence; expected words")

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
        mask = self._mask(ref, about["height"], about["width"])
        image = read_rgb(path)
        check_same_size(image, mask, str(path))
        return Sample(image, mask, self.name(index), ref["sentences"])

    def _mask(self, ref: dict[str, Any], height: int, width: int) -> np.ndarray:
        masks, shape = _coco_masks(), self._annotations[ref["ann_id"]]
        try:
            if isinstance(shape, list):
                codes = masks.frPyObjects(shape, height, width)
            else:
                codes = [masks.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape]
            layers = masks.decode(codes).sum(2)
        except Exception as error:  # pycocotools raises plain ones
            raise DatasetError(f"{self.name(index=self.refs.index(ref))}: no polygon and no RLE ({error})") from error
        return (layers == 1 if self.overlaps == "hole" else layers > 0).astype(np.uint8)


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


def _read_refs(path: Path) -> list[dict[str, Any]]:
    """Read what is needed of each ref: ref_id, ann_id, image_id, split, sentences. Raises DatasetError."""
    try:
        with path.open("rb") as file:
            refs = PlainUnpickler(file, encoding="latin-1").load()  # written by Python 2
        return [
            {
                **{key: int(ref[key]) for key in ("ref_id", "ann_id", "image_id")},
                "split": str(ref["split"]),
                "sentences": tuple(str(sentence["sent"]) for sentence in ref["sentences"]),
            }
            for ref in refs
        ]
    except (pickle.UnpicklingError, EOFError, OSError, MemoryError, AttributeError, ImportError) as error:
        raise DatasetError(f"{path}: not a pickle of plain values ({error})") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DatasetError(f"{path}: not REFER's list of objects ({type(error).__name__}: {error})") from error


def _read_instances(path: Path, refs: list[dict[str, Any]]) -> tuple[dict[int, Any], dict[int, dict[str, Any]]]:
    """Read the refs' segmentations by annotation and images by number. Raises DatasetError."""
    try:
        values = json.loads(read_text(path))
        wanted, pictures = {ref["ann_id"] for ref in refs}, {ref["image_id"] for ref in refs}
        shapes = {a["id"]: a["segmentation"] for a in values["annotations"] if a["id"] in wanted}
        images = {i["id"]: i for i in values["images"] if i["id"] in pictures}
        for image in images.values():
            if not isinstance(image["file_name"], str) or not all(
                type(image[key]) is int for key in ("height", "width")
            ):
                raise ValueError(f"image {image['id']} must have a file_name, and height and width in pixels")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}: not COCO's instances ({type(error).__name__}: {error})") from error
    for name, there, needed in (("annotation", shapes, wanted), ("image", images, pictures)):
        missing = sorted(needed - there.keys())
        if missing:
            raise DatasetError(f"{path}: has no {name} {missing[0]}, which the list of objects refers to")
    return shapes, images


def _coco_masks() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise MissingDependencyError('RefCOCO needs pycocotools: pip install "vpd_fast[train]"') from error
    return mask
