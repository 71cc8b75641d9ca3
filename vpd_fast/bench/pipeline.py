"""From files to files: images per second beside a stand-in for a device, and what each stage costs a core."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vpd_fast.inference.batching import BatchPredictor, Prepared
from vpd_fast.inference.listing import Shard
from vpd_fast.inference.predict_images import predict_images
from vpd_fast.inference.records import Records
from vpd_fast.inference.results import Result, save_picture
from vpd_fast.pictures.reading import read_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("read", "resize", "stack", "write labels", "draw", "write overlay", "record")


class StandIn(BatchPredictor[Result]):
    """A device that takes so many milliseconds for an image, and a model whose answers are known.

    All that a processor does beside a GPU is real: images are resized by the predictor, stacked, and labels copied.
    """

    on_gpu = True

    def __init__(self, predictor: BatchPredictor[Any], answer: Result, milliseconds: float) -> None:
        self._predictor, self._answer, self._seconds = predictor, answer, milliseconds / 1e3
        self.batch_size = predictor.batch_size
        self._free = 0.0

    def prepare(self, image: np.ndarray) -> Prepared:
        """Resize an image as the predictor does."""
        return self._predictor.prepare(image)

    def forwards(self, prepared: Prepared) -> int:
        """Return 1: the time of the device is given for an image."""
        return 1

    def start(self, group: Sequence[Prepared]) -> Callable[[], list[Result]]:
        """Begin with the images when the device is free."""
        for views in zip(*(prepared.views for prepared in group), strict=True):
            np.stack(views)
        self._free = max(self._free, time.perf_counter()) + self._seconds * len(group)
        end = self._free

        def finish() -> list[Result]:
            time.sleep(max(end - time.perf_counter(), 0))
            return [self._copy(prepared.image) for prepared in group]

        return finish

    def _copy(self, image: np.ndarray) -> Result:
        values = vars(self._answer)
        arrays = {name: values[name].copy() for name in ("labels", "masks", "depth") if name in values}
        return replace(self._answer, image=image, **arrays)


@dataclass(frozen=True)
class Run:
    """Images per second from files to files, and the milliseconds of a core that an image took."""

    milliseconds: float
    overlay: str
    images_per_second: float
    core_ms: float


def copies(photo: Path, folder: Path, count: int) -> list[tuple[str, str]]:
    """Return (name, path) of copies of a photo."""
    paths = [folder / f"{i:05d}{photo.suffix}" for i in range(count)]
    for path in paths:
        shutil.copyfile(photo, path)
    return [(path.name, str(path)) for path in paths]


def write(folder: Path, overlay: str, result: Result, name: str) -> dict[str, Any]:
    """Write what `vpd-fast predict` writes for an image."""
    stem = Path(name).stem
    written = result.save(folder / f"{stem}.png")
    if overlay != "none":
        written.append(save_picture(result.overlay(), folder / f"{stem}_overlay.{overlay}"))
    return {**result.record(), "files": [path.name for path in written]}


def measure(
    predictor: BatchPredictor[Any], answer: Result, photo: Path, milliseconds: float, overlay: str, count: int
) -> Run:
    """Go from files to files once."""
    with tempfile.TemporaryDirectory(prefix="vpd-fast-bench-") as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        images = copies(photo, Path(scratch), count)
        device = StandIn(predictor, answer, milliseconds)
        start, spent = time.perf_counter(), time.process_time()
        with Records(out, Shard(), {}) as sink:
            for _ in predict_images(
                device, images, lambda result, name: write(out, overlay, result, name), sink,
                prefetch=max(4, 2 * device.batch_size),
            ):  # fmt: skip
                pass
        wall, spent = time.perf_counter() - start, time.process_time() - spent
    return Run(milliseconds, overlay, count / wall, 1e3 * spent / count)


def stages(predictor: BatchPredictor[Any], answer: Result, photo: Path, rounds: int = 15) -> dict[str, float]:
    """Return the median milliseconds of a core for each of STAGES, one after the other in one thread."""
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with tempfile.TemporaryDirectory(prefix="vpd-fast-bench-") as scratch:
        folder = Path(scratch)
        with Records(folder, Shard(), {}) as sink:
            for _ in range(rounds):
                for stage, spent in _once(predictor, answer, photo, folder, sink):
                    times[stage].append(spent)
    return {stage: 1e3 * statistics.median(spent) for stage, spent in times.items()}


def _once(
    predictor: BatchPredictor[Any], answer: Result, photo: Path, folder: Path, sink: Records
) -> Iterator[tuple[str, float]]:
    start = time.thread_time()

    def lap() -> float:
        nonlocal start
        before, start = start, time.thread_time()
        return start - before

    image = read_image(photo)
    yield "read", lap()
    prepared = predictor.prepare(image)
    yield "resize", lap()
    for view in prepared.views:
        np.stack([view] * predictor.batch_size)
    yield "stack", lap() / predictor.batch_size
    answer.image = image
    files = answer.save(folder / "a.png")
    yield "write labels", lap()
    picture = answer.overlay()
    yield "draw", lap()
    files.append(save_picture(picture, folder / "a_overlay.jpg"))
    yield "write overlay", lap()
    sink.add({"image": "a.jpg", **answer.record(), "files": [path.name for path in files]})
    yield "record", lap()


def table(runs: Sequence[Run], by_stage: dict[str, float]) -> str:
    """Return both as tables in Markdown."""
    lines = ["| device, ms per image | overlay | images/s | core-ms per image |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {run.milliseconds:g} | {run.overlay} | {run.images_per_second:.0f} | {run.core_ms:.1f} |" for run in runs
    ]
    lines += ["", "| stage | core-ms per image |", "| --- | --- |"]
    lines += [f"| {stage} | {spent:.2f} |" for stage, spent in by_stage.items()]
    return "\n".join(lines)


def chart(runs: Sequence[Run], by_stage: dict[str, float], footer: str) -> Figure:
    """Return the stages as one bar, and images per second by the device's time."""
    from vpd_fast.bench.plots import new_figure

    drawing, (bar, rates) = new_figure(8, 6, (1.0, 2.4))
    left = 0.0
    for stage, spent in by_stage.items():
        bar.barh(0, spent, 0.6, left, label=f"{stage} {spent:.1f}")
        left += spent
    bar.set_yticks([])
    bar.set_title(f"one core, ms per image: {left:.1f}", loc="left", fontsize=11)
    bar.legend(fontsize=8, ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for overlay in dict.fromkeys(run.overlay for run in runs):
        mine = [run for run in runs if run.overlay == overlay]
        x = [run.milliseconds for run in mine]
        rates.plot(x, [run.images_per_second for run in mine], "o-", label=f"overlay {overlay}")
    times = sorted({run.milliseconds for run in runs if run.milliseconds})
    if times:
        rates.plot(times, [1e3 / ms for ms in times], "k--", lw=1, label="the device alone")
    rates.set(xlabel="ms per image of the device", ylabel="images per second")
    rates.set_ylim(bottom=0, top=1.3 * max(run.images_per_second for run in runs))
    rates.grid(alpha=0.3)
    rates.legend(fontsize=9, frameon=False)
    rates.set_title(footer, loc="left", fontsize=9)
    return drawing


def as_json(runs: Sequence[Run], by_stage: dict[str, float], about: dict[str, Any]) -> str:
    """Return all numbers."""
    return json.dumps({**about, "runs": [vars(run) for run in runs], "stages_core_ms": by_stage}, indent=2) + "\n"
