"""How long encoders of pictures take, and how many bytes they write: `python benchmarks/encoders.py`.

What `vpd-fast predict` writes for a photo of 640x480 pixels: labels as a palette PNG, depth as PNG of 16 bits, and the
overlay, by each library and setting that could. Milliseconds are processor time, medians of calls that take turns.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from vpd_fast.bench import pipeline
from vpd_fast.pictures import canvas, encoding
from vpd_fast.pictures.palette import palette

cv2.setNumThreads(1)
ROOM = Path(__file__).parents[1] / "examples" / "room.jpg"
CLASSES = 150


def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a photo (480,640,3) uint8, and labels and depth of that size as `vpd-fast bench pipeline` has them."""
    photo = Image.open(ROOM).convert("RGB").resize((pipeline.WIDTH, pipeline.HEIGHT), Image.Resampling.LANCZOS)
    _, labels, depth = pipeline.scene(CLASSES)
    return np.asarray(photo), labels, depth


def pillow(picture: Image.Image, **options: object) -> Callable[[], bytes]:
    """Return a function that encodes by Pillow."""

    def encode() -> bytes:
        data = io.BytesIO()
        picture.save(data, **options)
        return data.getvalue()

    return encode


def opencv(picture: np.ndarray, suffix: str, *options: int) -> Callable[[], bytes]:
    """Return a function that encodes by OpenCV, colours turned into its order first."""

    def encode() -> bytes:
        ordered = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR) if picture.ndim == 3 else picture
        return cv2.imencode(suffix, ordered, list(options))[1].tobytes()

    return encode


def encoders() -> dict[str, dict[str, Callable[[], bytes]]]:
    """Return, for each kind of picture, what encodes it, by name."""
    photo, labels, depth = scene()
    names = [f"class {i}" for i in range(CLASSES)]
    counts = np.bincount(labels.ravel(), minlength=CLASSES)
    shares = {names[i]: counts[i] / labels.size for i in np.argsort(-counts)[: (counts > 0).sum()]}
    overlay = canvas.segmentation_overlay(photo, labels, names, shares)
    drawn = np.asarray(overlay)
    indexed = Image.fromarray(labels.astype(np.uint8))
    indexed.putpalette(palette(CLASSES).tobytes())
    millimetres = np.rint(depth * 1000).astype(np.uint16)
    deep = Image.fromarray(millimetres)
    level, strategy, filters = cv2.IMWRITE_PNG_COMPRESSION, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_FILTER
    quality, sampling = cv2.IMWRITE_JPEG_QUALITY, cv2.IMWRITE_JPEG_SAMPLING_FACTOR
    found: dict[str, dict[str, Callable[[], bytes]]] = {
        "labels, PNG": {"**chosen**": lambda: encoding.encode_numbers(labels.astype(np.uint8), palette(CLASSES))},
        "depth, PNG": {"**chosen**": lambda: encoding.encode_numbers(millimetres)},
        "overlay": {"**chosen**, JPEG": lambda: encoding.encode_jpeg(overlay)},
    }
    for n in (1, 3, 6, 9):
        found["labels, PNG"][f"Pillow, level {n}"] = pillow(indexed, format="PNG", compress_level=n)
        found["depth, PNG"][f"Pillow, level {n}"] = pillow(deep, format="PNG", compress_level=n)
    for name, kind in (("RLE", 3), ("Huffman only", 2)):
        found["labels, PNG"][f"Pillow, {name}"] = pillow(indexed, format="PNG", compress_level=1, compress_type=kind)
        found["depth, PNG"][f"Pillow, {name}"] = pillow(deep, format="PNG", compress_level=1, compress_type=kind)
    for n in (1, 3, 6):
        found["depth, PNG"][f"OpenCV, level {n}"] = opencv(millimetres, ".png", level, n)
    found["depth, PNG"]["OpenCV, level 1, all filters"] = opencv(
        millimetres, ".png", level, 1, filters, cv2.IMWRITE_PNG_ALL_FILTERS
    )
    for name, kind in (("RLE", cv2.IMWRITE_PNG_STRATEGY_RLE), ("Huffman only", cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY)):
        for word, which in (("sub", cv2.IMWRITE_PNG_FILTER_SUB), ("up", cv2.IMWRITE_PNG_FILTER_UP)):
            key = f"OpenCV, {name}, filter {word}"
            found["depth, PNG"][key] = opencv(millimetres, ".png", level, 1, strategy, kind, filters, which)
    for q in (85, 92, 95):
        found["overlay"][f"Pillow, JPEG {q}, 4:4:4"] = pillow(overlay, format="JPEG", quality=q, subsampling=0)
        found["overlay"][f"Pillow, JPEG {q}, 4:2:0"] = pillow(overlay, format="JPEG", quality=q, subsampling=2)
        found["overlay"][f"OpenCV, JPEG {q}, 4:4:4"] = opencv(
            drawn, ".jpg", quality, q, sampling, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
        )
        found["overlay"][f"OpenCV, JPEG {q}, 4:2:0"] = opencv(drawn, ".jpg", quality, q)
    for n in (1, 6):
        found["overlay"][f"Pillow, PNG, level {n}"] = pillow(overlay, format="PNG", compress_level=n)
        found["overlay"][f"OpenCV, PNG, level {n}"] = opencv(drawn, ".png", level, n)
    found["overlay"]["Pillow, WebP 85"] = pillow(overlay, format="WEBP", quality=85, method=0)
    return found


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print("| picture | encoder | ms | kB |\n| --- | --- | --- | --- |")
    for kind, group in encoders().items():
        times: dict[str, list[float]] = {name: [] for name in group}
        sizes = {name: len(encode()) for name, encode in group.items()}
        for _ in range(rounds):
            for name, encode in group.items():
                start = time.process_time()
                encode()
                times[name].append(time.process_time() - start)
        for name in sorted(group, key=lambda name: statistics.median(times[name])):
            print(f"| {kind} | {name} | {1e3 * statistics.median(times[name]):.1f} | {sizes[name] / 1e3:.0f} |")


if __name__ == "__main__":
    main()
