"""Batches for training: the same ones whatever the number of workers, and from any point on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from vpd_fast.data.sample import Dataset, Example, Transform, failure, load_sample
from vpd_fast.errors import DatasetError, InputError, VPDFastError

TRIES = 10  # samples in a row that may be unreadable


class TrainLoader:
    """Makes batches of an endless sequence of epochs.

    The order of epoch e is a permutation drawn from (seed, e), of which rank r takes the positions r, r + world_size,
    ...; what does not fill a batch on every rank is left out, as the original does (drop_last). The random numbers of a
    sample are drawn from (seed, epoch, position): neither the number of workers nor a restart changes a batch.

    transform: (sample, generator, position in the epoch) -> tensors and values, see `make_transform`.
    on_error: "skip" puts another sample in the place of one that cannot be read, and tells in the batch's "skipped";
        "raise" raises the error.
    max_failures: samples that may be skipped in all before DatasetError is raised.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        *,
        batch_size: int,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        on_error: str = "skip",
        max_failures: int = 100,
    ) -> None:
        if on_error not in ("skip", "raise"):
            raise InputError(f'on_error must be "skip" or "raise", got {on_error!r}')
        if batch_size < 1 or workers < 0 or not 0 <= rank < world_size:
            raise InputError(
                "a loader needs batch_size >= 1, workers >= 0 and 0 <= rank < world_size, "
                f"got {batch_size}, {workers}, {rank}, {world_size}"
            )
        self.epoch_length = len(dataset) // (batch_size * world_size)
        if not self.epoch_length:
            raise InputError(
                f"{len(dataset)} samples do not fill a batch of {batch_size} on each of {world_size} processes"
            )
        self.batch_size, self.workers, self.seed, self.rank, self.world_size = (
            batch_size, workers, seed, rank, world_size
        )  # fmt: skip
        self.max_failures = max_failures
        self.skipped: list[str] = []
        self._examples = _Examples(dataset, transform, seed, on_error == "skip")
        self._length = len(dataset)

    def batches(self, start: int = 0) -> Iterator[Example]:
        """Yield batches number start, start + 1, ... without end: exactly those that an unbroken run would have there.

        Tensors and numbers are stacked; text becomes lists. Raises ImageError, DatasetError.
        """
        loader = DataLoader(
            self._examples,
            batch_sampler=_Batches(self, start),
            num_workers=min(self.workers, os.cpu_count() or 1),  # more would fight for the cores
            collate_fn=_collate,
            worker_init_fn=_one_thread,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if self.workers else None,
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            self.skipped += batch["skipped"]
            if len(self.skipped) > self.max_failures:
                raise DatasetError(
                    f"more than {self.max_failures} samples could not be read; the last: {self.skipped[-1]}"
                )
            yield batch

    def positions(self, number: int) -> list[tuple[int, int, int]]:
        """Return (epoch, position in the epoch, index) of the samples of batch `number` on this rank."""
        epoch, batch = divmod(number, self.epoch_length)
        order = np.random.default_rng((self.seed, epoch)).permutation(self._length)
        first = batch * self.batch_size
        places = [(first + i) * self.world_size + self.rank for i in range(self.batch_size)]
        return [(epoch, place, int(order[place])) for place in places]


class _Batches:
    """Samples the keys of batch after batch."""

    def __init__(self, loader: TrainLoader, start: int) -> None:
        self.loader, self.start = loader, start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        number = self.start
        while True:
            yield self.loader.positions(number)
            number += 1


class _Examples(torch.utils.data.Dataset):
    """Transformed samples by (epoch, position, index)."""

    def __init__(self, dataset: Dataset, transform: Transform, seed: int, skip: bool) -> None:
        self.dataset, self.transform, self.seed, self.skip = dataset, transform, seed, skip

    def __getitem__(self, key: tuple[int, int, int]) -> Example | Exception:
        """Return the example, or the error, as workers that raise it would put their stack into its message."""
        epoch, position, index = key
        messages: list[str] = []
        while True:
            sample = load_sample(self.dataset, index)
            if isinstance(sample, VPDFastError):
                if not self.skip:
                    return sample
                name, text = failure(self.dataset, index, sample)
                messages.append(f"{name}: {text}")
                if len(messages) == TRIES:
                    raise DatasetError(
                        f"{TRIES} samples in a row could not be read; the last: {messages[-1]}"
                    ) from sample
                # Any other: drawn from the sample's own seed, so that restarts draw the same.
                index = int(
                    np.random.default_rng((self.seed, epoch, position, len(messages))).integers(len(self.dataset))
                )
                continue
            break
        example = self.transform(sample, np.random.default_rng((self.seed, epoch, position)), position)
        return {**example, "name": sample.name, "index": index, "skipped": messages}


def _collate(examples: Sequence[Example | Exception]) -> Example | Exception:
    good: list[Example] = []
    for example in examples:
        if isinstance(example, Exception):
            return example
        good.append(example)
    batch: Example = {}
    for key in good[0]:
        values = [example[key] for example in good]
        if key == "skipped":
            batch[key] = [message for messages in values for message in messages]
        elif isinstance(values[0], np.ndarray):
            batch[key] = torch.from_numpy(np.stack(values))
        elif isinstance(values[0], torch.Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], (int, np.integer)):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch


def _one_thread(_: int) -> None:
    """Workers share the cores: OpenCV's own threads would only fight for them."""
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
