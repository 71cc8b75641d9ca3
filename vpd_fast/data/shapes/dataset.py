"""The shapes world as a data set of any task; scenes are rendered once and kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vpd_fast.data.sample import Sample
from vpd_fast.data.shapes.world import CLASSES, SPLITS, Scene, SceneObject, make_scene
from vpd_fast.errors import DatasetError, InputError
from vpd_fast.files import write_files
from vpd_fast.tasks import TASKS

LENGTHS = {"train": 4000, "validation": 500, "test": 500, "unseen": 500}
OBJECTS = 3  # samples of a scene for referring
_FORMAT = 3  # of stored scenes: change it when scenes change


class ShapesDataset:
    """Has `length` samples of a split, one per scene, from scene 0. root: where rendered scenes are kept (None: not).

    Referring: OBJECTS samples per scene, each of one of its objects with the sentences that fit it, in random order and
    from the first one again where there are fewer; scenes where none is visible enough are of another index far behind,
    so that every sample has a sentence.
    Raises InputError for unknown tasks and splits, DatasetError where the folder cannot be written.
    """

    def __init__(
        self, root: str | Path | None, split: str = "train", *, task: str, length: int | None = None, size: int = 128
    ) -> None:
        if task not in TASKS:
            raise InputError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if split not in SPLITS:
            raise InputError(f"data set shapes: the split must be one of {', '.join(SPLITS)}, got {split!r}")
        if length is not None and length < 1:
            raise InputError(f"data set shapes: length must be at least 1, got {length}")
        self.task, self.split, self.size = task, split, size
        self.class_names = {"segmentation": CLASSES, "depth": ("room",), "referring": ()}[task]
        self._length = LENGTHS[split] if length is None else length
        self._folder = Path(root) / f"shapes-{_FORMAT}" / f"{split}-{size}" if root is not None else None

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """Return SPLIT/INDEX, for example "train/0000012"."""
        return f"{self.split}/{index:07d}"

    def scene(self, index: int) -> Scene:
        """Return scene `index`, from the folder if it is there. Raises DatasetError."""
        if self._folder is None:
            return make_scene(index, self.split, size=self.size)
        path = self._folder / f"{index:07d}.npz"
        found = _read(path)
        if found is None:
            found = make_scene(index, self.split, size=self.size)
            try:
                write_files({path: lambda temporary: _write(temporary, found)})
            except OSError as error:
                raise DatasetError(f"{path}: the scene cannot be written ({error.strerror or error})") from error
        return found

    def load(self, index: int) -> Sample:
        """Render or read a sample. Raises DatasetError."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if not TASKS[self.task].takes_text:
            scene = self.scene(index)
            if self.task == "depth":
                return Sample(scene.image, scene.depth, self.name(index), scene=0)
            return Sample(scene.image, scene.labels, self.name(index))
        again = index // OBJECTS
        scene = self.scene(again)
        while not scene.sentences:
            again += 10**6
            scene = self.scene(again)
        choices = sorted({number for _, number in scene.sentences})
        order = np.random.default_rng((SPLITS[self.split], again, 1)).permutation(choices)
        chosen = int(order[index % OBJECTS % len(order)])
        sentences = tuple(text for text, number in scene.sentences if number == chosen)
        return Sample(scene.image, (scene.instances == chosen + 1).astype(np.uint8), self.name(index), sentences)


def _write(path: Path, scene: Scene) -> None:
    text = {
        "objects": [vars(thing) for thing in scene.objects],
        "caption": scene.caption,
        "sentences": scene.sentences,
    }
    with path.open("wb") as file:
        np.savez_compressed(
            file, image=scene.image, labels=scene.labels, depth=scene.depth, instances=scene.instances,
            text=np.array(json.dumps(text)),
        )  # fmt: skip


def _read(path: Path) -> Scene | None:
    """Read a stored scene; None where it is missing or broken."""
    try:
        with np.load(path) as arrays:
            text = json.loads(str(arrays["text"]))
            return Scene(
                *(arrays[name] for name in ("image", "labels", "depth", "instances")),
                objects=tuple(SceneObject(**values) for values in text["objects"]),
                caption=text["caption"],
                sentences=tuple((sentence, number) for sentence, number in text["sentences"]),
            )
    except Exception:  # a damaged archive raises anything
        return None
