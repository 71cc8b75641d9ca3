"""Prediction on a cluster with Ray Data: one model per worker, images streamed through `map_batches`.

Needs `pip install "vpd_fast[ray]"` on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vpd_fast.errors import ImageError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from ray.data import Dataset

    from vpd_fast.inference.results import Result
    from vpd_fast.models.perceiver import Perceiver

_FIELDS = {"segmentation": ("labels", 2, np.int64), "referring": ("masks", 3, bool), "depth": ("depth", 2, np.float32)}


class Predictor:
    """What `map_batches` makes once per worker: it loads the model, then turns batches of images into results.

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
        from vpd_fast.inference.predict import make_predictor

        if (checkpoint is None) == (model is None):
            raise InputError("Predictor needs either a checkpoint or a function that makes the model")
        self.model = _load(checkpoint, model, task, precision, device)
        self._predict = make_predictor(self.model, **options)
        self._field, self._dimensions, self._dtype = _FIELDS[self.model.config.task]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Column "image" (arrays (H,W,3) uint8) or "path" -> the same columns without "image", and the results.

        "labels" (H,W) int64, "masks" (sentences,H,W) bool or "depth" (H,W) float32 metres, by the model's task, and
        "error", "" where all went well. An image that fails has an empty array and does not end the job.
        """
        source = "image" if "image" in batch else "path"
        if source not in batch:
            raise InputError(f'a batch needs a column "image" or "path", got {", ".join(batch) or "none"}')
        found, errors = [], []
        for value in batch[source]:
            try:
                found.append(self._array(self._one(value)))
                errors.append("")
            except (ImageError, InputError, MemoryError) as error:
                found.append(np.empty((0,) * self._dimensions, self._dtype))
                errors.append(" ".join(str(error).split()) or "not enough memory for an image of this size")
        column = np.empty(len(found), object)
        for i, array in enumerate(found):  # at once, NumPy would try to stack them
            column[i] = array
        kept = {name: values for name, values in batch.items() if name != "image"}
        return {**kept, self._field: column, "error": np.array(errors, dtype=object)}

    def _one(self, value: Any) -> Result:
        import torch

        from vpd_fast.pictures.reading import read_image

        try:
            return self._predict(read_image(str(value) if isinstance(value, str | Path) else np.asarray(value)))
        except torch.OutOfMemoryError as error:
            raise ImageError("not enough memory for an image of this size") from error

    def _array(self, result: Result) -> np.ndarray:
        value = getattr(result, self._field)
        return np.ascontiguousarray(np.stack(value) if isinstance(value, list | tuple) else value, dtype=self._dtype)


def predict_dataset(
    images: Dataset | Iterable[str | Path],
    checkpoint: str | Path | None = None,
    *,
    workers: int | tuple[int, int] = 1,
    batch_size: int = 8,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **predictor: Any,
) -> Dataset:
    """A Ray dataset of results, computed when it is read: `.write_parquet(...)`, `.iter_rows()`.

    images: a dataset with a column "image" or "path" (`ray.data.read_images(folder, include_paths=True)`), or paths.
    workers: how many, or (least, most). batch_size: images a worker gets at a time; memory grows with it.
    num_cpus, num_gpus: of a worker. predictor: arguments of `Predictor`.

    Raises MissingDependencyError without Ray.
    """
    data = images if hasattr(images, "map_batches") else _ray_data().from_items([{"path": str(p)} for p in images])
    resources = {name: n for name, n in (("num_cpus", num_cpus), ("num_gpus", num_gpus)) if n is not None}
    return data.map_batches(
        Predictor, fn_constructor_kwargs={"checkpoint": checkpoint, **predictor}, batch_size=batch_size,
        concurrency=workers, **resources,
    )  # fmt: skip


def _ray_data() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(f'Ray Data is not available ({error}); pip install "vpd_fast[ray]"') from error
    return ray.data


def _load(checkpoint: Any, make: Any, task: str | None, precision: str | None, device: str | None) -> Perceiver:
    import torch

    from vpd_fast.checkpoints import load_checkpoint
    from vpd_fast.engine import load_engine, optimize
    from vpd_fast.engine.storage import SETTINGS

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if checkpoint is not None and (Path(checkpoint) / SETTINGS).exists():
        return load_engine(checkpoint, place)
    if make is not None:
        model = make().eval()
    else:
        model = load_checkpoint(checkpoint, task=task, device="cpu" if precision else place)
    return optimize(model, precision, device=place) if precision else model.to(place)
