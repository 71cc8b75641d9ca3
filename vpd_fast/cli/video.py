"""What `vpd-fast predict` does with videos and cameras."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer

from vpd_fast.errors import ImageError, InputError
from vpd_fast.inference.records import Record
from vpd_fast.inference.video import drawn, frame_count, is_video, predict_video
from vpd_fast.progress import ProgressBar

QUIT = (ord("q"), 27)  # 27: Esc


def camera_of(images: list[str]) -> int | None:
    """Return the number of a camera, where the only input is one and no file of that name exists."""
    number = len(images) == 1 and images[0].isdecimal() and not Path(images[0]).exists()
    return int(images[0]) if number else None


def videos_of(images: list[str]) -> list[Path]:
    """Return the videos among the inputs. Raises InputError where they are mixed with images, or have equal names."""
    found = [Path(image) for image in images if is_video(image)]
    if found and len(found) < len(images):
        raise InputError("videos and images are runs of their own: give only one of the two")
    stems = [path.stem for path in found]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise InputError(f"two videos are called {twice}, and so would be their results; predict on them one by one")
    if missing := next((path for path in found if not path.is_file()), None):
        raise InputError(f"{missing} does not exist")
    return found


def run(
    videos: list[Path], predictor: Any, output: Path, header: Record, *, every: int, resume: bool, print_json: bool
) -> None:
    """Predict on videos, and print what became of them; exit code 1 if a frame or a video failed."""
    found: list[Record] = []
    for path in videos:
        try:
            total = frame_count(path)
            with ProgressBar(None if total is None else -(-total // every), path.name) as bar:

                def show(done: int, record: Record, bar: ProgressBar = bar) -> None:
                    bar.update(done, f"{record['time']:.1f} s")

                found.append(predict_video(predictor, path, output, header, every=every, resume=resume, progress=show))
        except ImageError as error:
            found.append({"video": path.name, "error": str(error)})
    if print_json:
        typer.echo(json.dumps({**header, "videos": found}, indent=2))
    else:
        for note in header["notes"]:
            typer.echo(f"note: {note}")
        for record in found:
            for line in _lines(record, output):
                typer.echo(line)
    for record in found:
        if "error" in record:
            typer.echo(f"failed: {record['error']}", err=True)
        elif record["failed"]:
            typer.echo(f"{record['video']}: {record['failed']} damaged frames, named in its records", err=True)
    if any("error" in record or record["failed"] for record in found):
        raise typer.Exit(1)


def _lines(record: Record, output: Path) -> list[str]:
    if "error" in record:
        return []
    files = " and ".join(str(output / name) for name in record["files"])
    return [f"{record['video']}: {record['done']} frames: {files}", *(f"note: {note}" for note in record["notes"])]


def show(number: int, predictor: Any) -> None:
    """Show a camera's pictures with what is predicted, until q or Esc is pressed. Raises InputError."""
    import cv2

    camera = cv2.VideoCapture(number)
    if not camera.isOpened():
        raise InputError(f"camera {number} cannot be opened; expected the number of one that is connected")
    title, count, start = f"camera {number}", 0, time.monotonic()
    try:
        while True:
            there, pixels = camera.read()
            if not there:
                raise InputError(f"camera {number} gives no more pictures")
            result = predictor(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            picture = cv2.cvtColor(_array(drawn(result)), cv2.COLOR_RGB2BGR)
            cv2.imshow(title, picture)
            count += 1
            if cv2.waitKey(1) & 0xFF in QUIT:
                break
        cv2.destroyAllWindows()
    except cv2.error as error:
        raise InputError(
            "--show needs a display, and an OpenCV that has windows: "
            "pip uninstall opencv-python-headless, pip install opencv-python "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
    finally:
        camera.release()
    typer.echo(f"{count} pictures, {count / (time.monotonic() - start):.1f} per second")


def _array(picture: Any) -> Any:
    import numpy as np

    return np.asarray(picture)
