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
    check_class_names,
    check_depth_scale,
    check_flags,
    check_labels,
    left_out,
    read_lines,
    read_pair,
    require_file,
    require_folder,
    to_metres,
    usable_sentences,
)  # fmt: skip
from vpd_fast.errors import DatasetError, InputError
from vpd_fast.files import read_text
from vpd_fast.labels import scene_from_filename
from vpd_fast.pictures import IMAGE_SUFFIXES
from vpd_fast.pictures.decoding import reason
from vpd_fast.tasks import TASKS

TARGETS = {"segmentation": "masks", "referring": "masks", "depth": "depths"}
TARGET_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".pgm")
EXPECTED = "expected a list of entries with image, mask, sentences and split"
NAME_LISTS = {"segmentation": "classes.txt", "depth": "scenes.txt"}


class Folder:
    """Reads images in root/images, targets of the same name in root/masks or root/depths.

    Segmentation: masks/NAME.png holds class ids of 1 to 32 bits or palette indices, 255 is ignored; classes.txt has a
    class name per line.
    Depth: depths/NAME.png holds 16-bit millimetres, 0 is unknown; scenes.txt, if there, has a scene per line, of which
    the first that is part of an image's name is its own.
    Referring: masks/ANY.png is not 0 on the object; sentences.json lists {"image": "cat.jpg", "mask": "cat_1.png",
    "sentences": ["the grey cat"], "split": "train"}. Entries that are not like that are left out, see `notes`.
    Targets may also be TIFF, BMP or PGM files.

    split: if splits/SPLIT.txt exists, the images it lists, one name without extension per line; else those in
        images/SPLIT, with targets in masks/SPLIT or depths/SPLIT; of referring the entries of that split.
    classes: names, instead of those in the file. reduce_zero_label: 0 in masks is ignored, class n is n + 1.
    binary: of two classes, everything but 0 is the second one: for black and white masks, whose 255 would be ignored.
    exif: turn images by their EXIF orientation, as viewers show them; False where masks were made of the pixels as
    stored. depth_scale: stored units per metre; None: 1000, and files must have 16 bits.

    notes: how many files and entries were left out, and why. Raises DatasetError, InputError.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        task: str,
        classes: Sequence[str] | None = None,
        reduce_zero_label: bool = False,
        binary: bool = False,
        exif: bool = True,
        depth_scale: float | None = None,
    ) -> None:
        if task not in TASKS:
            raise InputError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        self.task, self.root, self.split, self.reduce_zero_label = task, Path(root), split, reduce_zero_label
        require_folder(self.root / "images", "folder data set")
        require_folder(self.root / TARGETS[task], "folder data set")
        self.exif, self.binary, self.depth_scale = exif, binary, check_depth_scale(depth_scale)
        check_flags(binary=binary, exif=exif, reduce_zero_label=reduce_zero_label)
        self.notes: list[str] = []
        check_class_names(classes)
        self.class_names = self._names(classes)
        if task == "segmentation":
            check_class_count(self.class_names, self.root)
        if binary and (task != "segmentation" or len(self.class_names) != 2 or reduce_zero_label):
            raise InputError(f"binary is for segmentation of two classes, got {task} of {len(self.class_names)}")
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
        image, target = read_pair(entry["image"], entry["target"], self.exif)
        if self.task == "segmentation":
            target = (target != 0) if self.binary else target
            target = zero_to_ignored(target) if self.reduce_zero_label else target
            check_labels(target, len(self.class_names), entry["target"])
            return Sample(image, target.astype(np.uint8), self.name(index))
        if self.task == "depth":
            scene = scene_from_filename(entry["image"].name, self.class_names)
            return Sample(image, to_metres(target, entry["target"], self.depth_scale), self.name(index), (), scene)
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
            images = self._images(self.root / "images")
            missing = [name for name in names if name not in images]
            if missing:
                raise DatasetError(f"{listing}: {missing[0]!r} has no image in {self.root / 'images'}")
            images = {name: images[name] for name in names}
            masks = _by_stem(targets, TARGET_SUFFIXES)[0]
        else:
            what = f"folder data set (neither {listing} nor a folder of images)"
            images = self._images(require_folder(self.root / "images" / self.split, what))
            targets /= self.split
            masks = _by_stem(targets, TARGET_SUFFIXES)[0]
            alone = [path for stem, path in masks.items() if stem not in images]
            self.notes += left_out(alone, f"files in {targets} of which no image has the name")
        return [{"image": path, "target": masks.get(stem, targets / f"{stem}.png")} for stem, path in images.items()]

    def _images(self, folder: Path) -> dict[str, Path]:
        """Return the images of a folder by name without extension."""
        images, twice, others = _by_stem(folder, IMAGE_SUFFIXES)
        self.notes += left_out(twice, f"images in {folder} with the name of another, but for the extension")
        self.notes += left_out(others, f"files in {folder} that are no {' '.join(IMAGE_SUFFIXES)}")
        return images

    def _listed(self) -> list[dict[str, Any]]:
        path = require_file(self.root / "sentences.json", "folder data set")
        try:
            rows = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise DatasetError(f"{path}: {EXPECTED} ({reason(error)})") from error
        if not isinstance(rows, list):
            raise DatasetError(f"{path}: {EXPECTED}, got a {type(rows).__name__}")
        entries, broken, dropped = [], [], []
        for number, row in enumerate(rows):
            if not _is_entry(row):
                broken.append(f"number {number}")
                continue
            if row["split"] != self.split:
                continue
            sentences, empty = usable_sentences(row["sentences"])
            target = self.root / "masks" / row["mask"]
            if not sentences:
                broken.append(target.name)
                continue
            dropped += [target.name] * empty
            entries.append({"image": self.root / "images" / row["image"], "target": target, "sentences": sentences})
        notes = left_out(broken, f"entries of {path.name} without image, mask, split or sentences")
        notes += left_out(dropped, f"empty sentences of {path.name}")
        if notes and not entries:
            raise DatasetError(f"{path}: {EXPECTED}; no entry of the split {self.split} is one. {'; '.join(notes)}")
        self.notes += notes
        return entries


def _is_entry(row: Any) -> bool:
    texts = ("image", "mask", "split")
    return isinstance(row, dict) and "sentences" in row and all(isinstance(row.get(name), str) for name in texts)


def _by_stem(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[Path], list[Path]]:
    """Return a folder's files by name without extension, further files of the same names, and those of other kinds.

    Of several files of a name the one whose suffix comes first is taken. Hidden files count nowhere.
    """
    found: dict[str, Path] = {}
    twice: list[Path] = []
    others: list[Path] = []
    files = sorted(path for path in (folder.iterdir() if folder.is_dir() else ()) if not path.name.startswith("."))
    ranks = {suffix: rank for rank, suffix in enumerate(suffixes)}
    for path in sorted(files, key=lambda path: ranks.get(path.suffix.lower(), len(ranks))):
        if path.is_dir():
            continue
        if path.suffix.lower() not in ranks:
            others.append(path)
        elif path.stem in found:
            twice.append(path)
        else:
            found[path.stem] = path
    return dict(sorted(found.items(), key=lambda item: item[1].name)), twice, others
