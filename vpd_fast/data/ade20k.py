"""ADE20K for scene parsing (Zhou et al., CVPR 2017): 150 classes, folders as in ADEChallengeData2016."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vpd_fast.data.sample import (
    Sample,
    check_class_count,
    check_class_names,
    check_flags,
    check_labels,
    left_out,
    read_pair,
    require_folder,
)  # fmt: skip
from vpd_fast.errors import DatasetError
from vpd_fast.labels import ADE20K_CLASSES, IGNORED


class ADE20K:
    """Reads root/images/SPLIT/NAME.jpg with root/annotations/SPLIT/NAME.png; SPLIT: training, validation.

    classes: names, if they are not ADE20K's own 150.
    reduce_zero_label: label 0 ("other") is ignored and class n has label n + 1, as the files have it.

    Images are turned by their EXIF orientation, as the original's reader does. notes: how many files were left out.
    Raises DatasetError.
    """

    task = "segmentation"

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        classes: Sequence[str] | None = None,
        reduce_zero_label: bool = True,
    ) -> None:
        root = Path(root)
        images = require_folder(root / "images" / split, "ADE20K")
        self.masks = require_folder(root / "annotations" / split, "ADE20K")
        check_class_names(classes)
        check_flags(reduce_zero_label=reduce_zero_label)
        self.class_names = tuple(ADE20K_CLASSES if classes is None else classes)
        check_class_count(self.class_names, root)
        self.reduce_zero_label, self.split = reduce_zero_label, split
        files = sorted(path for path in images.iterdir() if not path.name.startswith("."))
        self.images = [path for path in files if path.suffix == ".jpg"]
        self.notes = left_out([path for path in files if path.suffix != ".jpg"], f"files in {images} that are no .jpg")
        stems = {path.stem for path in self.images}
        alone = sorted(path for path in self.masks.glob("*.png") if path.stem not in stems)
        self.notes += left_out(alone, f"files in {self.masks} of which no image has the name")
        if not self.images:
            raise DatasetError(f"ADE20K: no .jpg files in {images}")

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return SPLIT/NAME."""
        return f"{self.split}/{self.images[index].stem}"

    def load(self, index: int) -> Sample:
        """Read image and mask. Raises ImageError, DatasetError."""
        path = self.masks / f"{self.images[index].stem}.png"
        image, labels = read_pair(self.images[index], path)
        labels = zero_to_ignored(labels) if self.reduce_zero_label else labels
        check_labels(labels, len(self.class_names), path)
        return Sample(image, labels.astype(np.uint8), self.name(index))


def zero_to_ignored(labels: np.ndarray) -> np.ndarray:
    """Convert labels whose 0 means ignored to class ids: 0 and 255 become 255, n becomes n - 1."""
    return np.where((labels == 0) | (labels == IGNORED), IGNORED, labels.astype(np.int32) - 1)
