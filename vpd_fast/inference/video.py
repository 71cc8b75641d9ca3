"""Videos: a prediction for each frame, drawn into a video with the sound of the first, and recorded.

A video is worked off in parts of PART frames. A part is there when its records are, so that a run that was killed
loses at most one; the last step joins them. Memory does not grow with the length.
"""

from __future__ import annotations

import heapq
import json
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vpd_fast.errors import ImageError, InputError, MissingDependencyError
from vpd_fast.files import write_files
from vpd_fast.inference.batching import BatchPredictor
from vpd_fast.inference.pipeline import Failure, outcomes
from vpd_fast.inference.predict_images import READERS, image_error, model_error, together
from vpd_fast.inference.records import Record
from vpd_fast.inference.results import SegmentationResult
from vpd_fast.locking import RunLock
from vpd_fast.pictures.canvas import BACKGROUND, named_classes

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp")
PART = 240  # frames
QUALITY = {"crf": "20", "preset": "veryfast"}  # of H.264
MP4_SOUND = ("aac", "mp3", "ac3", "eac3", "opus", "alac")  # codecs that are copied; others are encoded as AAC
TIME_BASE = Fraction(1, 90_000)  # seconds; that of broadcasting, which all usual frame rates divide


class Frame(NamedTuple):
    """A frame: its number, its time in seconds, and what came: an image (H,W,3) RGB, or why not."""

    number: int
    time: float
    image: np.ndarray | ImageError

    @property
    def name(self) -> str:
        return f"frame {self.number}"


def is_video(path: str | Path) -> bool:
    """Return whether a path is called as videos are."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(f'videos need PyAV ({error}); pip install "vpd_fast[video]"') from error
    return av


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A container to read. Raises ImageError."""
    av = _av()
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read as a video ({error})") from error
    with container:
        yield container


def frame_count(path: str | Path) -> int | None:
    """Return how many frames a video says it has, None where it does not. Raises ImageError for what is no video."""
    with _opened(Path(path)) as container:
        stream = _stream(container, Path(path))
        if stream.frames:
            return stream.frames
        rate, duration = stream.average_rate, container.duration
        return round(float(rate) * duration / 1e6) if rate and duration else None


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise ImageError(f"{path}: has no video stream")
    return container.streams.video[0]


def frames(path: str | Path, *, every: int = 1, first: int = 0) -> Generator[Frame, None, None]:
    """Yield every so manieth frame from number `first` on, upright as players show it.

    What cannot be decoded is a Frame with an ImageError. Raises ImageError for what is no video or has no frame.
    """
    path = Path(path)
    av = _av()
    number, last = -1, 0.0
    with _opened(path) as container:
        stream = _stream(container, path)
        stream.thread_type = "AUTO"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                decoded = packet.decode()
            except av.FFmpegError as error:  # of a packet, or of a file that is cut off: then the next is the end
                number += 1
                if number >= first:
                    yield Frame(number, last, ImageError(f"{path}: frame {number} is damaged ({error})"))
                continue
            for frame in decoded:
                number += 1
                last = frame.time if frame.time is not None else last
                if number >= first and number % every == 0:
                    pixels = frame.to_ndarray(format="rgb24")
                    turns = round(getattr(frame, "rotation", 0) / 90) % 4
                    yield Frame(number, last, np.ascontiguousarray(np.rot90(pixels, turns)))
    if number < 0:
        raise ImageError(f"{path}: has no frame that can be decoded")


def predict_video(
    predictor: BatchPredictor[Any],
    path: str | Path,
    output: str | Path,
    header: Record,
    *,
    every: int = 1,
    resume: bool = False,
    prefetch: int = 4,
    part: int = PART,
    progress: Callable[[int, Record], object] = lambda done, record: None,
) -> Record:
    """Predict on a video's frames; write NAME_overlay.mp4 and NAME.jsonl into the folder `output`, made before.

    predictor: of `make_predictor`. header: the model and its options, the first line of the records. every: only each
    so manieth frame, which then stays until the next. resume: go on after the parts that an earlier run with the same
    header finished. part: frames of one. progress: called with how many frames are done and the last record.

    Frames keep their times. Sound is copied where MP4 takes it, else encoded as AAC. Damaged frames are recorded with
    "error" and left out of the video. Returns {"done", "failed", "frames", "files", "notes"}. Raises ImageError for
    what is no video, has no frame, or cannot be written; InputError for parts of another run; ModelError.
    """
    path, output = Path(path), Path(output)
    run = VideoRun(path, output, {**header, "video": path.name, "every": every, "part": part}, resume)
    with run.lock:
        run.begin()
        parts = run.finished()
        records = [record for part_records in parts for record in part_records]
        first = records[-1]["frame"] + 1 if records else 0
        failed, done = _counts(records)
        count, left = len(parts), frames(path, every=every, first=first)
        try:
            while found := run.make_part(count, predictor, islice(left, part), prefetch, progress, done + failed):
                more_failed, more_done = _counts(found)
                failed, done, count = failed + more_failed, done + more_done, count + 1
        finally:
            with suppress(ValueError):  # after an error a thread may still read its last frame, and then lets go
                left.close()
        if done == 0:
            run.give_up()
            raise ImageError(f"{path}: none of its {failed} frames can be decoded")
        files, notes = run.join(count)
    return {"video": path.name, "frames": done + failed, "done": done, "failed": failed, "files": files, "notes": notes}


