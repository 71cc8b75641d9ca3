"""What a run tells: metrics.jsonl, TensorBoard, a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpd_fast.errors import MissingDependencyError, VPDFastError
from vpd_fast.evaluation.tasks import make_task
from vpd_fast.models import VPD
from vpd_fast.progress import ProgressBar
from vpd_fast.training.checkpoint import write_text

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PICTURE_WIDTH = 1600  # pixels: pictures are for looking at side by side, and are kept in every event file


class RunLog:
    """The log of the process that writes; the others have one with `folder` None, which says nothing.

    start: the step the run begins at, 0 or where it resumes; what an earlier attempt logged behind it is dropped, so
    that every step is there once. evaluated: the last step whose evaluation counts.
    steps: the last one. bar: whether to draw a progress bar; None: on a terminal.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        start: int,
        steps: int,
        evaluated: int | None = None,
        tensorboard: bool = True,
        bar: bool | None = None,
    ) -> None:
        self.folder = folder
        self.steps = steps
        self._writer: Any = None
        self._bar = ProgressBar(steps, completed=start, visible=False if folder is None else bar)
        self._loss = self._speed = ""
        self._started = time.monotonic()
        self._start = start
        if folder is None:
            return
        _drop_later(folder / METRICS, start, start if evaluated is None else evaluated)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingDependencyError(
                    'log.tensorboard needs TensorBoard: pip install "vpd_fast[train]", or set log.tensorboard=false'
                ) from error
            self._writer = SummaryWriter(folder / TENSORBOARD, purge_step=start + 1)

    def message(self, text: str) -> None:
        """Print a line for people, on stderr."""
        if self.folder is not None:
            self._bar.message(text)

    def advance(self, step: int, loss: float, rate: float) -> None:
        """Move the bar to `step`."""
        self._loss = f"loss {loss:.4g}  lr {rate:.2e}"
        self._bar.update(step, f"{self._loss} {self._speed}")

    def scalars(self, step: int, **values: float) -> None:
        """Log losses and the like at `step`; on no terminal a plain line as well."""
        if self.folder is None:
            return
        self._append({"step": step, **values})
        for name, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(f"train/{name}", value, step)
        self._speed = f"{values.get('images_per_second', 0):.3g} images/s"
        if self._bar.visible:
            self._bar.update(description=f"{self._loss} {self._speed}")
        else:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {step}/{self.steps}  {shown}  {self._remaining(step)}", file=sys.stderr, flush=True)

    def evaluation(self, step: int, metrics: dict[str, float], best: bool) -> None:
        """Log metrics of the validation data after `step` steps."""
        if self.folder is None:
            return
        self._append({"step": step, "evaluation": metrics, "best": best})
        for name, value in metrics.items():
            if self._writer is not None:
                self._writer.add_scalar(f"evaluation/{name}", value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.message(f"step {step}: {shown}{'  (best so far)' if best else ''}")

    def pictures(self, step: int, pictures: Iterable[np.ndarray]) -> None:
        """Log pictures (H,W,3) uint8."""
        if self._writer is not None:
            for i, picture in enumerate(pictures):
                self._writer.add_image(f"samples/{i}", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered and leave the terminal in order."""
        if self._writer is not None:
            self._writer.close()
        self._bar.close()

    def _append(self, values: dict[str, Any]) -> None:
        assert self.folder is not None
        try:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            self.message(f"warning: {self.folder / METRICS} cannot be written ({error.strerror or error})")

    def _remaining(self, step: int) -> str:
        done = step - self._start
        if done <= 0:
            return ""
        seconds = round((time.monotonic() - self._started) / done * (self.steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


class Window:
    """Accumulates loss and speed since the last entry of the log.

    losses: of the steps, which a checkpoint keeps, so that the next entry is that of an unbroken run.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Count images and time from now on."""
        self.start, self.images = time.monotonic(), 0

    def add(self, loss: float, finite: bool, images: int) -> None:
        self.images += images
        if finite:
            self.losses.append(loss)

    def values(self) -> dict[str, float]:
        """Return the mean loss of the finite steps (none: left out) and images per second."""
        speed = {"images_per_second": self.images / max(time.monotonic() - self.start, 1e-9)}
        return {"loss": sum(self.losses) / len(self.losses), **speed} if self.losses else speed


def _drop_later(path: Path, step: int, evaluated: int) -> None:
    """Drop entries after `step`, evaluations after `evaluated`, and a line that a kill cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("step", 0) <= (evaluated if "evaluation" in entry else step):
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))


def sample_pictures(
    model: VPD, dataset: Any, count: int, sentences: Callable | None, options: Mapping[str, Any]
) -> list[np.ndarray]:
    """Draw photo, prediction, target and what differs side by side, (H,W,3) uint8, as an evaluation does.

    The first `count` samples that can be read and measured. options: those of the evaluation.
    """
    task = make_task(model, dataset, text_encoder=sentences, **options)
    pictures = []
    for index in range(min(count, len(dataset))):
        try:
            findings = task.findings(dataset.load(index))
        except VPDFastError:
            continue
        for finding in findings[:1]:
            row = Image.fromarray(np.concatenate([np.asarray(panel) for _, panel in finding.draw().panels], 1))
            row.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH))
            pictures.append(np.asarray(row))
    return pictures
