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

from pathlib import Path
from typing import Any

from vpd_fast.data.loading import TrainLoader
from vpd_fast.data.sample import Dataset, Sample
from vpd_fast.data.transforms import make_transform
from vpd_fast.errors import InputError

REFER_KINDS = ("refcoco", "refcoco+", "refcocog", "refclef")
ANY_TASK = ("folder", "shapes")  # which have the option `task`
KINDS = ("ade20k", *REFER_KINDS, "nyu", *ANY_TASK)


def open_dataset(kind: str, root: str | Path, split: str, **options: Any) -> Dataset:
    """Return the data set of a kind (see above) in a folder; options are those of its class.

    Raises DatasetError if files are missing or broken, InputError for unknown kinds, splits and options.
    """
    if kind not in KINDS:
        raise InputError(f"the kind of a data set must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "ade20k":
        from vpd_fast.data.ade20k import ADE20K as cls
    elif kind == "nyu":
        from vpd_fast.data.nyu import NYU as cls
    elif kind == "folder":
        from vpd_fast.data.folder import Folder as cls
    elif kind == "shapes":
        from vpd_fast.data.shapes import ShapesDataset as cls
    else:
        from vpd_fast.data.refer import Refer as cls

        options = {"kind": kind, **options}
    try:
        return cls(root, split, **options)
    except TypeError as error:
        raise InputError(f"data set {kind}: {error}") from error


__all__ = ["ANY_TASK", "KINDS", "Dataset", "Sample", "TrainLoader", "make_transform", "open_dataset"]