def _counts(records: list[Record]) -> tuple[int, int]:
    """How many failed, and how many did not."""
    failed = sum("error" in record for record in records)
    return failed, len(records) - failed


class VideoRun:
    """The files of a run over one video: parts in a hidden folder, and in the end what they are joined to."""

    def __init__(self, path: Path, output: Path, header: Record, resume: bool) -> None:
        self.path, self.output, self.resume = path, output, resume
        self.header = json.loads(json.dumps(header))
        self.folder = output / f".{path.name}.parts"
        self.video, self.records = output / f"{path.stem}_overlay.mp4", output / f"{path.stem}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(self.folder / "lock")

    def begin(self) -> None:
        """Look at what an earlier run has left. Raises InputError for that of another header, or without `resume`."""
        settings = self.folder / "header.json"
        before = json.loads(settings.read_text()) if settings.is_file() else None
        if before is None and self.records.exists():
            raise InputError(f"{self.records} exists: choose another folder, or remove it")
        if before is not None and not self.resume:
            raise InputError(f"{self.path.name} was begun in {self.output}: --resume goes on, or choose another folder")
        if before is not None and before != self.header:
            changed = [name for name in {**before, **self.header} if before.get(name) != self.header.get(name)]
            raise InputError(
                f"{self.output}: {self.path.name} was begun with other options ({', '.join(changed)}); resume with "
                "the same ones, or choose another folder"
            )
        write_files({settings: lambda temporary: temporary.write_text(json.dumps(self.header))}, ImageError)

    def _file(self, count: int, suffix: str) -> Path:
        return self.folder / f"{count:06d}{suffix}"

    def finished(self) -> list[list[Record]]:
        """Return the records of the parts that are there."""
        parts: list[list[Record]] = []
        while (path := self._file(len(parts), ".jsonl")).is_file():
            parts.append([json.loads(line) for line in path.read_text().splitlines()])
        return parts

    def make_part(
        self,
        count: int,
        predictor: BatchPredictor[Any],
        wanted: Iterator[Frame],
        prefetch: int,
        progress: Callable[[int, Record], object],
        before: int,
    ) -> list[Record]:
        """Predict on a part's frames and write it. before: how many were done. Returns their records, none at the end
        of the video."""
        try:
            found = outcomes(
                wanted, lambda frame: self._prepared(predictor, frame), predictor,
                ahead=prefetch, threads=min(prefetch, READERS),
            )  # fmt: skip
            records: list[Record] = []
            with closing(found), _Writer(self._file(count, ".tmp.mp4"), self._size()) as writer:
                for outcome in found:
                    frame: Frame = outcome.item
                    record: Record = {"frame": frame.number, "time": round(frame.time, 6)}
                    if isinstance(outcome.result, Exception):
                        records.append(record | {"error": str(outcome.result)})
                    else:
                        assert outcome.result is not None
                        writer.add(drawn(outcome.result), frame.time)
                        records.append(record | outcome.result.record())
                    progress(before + len(records), records[-1])
        except Failure as failure:
            raise model_error(failure.cause, together([f.name for f in failure.items])) from failure.cause
        except OSError as error:
            raise image_error(error, str(self.path), "the results cannot be written") from error
        if not records:
            return records
        lines = "".join(json.dumps(record) + "\n" for record in records)
        if writer.count:
            self._file(count, ".tmp.mp4").replace(self._file(count, ".mp4"))
            sizes = json.dumps(writer.size)
            write_files({self.folder / "size.json": lambda temporary: temporary.write_text(sizes)}, ImageError)
        write_files({self._file(count, ".jsonl"): lambda temporary: temporary.write_text(lines)}, ImageError)
        return records

    @staticmethod
    def _prepared(predictor: BatchPredictor[Any], frame: Frame) -> Any:
        try:
            return frame.image if isinstance(frame.image, ImageError) else predictor.prepare(frame.image)
        except Exception as error:
            return image_error(error, frame.name, "cannot be prepared")

    def _size(self) -> tuple[int, int] | None:
        """Width and height of the parts before."""
        path = self.folder / "size.json"
        return tuple(json.loads(path.read_text())) if path.is_file() else None

    def join(self, count: int) -> tuple[list[str], list[str]]:
        """Join the parts, add the sound, and remove them. Returns names of files, and notes."""
        notes: list[str] = []
        parts = [path for i in range(count) if (path := self._file(i, ".mp4")).is_file()]
        texts = [self._file(i, ".jsonl").read_text() for i in range(count)]

        def write_records(temporary: Path) -> None:
            temporary.write_text(json.dumps({"header": self.header}) + "\n" + "".join(texts))

        write_files(
            {
                self.video: lambda temporary: notes.extend(_join(parts, self.path, temporary)),
                self.records: write_records,
            },
            ImageError,
        )
        self.give_up()
        return [self.video.name, self.records.name], notes

    def give_up(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)


