"""Short videos, made with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 10
TIME_BASE = Fraction(1, 90_000)
SIZE = (96, 64)  # width, height


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A bar that moves to the right."""
    pixels = np.full((size[1], size[0], 3), 60, np.uint8)
    pixels[:, number * 4 : number * 4 + 20] = (200, 60, 60)
    return pixels


def times(count: int, uneven: bool) -> list[float]:
    """When frames begin, in seconds."""
    return [(i + 0.3 * (i % 3) * uneven) / RATE for i in range(count)]


def make_clip(
    path: Path, count: int = 12, *, codec: str = "libx264", pixels: str = "yuv420p", sound: str | None = None,
    uneven: bool = False, size: tuple[int, int] = SIZE, container: str | None = None,
) -> Path:  # fmt: skip
    """Write `count` pictures, and as much of a tone if there is a codec for it. uneven: frames last differently."""
    with av.open(str(path), "w", format=container) as file:
        video = file.add_stream(codec, rate=RATE)
        video.width, video.height = size
        video.pix_fmt = pixels
        video.codec_context.time_base = TIME_BASE if uneven else Fraction(1, RATE)
        voice = None
        if sound is not None:
            voice = file.add_stream(sound, rate=48_000 if "opus" in sound else 16_000)
            voice.layout = "mono"
        for i, time in enumerate(times(count, uneven)):
            frame = av.VideoFrame.from_ndarray(picture(i, size))
            frame.pts, frame.time_base = round(time / video.codec_context.time_base), video.codec_context.time_base
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        if voice is not None:
            length = voice.codec_context.frame_size or 1024
            tone = (np.sin(np.arange(length) / 9) * 8000).astype(np.int16)[None]
            for i in range(count * voice.rate // RATE // length):
                frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
                frame.rate, frame.pts = voice.rate, i * length
                file.mux(voice.encode(frame))
            file.mux(voice.encode(None))
    return path


# name of a file: how it is made
KINDS: dict[str, dict] = {
    "h264.mp4": {"sound": "aac"},
    "h264.mov": {},
    "h264.mkv": {"sound": "flac"},
    "vp9.webm": {"codec": "libvpx-vp9", "sound": "libopus"},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "mpeg2.ts": {"codec": "mpeg2video", "sound": "mp2"},
    "ten_bits.mp4": {"pixels": "yuv420p10le"},
    "uneven.mkv": {"uneven": True},
    "animated.gif": {"codec": "gif", "pixels": "rgb8"},
}
