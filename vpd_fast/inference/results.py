"""What prediction returns: labels, masks or depth at the image's size, with `.save()` and `.overlay()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vpd_fast.errors import ImageError, InputError
from vpd_fast.files import write_files
from vpd_fast.pictures import canvas
from vpd_fast.pictures.encoding import encode, encode_numbers
from vpd_fast.pictures.palette import palette

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vpd_fast.inference.windows import WindowField

MILLIMETRES = 1000  # per metre, in depth PNGs of models whose depths fit
COARSER = 256  # levels per metre in those of others, as the original writes for everything but NYUv2
LARGEST_16_BIT = 65535


def depth_scale(max_depth: float) -> float:
    """Return the levels per metre of 16-bit depth PNGs up to `max_depth` metres: 1000, 256, 128, 64 ..."""
    scale: float = MILLIMETRES
    while round(max_depth * scale) > LARGEST_16_BIT:
        scale = COARSER if scale == MILLIMETRES else scale / 2
    return scale


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG under a temporary name and rename it: no half-written file stays behind. Raises ImageError."""
    path = _png(path)
    return save_picture(image, path)


def save_picture(image: Image.Image, path: str | Path) -> Path:
    """Write a picture as PNG or JPEG, which the ending of the path says, as safely as `save_png`. Raises ImageError."""
    path = Path(path)
    return _write(path, encode(image, path))


