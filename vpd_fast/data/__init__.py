"""Data sets from their usual folders, their transforms, and the loader of training.

ade20k: root/images/SPLIT/*.jpg with root/annotations/SPLIT/*.png, 0 ignored, class n stored as n + 1; training,
    validation.
refcoco, refcoco+, refcocog, refclef: root/KIND/refs(BY).p, root/KIND/instances.json, COCO's train2014 in
    root/images/mscoco/images/train2014; train, val, test, testA, testB.
nyu: root/sync/SCENE/rgb_N.jpg with sync_depth_N.png beside it (train), the same in root/official_splits/test (test).
folder: one's own images for any task, see `vpd_fast.data.folder.Folder`.
shapes: rendered scenes for any task, kept in root once they are made, see `vpd_fast.data.shapes`; train, validation,
    test, unseen.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from vpd_fast.data.loading import TrainLoader
from vpd_fast.data.sample import Dataset, Sample
from vpd_fast.data.transforms import make_transform
from vpd_fast.errors import InputError

REFER_KINDS = ("refcoco", "refcoco+", "refcocog", "refclef")
ANY_TASK = ("folder", "shapes")  # which have the option `task`
# The module and class of each kind, imported when a data set is opened.
CLASSES = {
    "ade20k": ("ade20k", "ADE20K"), **dict.fromkeys(REFER_KINDS, ("refer", "Refer")), "nyu": ("nyu", "NYU"),
    "folder": ("folder", "Folder"), "shapes": ("shapes", "ShapesDataset"),
}  # fmt: skip
KINDS = tuple(CLASSES)


def open_dataset(kind: str, root: str | Path, split: str, **options: Any) -> Dataset:
    """Return the data set of a kind (see above) in a folder; options are those of its class.

    Raises DatasetError if files are missing or broken, InputError for unknown kinds, splits and options.
    """
    if kind not in KINDS:
        raise InputError(f"the kind of a data set must be one of {', '.join(KINDS)}, got {kind!r}")
    module, name = CLASSES[kind]
    if kind in REFER_KINDS:
        options = {"kind": kind, **options}
    try:
        return getattr(importlib.import_module(f"vpd_fast.data.{module}"), name)(root, split, **options)
    except TypeError as error:
        raise InputError(f"data set {kind}: {error}") from error


__all__ = ["ANY_TASK", "KINDS", "Dataset", "Sample", "TrainLoader", "make_transform", "open_dataset"]
