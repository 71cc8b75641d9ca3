"""NYU Depth V2 (Silberman et al., ECCV 2012) in the folders that BTS, GLPDepth and VPD use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpd_fast.data.sample import Sample, read_lines, read_pair, require_file, require_folder, to_metres
from vpd_fast.errors import DatasetError, InputError
from vpd_fast.labels import NYU_SCENES, scene_from_filename

FOLDERS = {"train": "sync", "test": "official_splits/test"}
SCENE_RULES = ("substring", "fixed")


class NYU:
    """Reads root/sync/SCENE/rgb_N.jpg (train) or root/official_splits/test/SCENE/rgb_N.jpg, sync_depth_N.png beside.

    filenames: a list like the original's, "/SCENE/rgb_N.jpg /SCENE/sync_depth_N.png [anything]" per line, relative to
        the split's folder. Without it every pair in the folder is taken, sorted.
    scene_rule: "substring" is the original's, the first of the 27 scenes that is part of SCENE_rgb_N.jpg, which makes a
        study_room a "study" and an office_kitchen a "kitchen"; "fixed" takes the longest scene that SCENE begins with.
    unknown_scene: "error", or "mean": no scene, for which the model takes the mean of all.

    Depths are 16-bit millimetres. Raises DatasetError, InputError.
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
    ) -> None:
        if split not in FOLDERS:
            raise InputError(f"NYUv2 has the splits {', '.join(FOLDERS)}, got {split!r}")
        if scene_rule not in SCENE_RULES:
            raise InputError(f"scene_rule must be one of {', '.join(SCENE_RULES)}, got {scene_rule!r}")
        if unknown_scene not in ("error", "mean"):
            raise InputError(f'unknown_scene must be "error" or "mean", got {unknown_scene!r}')
        self.class_names = tuple(NYU_SCENES if classes is None else classes)
        self.scene_rule, self.unknown_scene = scene_rule, unknown_scene
        folder = require_folder(Path(root) / FOLDERS[split], "NYUv2")
        self.pairs = _listed(folder, Path(filenames)) if filenames else _found(folder)
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
        image, millimetres = read_pair(rgb, depth)
        return Sample(image, to_metres(millimetres), self.name(index), (), self._scene(rgb))

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


def _found(folder: Path) -> list[tuple[Path, Path]]:
    pairs = (
        (rgb, rgb.with_name(f"sync_depth_{rgb.stem.removeprefix('rgb_')}.png")) for rgb in folder.glob("*/rgb_*.jpg")
    )
    return sorted(pair for pair in pairs if pair[1].is_file())


def _listed(folder: Path, path: Path) -> list[tuple[Path, Path]]:
    lines = read_lines(require_file(path, "NYUv2's list of files"), names=True)
    pairs = []
    for line in lines:
        parts = line.split()
        if len(parts) < 2:
            raise DatasetError(f"{path}: expected an image and a depth file, got {line!r}")
        pairs.append((folder / parts[0].lstrip("/"), folder / parts[1].lstrip("/")))
    return pairs