def drawn(result: Any) -> Image.Image:
    """Return the picture of a frame: an overlay whose size does not depend on what is seen."""
    if isinstance(result, SegmentationResult):
        return named_classes(result.image, result.labels, result.class_names)
    return result.overlay()


class _Writer:
    """Writes pictures as H.264 of the first one's size, made even; the file is complete after the `with` block."""

    def __init__(self, path: Path, size: tuple[int, int] | None) -> None:
        self.path, self.size, self.count = path, size, 0
        self._container: Any = None

    def __enter__(self) -> _Writer:
        return self

    def add(self, picture: Image.Image, time: float) -> None:
        """Encode a picture that is shown from `time` on, in seconds."""
        av = _av()
        if self._container is None:
            self.size = self.size or (picture.width + picture.width % 2, picture.height + picture.height % 2)
            self._container = av.open(str(self.path), "w", format="mp4")
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, options=QUALITY if codec == "libx264" else {})
            self._stream.width, self._stream.height = self.size
            self._stream.pix_fmt, self._stream.time_base = "yuv420p", TIME_BASE
            self._stream.codec_context.time_base = TIME_BASE
        assert self.size is not None
        if picture.size != self.size:
            canvas = Image.new("RGB", self.size, BACKGROUND)
            canvas.paste(picture)
            picture = canvas
        frame = av.VideoFrame.from_image(picture)
        frame.pts, frame.time_base = round(time / TIME_BASE), TIME_BASE
        self._container.mux(self._stream.encode(frame))
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._container is None:
            return
        with suppress(Exception) if kind is not None else nullcontext():
            self._container.mux(self._stream.encode(None))
            self._container.close()


def _join(parts: list[Path], source: Path, destination: Path) -> list[str]:
    """Write one file of the parts' frames and the source's sound. Returns notes on what could not be kept."""
    av = _av()
    notes: list[str] = []
    with _opened(source) as original, av.open(str(destination), "w", format="mp4") as out:
        with _opened(parts[0]) as part:
            video = out.add_stream_from_template(part.streams.video[0])
        streams = [_video_packets(parts, video)]
        if original.streams.audio:
            streams.append(_sound_packets(original, out, notes))
        for _, packet in heapq.merge(*streams, key=lambda timed: timed[0]):  # so that no muxer has to keep them
            out.mux(packet)
    return notes


def _video_packets(parts: list[Path], stream: Any) -> Iterator[tuple[float, Any]]:
    """Yield (seconds, packet) of the parts in order."""
    for path in parts:
        with _opened(path) as part:
            for packet in part.demux(part.streams.video[0]):
                if packet.dts is not None:
                    time = float(packet.dts * packet.time_base)
                    packet.stream = stream
                    yield time, packet


def _sound_packets(original: Any, out: Any, notes: list[str]) -> Iterator[tuple[float, Any]]:
    """Return (seconds, packet) of the first sound, copied where MP4 takes it, else encoded; the stream is added now."""
    av, voice = _av(), original.streams.audio[0]
    copied = voice.codec_context.name in MP4_SOUND
    stream = out.add_stream_from_template(voice) if copied else out.add_stream("aac", rate=voice.rate)

    def packets() -> Iterator[Any]:
        for packet in original.demux(voice):
            if not copied:
                for frame in packet.decode():
                    yield from stream.encode(frame)
            elif packet.dts is not None:
                yield packet
        if not copied:
            yield from stream.encode(None)

    def timed() -> Iterator[tuple[float, Any]]:
        try:
            for packet in packets():
                time = float(packet.dts * packet.time_base)
                packet.stream = stream
                yield time, packet
        except (av.FFmpegError, ValueError) as error:
            notes.append(f"the sound is kept up to where it is damaged ({error})")

    return timed()
