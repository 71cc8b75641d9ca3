"""Which videos PyAV and OpenCV read: frames of twelve, and whether they come with their times and upright.

`python benchmarks/video_formats.py` makes a clip of each kind of tests/helpers/clips.py, and damaged ones, and prints
a table.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.clips import KINDS, make_clip, times
from vpd_fast.bench.timing import table
from vpd_fast.errors import ImageError
from vpd_fast.inference.video import frames

CLOSE = 0.011  # seconds; GIF has hundredths


def with_pyav(path: Path) -> tuple[int, int, list[float], tuple[int, ...]]:
    """Return frames, damaged frames, times and the shape of the first."""
    try:
        found = list(frames(path))
    except ImageError:
        return 0, 0, [], ()
    whole = [frame for frame in found if isinstance(frame.image, np.ndarray)]
    return len(whole), len(found) - len(whole), [frame.time for frame in whole], whole[0].image.shape[:2]


def with_opencv(path: Path) -> tuple[int, int, list[float], tuple[int, ...]]:
    """The same, without knowing of damage."""
    capture, found, shape = cv2.VideoCapture(str(path)), [], ()
    while True:
        there, pixels = capture.read()
        if not there:
            return len(found), 0, found, shape
        found.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        shape = pixels.shape[:2]


def damaged(folder: Path) -> dict[str, Path]:
    """Return clips that are turned, cut off, damaged, or nothing."""
    turned, cut, holes = make_clip(folder / "t.mp4"), make_clip(folder / "c.mkv", 40), make_clip(folder / "h.ts", 40)
    data = bytearray(turned.read_bytes())
    matrix = data.find(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    turned.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    data = bytearray(holes.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    holes.write_bytes(data)
    (folder / "n.mp4").write_text("nothing")
    return {"turned by 90 degrees": turned, "cut off (40)": cut, "a hole (40)": holes, "no video": folder / "n.mp4"}


def main() -> None:
    """Print the table."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        clips = {name: make_clip(folder / name, **options) for name, options in KINDS.items()} | damaged(folder)
        for name, path in clips.items():
            row = {"clip": name}
            for reader, read in (("PyAV", with_pyav), ("OpenCV", with_opencv)):
                count, broken, found, shape = read(path)
                expected = times(count, "uneven" in name)
                timed = count and np.allclose(np.array(found) - found[0], expected, atol=CLOSE)
                row[reader] = f"{count} frames" + (f", {broken} named as damaged" if broken else "")
                row[f"{reader} times"] = "yes" if timed else "no"
                row[f"{reader} size"] = "x".join(map(str, shape[::-1]))
            rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
