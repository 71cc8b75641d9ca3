"""One's own images for any task, in plain folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpd_fast.data.ade20k import zero_to_ignored
from vpd_fast.data.sample import (
    Sample,
    check_class_count,
    check_labels,
    read_lines,
    read_pair,
    require_file,
    require_folder,
    to_metres,
)  # fmt: skip
from vpd_fast.errors import DatasetError, InputError
from vpd_fast.files import read_text
from vpd_fast.labels import scene_from_filename
from vpd_fast.pictures import IMAGE_SUFFIXES
from vpd_fast.tasks import TASKS

TARGETS = {"segmentation": "masks", "referring": "masks", "depth": "depths"}
NAME_LISTS = {"segmentation": "classes.txt", "depth": "scenes.txt"}


class Folder:
    """Reads images in root/images, targets of the same name in root/masks or root/depths.

    Segmentation: masks/NAME.png holds class ids, 255 is ignored; classes.txt has a class name per line.
    Depth: depths/NAME.png holds 16-bit millimetres, 0 is unknown; scenes.txt, if there, has a scene per line, of which
    the first that is part of an image's name is its own.
    Referring: masks/ANY.png is not 0 on the object; sentences.json lists {"image": "cat.jpg", "mask": "cat_1.png",
    "sentences": ["the grey cat"], "split": "train"}.

    split: if splits/SPLIT.txt exists, the images it lists, one name without extension per line; else those in
        images/SPLIT, with targets in masks/SPLIT or depths/SPLIT; of referring the entries of that split.
    classes: names, instead of those in the file. reduce_zero_label: 0 in masks is ignored, class n is n + 1.

    Raises DatasetError, InputError.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        task: str,
        classes: Sequence[str] | None = None,
        reduce_zero_label: bool = False,
    ) -> None:
        if task not in TASKS:
            raise InputError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        self.task, self.root, self.split, self.reduce_zero_label = task, Path(root), split, reduce_zero_label
        require_folder(self.root / "images", "folder data set")
        require_folder(self.root / TARGETS[task], "folder data set")
        self.class_names = self._names(classes)
        if task == "segmentation":
            check_class_count(self.class_names, self.root)
        self.entries = self._listed() if TASKS[task].takes_text else self._found()
        if not self.entries:
            raise DatasetError(f"{root}: no images in the split {split}")

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """Return SPLIT/NAME, the target's name without extension, which but for referring is the image's too."""
        return f"{self.split}/{self.entries[index]['target'].stem}"

    def load(self, index: int) -> Sample:
        """Read image and target. Raises ImageError, DatasetError."""
        entry = self.entries[index]
        image, target = read_pair(entry["image"], entry["target"])
        if self.task == "segmentation":
            target = zero_to_ignored(target) if self.reduce_zero_label else target
            check_labels(target, len(self.class_names), entry["target"])
            return Sample(image, target.astype(np.uint8), self.name(index))
        if self.task == "depth":
            scene = scene_from_filename(entry["image"].name, self.class_names)
            return Sample(image, to_metres(target), self.name(index), (), scene)
        return Sample(image, (target > 0).astype(np.uint8), self.name(index), entry["sentences"])

    def _names(self, classes: Sequence[str] | None) -> tuple[str, ...]:
        if classes is not None or self.task not in NAME_LISTS:
            return tuple(classes or ())
        path = self.root / NAME_LISTS[self.task]
        if TASKS[self.task].unnamed is not None and not path.is_file():
            return ()
        names = tuple(read_lines(require_file(path, "folder data set")))
        if not names or len(set(names)) < len(names):
            raise DatasetError(f"{path}: expected a name per line, none twice, got {len(names)}")
        return names

    def _found(self) -> list[dict[str, Any]]:
        listing = self.root / "splits" / f"{self.split}.txt"
        targets = self.root / TARGETS[self.task]
        if listing.is_file():
            names = read_lines(listing, names=True)
            images = {path.stem: path for path in _images(self.root / "images")}
            missing = [name for name in names if name not in images]
            if missing:
                raise DatasetError(f"{listing}: {missing[0]!r} has no image in {self.root / 'images'}")
            found = [images[name] for name in names]
        else:
            what = f"folder data set (neither {listing} nor a folder of images)"
            found, targets = _images(require_folder(self.root / "images" / self.split, what)), targets / self.split
        return [{"image": path, "target": targets / f"{path.stem}.png"} for path in found]

    def _listed(self) -> list[dict[str, Any]]:
        path = require_file(self.root / "sentences.json", "folder data set")
        try:
            rows = json.loads(read_text(path))
            entries = [
                {
                    "image": self.root / "images" / row["image"],
                    "target": self.root / "masks" / row["mask"],
                    "sentences": tuple(row["sentences"]),
                }
                for row in rows
                if row["split"] == self.split
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path}: expected a list of entries with image, mask, sentences and split "
                f"({type(error).__name__}: {error})"
            ) from error
        for entry in entries:
            sentences = entry["sentences"]
            if not sentences or not all(isinstance(text, str) and text.strip() for text in sentences):
                raise DatasetError(f"{path}: {entry['target'].name} has an empty sentence; expected words")
        return entries


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
