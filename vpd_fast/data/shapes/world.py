"""Scenes of the shapes world: what stands where, drawn from a seed, and what a camera sees of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vpd_fast.data.shapes.language import Sentence, caption_of, sentences_of
from vpd_fast.data.shapes.render import SHAPES, TEXTURES, Camera, Room, Solid, shade, trace
from vpd_fast.errors import InputError

CLASSES = ("floor", "wall", *SHAPES)
SPLITS = {"train": 1, "validation": 2, "test": 3, "unseen": 4}
SIZES = {"small": 0.5, "large": 0.8}  # radius in metres
COLORS = {
    "red": (0.85, 0.13, 0.12),
    "green": (0.15, 0.62, 0.2),
    "blue": (0.13, 0.28, 0.85),
    "yellow": (0.95, 0.82, 0.12),
    "purple": (0.52, 0.17, 0.68),
    "orange": (0.96, 0.48, 0.08),
    "cyan": (0.15, 0.78, 0.82),
    "white": (0.93, 0.93, 0.93),
}
CAMERA = Camera()
LEAST_VISIBLE = 0.3  # of an object's pixels, for it to be spoken of
_TRIES = 40


@dataclass(frozen=True)
class SceneObject:
    """x, z: where it stands, in metres; column: mean of its visible pixels; visible: their share of all its pixels."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    z: float
    column: float
    visible: float


@dataclass(frozen=True)
class Scene:
    """What a camera sees. image (S,S,3) uint8 RGB; labels (S,S) uint8, indices of CLASSES; depth (S,S) float32 metres
    along the optical axis; instances (S,S) uint8, i + 1 for objects[i], 0 elsewhere; caption; sentences: (text, index
    of the one object it fits)."""

    image: np.ndarray
    labels: np.ndarray
    depth: np.ndarray
    instances: np.ndarray
    objects: tuple[SceneObject, ...]
    caption: str
    sentences: tuple[Sentence, ...]


def held_out(shape: str, color: str) -> bool:
    """Return whether this pair is only in the split "unseen": one colour of every shape, each of another."""
    return list(COLORS).index(color) == SHAPES.index(shape)


def make_scene(index: int, split: str = "train", *, size: int = 128) -> Scene:
    """Make scene `index` of a split, the same on every machine up to rounding; `size` pixels a side, any multiple of 2.

    Scenes of "unseen" have at least one colour-shape pair that the other splits never show. Raises InputError.
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if index < 0 or size < 16 or size % 2:
        raise InputError(f"a scene needs index >= 0 and an even size of at least 16, got {index} and {size}")
    random = np.random.default_rng((SPLITS[split], index))
    room = _room(random)
    solids, drawn = _objects(random, split)
    origin, rays = CAMERA.rays(size)
    hits = trace(room, solids, origin, rays)
    seen = hits["seen"]
    columns = np.tile(np.arange(size), size)
    objects = []
    for i, (solid, words) in enumerate(zip(solids, drawn, strict=True)):
        mask = seen == i
        column = float(columns[mask].mean()) if mask.any() else float("nan")
        share = float(mask.sum() / max(hits["each"][i].sum(), 1))
        objects.append(SceneObject(*words, solid.x, solid.z, column, share))
    fine = shade(room, solids, *CAMERA.rays(2 * size)).reshape(size, 2, size, 2, 3).mean((1, 3))
    shapes = np.array([CLASSES.index(solid.shape) for solid in solids] + [1, 0], np.uint8)  # -2: wall, -1: floor
    named = [(i, thing) for i, thing in enumerate(objects) if thing.visible >= LEAST_VISIBLE]
    return Scene(
        image=(np.sqrt(fine) * 255).round().astype(np.uint8),  # to the screen's brightness, roughly
        labels=shapes[seen].reshape(size, size),
        depth=hits["depth"].astype(np.float32).reshape(size, size),
        instances=np.maximum(seen + 1, 0).astype(np.uint8).reshape(size, size),
        objects=tuple(objects),
        caption=caption_of([thing for _, thing in named], random),
        sentences=tuple(sentences_of(named, np.random.default_rng((SPLITS[split], index, 2)), size)),
    )


def stream(split: str = "train", *, first: int = 0, size: int = 128) -> Iterator[Scene]:
    """Yield scenes of a split from number `first` on, without end. Raises InputError as `make_scene` does."""
    for index in itertools.count(first):
        yield make_scene(index, split, size=size)


def _room(random: np.random.Generator) -> Room:
    floor, wall = (random.uniform(0.3, 0.55) * np.array([1, 1, 1]) + random.uniform(-0.06, 0.06, 3) for _ in range(2))
    side, up = random.uniform(-0.9, 0.9), random.uniform(0.9, 1.6)
    light = np.array([side, up, -0.7]) / math.sqrt(side**2 + up**2 + 0.49)
    return Room(
        wall=float(random.uniform(6.5, 8.5)),
        floor_albedo=tuple(floor),
        wall_albedo=tuple(wall),
        floor_texture=str(random.choice(["plain", "tiles", "planks"])),
        wall_texture=str(random.choice(["plain", "bricks", "planks"])),
        light=tuple(light),
    )


def _objects(random: np.random.Generator, split: str) -> tuple[list[Solid], list[tuple[str, str, str, str]]]:
    solids: list[Solid] = []
    words: list[tuple[str, str, str, str]] = []
    count = int(random.integers(2, 6))
    for _ in range(_TRIES):
        if len(solids) == count:
            break
        shape, size = str(random.choice(SHAPES)), str(random.choice(list(SIZES)))
        must = split == "unseen" and not solids  # the first one is a new pair
        colors = [color for color in COLORS if held_out(shape, color) == must]
        color, texture = str(random.choice(colors)), str(random.choice(TEXTURES, p=[0.55, 0.15, 0.15, 0.15]))
        radius = SIZES[size] * random.uniform(0.93, 1.07)
        z = random.uniform(2.9, 5.6)
        x = random.uniform(-1, 1) * (0.36 * z - 0.3)
        if any(math.hypot(x - other.x, z - other.z) < 1.05 * (radius + other.radius) for other in solids):
            continue
        albedo = tuple(np.clip(np.array(COLORS[color]) ** 2 * random.uniform(0.85, 1.1), 0, 1))
        angle = random.uniform(-0.7, 0.7)
        solids.append(Solid(shape, float(x), float(z), float(radius), float(angle), albedo, texture))
        words.append((shape, color, size, texture))
    return solids, words
