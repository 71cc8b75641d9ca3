"""Small data sets in memory, with the methods evaluation uses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vpd_fast.errors import ImageError


@dataclass(frozen=True)
class MemorySample:
    """What a data set's `load` returns."""

    image: np.ndarray
    target: np.ndarray
    name: str
    sentences: tuple[str, ...] = ()
    scene: int | None = None


@dataclass
class MemoryDataset:
    """Samples in a list; an exception in the list is raised."""

    task: str
    samples: list
    class_names: tuple[str, ...] = ()
    loaded: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int) -> MemorySample:
        self.loaded.append(index)
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]


BROKEN = ImageError("broken.jpg: cannot read the image")


def make_dataset(task: str, count: int = 5, size: tuple[int, int] = (70, 100), seed: int = 0) -> MemoryDataset:
    """Smooth pictures with blocks of labels; segmentation has 5 classes, depth 3 scenes."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        height, width = size[0] + 3 * i, size[1] - 5 * i
        coarse = rng.integers(0, 255, (height // 10 + 1, width // 10 + 1, 3), np.uint8)
        image = coarse.repeat(10, 0).repeat(10, 1)[:height, :width]
        sentences, scene = (), None
        if task == "segmentation":
            target = rng.integers(0, 6, (height // 20 + 1, width // 20 + 1)).astype(np.uint8)
            target = np.where(target == 5, 255, target).astype(np.uint8)
        elif task == "referring":
            target = rng.integers(0, 2, (height // 20 + 1, width // 20 + 1)).astype(np.uint8)
            sentences = tuple(f"thing {i} {j}" for j in range(1 + i % 3))
        else:
            target = rng.uniform(0.5, 9, (height // 20 + 1, width // 20 + 1)).astype(np.float32)
            target[0, 0] = 0
            scene = None if i == 1 else i % 3
        target = target.repeat(20, 0).repeat(20, 1)[:height, :width]
        samples.append(MemorySample(np.ascontiguousarray(image), target, f"image {i}", sentences, scene))
    names = {"segmentation": ("wall", "sky", "tree", "<road>", "car"), "depth": ("kitchen", "office", "cafe")}
    return MemoryDataset(task, samples, names.get(task, ()))
