"""NYU Depth V2 (Silberman et al., ECCV 2012) in the folders that BTS, GLPDepth and VPD use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpd_fast.data.sample import (
    Sample,
    check_class_names,
    check_depth_scale,
    left_out,
    read_lines,
    read_pair,
    require_file,
    require_folder,
    to_metres,
)  # fmt: skip
from vpd_fast.errors import DatasetError, InputError
from vpd_fast.labels import NYU_SCENES, scene_from_filename

FOLDERS = {"train": "sync", "test": "official_splits/test"}
SCENE_RULES = ("substring", "fixed")


class NYU:
    """Reads root/sync/SCENE/rgb_N.jpg (train) or root/official_splits/test/SCENE/rgb_N.jpg, sync_depth_N.png beside.

    filenames: a list like the original's, "/SCENE/rgb_N.jpg /SCENE/sync_depth_N.png [anything]" per line, relative to
        the split's folder. Without it every pair in the folder is taken, sorted; `notes` says how many images have no
        depth and how many depths no image.
    scene_rule: "substring" is the original's, the first of the 27 scenes that is part of SCENE_rgb_N.jpg, which makes a
        study_room a "study" and an office_kitchen a "kitchen"; "fixed" takes the longest scene that SCENE begins with.
    unknown_scene: "error", or "mean": no scene, for which the model takes the mean of all.
    depth_scale: stored units per metre; None: 1000, and files must have 16 bits.

    Images are turned by their EXIF orientation, as the original's reader does. Raises DatasetError, InputError.
    """

    task = "depth"

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        filenames: str | Path | None = None,
        scene_rule: str = "substring",
        unknown_scene: str = "error",
        classes: Sequence[str] | None = None,
        depth_scale: float | None = None,
    ) -> None:
        if split not in FOLDERS:
            raise InputError(f"NYUv2 has the splits {', '.join(FOLDERS)}, got {split!r}")
        if scene_rule not in SCENE_RULES:
            raise InputError(f"scene_rule must be one of {', '.join(SCENE_RULES)}, got {scene_rule!r}")
        if unknown_scene not in ("error", "mean"):
            raise InputError(f'unknown_scene must be "error" or "mean", got {unknown_scene!r}')
        check_class_names(classes)
        self.class_names = tuple(NYU_SCENES if classes is None else classes)
        self.scene_rule, self.unknown_scene = scene_rule, unknown_scene
        self.depth_scale = check_depth_scale(depth_scale)
        self.notes: list[str] = []
        folder = require_folder(Path(root) / FOLDERS[split], "NYUv2")
        self.pairs = _listed(folder, Path(filenames)) if filenames else self._found(folder)
        if not self.pairs:
            raise DatasetError(f"NYUv2: no rgb_*.jpg with a sync_depth_*.png beside it in the scenes of {folder}")

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """Return SCENE_rgb_N, which the original looks for scenes in."""
        path = self.pairs[index][0]
        return f"{path.parent.name}_{path.stem}"

    def load(self, index: int) -> Sample:
        """Read image and depth. Raises ImageError, DatasetError."""
        rgb, depth = self.pairs[index]
        image, stored = read_pair(rgb, depth)
        return Sample(image, to_metres(stored, depth, self.depth_scale), self.name(index), (), self._scene(rgb))

    def _scene(self, path: Path) -> int | None:
        if self.scene_rule == "substring":
            scene = scene_from_filename(f"{path.parent.name}_{path.name}", self.class_names)
        else:
            fitting = [i for i, name in enumerate(self.class_names) if path.parent.name.startswith(name)]
            scene = max(fitting, key=lambda i: len(self.class_names[i]), default=None)
        if scene is None and self.unknown_scene == "error":
            raise DatasetError(
                f"{path}: its name tells none of the {len(self.class_names)} scenes; "
                'unknown_scene="mean" takes their mean'
            )
        return scene

    def _found(self, folder: Path) -> list[tuple[Path, Path]]:
        images, depths = (
            {(path.parent, path.stem.removeprefix(prefix)): path for path in folder.glob(f"*/{prefix}*{suffix}")}
            for prefix, suffix in (("rgb_", ".jpg"), ("sync_depth_", ".png"))
        )
        for some, others, why in (
            (images, depths, "images without a depth file"),
            (depths, images, "depth files without an image"),
        ):
            alone = sorted(some[key] for key in some.keys() - others.keys())
            self.notes += left_out([path.relative_to(folder) for path in alone], f"{why} in {folder}")
        return [(images[key], depths[key]) for key in sorted(images.keys() & depths.keys(), key=images.__getitem__)]


def _listed(folder: Path, path: Path) -> list[tuple[Path, Path]]:
    lines = read_lines(require_file(path, "NYUv2's list of files"), names=True)
    pairs = []
    for line in lines:
        parts = line.split()
        if len(parts) < 2:
            raise DatasetError(f"{path}: expected an image and a depth file, got {line!r}")
        pairs.append((folder / parts[0].lstrip("/"), folder / parts[1].lstrip("/")))
    return pairs
