"""From files to files: images per second beside a stand-in or a model, and what each stage costs a core."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from vpd_fast.errors import ImageError
from vpd_fast.inference.batching import BatchPredictor, Prepared, launch
from vpd_fast.inference.listing import Shard
from vpd_fast.inference.predict_images import predict_images
from vpd_fast.inference.records import Records
from vpd_fast.inference.results import Result, save_picture
from vpd_fast.inference.streams import Streams
from vpd_fast.pictures.reading import read_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = ("read", "resize", "stack", "write labels", "draw", "write overlay", "record")
HEIGHT, WIDTH = 480, 640
MAX_DEPTH = 10.0  # metres
_STATM = Path("/proc/self/statm")


def smooth(rng: np.random.Generator, cells: tuple[int, int], channels: int) -> np.ndarray:
    """Return random numbers (HEIGHT,WIDTH,channels), smooth over WIDTH / cells pixels, as a network's output is."""
    small = rng.normal(size=(*cells, channels)).astype(np.float32)
    planes = [cv2.resize(small[..., i], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for i in range(channels)]
    return np.stack(planes, -1)


def scene(classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return random arrays of HEIGHT and WIDTH: a picture (H,W,3) uint8 with the edges and the grain of a photo, labels
    (H,W) int64 of at most 24 of the classes, and depth (H,W) float32 in metres."""
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(classes)[:24]
    regions = (smooth(rng, (9, 12), len(numbers)) + 0.15 * smooth(rng, (60, 80), len(numbers))).argmax(-1)
    field = 3 * smooth(rng, (4, 5), 1) + 0.1 * smooth(rng, (60, 80), 1)
    colors = rng.uniform(30, 225, (len(numbers), 3))[regions]
    photo = colors + 20 * smooth(rng, (30, 40), 3) + rng.normal(0, 3, (HEIGHT, WIDTH, 1))
    depth = (MAX_DEPTH / (1 + np.exp(-field[..., 0]))).astype(np.float32)
    return photo.clip(0, 255).astype(np.uint8), numbers[regions].astype(np.int64), depth


class StandIn(BatchPredictor[Result]):
    """A device that takes so many milliseconds for an image, and a model whose answers are known.

    All that a processor does beside a GPU is real: images are resized by the predictor, stacked, and labels copied.
    """

    on_gpu = True

    def __init__(self, predictor: BatchPredictor[Any], answer: Result, milliseconds: float) -> None:
        self._predictor, self._answer, self.milliseconds = predictor, answer, milliseconds
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
        self._free = max(self._free, time.perf_counter()) + self.milliseconds / 1e3 * len(group)
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
    """One way from files to files.

    milliseconds: of the stand-in for an image; None: a model ran. overlay: its format, or "none". core_ms: milliseconds
    of processors that an image took, of all threads. grown_mib: by how much the last tenth of the images had more
    memory resident than the second tenth; None where that is not known (Linux tells it).
    """

    milliseconds: float | None
    overlay: str
    images_per_second: float
    core_ms: float
    grown_mib: float | None = None


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


def measure(predictor: BatchPredictor[Any], photo: Path, overlay: str, count: int) -> Run:
    """Go once from `count` copies of a photo to the files of their results."""
    milliseconds = predictor.milliseconds if isinstance(predictor, StandIn) else None
    resident: list[float] = []
    with tempfile.TemporaryDirectory(prefix="vpd-fast-bench-") as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        images = copies(photo, Path(scratch), count)
        start, spent = time.perf_counter(), time.process_time()
        with Records(out, Shard(), {}) as sink:
            for record in predict_images(
                predictor, images, lambda result, name: write(out, overlay, result, name), sink,
                prefetch=max(4, 2 * predictor.batch_size),
            ):  # fmt: skip
                if "error" in record:
                    raise ImageError(record["error"])
                resident.append(_resident_mib())
        wall, spent = time.perf_counter() - start, time.process_time() - spent
    tenth = max(len(resident) // 10, 1)
    grown = statistics.median(resident[-tenth:]) - statistics.median(resident[tenth : 2 * tenth] or resident)
    return Run(milliseconds, overlay, count / wall, 1e3 * spent / count, None if math.isnan(grown) else grown)


def median_runs(
    predictors: Sequence[BatchPredictor[Any]],
    photo: Path,
    overlays: Sequence[str],
    count: int,
    rounds: int,
    on_run: Callable[[], object],
) -> list[Run]:
    """Return, for each predictor and overlay, the run of the median speed of `rounds`. on_run: called after each."""
    measure(predictors[0], photo, overlays[-1], 2 * predictors[0].batch_size)  # caches
    chosen = []
    for predictor, overlay in product(predictors, overlays):
        runs = []
        for _ in range(rounds):
            runs.append(measure(predictor, photo, overlay, count))
            on_run()
        chosen.append(sorted(runs, key=lambda run: run.images_per_second)[rounds // 2])
    return chosen


def model_alone(
    predictor: BatchPredictor[Any], image: np.ndarray, streams: int | None = None, seconds: float = 2.0
) -> tuple[float, float]:
    """Return the images per second of a model alone, labels or depth included, and milliseconds of cores per image.

    It gets batches of one image that was read. streams: how many at once; None: as many as from files to files.
    """
    prepared = predictor.prepare(image)
    group = [prepared] * max(predictor.batch_size // predictor.forwards(prepared), 1)
    count = predictor.streams if streams is None else streams
    with ExitStack() as stack:
        parallel = stack.enter_context(closing(Streams(count))) if count > 1 else None

        def predict() -> object:
            return launch(predictor, group)()

        def spent(batches: int) -> tuple[float, float]:
            start, start_of_cores = time.perf_counter(), time.process_time()
            if parallel is None:
                for _ in range(batches):
                    predict()
            else:
                for future in [parallel.submit(predict) for _ in range(batches)]:
                    future.result()
            return time.perf_counter() - start, time.process_time() - start_of_cores

        spent(4 * count)  # compiles, allocates
        batches = 3 * count
        while (taken := spent(batches))[0] < seconds:
            batches *= 2
    images = batches * len(group)
    return images / taken[0], 1e3 * taken[1] / images


def _resident_mib() -> float:
    """Return the memory of this process that is resident, nan where that is not known."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError):
        return math.nan


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
    lines = [
        "| ms per image | overlay | images/s | core-ms per image | memory grew, MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        device = "model" if run.milliseconds is None else f"{run.milliseconds:g}"
        grown = "?" if run.grown_mib is None else f"{run.grown_mib:.0f}"
        lines.append(f"| {device} | {run.overlay} | {run.images_per_second:.0f} | {run.core_ms:.1f} | {grown} |")
    lines += ["", "| stage | core-ms per image |", "| --- | --- |"]
    lines += [f"| {stage} | {spent:.2f} |" for stage, spent in by_stage.items()]
    return "\n".join(lines)


def chart(runs: Sequence[Run], by_stage: dict[str, float], footer: str, alone: float | None = None) -> Figure:
    """Return the stages as one bar, and images per second by the time of the stand-in, or with a model as bars beside
    those of the model `alone`."""
    from vpd_fast.bench.plots import new_figure

    drawing, (bar, rates) = new_figure(8, 6, (1.0, 2.4))
    left = 0.0
    for stage, spent in by_stage.items():
        bar.barh(0, spent, 0.6, left, label=f"{stage} {spent:.1f}")
        left += spent
    bar.set_yticks([])
    bar.set_title(f"one core, ms per image: {left:.1f}", loc="left", fontsize=11)
    bar.legend(fontsize=8, ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    if alone is None:
        _lines(rates, runs)
    else:
        names = ["model alone", *(f"overlay {run.overlay}" for run in runs)]
        bars = rates.bar(names, [alone, *(run.images_per_second for run in runs)], 0.5)
        rates.bar_label(bars, fmt="%.1f", fontsize=9)
    rates.set_ylabel("images per second")
    rates.set_ylim(bottom=0, top=1.3 * max(run.images_per_second for run in runs))
    rates.grid(alpha=0.3, axis="y")
    rates.set_title(footer, loc="left", fontsize=9)
    return drawing


def _lines(rates: Axes, runs: Sequence[Run]) -> None:
    for overlay in dict.fromkeys(run.overlay for run in runs):
        chosen = [(run.milliseconds or 0.0, run.images_per_second) for run in runs if run.overlay == overlay]
        rates.plot(*zip(*chosen, strict=True), "o-", label=f"overlay {overlay}")
    times = sorted({run.milliseconds for run in runs if run.milliseconds})
    if times:
        rates.plot(times, [1e3 / ms for ms in times], "k--", lw=1, label="the device alone")
    rates.set_xlabel("ms per image of the device")
    rates.legend(fontsize=9, frameon=False)


def numbers(runs: Sequence[Run], by_stage: dict[str, float], about: dict[str, Any]) -> dict[str, Any]:
    """Return all numbers, for a JSON file."""
    return {**about, "runs": [vars(run) for run in runs], "stages_core_ms": by_stage}