def _png(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ImageError(f"{path}: results are written as PNG; expected a file name that ends in .png")
    return path


def _write(path: Path, data: bytes) -> Path:
    try:
        write_files({path: lambda temporary: temporary.write_bytes(data)})
    except OSError as error:
        raise ImageError(f"{path}: cannot write the image ({error.strerror or error})") from error
    return path


class AttentionMaps(Mapping[str | int, np.ndarray]):
    """Cross-attention heat maps by class, word or token: `maps["sky"]`, `maps[2]` -> (H, W) float32, the image's size.

    Each is the mean over levels (and over scales and flips, if there were any) of attention probabilities resized
    bilinearly. Kept at low resolution; the heat map is made when it is asked for. A name that occurs again is called
    "name (2)". Iterating gives the names of classes or tokens, or numbers where there are no names.

    words: for sentences, each word and the numbers of its tokens: `maps["unicorn"]` is the mean of the maps of "u",
    "nic" and "orn", and `maps.words` are the words in order. A name that is both, word and token, is the word.
    """

    def __init__(
        self,
        fields: Sequence[WindowField],
        names: Sequence[str] = (),
        words: Sequence[tuple[str, Sequence[int]]] = (),
    ) -> None:
        self._fields = tuple(fields)
        self.names: tuple[str | int, ...] = _unique(names) if names else tuple(range(fields[0].channels))
        self.words = _unique([word for word, _ in words])
        self._channels: dict[str | int, tuple[int, ...]] = {i: (i,) for i in range(len(self.names))}
        self._channels |= {name: (i,) for i, name in enumerate(self.names)}
        self._channels |= {word: tuple(tokens) for word, (_, tokens) in zip(self.words, words, strict=True)}

    def __getitem__(self, key: str | int) -> np.ndarray:
        channels = self.channels(key)
        heat = reduce(torch.add, (field.select(i).picture()[0] for field in self._fields for i in channels))
        return (heat / (len(self._fields) * len(channels))).numpy()

    def by_token(self) -> AttentionMaps:
        """Return the same maps without words: each name is that of a token."""
        return AttentionMaps(self._fields, [name for name in self.names if isinstance(name, str)])

    def channels(self, key: str | int) -> tuple[int, ...]:
        """Return the numbers of the classes or tokens whose mean `maps[key]` is: those of a word's tokens."""
        return self._channels[key]

    def __iter__(self) -> Iterator[str | int]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def strongest(self, count: int) -> list[str | int]:
        """Return the names of the `count` maps with the largest mean attention, largest first."""
        strength = reduce(torch.add, (field.values.mean((1, 2)) for field in self._fields))
        return [self.names[i] for i in strength.argsort(descending=True, stable=True)[:count].tolist()]


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(unique)


@dataclass
class SegmentationResult:
    """Result of segmentation: image (H,W,3) RGB; labels (H,W) int64.

    probabilities (C,H,W) float32 and maps if asked for.
    """

    image: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    probabilities: np.ndarray | None = None
    maps: AttentionMaps | None = None

    def shares(self) -> dict[str, float]:
        """Return the fraction of the image that each class covers, largest first, without those that do not occur."""
        return {self.class_names[i]: share for i, share in self._shares()}

    def _shares(self) -> list[tuple[int, float]]:
        counts = np.bincount(self.labels.ravel(), minlength=len(self.class_names))
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
        return [(i, float(counts[i] / self.labels.size)) for i in order]

    @property
    def values(self) -> np.ndarray:
        """The labels (H,W) int64."""
        return self.labels

    def record(self) -> dict[str, Any]:
        """Return what results files say: {"classes": [{"name", "label", "percent"}, ...]}, the largest class first."""
        return {
            "classes": [
                {"name": self.class_names[i], "label": i, "percent": round(100 * share, 3)}
                for i, share in self._shares()
            ]
        }

    def save(self, path: str | Path) -> list[Path]:
        """Write the labels as PNG: a colour palette with label = palette index up to 256 classes, else 16-bit grey."""
        count = len(self.class_names)
        if count > LARGEST_16_BIT + 1:
            raise InputError(f"labels of {count} classes do not fit into a PNG; expected at most {LARGEST_16_BIT + 1}")
        if count > 256:
            return [_write(_png(path), encode_numbers(self.labels.astype(np.uint16)))]
        return [_write(_png(path), encode_numbers(self.labels.astype(np.uint8), palette(count)))]

    def overlay(self) -> Image.Image:
        """Draw the photo with the classes in colour and a legend."""
        return canvas.segmentation_overlay(self.image, self.labels, self.class_names, self.shares())


@dataclass
class ReferringResult:
    """Result of referring segmentation: image (H,W,3) RGB; masks (S,H,W) bool, one per sentence.

    probabilities (S,H,W) float32 and maps if asked for.
    """

    image: np.ndarray
    masks: np.ndarray
    sentences: tuple[str, ...]
    probabilities: np.ndarray | None = None
    maps: tuple[AttentionMaps, ...] | None = None  # of each sentence's tokens

    @property
    def mask(self) -> np.ndarray:
        """The mask (H,W) of the only, or the first, sentence."""
        return self.masks[0]

    @property
    def values(self) -> np.ndarray:
        """The masks (S,H,W) bool."""
        return self.masks

    def record(self) -> dict[str, Any]:
        """Return what results files say: {"masks": [{"text", "pixels", "percent"}, ...]}, one per sentence."""
        return {
            "masks": [
                {"text": sentence, "pixels": int(mask.sum()), "percent": round(100 * float(mask.mean()), 3)}
                for sentence, mask in zip(self.sentences, self.masks, strict=True)
            ]
        }

    def save(self, path: str | Path) -> list[Path]:
        """Write the masks as PNG, 255 inside and 0 outside; several as name_1.png, name_2.png, ..."""
        path = _png(path)
        images = [encode_numbers(mask.astype(np.uint8) * 255) for mask in self.masks]
        if len(images) == 1:
            return [_write(path, images[0])]
        return [_write(path.with_stem(f"{path.stem}_{i}"), image) for i, image in enumerate(images, 1)]

    def overlay(self) -> Image.Image:
        """Draw the photo with each mask in colour and outlined, and the sentences."""
        return canvas.referring_overlay(self.image, self.masks, self.sentences)


@dataclass
class DepthResult:
    """Result of depth: image (H,W,3) RGB; depth (H,W) float32 in metres, at most max_depth."""

    image: np.ndarray
    depth: np.ndarray
    max_depth: float

    @property
    def values(self) -> np.ndarray:
        """The depth (H,W) float32 in metres."""
        return self.depth

    @property
    def scale(self) -> float:
        """Levels per metre of the PNG that `save` writes: 1000, or 256 and less where max_depth is beyond 65.535 m."""
        return depth_scale(max(self.max_depth, float(self.depth.max())))

    def record(self) -> dict[str, Any]:
        """Return what results files say: {"metres": {"min", "mean", "max"}, "depth_scale": levels per metre}."""
        depth = self.depth
        metres = {"min": float(depth.min()), "mean": float(depth.mean()), "max": float(depth.max())}
        return {"metres": metres, "depth_scale": self.scale}

    def save(self, path: str | Path) -> list[Path]:
        """Write the depth as 16-bit PNG, `scale` levels per metre: millimetres unless max_depth is beyond 65.535 m."""
        if not np.isfinite(self.depth).all():
            raise ImageError(f"{path}: the depth contains NaN or infinity and is not written")
        levels = self.depth * self.scale
        np.maximum(np.rint(levels, out=levels), 0, out=levels)
        return [_write(_png(path), encode_numbers(levels.astype(np.uint16)))]

    def overlay(self) -> Image.Image:
        """Draw the photo beside the depth in colour, with a scale in metres."""
        return canvas.depth_overlay(self.image, self.depth)


Result = SegmentationResult | ReferringResult | DepthResult
