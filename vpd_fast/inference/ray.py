"""Prediction on a cluster with Ray Data: one model per worker, images streamed through `map_batches`.

Needs `pip install "vpd_fast[ray]"` on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from vpd_fast.checkpoints import load_checkpoint
from vpd_fast.engine import load_engine, optimize
from vpd_fast.engine.storage import SETTINGS
from vpd_fast.errors import InputError, MissingDependencyError
from vpd_fast.hub import local_path
from vpd_fast.inference.pipeline import Failure, outcomes
from vpd_fast.inference.predict import make_predictor
from vpd_fast.inference.predict_images import READERS, read_prepared

if TYPE_CHECKING:
    from ray.data import Dataset

    from vpd_fast.models.perceiver import Perceiver

_FIELDS = {"segmentation": ("labels", 2, np.int64), "referring": ("masks", 3, bool), "depth": ("depth", 2, np.float32)}


class Predictor:
    """Ray's worker, made once by `map_batches`: it loads the model, then turns batches of images into results.

    checkpoint: what `vpd-fast predict --checkpoint` takes, fast models included; every machine must find it there.
    model: in place of a checkpoint, a function that makes the model. precision: of the fast model to make, None for
    the plain one. device: None takes the GPU that Ray gave the worker, or the CPU. options: of the predictor
    (`flip=True`, `scales=(1.0, 1.25)`, `text=[...]`, `text_encoder=...`).

    Raises InputError, CheckpointError, MissingDependencyError when it is made.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        model: Any = None,
        task: str | None = None,
        precision: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if (checkpoint is None) == (model is None):
            raise InputError("Predictor needs either a checkpoint or a function that makes the model")
        self.model = _load(checkpoint, model, task, precision, device)
        self._predictor: Any = make_predictor(self.model, **options)
        self._field, self._dimensions, self._dtype = _FIELDS[self.model.config.task]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Take columns with "image" (arrays (H,W,3) uint8) or "path"; return them without "image", and the results:

        "labels" (H,W) int64, "masks" (sentences,H,W) bool or "depth" (H,W) float32 metres, by the model's task, and
        "error", "" where all went well. An image that fails has an empty array and does not end the job.
        """
        source = "image" if "image" in batch else "path"
        if source not in batch:
            raise InputError(f'a batch needs a column "image" or "path", got {", ".join(batch) or "none"}')
        column = np.empty(len(batch[source]), object)  # filled one by one: NumPy would try to stack arrays
        errors = np.full(len(column), "", object)

        def read(i: int) -> Any:
            value = batch[source][i]
            image = str(value) if isinstance(value, str | Path) else np.asarray(value)
            return read_prepared(self._predictor, image, str(batch["path"][i]) if "path" in batch else f"image {i}")

        try:
            for outcome in outcomes(range(len(column)), read, self._predictor, ahead=READERS, threads=READERS):
                column[outcome.item], errors[outcome.item] = self._cell(outcome.result)
        except Failure as failure:
            raise failure.cause from None
        kept = {name: values for name, values in batch.items() if name != "image"}
        return {**kept, self._field: column, "error": errors}

    def _cell(self, result: Any) -> tuple[np.ndarray, str]:
        """Return the values of an image's result and "", or an empty array and its error."""
        if isinstance(result, Exception):
            return np.empty((0,) * self._dimensions, self._dtype), " ".join(str(result).split())
        return np.ascontiguousarray(result.values, dtype=self._dtype), ""


def predict_dataset(
    images: Dataset | Iterable[str | Path],
    checkpoint: str | Path | None = None,
    *,
    workers: int | tuple[int, int] = 1,
    batch_size: int = 8,
    forward_batch: int | str | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **predictor: Any,
) -> Dataset:
    """Return a Ray dataset of results, computed when it is read: `.write_parquet(...)`, `.iter_rows()`.

    images: a dataset with a column "image" or "path" (`ray.data.read_images(folder, include_paths=True)`), or paths.
    workers: how many, or (least, most). batch_size: images a worker gets at a time; memory grows with it.
    forward_batch: how many windows or sentences of them share a forward, the predictor's `batch_size`.
    num_cpus, num_gpus: of a worker. predictor: arguments of `Predictor`.

    Raises MissingDependencyError without Ray.
    """
    data: Any = images
    if not hasattr(images, "map_batches"):
        data = _ray_data().from_items([{"path": str(path)} for path in cast("Iterable[str | Path]", images)])
    options = predictor if forward_batch is None else {**predictor, "batch_size": forward_batch}
    resources = {name: n for name, n in (("num_cpus", num_cpus), ("num_gpus", num_gpus)) if n is not None}
    return data.map_batches(
        Predictor, fn_constructor_kwargs={"checkpoint": checkpoint, **options}, batch_size=batch_size,
        concurrency=workers, **resources,
    )  # fmt: skip


def _ray_data() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(f'Ray Data is not available ({error}); pip install "vpd_fast[ray]"') from error
    return ray.data


def _load(checkpoint: Any, make: Any, task: str | None, precision: str | None, device: str | None) -> Perceiver:
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = None if make is not None else local_path(checkpoint)
    if make is not None:
        model = make().eval()
    elif (checkpoint / SETTINGS).exists():
        return load_engine(checkpoint, place)
    else:
        model = load_checkpoint(checkpoint, task=task, device="cpu" if precision else place, mmap=True)
    return optimize(model, precision, device=place) if precision else model.to(place)
